"""The tilt inside SGLang: one server for most of it, on a CPU with shells for SGLang's kernels."""

import json
import math
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cases import NEW, WEIGHTS, length, values
from sglang_server import ARGUMENTS, Server, environment
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import pyengine
from pyengine import Engine, PrefixModel, PrefixScorer, SamplingParams, Tokenwise
from pyengine.integrations.sglang.routes import CARRY

HERE = Path(__file__).parent
KEYS = [(i, weight) for i in range(8) for weight in WEIGHTS]
# Prompts are read in parts, and eight rows that grow run out of memory.
SMALL = {"chunked_prefill_size": 64, "max_total_tokens": 1600, "max_running_requests": 16}


@pytest.fixture(scope="module")
def case(cases):
    return cases["llama"]


@pytest.fixture(scope="module")
def scorers(case, tmp_path_factory):
    """{name: directory}: a prefix scorer, a prefix model of the same tokenizer, and a scorer whose values overflow."""
    folder = tmp_path_factory.mktemp("scorers")
    tokenizer = AutoTokenizer.from_pretrained(case.model)
    head = pyengine.load_scorer(case.scorer)
    torch.manual_seed(5)
    model = AutoModel.from_config(AutoModel.from_pretrained(case.model).config)
    PrefixModel(model, tokenizer, head).save(folder / "reader")
    broken = PrefixScorer(64, 745, width=8)
    with torch.no_grad():
        broken.head.bias[7] = 3e38  # twice that is infinite
    broken.save(folder / "broken")
    return {"first": case.scorer, "reader": folder / "reader", "broken": folder / "broken"}


@pytest.fixture(scope="module")
def server(case, scorers, tmp_path_factory):
    log = tmp_path_factory.mktemp("sglang") / "log"
    variables = {"SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "8", "PYENGINE_SCORER_CACHE_GB": "0.05"}
    template = log.with_name("chat.jinja")
    template.write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    server = Server(log, case.model, scorers, SMALL | {"chat_template": template}, variables)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def reference(case):
    """(base logits, values of the first scorer) [T, 745] of every place of a sequence, by transformers."""
    model, scorer = AutoModelForCausalLM.from_pretrained(case.model).eval(), pyengine.load_scorer(case.scorer)

    @torch.inference_mode()
    def read(ids):
        hidden = []
        hook = model.lm_head.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0][0]))
        logits = model(torch.tensor([ids])).logits[0]
        hook.remove()
        return logits, values(scorer, hidden[0])

    return read


def engine_tokens(case, scorer):
    """{(prompt, λ): greedy tokens} by pyengine's own engine."""
    engine = Engine.from_pretrained(case.model, scorer=scorer)
    sampling = SamplingParams(max_tokens=NEW, temperature=0, seed=0, ignore_eos=True)
    prompts = [case.prompts[i] for i, _ in KEYS]
    handles = [engine.submit(p, Tokenwise(w), sampling) for p, (_, w) in zip(prompts, KEYS, strict=True)]
    return {key: list(handle.result().tokens) for key, handle in zip(KEYS, handles, strict=True)}


def logprobs(answer):
    """[T, 745] of an answer with top_logprobs_num=745; -inf where SGLang gives none."""
    found = torch.full((len(answer["output_ids"]), 745), -math.inf)
    for row, listed in zip(found, answer["meta_info"]["output_top_logprobs"], strict=True):
        for value, token, _ in listed:
            row[token] = -math.inf if value is None else value
    return found


ALL = {"return_logprob": True, "top_logprobs_num": 745}


def is_parity(server, case, scorer, expected):
    """All prompts with all λ at once; they end at different times."""
    assert len({tuple(tokens) for tokens in expected.values()}) > 24
    before = server.state()["tilted_tokens"]
    fields = [{"tilt_weight": weight, "tilt_scorer": scorer} for _, weight in KEYS]
    answers = server.together(
        [
            {"ids": case.prompts[i], "tilt": tilt, "max_new_tokens": length(n)}
            for n, ((i, _), tilt) in enumerate(zip(KEYS, fields, strict=True))
        ]
    )
    for n, (key, answer) in enumerate(zip(KEYS, answers, strict=True)):
        assert answer["output_ids"] == expected[key][: length(n)], key
    drawn = sum(length(n) for n, (_, weight) in enumerate(KEYS) if weight)
    assert drawn <= server.state()["tilted_tokens"] - before < 2 * drawn


@pytest.mark.parametrize("name", ["first", "reader"])
def test_greedy_tokens_are_the_engine_s(name, server, case, scorers):
    expected = engine_tokens(case, scorers[name])
    if name == "first":
        assert expected == case.tokens
    is_parity(server, case, name, expected)


