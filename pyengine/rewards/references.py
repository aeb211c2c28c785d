"""Reference values r_ref(x) of rewards: from samples of the base policy, from canned responses, or learned.

Also the frozen statistics of a reward. Values are in the reward's own unit and fp64.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any, Protocol, Self, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pyengine.errors import InputError, first_line, real, whole
from pyengine.scorers import Candidates, ScorerLike, parts_of, score_texts
from pyengine.scorers.base import as_given
from pyengine.scorers.embedding_probe import last_states

Rewards = Mapping[str, Sequence[float]]  # of samples of the base policy, for each prompt
Embed = Callable[[Sequence[str]], Tensor]  # N prompts -> [N, D]


@runtime_checkable
class Reference(Protocol):
    """What gives r_ref(x)."""

    @property
    def scorer(self) -> str:
        """Name of the scorer whose unit it is in; "" fits any."""

    def lookup(self, prompts: Sequence[str]) -> list[float]:
        """One value for each prompt; InputError names a prompt that has none."""


@dataclass(frozen=True)
class References:
    """One reference value for each known prompt, and how they were made.

    scorer: name of the scorer that they belong to; "" fits any. method: "empirical", "gaussian", "canned" or "given".
    samples: fewest rewards that any of the values comes from. Raises InputError for a value that is not finite.
    """

    values: dict[str, float]
    scorer: str = ""
    method: str = "given"
    quantile: float | None = None
    ddof: int | None = None
    samples: int | None = None

    def __post_init__(self) -> None:
        checked = {prompt: real(value, f"the reference of {_short(prompt)}") for prompt, value in self.values.items()}
        object.__setattr__(self, "values", checked)

    @classmethod
    def empirical(cls, rewards: Rewards, quantile: float = 0.85, scorer: str = "") -> Self:
        """The quantile of each prompt's rewards, interpolated linearly as numpy.quantile does by default."""
        level = real(quantile, "References: quantile", 0, 1)
        samples = _samples(rewards)
        values = {prompt: found.quantile(level).item() for prompt, found in samples.items()}
        return cls(values, scorer, "empirical", level, samples=min(map(len, samples.values())))

    @classmethod
    def gaussian(cls, rewards: Rewards, quantile: float = 0.85, ddof: int = 0, scorer: str = "") -> Self:
        """mean + Phi^-1(quantile) * std of each prompt's rewards (LSC, appendix A.1); a std of 0 gives the mean.

        ddof: the std divides by n - ddof; with no more samples than that it is 0.
        """
        score, samples = _normal_score(quantile), _samples(rewards)
        values = {}
        for prompt, found in samples.items():
            mean, std = _moments(found, ddof)
            values[prompt] = mean + score * std
        return cls(values, scorer, "gaussian", float(quantile), ddof, min(map(len, samples.values())))

    @classmethod
    def canned(cls, scorer: ScorerLike, prompts: Sequence[str], responses: Sequence[str], seed: int = 0) -> Self:
        """The score of one of the canned responses (refusals, for harmlessness in LSC) to each prompt.

        A hash of (seed, prompt) draws which, so it depends on nothing else. A response is text that follows the
        prompt as it stands. The scorer reads text: InputError for one that reads hidden states or counts tokens.
        """
        parts, prompts, responses = parts_of(scorer), list(prompts), list(responses)
        for prompt in prompts:
            if type(prompt) is not str:
                raise InputError(f"References.canned takes prompts as text (Result.prompt), got {prompt!r:.40}")
        prompts = list(dict.fromkeys(prompts))
        if not prompts or not responses or not parts:
            raise InputError("References.canned needs a scorer and at least one prompt and one response")
        chosen = [responses[_hash(seed, prompt) % len(responses)] for prompt in prompts]
        # Their tokens are not known: `length` refuses a response of none.
        candidates = Candidates(prompts, [[]] * len(prompts), {}, {}, as_given(chosen))
        total = score_texts(parts, candidates)
        name = parts[0].name if len(parts) == 1 and parts[0].weight == 1 else ""
        return cls(dict(zip(prompts, total.tolist(), strict=True)), name, "canned", samples=1)

    def lookup(self, prompts: Sequence[str]) -> list[float]:
        for prompt in prompts:
            if prompt not in self.values:
                raise InputError(
                    f"no reference for the prompt {_short(prompt)}: add it from samples of the base policy "
                    "(sample_rewards), or use a LearnedReference"
                )
        return [self.values[prompt] for prompt in prompts]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one JSON file."""
        _write(path, asdict(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """What `save` wrote; InputError, naming the file, for anything else."""
        return _read(cls, path, "references")


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of `count` rewards, frozen: what a z-score is made with."""

    mean: float
    std: float
    ddof: int = 0
    count: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", real(self.mean, "Statistics: mean"))
        object.__setattr__(self, "std", real(self.std, "Statistics: std", 0))

    @classmethod
    def of(cls, rewards: Sequence[float], ddof: int = 0) -> Self:
        """Of all rewards together. ddof: the std divides by n - ddof; with no more rewards than that it is 0."""
        found = _tensor(rewards, "Statistics: reward")
        if not len(found):
            raise InputError("Statistics.of needs at least one reward")
        return cls(*_moments(found, ddof), ddof, len(found))

    def z(self, rewards: Sequence[float]) -> list[float]:
        """(r - mean) / std of each reward, 0 where std is 0; InputError names a reward that is not finite."""
        found = _tensor(rewards, "Statistics: reward")
        return [0.0] * len(found) if self.std == 0 else ((found - self.mean) / self.std).tolist()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one JSON file."""
        _write(path, asdict(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """What `save` wrote; InputError, naming the file, for anything else."""
        return _read(cls, path, "statistics")


@dataclass
class LearnedReference:
    """r_ref(x) = mean(x) + Phi^-1(quantile) * std(x), both read from an embedding of the prompt (LSC, appendix A.1).

    Two linear regressors, of the mean and of log std of the base policy's rewards. embed gives [N, D] for N prompts; a
    prompt is embedded once. weight: fp64 [2, D]; bias: fp64 [2]; bounds: fp64 [2], the least and greatest log std that
    was seen, which predictions stay within, as an extrapolated exponential has no bound. Make it with `fit` or `load`.
    """

    weight: Tensor
    bias: Tensor
    bounds: Tensor
    embed: Embed = field(repr=False)
    quantile: float = 0.85
    scorer: str = ""
    _known: dict[str, float] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        shapes = [list(x.shape) for x in (self.weight, self.bias, self.bounds)]
        if len(shapes[0]) != 2 or shapes[0][0] != 2 or shapes[1:] != [[2], [2]]:
            raise InputError(f"LearnedReference: weight, bias and bounds must be [2, D], [2] and [2], got {shapes}")

    @classmethod
    def fit(
        cls,
        rewards: Rewards,
        embed: Embed,
        quantile: float = 0.85,
        ridge: float = 1e-3,
        ddof: int = 0,
        scorer: str = "",
    ) -> Self:
        """Ridge regression on the prompts of `rewards`, in closed form and fp64; biases are not shrunk.

        ridge: the penalty in units of the embedding's mean variance times N, so that scale and N do not matter. A
        prompt whose rewards are all equal counts with the least std above 0 of the others.
        """
        _normal_score(quantile)
        ridge = real(ridge, "LearnedReference: ridge", 1e-12)
        samples = _samples(rewards)
        x = _embedded(embed, list(samples))
        means, stds = torch.tensor([_moments(found, ddof) for found in samples.values()], dtype=torch.float64).T
        positive = stds[stds > 0]
        log_std = stds.clamp(min=positive.min()).log() if len(positive) else torch.full_like(stds, -torch.inf)
        y = torch.stack([means, log_std if len(positive) else torch.zeros_like(stds)], -1)
        centred, centre = x - x.mean(0), x.mean(0)
        gram = centred.T @ centred
        penalty = ridge * gram.trace() / len(gram)
        gram.diagonal().add_(penalty if penalty > 0 else 1.0)  # equal embeddings: any penalty gives a weight of 0
        weight = torch.linalg.solve(gram, centred.T @ (y - y.mean(0))).T.contiguous()
        bias = y.mean(0) - weight @ centre
        if not len(positive):
            bias[1] = -torch.inf
        return cls(weight, bias, torch.stack([log_std.min(), log_std.max()]), embed, float(quantile), scorer)

    def lookup(self, prompts: Sequence[str]) -> list[float]:
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]
        if new:
            x = _embedded(self.embed, new)
            if x.shape[1] != self.weight.shape[1]:
                raise InputError(
                    f"the learned reference reads embeddings of width {self.weight.shape[1]}, embed gives "
                    f"{x.shape[1]}: it was fitted with another embedding"
                )
            mean, log_std = (x @ self.weight.T + self.bias).T
            found = mean + _normal_score(self.quantile) * log_std.clamp(*self.bounds).exp()
            self._known |= dict(zip(new, found.tolist(), strict=True))
        return [self._known[prompt] for prompt in prompts]

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write config.json and model.safetensors."""
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        _write(path / "config.json", {"quantile": self.quantile, "scorer": self.scorer})
        save_file({name: getattr(self, name) for name in ("weight", "bias", "bounds")}, path / "model.safetensors")

    @classmethod
    def load(cls, directory: str | os.PathLike[str], embed: Embed) -> Self:
        """What `save` wrote, with the embedding that it was fitted with; InputError names the directory otherwise."""
        path = Path(directory)
        arguments: dict[str, Any] = _json(path / "config.json", "learned reference")
        try:
            arguments |= load_file(path / "model.safetensors")
            return cls(**arguments, embed=embed)
        except (OSError, TypeError, InputError, SafetensorError) as error:
            raise InputError(f"learned reference {path}: {first_line(error)}") from error


