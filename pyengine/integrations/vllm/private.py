"""What vLLM has beside its public interface, all of it in this module, and looked for when it is imported.

A model's output head (`LogitsProcessor`, which vLLM lets others replace) shows what it reads to the logits processor
of its engine; the front end asks us about each request; a worker can be asked how many rows it tilted; the scheduler
ends requests whose rows are not finite.
"""

from __future__ import annotations

import logging
import sys
from collections import deque
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import vllm
from torch import Tensor

from pyengine.integrations.vllm.server import Front

SUPPORTED = "0.32.0"

try:
    from vllm import SamplingParams
    from vllm.config import get_current_vllm_config
    from vllm.exceptions import VLLMValidationError
    from vllm.model_executor.custom_op import op_registry_oot
    from vllm.model_executor.layers.logits_processor import LogitsProcessor as OutputHead
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.request import RequestStatus
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

__all__ = [
    "OutputHead",
    "ProcessorV1",
    "ProcessorV2",
    "Tap",
    "VLLMValidationError",
    "hook",
    "hooked",
    "process_dict_updates",
    "tap_of",
]

log = logging.getLogger("vllm.pyengine")  # below vLLM's logger, whose handler prints it

KEY = "_pyengine_tap"
STEPS = 4  # whose flags are kept: more than are under way at a time


class Tap:
    """What an engine's output head, its logits processor and its scheduler know of each other.

    heads: output heads that show what they read. wanted: whether anybody looks. hidden: [N, D], what the head read
    last, for the N rows that it made. rows: how many rows were tilted so far. drawn: of the last steps ([N] of bool on
    the CPU: which rows are finite, the sampling parameters of each). faulty: parameters by id, of rows that are not.
    """

    def __init__(self) -> None:
        self.heads, self.wanted, self.rows = 0, False, 0
        self.hidden: Tensor | None = None
        self.drawn: deque[tuple[Tensor, Sequence[Any]]] = deque(maxlen=STEPS)
        self.faulty: dict[int, Any] = {}

    def look(self) -> None:
        """Take up what the last steps have said. A device writes its flags later, by the time of the step's tokens."""
        for finite, params in self.drawn:
            for i in (~finite).nonzero().flatten().tolist():
                finite[i] = True
                self.faulty[id(params[i])] = params[i]
                log.error("pyengine: tilted logits are not finite; the parameters of its request: %.400r", params[i])

    def check_heads(self) -> None:
        """RuntimeError where nobody sees the hidden states."""
        if not self.heads:
            raise RuntimeError(
                "this model computes its logits without vLLM's LogitsProcessor layer: nobody sees its hidden states, "
                "and no request can be tilted"
            )


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
        given = getattr(self, "vllm_xargs", None) or {}
        if twice := beside.keys() & given.keys():
            name = min(twice)
            raise VLLMValidationError(f"{name} is given twice, also in vllm_xargs", parameter=name)
        asked = [name for name in {**beside, **given} if name.startswith("tilt_")]
        if asked and "vllm_xargs" in type(self).model_fields:
            self.vllm_xargs = {**beside, **given}
        params = theirs(self, *args, **kwargs)
        if asked and not isinstance(params, SamplingParams):
            raise VLLMValidationError(f"{asked[0]} does not go with beam search", parameter=asked[0])
        if asked and asked[0] not in (params.extra_args or {}):
            raise VLLMValidationError(f"{asked[0]} does not go with {type(self).__name__}", parameter=asked[0])
        if beside:
            self.vllm_xargs = given or None  # the request may be asked again
        return params

    return ours


def _stand_in_front(wanted: bool) -> None:
    """The server gets a middleware of ours, inside those that it has, as it asks who may ask. wanted: count rows."""
    app: Any = sys.modules.get("vllm.entrypoints.launchers.app")
    if app is None or hasattr(app.init_entrypoints_middleware, "__wrapped__"):
        return
    theirs = app.init_entrypoints_middleware

    @wraps(theirs)
    def ours(args: Any, app: Any, *more: Any) -> None:
        app.add_middleware(Front, rows=_rows if wanted else None)
        theirs(args, app, *more)

    app.init_entrypoints_middleware = ours


async def _rows(engine: Any) -> int:
    """Of all workers of all engines behind a server's client."""
    found = await engine.engine_core.call_utility_all_async("collective_rpc", "tilted_rows", None, (), None)
    return sum(rows for workers in found for rows in workers)


def _end_faulty() -> None:
    """A request whose row was not finite ends with an error, without the token that was drawn of it."""
    theirs, update = Scheduler._update_request_with_output, Scheduler.update_from_output

    def update_from_output(self: Any, *args: Any, **kwargs: Any) -> Any:
        tap_of(self.vllm_config).look()
        return update(self, *args, **kwargs)

    def update_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> tuple[list[int], bool]:
        if id(request.sampling_params) not in tap_of(self.vllm_config).faulty:
            found: tuple[list[int], bool] = theirs(self, request, *args, **kwargs)
            return found
        request.status, request.resumable = RequestStatus.FINISHED_ERROR, False
        return [], True

    Scheduler.update_from_output, Scheduler._update_request_with_output = update_from_output, update_request


def _check_loaded() -> None:
    """A model that shows nothing is an error when it is loaded, where its engine has scorers."""
    theirs = BaseModelLoader.load_model

    @wraps(theirs)
    def load_model(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        model = theirs(self, vllm_config, *args, **kwargs)
        if tap_of(vllm_config).wanted:
            tap_of(vllm_config).check_heads()
        return model

    BaseModelLoader.load_model = load_model


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
        _stand_in_front(tap_of(vllm_config).wanted)
        before = self.validate_logits_processors_params

        def validate(params: Any) -> None:
            before(params)
            admit(params)

        self.validate_logits_processors_params = validate

    InputProcessor.__init__ = init
    _end_faulty()
    _check_loaded()
    WorkerBase.tilted_rows = lambda self: tap_of(self.vllm_config).rows