@pytest.mark.parametrize("name", ["qwen2", "embedded"])
def test_greedy_tokens_of_another_model_are_too(name, cases, tmp_path):
    case = cases[name]
    expected = engine_tokens(case, case.scorer)
    assert expected == case.tokens
    server = Server(tmp_path / "log", case.model, {"own": case.scorer}, {}, {})
    try:
        is_parity(server, case, "own", expected)
    finally:
        server.stop()


def test_the_law(server, case, reference):
    """softmax(l / T + λ V) over the whole vocabulary, whatever shares the batch."""
    asked = [(t, w) for t in (0.7, 1.0, 1.6) for w in (2.0, -2.0, 0.0)]
    prompt = case.prompts[3]
    common = {"ids": prompt, "max_new_tokens": 6} | ALL
    answers = server.together(
        [common | {"tilt": {"tilt_weight": w}, "sampling": {"temperature": t}} for t, w in asked],
    )
    for (temperature, weight), answer in zip(asked, answers, strict=True):
        logits, v = reference(prompt + answer["output_ids"])
        law = (logits / temperature + weight * v).log_softmax(-1)[len(prompt) - 1 : -1]
        found = logprobs(answer)
        seen = law > -80  # below, the host's probability is 0 in fp32
        assert seen.float().mean() > 0.9
        torch.testing.assert_close(found[seen], law[seen], atol=1e-3, rtol=0)
        assert (found[~seen] < -79).all()


def test_scores_without_a_response_are_the_policy_s(server, case, reference):
    ids = [7, 99, 745 - 1]
    tilt, asked = {"tilt_weight": 2.0}, {"return_logprob": True, "token_ids_logprob": ids}
    answer = server.generate(case.prompts[2], tilt, 0, sampling={"temperature": 0.7}, **asked)
    logits, v = (rows[-1] for rows in reference(case.prompts[2]))
    found = [row[0] for row in answer["meta_info"]["output_token_ids_logprobs"][0]]
    torch.testing.assert_close(torch.tensor(found), (logits + 2.0 * v).log_softmax(-1)[ids], atol=1e-3, rtol=0)


def test_a_budget_is_spent(server, case, reference):
    prompt = case.prompts[2]
    tilt = {"tilt_kl_budget": 0.05}
    answer = server.generate(prompt, tilt, 8, sampling={"temperature": 1.3}, **ALL)
    base = (reference(prompt + answer["output_ids"])[0] / 1.3).log_softmax(-1)[len(prompt) - 1 : -1]
    policy = logprobs(answer)
    spent = torch.where(policy.exp() > 0, policy.exp() * (policy - base), 0.0).sum(-1)
    torch.testing.assert_close(spent, torch.full((8,), 0.05), atol=5e-4, rtol=0)


def test_the_prompt_s_logprobs_are_the_base_policy_s(server, case):
    """Asked for, they put all of the prompt's rows before the output head, in parts."""
    prompt = case.prompts[5]
    plain = server.generate(prompt, None, 4, logprob_start_len=0, **ALL)["meta_info"]
    for extra in ({"logprob_start_len": 0}, {}):
        answer = server.generate(prompt, {"tilt_weight": 8.0}, 12, **ALL, **extra)
        assert answer["output_ids"] == case.tokens[5, 8.0][:12]
        if extra:
            found = [row[0] for row in answer["meta_info"]["input_token_logprobs"][1:]]
            expected = [row[0] for row in plain["input_token_logprobs"][1:]]
            torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-4, rtol=0)


def test_a_grammar_s_mask_stays(server, case, reference):
    prompt = case.prompts[1]
    sampling = {"regex": "[a-m ]{30,40}", "temperature": 1.0}
    tilts = ({"tilt_weight": 0.0}, {"tilt_weight": 2.0})
    plain, tilted = (server.generate(prompt, tilt, 8, sampling=sampling, **ALL) for tilt in tilts)
    allowed = logprobs(plain)[0] > -1e4
    assert 5 < allowed.sum() < 300
    logits, v = (rows[len(prompt) - 1] for rows in reference(prompt))
    found, law = logprobs(tilted)[0], (logits + 2.0 * v)[allowed].log_softmax(-1)
    torch.testing.assert_close(found[allowed], law, atol=1e-3, rtol=0)
    assert (found[~allowed] < -1e4).all()