ReferenceLike = Reference | Mapping[str, float] | str | os.PathLike[str] | float


@dataclass(frozen=True)
class _Constant:
    value: float
    scorer: str = ""

    def lookup(self, prompts: Sequence[str]) -> list[float]:
        return [self.value] * len(prompts)


def reference_of(reference: ReferenceLike) -> Reference:
    """Anything that `lsc` takes as a reference: it, a number, a mapping from prompt to number, or a path."""
    if isinstance(reference, (str, os.PathLike)):
        if Path(reference).is_dir():
            raise InputError(f"references {reference} is a directory: use LearnedReference.load(directory, embed)")
        return References.load(Path(reference))
    if isinstance(reference, Mapping):
        return References(dict(reference))
    if isinstance(reference, Reference):
        return reference
    return _Constant(real(reference, "a reference that is neither References, a mapping nor a path"))


def prompt_embeddings(model: Any, tokenizer: Any, prompts: Sequence[str], layer: int = -1) -> Tensor:
    """The hidden state at each prompt's last token, fp32 [N, D] on the CPU.

    model: a causal language model of transformers, such as Engine.model. layer: as in its hidden_states, -1 the last.
    """
    ids = [tokenizer(prompt, verbose=False).input_ids for prompt in prompts]
    return last_states(model.base_model, ids, layer, label="prompt")


