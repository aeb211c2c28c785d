"""Blockwise and best-of-K as `generate(custom_generate=…)`: the engine decodes, in the place of transformers' loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.utils import ModelOutput

from pyengine.checkpoint import PROCESSORS
from pyengine.engine import Engine
from pyengine.errors import InputError
from pyengine.results import Result, SamplingParams
from pyengine.scorers import ScorerLike
from pyengine.strategies import BestOfK, Blockwise, Selection, Strategy

# What else `generate` takes and a block cannot follow, with what is neutral.
REFUSED: dict[str, Any] = PROCESSORS | {
    "num_beams": 1,
    "top_h": None,
    "max_time": None,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
    "watermarking_config": None,
    "token_healing": False,
    "output_scores": False,
    "output_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "penalty_alpha": None,
    "dola_layers": None,
    "low_memory": None,
}
# Of these, what a block does follow.
APPLIED = ("repetition_penalty", "min_new_tokens", "min_length")
# What `generate` makes of fields that are applied.
MADE = (
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "MinPLogitsWarper",
    "RepetitionPenaltyLogitsProcessor",
    "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor",
    "MaxLengthCriteria",
    "EosTokenCriteria",
)
# What `generate` prepares for its own passes.
UNUSED = ("attention_mask", "position_ids", "past_key_values", "cache", "use_cache", "logits_to_keep", "cache_position")


@dataclass
class TiltedOutput(ModelOutput):
    """sequences: [N, T] as `generate` returns them. results: the engine's `Result` of each row, ledger included."""

    sequences: Tensor | None = None
    results: list[Result] | None = None


Custom = Callable[..., Tensor | TiltedOutput]


def blockwise(
    scorer: ScorerLike,
    tokenizer: Any,
    k: int = 8,
    block_tokens: int = 16,
    selection: Selection = "argmax",
    beta: float | None = None,
) -> Custom:
    """Blockwise best-of-K (Controlled Decoding, Eq. 7) for `generate`:

        model.generate(**inputs, do_sample=True, custom_generate=blockwise(scorer, tokenizer, k=8, block_tokens=16))

    scorer: whatever `pyengine.Engine` takes; tokenizer: the model's. Arguments as for `pyengine.Blockwise`. `generate`
    takes `seed=` besides (without one it comes from torch's generator) and, in the place of stop_strings, which needs
    a tokenizer that it does not pass on, `stop=`. With return_dict_in_generate the output is a TiltedOutput. Keep the
    function: it keeps the engine of the model that it was last called with.

    Raises InputError for an argument of `generate` that a block cannot follow. A streamer cannot be served, as
    `generate` does not pass it on.
    """
    return _custom(scorer, tokenizer, Blockwise(k, block_tokens, selection, beta))


def best_of_k(
    scorer: ScorerLike, tokenizer: Any, k: int = 8, selection: Selection = "argmax", beta: float | None = None
) -> Custom:
    """Best-of-K for `generate`; otherwise as `blockwise`."""
    return _custom(scorer, tokenizer, BestOfK(k, selection, beta))


def _custom(scorer: ScorerLike, tokenizer: Any, strategy: Strategy) -> Custom:
    engines: list[Engine] = []  # the last one

    def custom_generate(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        seed: int | None = None,
        stop: str | list[str] | None = None,
        **model_kwargs: Any,
    ) -> Tensor | TiltedOutput:
        _refuse(generation_config, [*(logits_processor or []), *(stopping_criteria or [])], model_kwargs)
        prompts = _prompts(input_ids, model_kwargs.get("attention_mask"))
        sampling = _sampling(input_ids, generation_config, seed, stop)
        if not engines or engines[0].model is not model:
            engines[:] = [Engine(model, tokenizer, scorer)]
        results = engines[0].generate(prompts, strategy, sampling)
        pad = generation_config.pad_token_id
        sequences = _sequences(input_ids, results, next(iter(_ends(generation_config)), 0) if pad is None else pad)
        return TiltedOutput(sequences, results) if generation_config.return_dict_in_generate else sequences

    return custom_generate


def _refuse(config: GenerationConfig, given: list[Any], model_kwargs: dict[str, Any]) -> None:
    for field, neutral in REFUSED.items():
        value = getattr(config, field, None)
        if field not in APPLIED and value not in (None, neutral, []):
            raise InputError(f"{field}={value!r:.40} is an argument of generate that custom_generate does not follow")
    for one in given:
        if type(one).__name__ not in MADE:
            raise InputError(
                f"custom_generate does not follow a {type(one).__name__}: leave it out, or take TiltLogitsProcessor "
                "with transformers' own loop"
            )
    for name, value in model_kwargs.items():
        if name not in UNUSED and value is not None:
            raise InputError(f"custom_generate takes input_ids and attention_mask, not {name}")
    for name in ("past_key_values", "cache"):
        cache = model_kwargs.get(name)
        if cache is not None and cache.get_seq_length():
            raise InputError(f"custom_generate reads prompts itself: leave out {name}")


def _prompts(input_ids: Tensor, mask: Tensor | None) -> list[list[int]]:
    """Each row without its padding, which is on the left."""
    if mask is None:
        return list(input_ids.tolist())
    if bool((mask[:, 1:] < mask[:, :-1]).any()):
        raise InputError("attention_mask: a prompt is padded on the left; set the tokenizer's padding_side='left'")
    return [row[start:] for row, start in zip(input_ids.tolist(), (mask == 0).sum(1).tolist(), strict=True)]


def _ends(config: GenerationConfig) -> list[int]:
    ends = config.eos_token_id
    return [] if ends is None else [int(end) for end in (ends if isinstance(ends, (list, tuple)) else [ends])]


def _sampling(
    input_ids: Tensor, config: GenerationConfig, seed: int | None, stop: str | list[str] | None
) -> list[SamplingParams]:
    """Of each row, with a seed of its own."""
    if not config.do_sample:
        raise InputError("custom_generate draws branches, which are all alike without do_sample=True")
    most = config.max_length - input_ids.shape[1]
    if seed is None:
        seed = int(torch.randint(2**62, ()).item())
    shared: dict[str, Any] = {
        "max_tokens": most,
        "temperature": 1.0 if config.temperature is None else config.temperature,
        "top_k": config.top_k or 0,
        "top_p": 1.0 if config.top_p is None else config.top_p,
        "min_p": config.min_p or 0.0,
        "repetition_penalty": 1.0 if config.repetition_penalty is None else config.repetition_penalty,
        "stop": stop,
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "stop_token_ids": _ends(config) or None,
        "ignore_eos": True,
    }
    least = max(0, config.min_new_tokens or 0, (config.min_length or 0) - input_ids.shape[1])
    if least and stop:
        raise InputError("custom_generate: stop may end a response of any length; leave out the least length")
    return [
        SamplingParams(**shared, min_tokens=min(least, most), seed=(seed + i) % 2**63) for i in range(len(input_ids))
    ]


def _sequences(input_ids: Tensor, results: list[Result], pad: int) -> Tensor:
    longest = max(len(result.tokens) for result in results)
    tails = [result.tokens + [pad] * (longest - len(result.tokens)) for result in results]
    return torch.cat([input_ids, torch.tensor(tails, dtype=input_ids.dtype, device=input_ids.device)], 1)
