"""Tokenwise inside vLLM's V1 and V2 model runners: the tokens, the law, batches under pressure, and what is refused.

All engines of a runner come one after another in one process, which ends before its tests look at what it wrote.
"""

import json
import math

import pytest
import torch
from cases import NEW, WEIGHTS, expected, length, prefix_model, run_vllm, values
from transformers import AutoModelForCausalLM

import pyengine
from pyengine import Engine, PrefixScorer, Probe, SamplingParams, Tokenwise

TEMPERATURES = (0.7, 1.0, 1.6)
LAW = [{"tilt_weight": 2.0}, {"tilt_weight": -3.0}, {}]
SUM = [{"tilt_weight": 1.0, "tilt_scorer": "liked=2,also=-.5"}]
BUDGET = [{"tilt_kl_budget": 0.2, "tilt_scorer": "also=-1"}]
GREEDY = {"temperature": 0, "max_tokens": NEW, "ignore_eos": True}
BLOCKS = 34  # of 32 tokens, for 16 requests of up to 324
BATCHED = 64  # tokens of a step, for prompts of up to 300
ALLOWED = list(range(20, 400, 3))


def configured(case, **scorers):
    return {"model": str(case.model), "additional_config": {"tilt_scorers": {"liked": str(case.scorer)} | scorers}}


def parity(case, **args):
    """All prompts with all λ in one batch of few rows, so that requests join, move and leave."""
    asked = [(i, weight) for weight in WEIGHTS for i in range(len(case.prompts))]
    params = [
        GREEDY | {"max_tokens": length(j), "extra_args": {"tilt_weight": weight}} for j, (_, weight) in enumerate(asked)
    ]
    call = {"prompts": [case.prompts[i] for i, _ in asked], "params": params}
    return {"args": configured(case) | {"max_num_seqs": 6} | args, "calls": [call]}


def asked_of_the_law():
    """(top-p, temperature, fields of its requests) of each batch; one scorer alone goes another way than a sum."""
    pairs = [(p, t) for p in (1.0, 0.9) for t in TEMPERATURES]
    return [(p, t, LAW) for p, t in pairs] + [(p, t, SUM) for p, t in pairs]


def law(case):
    """Whole distributions of two tokens at every temperature, without and with a filter, then with budgets."""
    calls = []
    for top_p, t, asked in [*asked_of_the_law(), *((1.0, t, BUDGET) for t in (0.7, 1.6))]:
        own = {"temperature": t, "top_p": top_p, "max_tokens": 2, "logprobs": -1, "seed": 3}
        own["ignore_eos"] = True
        calls.append({"prompts": [case.prompts[3]] * len(asked), "params": [own | {"extra_args": f} for f in asked]})
    own = {"logprobs_mode": "processed_logprobs", "max_logprobs": -1}
    return {"args": configured(case, also="prefix") | own, "calls": calls}


def pressed(case, model):
    """16 requests, of which 8 are tilted, 4 of them by a model; all at once, then each alone."""
    fields = [None, {"tilt_weight": 8.0}, None, {"tilt_weight": 8.0, "tilt_scorer": "model"}] * 2
    fields += [*fields[1:], None]
    params = [GREEDY | ({} if f is None else {"extra_args": f}) for f in fields]
    prompts = case.prompts * 2
    calls = [{"prompts": prompts, "params": params}]
    calls += [{"prompts": [prompt], "params": [own]} for prompt, own in zip(prompts, params, strict=True)]
    own = {
        "max_num_seqs": 16, "num_gpu_blocks_override": BLOCKS, "block_size": 32, "max_num_batched_tokens": BATCHED,
        "enable_prefix_caching": False, "disable_log_stats": False,
    }  # fmt: skip
    return {"args": configured(case, model=str(model)) | own, "calls": calls}, fields


def beside(case, v2):
    """What else a request may ask for, beside a tilt of 8: each a call of its own. V2 has a kernel for grammars that
    Triton's interpreter does not run."""
    own = GREEDY | {"extra_args": {"tilt_weight": 8.0}}
    params = [
        own | {"prompt_logprobs": 2},
        own | {"allowed_token_ids": ALLOWED},
        own | {"n": 3, "temperature": 1.0, "seed": 4, "extra_args": {"tilt_weight": 1e4}},
        own | {"logit_bias": {7: 50.0}, "frequency_penalty": 2.0},
        own | {"regex": "[a-z ]{30}", "ignore_eos": False},
    ][: 4 if v2 else 5]
    return {"args": configured(case), "calls": [{"prompts": [case.prompts[4]] * 2, "params": [p] * 2} for p in params]}


