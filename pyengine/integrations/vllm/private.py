"""What vLLM has beside its public interface, all of it in this module, and looked for when it is imported.

A model's output head (`LogitsProcessor`, which vLLM lets others replace) shows what it reads to the logits processor
of its engine; the front end asks us about each request; a worker can be asked how many rows it tilted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import vllm
from torch import Tensor

SUPPORTED = "0.32.0"

try:
    from vllm import SamplingParams
    from vllm.config import get_current_vllm_config
    from vllm.exceptions import VLLMValidationError
    from vllm.model_executor.custom_op import op_registry_oot
    from vllm.model_executor.layers.logits_processor import LogitsProcessor as OutputHead
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.sample.logits_processor import LogitsProcessor as ProcessorV1
    from vllm.v1.sample.logits_processor import process_dict_updates
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as ProcessorV2
    from vllm.v1.worker.worker_base import WorkerBase

    if not hasattr(OutputHead, "register_oot"):
        raise ImportError("its output head cannot be replaced")
except ImportError as error:
    raise ImportError(
        f"pyengine.integrations.vllm works with vLLM {SUPPORTED}; this is {vllm.__version__}, where {error}: "
        f"pip install vllm=={SUPPORTED}, or uninstall tilt-engine"
    ) from error

__all__ = ["OutputHead", "ProcessorV1", "ProcessorV2", "VLLMValidationError", "hook", "hooked", "process_dict_updates"]

KEY = "_pyengine_tap"


class Tap:
    """What an engine's output head and its logits processor know of each other.

    heads: output heads that show what they read. wanted: whether anybody looks. hidden: [N, D], what the head read
    last, for the N rows that it made. rows: how many rows were tilted so far.
    """

    def __init__(self) -> None:
        self.heads, self.wanted, self.rows = 0, False, 0
        self.hidden: Tensor | None = None


def tap_of(config: Any) -> Tap:
    """The one of an engine's configuration. Its part for compilation is the one object that the configurations made
    for parts of a model share; vLLM keeps what layers and runner share there, too."""
    tap: Tap = vars(config.compilation_config).setdefault(KEY, Tap())
    return tap


class ShowingHead(OutputHead):
    """vLLM's output head, which also shows what it reads. It runs outside compiled and captured code."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tap = tap_of(get_current_vllm_config())
        self.tap.heads += 1

    def forward(self, lm_head: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        # Under LoRA `self` is a wrapper of another class, with this layer inside.
        logits = OutputHead.forward(self, lm_head, hidden_states, *args, **kwargs)
        layer: Any = getattr(self, "base_layer", self)
        tap = layer.tap
        if tap.wanted:
            tap.hidden = hidden_states
        return logits


def _take_fields() -> None:
    """The OpenAI-compatible server takes `tilt_*` beside a request's own fields, too, as pyengine's does. vLLM keeps
    fields that it does not know, and looks at none of them; a search by beams drops those in `vllm_xargs`, too."""
    protocol = sys.modules.get("vllm.entrypoints.serve.engine.protocol")
    requests = [] if protocol is None else protocol.OpenAIBaseModel.__subclasses__()
    for request in requests:
        requests += request.__subclasses__()
        for name in {"to_sampling_params", "to_beam_search_params"} & vars(request).keys():
            theirs = getattr(request, name)
            if not hasattr(theirs, "__wrapped__"):
                setattr(request, name, _with_fields(theirs))


def _with_fields(theirs: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(theirs)
    def ours(self: Any, *args: Any, **kwargs: Any) -> Any:
        beside = {name: value for name, value in (self.model_extra or {}).items() if name.startswith("tilt_")}
        if beside:
            self.vllm_xargs = {**beside, **(self.vllm_xargs or {})}
        params = theirs(self, *args, **kwargs)
        asked = [name for name in getattr(self, "vllm_xargs", None) or {} if name.startswith("tilt_")]
        if asked and not isinstance(params, SamplingParams):
            raise VLLMValidationError(f"{asked[0]} does not go with beam search", parameter=asked[0])
        return params

    return ours


def hooked() -> bool:
    """Whether `hook` has run in this process."""
    return op_registry_oot.get(OutputHead.__name__) is ShowingHead


def hook(admission: Callable[[Any], Callable[[Any], None]]) -> None:
    """Put all of this in place, once in a process. admission: of an engine's configuration, what to ask about the
    sampling parameters of each request."""
    if hooked():
        return
    if OutputHead.__name__ in op_registry_oot:
        raise RuntimeError(
            f"another plug-in has replaced vLLM's output head by {op_registry_oot[OutputHead.__name__]!r}: "
            "set VLLM_PLUGINS so that one of them is loaded"
        )
    OutputHead.register_oot(ShowingHead, name=OutputHead.__name__)
    theirs = InputProcessor.__init__

    def init(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        admit = admission(vllm_config)
        theirs(self, vllm_config, *args, **kwargs)
        _take_fields()
        before = self.validate_logits_processors_params

        def validate(params: Any) -> None:
            before(params)
            admit(params)

        self.validate_logits_processors_params = validate

    InputProcessor.__init__ = init
    WorkerBase.tilted_rows = lambda self: tap_of(self.vllm_config).rows