def test_preempted_rows_and_prompts_in_parts_equal_solo_runs(server, case):
    names = ("first", "reader", "first=0.5,reader=1")
    requests = [
        {"ids": case.prompts[i % 6], "max_new_tokens": 180}
        | ({"tilt": {"tilt_weight": WEIGHTS[i % 4] or 1.0, "tilt_scorer": names[i % 3]}} if i % 2 else {})
        for i in range(16)
    ]
    answers = server.together(requests)
    assert sum(answer["meta_info"]["num_retractions"] for answer in answers[1::2]) > 0
    for request, answer in zip(requests, answers, strict=True):
        assert answer["output_ids"] == server.generate(**request)["output_ids"]


BAD = [
    ({"tilt_weight": "much"}, {}, "tilt_weight"),
    ({"tilt_wait": 2.0}, {}, "tilt_wait"),
    ({"tilt_weight": 2.0, "tilt_scorer": "nobody"}, {}, "nobody"),
    ({"tilt_strategy": "blockwise", "tilt_k": 4}, {}, "tilt_strategy"),
    ({"tilt_kl_budget": 0.1}, {"top_p": 0.9, "temperature": 1.0}, "tilt_kl_budget"),
    ({"tilt_weight": 2.0}, {"beam_width": 3}, "beam_width"),
]


@pytest.mark.parametrize(("tilt", "sampling", "named"), BAD)
def test_a_bad_request_is_a_400_of_its_own(tilt, sampling, named, server, case):
    body = {"input_ids": case.prompts[0], "sampling_params": {"max_new_tokens": 4, **sampling, "custom_params": tilt}}
    status, answer = server.ask("POST", "/generate", body)
    assert status == 400
    assert named in answer["error"]["message"]
    status, answer = server.ask("POST", "/generate", body | {"stream": True})
    assert named in answer
    assert '"output_ids":[]' in answer or '"error"' in answer  # nothing was drawn for it


def test_a_scorer_whose_values_overflow_fails_its_request_alone(server, case):
    tilt = {"tilt_weight": 2.0, "tilt_scorer": "broken"}
    bad = {"input_ids": case.prompts[4], "sampling_params": {"max_new_tokens": 12, "custom_params": tilt}}
    good = {"ids": case.prompts[4], "tilt": {"tilt_weight": 2.0}, "max_new_tokens": NEW}
    with ThreadPoolExecutor(8) as pool:
        failed = [pool.submit(server.ask, "POST", "/generate", bad) for _ in range(4)]
        others = [pool.submit(server.generate, **good) for _ in range(4)]
    for status, answer in (one.result() for one in failed):
        assert (status, "finite" in answer["message"]) == (500, True)
    assert all(one.result()["output_ids"] == case.tokens[4, 2.0] for one in others)


def test_openai_s_routes(server, case):
    body = {"model": "any", "prompt": case.prompts[6], "temperature": 0, "max_tokens": 16, "ignore_eos": True}
    texts = {}
    for weight in WEIGHTS:
        status, answer = server.ask("POST", "/v1/completions", body | {"custom_params": {"tilt_weight": weight}})
        assert status == 200, answer
        texts[weight] = answer["choices"][0]["text"]
    tokenizer = AutoTokenizer.from_pretrained(case.model)
    for weight, text in texts.items():
        assert text == tokenizer.decode(case.tokens[6, weight][:16], skip_special_tokens=True)
    status, answer = server.ask("POST", "/v1/completions", body | {"custom_params": {"tilt_weight": "x"}})
    assert (status, "tilt_weight" in answer["message"]) == (400, True)


def test_each_route_that_carries_a_tilt_takes_it_beside(server, case):
    """The same text as by custom_params, another one than without."""
    short = {"temperature": 0, "max_tokens": 16, "ignore_eos": True}
    chat = short | CHAT | {"model": "any"}
    native = {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True}
    bodies = {
        "/v1/completions": short | {"model": "any", "prompt": case.prompts[6]},
        "/v1/chat/completions": chat,
        "/invocations": chat,
        "/generate": {"input_ids": case.prompts[6], "sampling_params": native},
        "/vertex_generate": {"instances": [{"text": "the harbour"}], "parameters": {"sampling_params": native}},
    }
    assert bodies.keys() == CARRY.keys()
    for path, body in bodies.items():
        deep = json.loads(json.dumps(body))
        inner = deep
        for step in CARRY[path]:
            inner = inner.setdefault(step, {})
        inner["tilt_weight"] = -8
        plain, by_params, beside = (texts(server, path, one) for one in (body, deep, body | {"tilt_weight": -8}))
        assert plain != by_params == beside, path


def texts(server, path, body):
    status, answer = server.ask("POST", path, body)
    assert status == 200, (path, answer)
    found = re.findall(r'"(?:text|content)": ("(?:[^"\\]|\\.)*")', json.dumps(answer))
    assert found, answer
    return found


