"""Tokenwise inside vLLM: the same tokens as everywhere, the law, batches under pressure, and what is refused."""

import pytest
from cases import WEIGHTS, length, run_vllm

from pyengine import Engine, SamplingParams, Tokenwise


def parity(case, **args):
    """An engine, and all prompts with all λ in one batch of few rows, so that requests join, move and leave."""
    asked = [(i, weight) for weight in WEIGHTS for i in range(len(case.prompts))]
    params = [
        {"temperature": 0, "max_tokens": length(j), "ignore_eos": True, "extra_args": {"tilt_weight": weight}}
        for j, (_, weight) in enumerate(asked)
    ]
    call = {"prompts": [case.prompts[i] for i, _ in asked], "params": params}
    wanted = [case.tokens[key][: length(j)] for j, key in enumerate(asked)]
    tilted = sum(length(j) for j, (_, weight) in enumerate(asked) if weight)
    options = {"tilt_scorers": {"liked": str(case.scorer)}}
    arguments = {"model": str(case.model), "max_num_seqs": 6, "additional_config": options} | args
    return {"args": arguments, "calls": [call]}, wanted, tilted


def tokens(call):
    assert isinstance(call, list), call["error"]
    return [sample["tokens"] for request in call for sample in request]


def test_the_engine_gives_the_tokens_of_the_reference(cases):
    for case in cases.values():
        engine = Engine.from_pretrained(case.model, scorer=case.scorer)
        sampling = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
        for weight in WEIGHTS:
            found = engine.generate(case.prompts, strategy=Tokenwise(weight=weight), sampling=sampling)
            assert [r.tokens for r in found] == [case.tokens[i, weight] for i in range(len(case.prompts))]
        changed = [case.tokens[i, w] != case.tokens[i, 0.0] for i in range(len(case.prompts)) for w in WEIGHTS[1:]]
        assert sum(changed) > len(changed) // 2


@pytest.mark.parametrize("runner", ["V1", "V1 compiled", "V2"])
def test_greedy_tokens_are_the_same_in_every_runner(cases, tmp_path, runner):
    some = [parity(case, enforce_eager=runner != "V1 compiled") for case in cases.values()]
    found, _ = run_vllm(tmp_path, [engine for engine, *_ in some], v2=runner == "V2")
    for one, (_, wanted, tilted) in zip(found, some, strict=True):
        assert "error" not in one, one["error"]
        assert tokens(one["calls"][0]) == wanted
        assert one["tilted"] >= tilted