FAULTS = {  # fields of a request, and how its error begins
    "tilt_weight must be": {"tilt_weight": "much"},
    "tilt_scorer: there is no 'other'": {"tilt_weight": 1.0, "tilt_scorer": "other"},
    "unknown field tilt_wieght": {"tilt_wieght": 1.0},
    "tilt_strategy 'blockwise'": {"tilt_strategy": "blockwise"},
    "tilt_kl_budget: Tokenwise": {"tilt_kl_budget": 0.1},  # at temperature 0
    "tilt_weight: a weight beyond": {"tilt_weight": 1e31},
}


def faulty(case, fields, **more):
    return {"prompts": [case.prompts[0]], "params": [GREEDY | {"max_tokens": 2, "extra_args": fields} | more]}


def run_all(cases, folder, v2):
    """{name: what came of the engine}"""
    model, _ = prefix_model(cases["qwen2"], folder / "reads")
    llama = cases["llama"]
    calls = [faulty(llama, fields) for fields in FAULTS.values()]
    calls += [faulty(llama, {"tilt_weight": 2.0}, repetition_penalty=1.2), faulty(llama, {"tilt_weight": 2.0})]
    beyond, scorer = folder / "beyond", pyengine.load_scorer(llama.scorer)
    with torch.no_grad():
        scorer.head.weight.fill_(3e38)  # finite, as its values are not
    scorer.save(beyond)
    fields = [{"tilt_weight": 2.0}, {"tilt_weight": 8.0, "tilt_scorer": "beyond"}, None]
    mixed = {"prompts": [llama.prompts[0]] * 3, "params": [GREEDY | ({"extra_args": f} if f else {}) for f in fields]}
    engines = {
        **{name: parity(case) for name, case in cases.items()},
        "law": law(cases["embedded"]),
        "pressed": pressed(llama, model)[0],
        "beside": beside(cases["embedded"], v2),
        "faulty": {"args": configured(llama, beyond=str(beyond)), "calls": [mixed, *calls, mixed]},
        "without": {"args": {"model": str(llama.model)}, "calls": [*calls[-1:], faulty(llama, {})]},
    }
    found, said = run_vllm(folder, list(engines.values()), v2)
    assert all(one.get("v2") == v2 for one in found), found
    return dict(zip(engines, found, strict=True)), said


@pytest.fixture(scope="module", params=["V1", "V2"])
def ran(request, cases, tmp_path_factory):
    found, said = run_all(cases, tmp_path_factory.mktemp("ran"), request.param == "V2")
    for name, one in found.items():
        assert "error" not in one, f"{name}: {one['error']}"
    return found | {"said": said}


def tokens(call):
    assert isinstance(call, list), call["error"]
    return [sample["tokens"] for request in call for sample in request]


def is_parity(case, one):
    asked = [(i, weight) for weight in WEIGHTS for i in range(len(case.prompts))]
    assert tokens(one["calls"][0]) == [case.tokens[key][: length(j)] for j, key in enumerate(asked)]
    assert one["tilted"] >= sum(length(j) for j, (_, weight) in enumerate(asked) if weight)


def test_the_engine_gives_the_tokens_of_the_reference(cases):
    for case in cases.values():
        engine = Engine.from_pretrained(case.model, scorer=case.scorer)
        sampling = SamplingParams(**GREEDY)
        for weight in WEIGHTS:
            found = engine.generate(case.prompts, strategy=Tokenwise(weight=weight), sampling=sampling)
            assert [r.tokens for r in found] == [case.tokens[i, weight] for i in range(len(case.prompts))]
        changed = [case.tokens[i, w] != case.tokens[i, 0.0] for i in range(len(case.prompts)) for w in WEIGHTS[1:]]
        assert sum(changed) > len(changed) // 2


def test_greedy_tokens_are_those_of_the_reference(cases, ran):
    for name, case in cases.items():
        is_parity(case, ran[name])
    assert "rows are tilted" in ran["said"]


def test_greedy_tokens_are_the_same_where_the_model_is_compiled(cases, tmp_path):
    found, _ = run_vllm(tmp_path, [parity(case, enforce_eager=False) for case in cases.values()])
    for case, one in zip(cases.values(), found, strict=True):
        assert one["compiled"]
        is_parity(case, one)