def _short(prompt: str) -> str:
    return repr(prompt) if len(str(prompt)) <= 40 else f"{str(prompt)[:40]!r}..."


def _hash(seed: int, prompt: str) -> int:
    text = json.dumps([seed, prompt]).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _tensor(rewards: Sequence[float], name: str) -> Tensor:
    """fp64 [n]; InputError names the first reward that is not a finite number."""
    return torch.tensor([real(reward, f"{name} {i}") for i, reward in enumerate(rewards)], dtype=torch.float64)


def _samples(rewards: Rewards) -> dict[str, Tensor]:
    if not rewards:
        raise InputError("references need the rewards of at least one prompt")
    samples = {}
    for prompt, found in rewards.items():
        samples[prompt] = _tensor(found, f"prompt {_short(prompt)}: reward")
        if not len(samples[prompt]):
            raise InputError(f"prompt {_short(prompt)} has no rewards: sample some, or leave it out")
    return samples


def _moments(values: Tensor, ddof: int) -> tuple[float, float]:
    """Mean and std of fp64 [n]. Equal values have a std of exactly 0, which rounding of the mean would spoil."""
    whole(ddof, "ddof", 0)
    if len(values) <= ddof or values.min() == values.max():
        return values.mean().item(), 0.0
    return values.mean().item(), values.std(correction=ddof).item()


def _normal_score(quantile: float) -> float:
    level = real(quantile, "quantile of a normal distribution", 0, 1)
    if level in (0, 1):
        raise InputError(f"quantile of a normal distribution must lie between 0 and 1, got {level:g}")
    return NormalDist().inv_cdf(level)


def _embedded(embed: Embed, prompts: list[str]) -> Tensor:
    x = torch.as_tensor(embed(prompts)).detach().cpu().double()
    if x.dim() != 2 or len(x) != len(prompts) or not x.isfinite().all():
        raise InputError(f"embed must give finite [{len(prompts)}, D] for {len(prompts)} prompts, got {list(x.shape)}")
    return x


def _write(path: str | os.PathLike[str], fields: dict[str, Any]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(fields, indent=1) + "\n")


def _json(path: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    try:
        fields = json.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{kind} {path}: {first_line(error)}") from error
    if not isinstance(fields, dict):
        raise InputError(f"{kind} {path}: a JSON object is needed, got {type(fields).__name__}")
    return fields


def _read(cls: Any, path: str | os.PathLike[str], kind: str) -> Any:
    fields = _json(path, kind)
    try:
        return cls(**fields)
    except (TypeError, AttributeError, InputError) as error:
        raise InputError(f"{kind} {path}: {first_line(error)}") from error
