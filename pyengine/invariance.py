"""Whether no bit of a row depends on the other rows of its batch: a model's operators one by one, and a trial."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyengine.cache import PAGE
from pyengine.decoder import BranchingDecoder
from pyengine.group import Group
from pyengine.ops.linear import VECTORS


def _names(words: str) -> frozenset[str]:
    return frozenset(words.split())


# Operators that move numbers, or round each one as IEEE 754 says, whatever loop they run in.
EXACT = _names(
    "abs add arange cat clamp clamp_max clamp_min clone constant_pad_nd copy div embedding empty empty_like fill full "
    "full_like gather index index_select masked_fill maximum minimum mul neg new_empty new_empty_strided new_full "
    "new_ones new_zeros ones ones_like relu repeat rsub scalar_tensor split_with_sizes_copy sqrt square stack sub "
    "_to_copy tril triu where zero zeros zeros_like"
)
# Whose loops end in the same vectors as they begin (torch's vml.h), measured on every width from 1 to 200.
MAPPED = _names("cos exp log sin tanh")
# Whose loops end in another formula, which only rows of whole vectors never reach.
BY_VECTORS = _names("elu gelu hardswish log_sigmoid_forward mish pow sigmoid silu softplus")
# Over the last dimension alone, each row in the same order.
BY_ROW = _names("amax amin _fused_rms_norm linalg_vector_norm _log_softmax mean native_layer_norm _softmax sum var")
PRODUCTS = _names("addmm addmv baddbmm bmm linear matmul mm mv")


class Watch(TorchDispatchMode):
    """Notes the first operator that may let a row's bits depend on the other rows."""

    reason: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (
            func.namespace == "aten"
            and not func.is_view
            and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
        ):
            with self:
                found = func.decompose(*args, **kwargs)
            if found is not NotImplemented:
                return found
        found = func(*args, **kwargs)
        if self.reason is None:
            self.reason = _doubt(func, args, kwargs, found)
        return found


def _doubt(func: Any, args: Any, kwargs: Any, found: Any) -> str | None:
    """Why this call may let a row's bits depend on the other rows; None where it cannot."""
    results = [x for x in (found if isinstance(found, (tuple, list)) else (found,)) if isinstance(x, Tensor)]
    if func.is_view or func.namespace == "pyengine" or not any(x.is_floating_point() for x in results):
        return None
    name = func._schema.name.removeprefix("aten::").rstrip("_")
    x = next((x for x in args if isinstance(x, Tensor)), None)
    if name in EXACT or name in MAPPED or x is None or not x.is_floating_point():
        return None
    if name == "rsqrt" and x.dtype == torch.float32:  # in bf16 the end of its loop rounds otherwise
        return None
    if name == "index_put" and not any(args[3:4]):  # it sums nothing up
        return None
    if name == "pow" and args[1] == 2:
        return None
    if name in BY_VECTORS and x.shape[-1] % VECTORS == 0:
        return None
    if name in BY_ROW and _over_last(name, x, args):
        return None
    if name == "bmm" and x.shape[-1] == 1:  # rotary angles: nothing is summed
        return None
    if name in PRODUCTS:
        return f"it multiplies matrices by aten::{name}, outside of linear layers, in an order that its rows decide"
    return f"it calls aten::{name} on {x.dtype} {list(x.shape)}, whose rows nobody has shown to be independent"


def _over_last(name: str, x: Tensor, args: Any) -> bool:
    if name in ("native_layer_norm", "_fused_rms_norm"):
        return len(args[1]) == 1
    if name in ("_softmax", "_log_softmax"):
        return args[1] in (-1, x.dim() - 1)
    at = 2 if name == "linalg_vector_norm" else 1
    dims = args[at] if len(args) > at and isinstance(args[at], (list, tuple)) else []
    return [d % x.dim() for d in dims] == [x.dim() - 1] and x.stride(-1) == 1


@torch.inference_mode()
def why_not(decoder: BranchingDecoder) -> str | None:
    """Why a steady decoder's rows may depend on their neighbours, or None.

    Its pass is watched operator by operator, then decodes prompts alone and among others, in other places and
    numbers, one of them with a page that another has read.
    """
    vocab = decoder.model.get_input_embeddings().weight.shape[0]
    longest = min(PAGE + 6, decoder.context - 3)
    ids = [(7 * i + 3) % vocab for i in range(longest)]
    prompts = [ids[:3], ids, [*ids[:-5], *ids[:4]], ids[5:40]]
    most = 22
    with decoder.on_trial(longest + 2, len(prompts), most * len(prompts)):
        with Watch() as watch:
            _walk(decoder, prompts[:2], 1)
        if watch.reason:
            return watch.reason
        alone = [_walk(decoder, [prompt], 1) for prompt in prompts]
        for k in (1, 11, most):
            for order in (list(range(len(prompts))), [3, 1, 0, 2]):
                among = _walk(decoder, [prompts[i] for i in order], k)
                for place, i in enumerate(order):
                    if not all(torch.equal(a[0], b[place * k]) for a, b in zip(alone[i], among, strict=True)):
                        return f"a row changes among {k * len(prompts)} others"
    return None


def _walk(decoder: BranchingDecoder, prompts: list[list[int]], k: int) -> list[Tensor]:
    """Logits and hidden states over two tokens of k branches, of which the first is the same for each k."""
    vocab = decoder.model.get_input_embeddings().weight.shape[0]
    group = Group(decoder, k, 2)
    try:
        group.join(prompts)
        frontiers = [group.fork()]
        for step in range(2):
            drawn = [(prompt[-1] + 11 * branch + step + 1) % vocab for prompt in prompts for branch in range(k)]
            frontiers.append(group.append(torch.tensor(drawn)))
    finally:
        group.close(whole=False)
    return [x for frontier in frontiers for x in (frontier.logits, *frontier.hidden.values())]