@torch.inference_mode()
def laws(case, fields, one, temperature):
    """(log-probabilities of the base, the values that the request follows) [T, V] of what one request drew."""
    model = AutoModelForCausalLM.from_pretrained(case.model).eval()
    prompt = case.prompts[3]
    output = model(torch.tensor([prompt + one["tokens"][:-1]]), output_hidden_states=True)
    of = pyengine.load_scorer(case.scorer)
    found = values(of, output.hidden_states[-1][0, len(prompt) - 1 :])
    share = {"liked=2,also=-.5": 1.5, "also=-1": -1.0}.get(fields.get("tilt_scorer"), 1.0)  # both are the same scorer
    return torch.log_softmax(output.logits[0, len(prompt) - 1 :] / temperature, -1), share * found


def test_the_law_holds_at_every_temperature_and_its_filter_keeps_the_same(cases, ran):
    case = cases["embedded"]
    for (top_p, t, asked), call in zip(asked_of_the_law(), ran["law"]["calls"][:12], strict=True):
        for fields, (one,) in zip(asked, call, strict=True):
            base, followed = laws(case, fields, one, t)
            wanted = torch.log_softmax(base + fields.get("tilt_weight", 0.0) * followed, -1)
            found = torch.tensor([[-math.inf if x is None else x for x in row] for row in one["logprobs"]])
            assert found.shape == wanted.shape == (2, 745)
            if top_p < 1:
                ranked = wanted.sort(-1, descending=True)
                before = ranked.values.exp().cumsum(-1) - ranked.values.exp()
                assert ((before - top_p).abs() > 1e-5).all(), "a token at the very edge: take another prompt"
                kept = torch.zeros_like(wanted, dtype=torch.bool).scatter(1, ranked.indices, before < top_p)
                assert torch.equal(found > -math.inf, kept)
                wanted = torch.log_softmax(wanted.masked_fill(~kept, -math.inf), -1)
                found, wanted = found[kept], wanted[kept]
            assert (found - wanted).abs().max() < 1e-3


def test_a_budget_is_spent_at_every_token(cases, ran):
    for t, ((one,),) in zip((0.7, 1.6), ran["law"]["calls"][12:], strict=True):
        base, followed = laws(cases["embedded"], BUDGET[0], one, t)
        found = torch.tensor(one["logprobs"])
        assert ((found.exp() * (found - base)).sum(-1) / 0.2 - 1).abs().max() < 0.01
        assert ((found.exp() - base.exp()) * followed).sum(-1).min() > 0


def test_a_batch_under_pressure_gives_what_each_request_gives_alone(cases, ran, tmp_path):
    """16 requests in a cache for a few of them: preempted, read in pieces, and right, whichever scorer they follow."""
    case, found = cases["llama"], ran["pressed"]
    together, alone = found["calls"][0], found["calls"][1:]
    assert found["preemptions"] > 0
    assert sum(count > 1 for count in found["pieces"].values()) >= 6  # prompts of more than a step's tokens, twice
    model, valued = prefix_model(cases["qwen2"], tmp_path / "reads")
    wanted = {"liked": case.tokens, "model": expected(case.model, case.prompts, valued)}
    for i, (fields, one, own) in enumerate(zip(pressed(case, model)[1], together, alone, strict=True)):
        asked = fields or {"tilt_weight": 0.0}
        assert tokens([one]) == tokens(own) == [wanted[asked.get("tilt_scorer", "liked")][i % 8, asked["tilt_weight"]]]


def test_other_fields_shape_the_base_policy(cases, ran):
    case = cases["embedded"]
    engine = Engine.from_pretrained(case.model, scorer=case.scorer)

    def ours(**sampling):
        return engine.generate([case.prompts[4]] * 2, Tokenwise(8.0), SamplingParams(**(GREEDY | sampling)))

    prompted, allowed, several, penalties, *regex = ran["beside"]["calls"]
    assert tokens(prompted) == [case.tokens[4, 8.0]] * 2
    assert tokens(allowed) == [r.tokens for r in ours(allowed_token_ids=ALLOWED)]
    for call in regex:
        assert tokens(call) == [r.tokens for r in ours(grammar={"regex": "[a-z ]{30}"}, ignore_eos=False)]
    assert tokens(penalties) == [r.tokens for r in ours(logit_bias={7: 50.0}, frequency_penalty=2.0)]
    best = tokens(several)  # at λ = 10,000 the draw is the argmax of V
    assert len(best) == 6
    assert all(row == best[0] for row in best)


