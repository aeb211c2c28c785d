"""Preference pairs from the engine: sample responses, score them, keep the best and the worst of each prompt.

The rules are those of WPO (arXiv:2406.11827): on-policy pairs of the highest and the lowest score, and hybrid ones,
where another model's responses stand beside the samples.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from pyengine.codec import PromptLike, as_prompts, key_of
from pyengine.engine import Engine
from pyengine.errors import InputError, real, whole
from pyengine.jsonl import json_object, numbered_prompts, raise_all, read_file, record_of
from pyengine.results import SamplingParams
from pyengine.scorers import ScorerLike
from pyengine.training.data import Example, encode, example_of
from pyengine.training.identity import identity
from pyengine.training.scoring import score_examples
from pyengine.training.shards import Job, begun, digest_of, held, lines, merged, missing, vacant, written

log = logging.getLogger("pyengine")
ROUNDING = 2.0**-23  # of a difference of two fp32 scores, relative to the larger: half a unit in the last place each
AT_ONCE = 512  # responses in a shard: what a kill loses
SAMPLING = SamplingParams(max_tokens=1024, temperature=0.7, top_p=0.95, seed=0)  # temperature and top-p are WPO's


class Answer(NamedTuple):
    """One response to a prompt; length in tokens of the policy, its EOS included. given: not sampled here."""

    response: str
    reward: float
    length: int
    given: bool = False


class Given(NamedTuple):
    """A response that was read from a file; reward None has to be scored."""

    response: str
    reward: float | None
    tokens: list[int]  # as the policy reads it, its EOS included
    where: str  # file:line


class Choice(NamedTuple):
    """A pair, or why there is none: "single" (fewer than two answers), "tied" (all scores equal), "margin" (none is
    far enough below the best), "equal" (both are the same text)."""

    outcome: str
    chosen: Answer | None = None
    rejected: Answer | None = None


def choose(answers: Sequence[Answer], margin: float | None = None, rng: random.Random | None = None) -> Choice:
    """The chosen and the rejected of one prompt's answers.

    Chosen is the highest score, of several the shortest. Rejected is the lowest, of several the one whose length is
    closest to the chosen one's (WPO's README v2); with a margin it is any answer whose score is lower by at least that
    (the margin of WPO's hybrid rule, whose other half, that the best must score 5 or 6, is not asked), which `rng`
    draws. Scores are fp32: a difference that misses the margin by their rounding reaches it. What still ties goes to
    the earlier answer.
    """
    if len(answers) < 2:
        return Choice("single")
    highest, lowest = max(a.reward for a in answers), min(a.reward for a in answers)
    if highest == lowest:
        return Choice("tied")
    chosen = min((a for a in answers if a.reward == highest), key=lambda a: a.length)
    if margin is None:
        below = [a for a in answers if a.reward == lowest]
        rejected = min(below, key=lambda a: abs(a.length - chosen.length))
    else:
        least = margin - ROUNDING * max(abs(highest), abs(lowest))
        below = [a for a in answers if a.reward < highest and highest - a.reward >= least]
        if not below:
            return Choice("margin")
        rejected = (rng or random.Random()).choice(below)
    if chosen.response == rejected.response:  # a scorer that is not a function of the text, or scores from two of them
        return Choice("equal")
    return Choice("pair", chosen, rejected)


class _Prompts(NamedTuple):
    """A shard: the prompts first .. first + rows - 1."""

    first: int
    rows: int


def build_pairs(
    engine: Engine,
    prompts: PromptLike | Sequence[PromptLike] | Path,
    scorer: ScorerLike,
    out: str | Path,
    *,
    samples: int = 5,
    sampling: SamplingParams = SAMPLING,
    candidates: str | Path | None = None,
    margin: float | None = None,
    fixed_horizon: bool = False,
    resume: bool = False,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Write a pair for each prompt that has one, and a report to OUT.report.json, which is returned too.

    A line is {"prompt", "chosen", "rejected", "score_chosen", "score_rejected"}, in the order of the prompts: TRL's
    preference format (the conversational one where the prompt is a conversation), which `read_preferences` reads.
    prompts: as for `Engine.generate`, or the Path of a JSONL file of them. samples: responses of the base policy to
    each prompt, at least two where there are no `candidates`, the j-th drawn with seed sampling.seed + j, whatever else
    is in the batch. scorer: anything that the engine follows. candidates: JSONL lines {"prompt", "response"} of another
    model, with a "reward" where they were scored already, by the same scorer. margin: the hybrid rule (see `choose`),
    drawn by seed and prompt. resume: take up a run that was cut short; nothing is sampled again but the shard in hand.
    progress: a bar on stderr after two seconds; None shows it on a terminal only.

    No candidate are empty responses, and those that were cut off, which have no reward yet and which a trainer would
    end with an EOS; with fixed_horizon they are, with the score of what there is of them. A warning is logged where no
    pair was made, or most responses were cut off. The report counts: prompts, repeated (prompts that came again, which
    are taken once), pairs, dropped (by reason), sampled, given, left_out (by reason), chosen_given and rejected_given,
    and seconds of this run. Raises one InputError for all prompts that cannot be decoded, one for all lines of
    `candidates` that cannot be used (of other prompts, too), and, naming prompt or line, one for a score that is not
    finite.
    """
    start, out = time.perf_counter(), Path(out).absolute()
    samples = whole(samples, "build_pairs: samples", 1)
    if samples == 1 and candidates is None:
        raise InputError("build_pairs: one sample makes no pair: take samples of at least 2, or give candidates")
    margin = None if margin is None else real(margin, "build_pairs: margin", 1e-12)
    if sampling.seed is None:
        raise InputError("build_pairs: sampling needs a seed, so that a run that was cut short can be taken up again")
    vacant(out, resume)
    asked = _readable(engine, prompts)
    unique = list(dict.fromkeys(asked))
    data = b"" if candidates is None else read_file(candidates)
    given = {} if candidates is None else parse_candidates(data, str(candidates), engine, unique)
    job = Job(
        out,
        {
            "prompts": digest_of(json.dumps(unique).encode()),
            "model": [identity(engine.model), identity(engine.tokenizer)],
            "scorer": identity(scorer),
            "sampling": {"samples": samples, **dataclasses.asdict(sampling)},
            "candidates": None if candidates is None else digest_of(data),
            "margin": margin,
            "fixed_horizon": fixed_horizon,
        },
    )
    size = max(1, AT_ONCE // samples)
    shards = [_Prompts(first, min(size, len(unique) - first)) for first in range(0, len(unique), size)]
    with held(out, resume), engine.following(scorer):
        report = begun(job, resume)
        if report is not None:
            return report
        if not engine.parts:
            raise InputError("build_pairs needs a scorer")
        todo = missing(job, shards)
        hide = None if progress is None else not progress
        done = len(unique) - sum(shard.rows for shard in todo)
        with tqdm(total=len(unique), initial=done, unit="prompt", delay=2, disable=hide, leave=False) as bar:
            for shard in todo:
                some = unique[shard.first : shard.first + shard.rows]
                found = _sampled(engine, some, given, samples, sampling, margin, fixed_horizon)
                with written(job.file(shard)) as file:
                    file.writelines(json.dumps(line) + "\n" for line in found)
                bar.update(shard.rows)
        report = {"prompts": len(unique), "repeated": len(asked) - len(unique)}
        with merged(job, report) as file:
            counts, dropped, left_out = Counter[str](), Counter[str](), Counter[str]()
            for _, line in lines(job, shards):
                counts.update(line["counts"])
                left_out.update(line["left_out"])
                if line["pair"] is None:
                    dropped[line["outcome"]] += 1
                else:
                    counts["pairs"] += 1
                    file.write(json.dumps(line["pair"]) + "\n")
            names = ("pairs", "sampled", "given", "chosen_given", "rejected_given")
            report |= {name: counts[name] for name in names} | {"dropped": dict(dropped), "left_out": dict(left_out)}
            report["seconds"] = round(time.perf_counter() - start, 2)
    _warn(report, sampling.max_tokens)
    return {"of": job.pins, **report}


def _warn(report: dict[str, Any], most: int) -> None:
    """Log what the counts of a report mean where that is little."""
    cut, sampled = report["left_out"].get("cut_off", 0), report["sampled"]
    if 2 * cut > sampled:
        log.warning(
            "%d of %d responses were cut off at %d tokens and make no pair: let them be longer (--max-tokens), or "
            "count them as they stand (--fixed-horizon)",
            *(cut, sampled, most),
        )
    if not report["pairs"]:
        log.warning("no pair was made of %d prompts: dropped %s", report["prompts"], report["dropped"])


def _readable(engine: Engine, prompts: PromptLike | Sequence[PromptLike] | Path) -> list[str]:
    """The prompts; one InputError for all that the engine's model cannot read."""
    if isinstance(prompts, Path):
        named = numbered_prompts(prompts)
    else:
        named = [(f"prompt {i}", p) for i, p in enumerate(as_prompts(prompts))]
    faults = []
    for where, prompt in named:
        try:
            engine.encode(prompt, where)
        except InputError as error:
            faults.append(str(error))
    raise_all(faults, len(named), "prompts")
    if not named:
        raise InputError("build_pairs needs prompts")
    return [key_of(prompt) for _, prompt in named]


def parse_candidates(data: bytes, path: str, engine: Engine, prompts: Sequence[str]) -> dict[str, list[Given]]:
    """The responses in JSONL {"prompt", "response"[, "reward"]} to these prompts, in the file's order.

    "finish_reason" and "tokens" are as `read_examples` takes them. Raises one InputError with file:line for all lines
    that the engine's model cannot read or that answer other prompts.
    """
    known, faults, count = {prompt: list[Given]() for prompt in prompts}, [], 0
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        count += 1
        try:
            where = f"{path}:{number}"
            record = json_object(line, where)
            example = example_of({"reward": 0.0, **record}, where)
            if example.prompt not in known:
                raise InputError(f"{where}: its prompt is not among those to sample for: {example.prompt[:40]!r}")
            if not example.ended:
                raise InputError(f'{where}: finish_reason is "length": a response that was cut off makes no pair')
            encoded = encode(engine, example)
            reward = encoded.reward if "reward" in record else None
            known[example.prompt].append(Given(example.response, reward, encoded.ids[encoded.start :], where))
        except InputError as error:
            faults.append(str(error))
    raise_all(faults, count, "lines")
    return {prompt: found for prompt, found in known.items() if found}


def _sampled(
    engine: Engine,
    prompts: Sequence[str],
    given: Mapping[str, Sequence[Given]],
    samples: int,
    sampling: SamplingParams,
    margin: float | None,
    fixed_horizon: bool,
) -> list[dict[str, Any]]:
    """The line of each prompt: its outcome, what was counted, and the pair or None."""
    seed = sampling.seed or 0
    params = [dataclasses.replace(sampling, seed=seed + j) for j in range(samples)]
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    results = engine.generate(repeated, sampling=params * len(prompts), progress=False)
    others = _scored(engine, prompts, given)
    out = []
    for i, prompt in enumerate(prompts):
        answers, left_out = list[Answer](), Counter[str]()
        for j, result in enumerate(results[i * samples : (i + 1) * samples]):
            if result.finish_reason == "length" and not fixed_horizon:
                left_out["cut_off"] += 1
            elif not result.text.strip():
                left_out["empty"] += 1
            elif result.reward is None or not math.isfinite(result.reward):
                raise InputError(
                    f"sample {j} of prompt {prompt[:40]!r}: its score is {result.reward}, it must be finite: "
                    f"{result.text[:40]!r}"
                )
            else:
                answers.append(Answer(result.text, result.reward, len(result.tokens)))
        answers += others.get(prompt, [])
        choice = choose(answers, margin, random.Random(f"{seed}:{prompt}"))
        counts = {"sampled": samples, "given": len(others.get(prompt, []))}
        pair = None
        if choice.chosen is not None and choice.rejected is not None:
            counts |= {"chosen_given": int(choice.chosen.given), "rejected_given": int(choice.rejected.given)}
            pair = _pair(prompt, choice.chosen, choice.rejected)
        out.append({"outcome": choice.outcome, "counts": counts, "left_out": left_out, "pair": pair})
    return out


def _pair(prompt: str, chosen: Answer, rejected: Answer) -> dict[str, Any]:
    """The line of a pair."""
    record, answers = record_of(prompt), {"chosen": chosen.response, "rejected": rejected.response}
    said: dict[str, Any] = dict(answers)
    if "messages" in record:
        record = {"prompt": record["messages"]}
        said = {name: [{"role": "assistant", "content": text}] for name, text in answers.items()}
    return {**record, **said, "score_chosen": chosen.reward, "score_rejected": rejected.reward}


def _scored(engine: Engine, prompts: Sequence[str], given: Mapping[str, Sequence[Given]]) -> dict[str, list[Answer]]:
    """The given responses to these prompts, all with a reward."""
    bare = [(prompt, one) for prompt in prompts for one in given.get(prompt, ()) if one.reward is None]
    rewards = {one.where: one.reward for found in given.values() for one in found if one.reward is not None}
    if bare:
        examples = [Example(prompt, one.response, 0.0, one.tokens, where=one.where) for prompt, one in bare]
        for (_, one), score in zip(bare, score_examples(engine, engine.parts, examples), strict=True):
            if not math.isfinite(score.reward):
                raise InputError(f"{one.where}: its score is {score.reward}, it must be finite")
            rewards[one.where] = score.reward
    return {
        prompt: [Answer(one.response, rewards[one.where], len(one.tokens), True) for one in given.get(prompt, ())]
        for prompt in prompts
    }