CHAT = {"messages": [{"role": "user", "content": "the harbour"}]}
SHORT = {"stream": False, "options": {"num_predict": 4}}
DROP = {
    "/v1/responses": {"input": "the harbour", "max_output_tokens": 4},
    "/v1/messages": CHAT | {"max_tokens": 4},
    "/api/generate": SHORT | {"prompt": "the harbour"},
    "/api/chat": SHORT | CHAT,
}


def test_what_a_route_would_drop_is_a_400_that_names_it(server, case):
    tilt = {"tilt_weight": -8}
    nested = {"custom_params": tilt}
    bodies = {path: {"model": str(case.model)} | body for path, body in DROP.items()}
    asked = [(path, body | more) for path, body in bodies.items() for more in (tilt, nested)]
    asked += [("/api/generate", bodies["/api/generate"] | {"options": tilt})]
    asked += [("/v1/completions", {"model": "any", "prompt": case.prompts[0], "vllm_xargs": tilt})]
    asked += [("/generate", {"input_ids": case.prompts[0], **nested})]
    for path, body in asked:
        status, answer = server.ask("POST", path, body)
        assert (status, answer["error"]["param"]) == (400, "tilt_weight"), (path, answer)
        assert "custom_params" in answer["error"]["message"]
    for path, body in bodies.items():
        assert server.ask("POST", path, body)[0] == 200, path  # what asks for no tilt


BARE = """
import json, sys
from sglang.srt.entrypoints.engine import Engine
if __name__ == "__main__":
    engine = Engine(model_path=sys.argv[1], **json.loads(sys.argv[2]))
    sampling = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
    prompt = json.loads(sys.argv[3])
    plain = engine.generate(input_ids=prompt, sampling_params=sampling, return_logprob=True, top_logprobs_num=745)
    said = []
    for params in ({"tilt_weight": 2.0}, {"tilt_weight": 10**400}, {5: 1.0, "else": 2.0}):
        try:
            answer = engine.generate(input_ids=prompt, sampling_params=sampling | {"custom_params": params})
            said.append(answer["output_ids"])
        except Exception as error:
            said.append(str(error))
    print(json.dumps({"plain": plain, "said": said}), file=open(sys.argv[4], "w"))
    engine.shutdown()
"""


def test_without_scorers_a_tilt_is_refused_and_the_rest_has_the_same_bits(server, case, tmp_path):
    (tmp_path / "bare.py").write_text(BARE)
    arguments = [str(case.model), json.dumps(ARGUMENTS | SMALL), json.dumps(case.prompts[3]), str(tmp_path / "out")]
    command = [sys.executable, str(tmp_path / "bare.py"), *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "out").read_text())
    for name, said in zip(("PYENGINE_SCORERS", ""), found["said"], strict=False):
        assert isinstance(said, str)
        assert name in said
    assert found["said"][2] == found["plain"]["output_ids"]  # other processors' parameters, whatever their keys are
    server.ask("POST", "/flush_cache")
    answer = server.generate(case.prompts[3], {"tilt_weight": 0.0}, 8, **ALL)
    assert answer["output_ids"] == found["plain"]["output_ids"]
    assert torch.equal(logprobs(answer), logprobs(found["plain"]))


def blocks(language):
    """The code of docs/sglang.md."""
    return re.findall(
        rf"^```{language}\n(.*?)^```", (HERE.parents[1] / "docs" / "sglang.md").read_text(), re.DOTALL | re.MULTILINE
    )


def test_the_page_s_examples_do_what_it_says(server, tmp_path, capsys):
    offline, client = blocks("python")
    given = f"model, scorer = {str(pyengine.embedded('policy'))!r}, {str(pyengine.embedded('prefix'))!r}\n"
    offline = offline.replace("Engine(model_path=model)", f"Engine(model_path=model, **{ARGUMENTS!r})")
    (tmp_path / "offline.py").write_text(given + offline)
    command = [sys.executable, str(tmp_path / "offline.py")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    printed = "".join(line[2:] + "\n" for line in offline.splitlines() if line.startswith("# "))
    counted = re.search(r"tilted_tokens': (\d+)", done.stdout)
    assert int(counted[1]) > 20  # one more a request where the next step had begun before its end was seen
    assert re.sub(r"\d+}", "N}", printed) in re.sub(r"\d+}", "N}", done.stdout)
    code = client.replace(":30000", f":{server.port}").replace("helpful", "first")
    before = server.state()["tilted_tokens"]
    exec(compile(code, "docs/sglang.md", "exec"), {})
    assert capsys.readouterr().out.strip()
    assert server.state()["tilted_tokens"] > before