def test_a_request_that_is_wrong_is_refused_by_name_and_others_go_on(cases, ran):
    _, *wrong, penalty, right, _ = ran["faulty"]["calls"]
    for says, call in zip(FAULTS, wrong, strict=True):
        assert call["error"].startswith(f"VLLMValidationError: {says}"), call
    if ran["faulty"]["v2"]:
        assert len(tokens(penalty)) == 1
    else:
        assert "repetition_penalty does not go with tilt_*" in penalty["error"]
    assert tokens(right) == [cases["llama"].tokens[0, 2.0][:2]]


def test_a_request_whose_tilt_is_not_finite_ends_with_an_error_and_others_go_on(cases, ran):
    case = cases["llama"]
    for right, beyond, plain in (ran["faulty"]["calls"][0], ran["faulty"]["calls"][-1]):
        assert (tokens([right]), tokens([plain])) == ([case.tokens[0, 2.0]], [case.tokens[0, 0.0]])
        assert (beyond[0]["finish"], beyond[0]["tokens"]) == ("error", [])
    assert "tilted logits are not finite" in ran["said"]


def test_without_scorers_a_tilt_is_an_error_that_says_what_to_configure(cases, ran):
    tilted, plain = ran["without"]["calls"]
    assert "tilt_weight: this engine has no scorers; start it with additional_config" in tilted["error"]
    assert tokens(plain) == [cases["llama"].tokens[0, 0.0][:2]]
    assert ran["without"]["tilted"] == 0


def scorers_for(case, folder):
    """Scorers that do not fit a case's model, {name: directory}."""
    made = {
        "layer": PrefixScorer(64, 745, layer=1),
        "width": PrefixScorer(32, 745),
        "vocabulary": PrefixScorer(64, 700),
        "response": Probe(64),
    }
    for name, scorer in made.items():
        scorer.save(folder / name)
    model, _ = prefix_model(case, folder / "short")
    config = json.loads((model / "model" / "config.json").read_text()) | {"max_position_embeddings": 256}
    (model / "model" / "config.json").write_text(json.dumps(config))
    return {name: str(folder / name) for name in (*made, "short")}


def test_what_cannot_be_tilted_is_refused_at_start_with_the_reason(cases, tmp_path):
    case = cases["llama"]
    made = scorers_for(case, tmp_path)
    speculative = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    settings = {
        "speculative decoding": {"speculative_config": speculative},
        "tensor parallelism": {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"},
        "pipeline parallelism": {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"},
        "LoRA": {"enable_lora": True},
        "runner='pooling'": {"runner": "pooling"},
        "reads layer 1 of 3": configured(case, other=made["layer"]),
        "reads hidden states of width 32": configured(case, other=made["width"]),
        "scores a vocabulary of 700 tokens": configured(case, other=made["vocabulary"]),
        "scores whole prefixes only": configured(case, other=made["response"]),
        "reads 256 tokens, requests may have 512": configured(case, other=made["short"]),
        "prompts given as embeddings": configured(case, other=made["short"]) | {"enable_prompt_embeds": True},
        "no scorer 'nowhere'": configured(case, other="nowhere"),
        "tilt_scorers must be {name: directory}": {"additional_config": {"tilt_scorers": []}},
        "unknown tilt_scorer;": {"additional_config": {"tilt_scorer": "prefix"}},
    }
    refused = [{"args": configured(case) | own, "calls": []} for own in settings.values()]
    adapted = {"args": {"model": str(case.model), "enable_lora": True}, "calls": [faulty(case, {})]}
    blind = {"args": configured(case), "calls": [], "blind": True}
    *found, last, unseen = run_vllm(tmp_path, [*refused, adapted, blind])[0]
    assert "without vLLM's LogitsProcessor layer" in unseen["error"]
    assert tokens(last["calls"][0]) == [case.tokens[0, 0.0][:2]]  # LoRA without scorers is none of our business
    for says, one in zip(settings, found, strict=True):
        assert one.get("error", "nothing").startswith("InputError"), (says, one)
        assert says in one["error"]


def test_without_the_general_plugin_scorers_and_tilts_are_refused(cases, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    case = cases["llama"]
    plain = {"args": {"model": str(case.model)}, "calls": [faulty(case, {"tilt_weight": 1.0}), faulty(case, {})]}
    (scored, asked), _ = run_vllm(tmp_path, [{"args": configured(case), "calls": []}, plain])
    assert "VLLM_PLUGINS leaves out the plug-in 'tilt'" in scored["error"]
    assert "VLLM_PLUGINS leaves out the plug-in 'tilt'" in asked["calls"][0]["error"]
    assert tokens(asked["calls"][1]) == [case.tokens[0, 0.0][:2]]
