"""Training of prefix scorers: the data, the losses against exact values, the runs, what the engine makes of them."""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import pyengine
from pyengine import Blockwise, Engine, InputError, PrefixScorer, SamplingParams, Tokenwise, cli, load_scorer
from pyengine.training import prefix, values
from pyengine.training.data import (
    Encoded,
    Example,
    encode,
    encode_all,
    read_examples,
    read_prompts,
    roll_out,
    write_examples,
)
from pyengine.training.prefix import PrefixTraining, Shuffled, split, train_prefix_scorer
from pyengine.training.values import Batch, Student, collate, expectation, read_prefixes, regression_loss, targets
from pyengine.worlds import reviews

PROMPT = "Review of the Harbour, a bakery:"
TOKENS = 8


def batch_of(items):
    return Batch(**collate(items))


@pytest.fixture(scope="module")
def small(model_dirs):
    """An engine on a small random model, and examples in its words."""
    engine = Engine.from_pretrained(model_dirs["llama"])
    return engine, words_examples(40)


def words_examples(count):
    """Examples over the words of the small models' tokenizer, with rewards that the words decide."""
    words = ("quick", "brown", "fox", "jumps", "over", "lazy", "dog", "box", "five", "jugs", "the")
    rng = random.Random(7)
    out = []
    for i in range(count):
        said = [rng.choice(words) for _ in range(rng.randint(1, 8))]
        reward = statistics.mean(len(w) for w in said) - 4 + said.count("the")
        out.append(Example(f"pack {words[i % 7]}", " " + " ".join(said), reward, where=f"example {i}"))
    return out


# Data


def jsonl(path, *records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def record(**changes):
    return {"prompt": PROMPT, "response": " The bread was lovely.", "reward": 0.5} | changes


def test_a_response_is_its_own_tokens_behind_the_prompts_and_one_eos(engine):
    text = " The bread was lovely."
    head, said = (engine.tokenizer(t).input_ids for t in (PROMPT, text))
    eos = engine.tokenizer.eos_token_id
    assert encode(engine, Example(PROMPT, text, 1.0)) == (head + said + [eos], len(head), 1.0, True, PROMPT)
    assert encode(engine, Example(PROMPT, text, 1.0, ended=False)).ids == head + said
    assert encode(engine, Example(PROMPT, text + "<|endoftext|>", 1.0)).ids == head + said + [eos]
    assert encode(engine, Example(PROMPT, text, 1.0, tokens=[*said, eos])).ids == [*head, *said, eos]


def test_nothing_merges_across_the_border(engine):
    """ "bakery" is fewer tokens than "bak" and "ery": the prompt's own ids stay."""
    found = encode(engine, Example("Review of the Harbour, a bak", "ery.", 0.0))
    assert found.ids[: found.start] == engine.tokenizer("Review of the Harbour, a bak").input_ids
    assert engine.tokenizer.decode(found.ids[found.start :], skip_special_tokens=True) == "ery."


def test_sentencepiece_keeps_its_spaces(sentencepiece_tokenizer, model_dirs):
    """A response whose first word it would give another space is refused, not changed."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dirs["llama"])
    engine = Engine(model, sentencepiece_tokenizer)
    found = encode(engine, Example("the quick", " brown fox", 0.0))
    assert found.ids == [*sentencepiece_tokenizer("the quick brown fox").input_ids, 0]
    with pytest.raises(InputError, match="cannot spell this response behind its prompt"):
        encode(engine, Example("the qui", "ck brown fox", 0.0))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "bad.jsonl:2: not JSON"),
        ("[1, 2]", "bad.jsonl:2: must be a JSON object"),
        ({"prompt": PROMPT, "response": " Fine."}, "bad.jsonl:2: lacks 'reward'"),
        ({}, "bad.jsonl:2: lacks 'prompt' and 'response' and 'reward'"),
        (record(response=3), "bad.jsonl:2: 'response' must be a string, got 3"),
        (record(reward=math.nan), "bad.jsonl:2: the reward is nan"),
        (record(reward=-math.inf), "bad.jsonl:2: the reward is -inf"),
        (record(reward="high"), "bad.jsonl:2: the reward must be a number, got 'high'"),
        (record(reward=True), "bad.jsonl:2: the reward must be a number, got True"),
        (record(response=""), "bad.jsonl:2: the response is empty"),
        (record(tokens=[]), "bad.jsonl:2: the response is empty"),
        (record(prompt=" "), "bad.jsonl:2: the prompt is empty"),
        (record(response=" very" * 600), r"bad.jsonl:2: prompt and response have \d+ \+ \d{3,} tokens, .* reads 512"),
        (record(finish_reason="tired"), "bad.jsonl:2: finish_reason must be"),
        (record(response=" A.<|endoftext|> B."), "bad.jsonl:2: the response has an EOS at token"),
        (record(response=" A.<|endoftext|>", finish_reason="length"), 'is "length", but the response ends with an EOS'),
        (record(tokens=[745]), "token 745 is not in the vocabulary of 745 tokens"),
        (record(tokens=[5, 0]), "its tokens do not spell its response: they are another tokenizer's"),
    ],
)
def test_a_bad_line_is_named(engine, tmp_path, line, message):
    with pytest.raises(InputError, match=message) as error:
        read_examples(jsonl(tmp_path / "bad.jsonl", record(), line, "", record()), engine)
    assert "\n" not in str(error.value)


def test_all_bad_lines_are_told_together(engine, tmp_path):
    lines = [record(), *["{"] * 6, record(reward=math.nan)]
    with pytest.raises(InputError, match=r"^7 of 8 lines cannot be used: .*:2: not JSON.*:6: not JSON.*; and 2 more$"):
        read_examples(jsonl(tmp_path / "bad.jsonl", *lines), engine)
    with pytest.raises(InputError, match=r"^2 of 3 examples cannot be used: a: .*; b: "):
        encode_all(engine, [Example(PROMPT, "", 0.0, where=w) for w in "ab"] + [Example(PROMPT, " Yes.", 0.0)])
    with pytest.raises(InputError, match="no examples"):
        read_examples(jsonl(tmp_path / "empty.jsonl", ""), engine)
    with pytest.raises(InputError, match="No such file"):
        read_examples(tmp_path / "none.jsonl", engine)


def test_lines_are_read_as_they_are(engine, tmp_path):
    lines = [record(), record(response=" Fine.<|endoftext|>"), record(response=" I went", finish_reason="length")]
    found = read_examples(jsonl(tmp_path / "good.jsonl", *lines), engine)
    assert [(e.response, e.ended) for e in found] == [(r["response"], i < 2) for i, r in enumerate(lines)]
    assert [e.where for e in found] == [f"{tmp_path}/good.jsonl:{i}" for i in (1, 2, 3)]
    assert [i.ids[-1] == engine.tokenizer.eos_token_id for i in encode_all(engine, found)] == [True, True, False]


def test_prompts_from_a_file(tmp_path):
    assert read_prompts(jsonl(tmp_path / "p.jsonl", {"prompt": "a"}, "", {"prompt": "b"})) == ["a", "b"]
    with pytest.raises(InputError, match=r"2 of 3 lines cannot be used: .*:1: needs a string.*:3: not JSON"):
        read_prompts(jsonl(tmp_path / "q.jsonl", {"text": "a"}, {"prompt": "b"}, "}"))


def test_roll_outs_are_the_base_policys_and_survive_the_disk(engine, tmp_path):
    engine.set_scorer(reviews.length)
    asked = [*reviews.prompts(2), reviews.prompts(1)[0]]  # one prompt again
    found = roll_out(engine, asked, reviews.sentiment, per_prompt=2, max_tokens=24, seed=3)
    assert [p.name for p in engine.parts] == ["length"]
    by_seed = {}
    for prompt in reviews.prompts(2):
        sampling = [SamplingParams(max_tokens=24, seed=3 + j) for j in range(4)]
        by_seed[prompt] = engine.generate([prompt] * 4, sampling=sampling)
    first, second = reviews.prompts(2)
    wanted = by_seed[first][:2] + by_seed[second][:2] + by_seed[first][2:]
    assert [e.tokens for e in found] == [r.tokens for r in wanted]
    assert [e.reward for e in found] == pytest.approx([reviews.sentiment_of(r.text) for r in wanted], abs=1e-6)
    assert [e.ended for e in found] == [r.finish_reason == "stop" for r in wanted]
    assert {e.ended for e in found} == {True, False}
    write_examples(tmp_path / "r.jsonl", found)
    again = read_examples(tmp_path / "r.jsonl", engine)
    assert encode_all(engine, again) == encode_all(engine, found)


def test_a_reward_that_is_not_finite_names_prompt_and_sample(engine):
    def fails_on_the_second(prompts, completions):
        return [math.nan if i else 0.0 for i in range(len(completions))]

    with pytest.raises(InputError, match=r"roll-out 1 of prompt 'Review of the Harbour.*the reward is nan"):
        roll_out(engine, [PROMPT], fails_on_the_second, per_prompt=2, max_tokens=1)
    assert engine.parts == []


# Losses


class World:
    """A random Llama over eight tokens whose responses end at an EOS or after `horizon` tokens: all of them.

    Token 0 is the EOS. leaves: every response there is; reward: a random number for each; value: V* of every prefix,
    by V* = reward at a leaf and the base policy's mean of V* one token later otherwise.
    """

    def __init__(self, horizon):
        vocabulary = {"<eos>": 0} | {f"w{i}": i for i in range(1, TOKENS)}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w1"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        torch.manual_seed(3)
        config = LlamaConfig(
            vocab_size=TOKENS,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=8,
            eos_token_id=0,
            bos_token_id=None,
        )
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(8)
        self.engine = Engine(model, PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>"))
        self.horizon, self.prompt = horizon, "w1 w2"
        self.leaves = list(self._leaves(()))
        rng = random.Random(5)
        self.reward = {leaf: rng.uniform(-1, 1) for leaf in self.leaves}
        self.value, self.probability = dict(self.reward), {(): 1.0}
        self._solve(())

    def _leaves(self, prefix):
        if len(prefix) == self.horizon or prefix[-1:] == (0,):
            yield prefix
        else:
            for z in range(TOKENS):
                yield from self._leaves((*prefix, z))

    @torch.inference_mode()
    def _solve(self, prefix):
        logits = self.engine.model(torch.tensor([[1, 2, *prefix]])).logits[0, -1]
        following = logits.double().softmax(-1).tolist()
        self.value[prefix] = 0.0
        for z, p in enumerate(following):
            child = (*prefix, z)
            self.probability[child] = self.probability[prefix] * p
            if child not in self.reward:
                self._solve(child)
            self.value[prefix] += p * self.value[child]

    def example(self, leaf):
        text = self.engine.tokenizer.decode([1, 2, *leaf], skip_special_tokens=True).removeprefix("w1 w2")
        return Example(self.prompt, text, self.reward[leaf], list(leaf))  # a cut at the horizon ends it there

    def examples(self):
        return [self.example(leaf) for leaf in self.leaves]


@pytest.fixture(scope="module")
def world():
    return World(3)


def student_of(engine, mean=0.0, width=32, seed=0):
    """A student with random weights everywhere."""
    torch.manual_seed(seed)
    student = Student(PrefixScorer(engine.policy.hidden_size, engine.policy.vocab_size, width), mean)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return student


def test_the_enumeration_is_whole(world):
    assert len(world.leaves) == 1 + 7 + 49 * TOKENS
    assert sum(world.probability[leaf] for leaf in world.leaves) == pytest.approx(1)
    mean = sum(world.probability[leaf] * world.reward[leaf] for leaf in world.leaves)
    assert world.value[()] == pytest.approx(mean)


def test_the_mean_gradient_of_fudge_is_that_of_the_target_loss(world):
    """Lemma C.1 of Controlled Decoding, over all responses of the world; the losses themselves differ."""
    student, items = student_of(world.engine), encode_all(world.engine, world.examples())
    batch = batch_of(items)
    p = read_prefixes(world.engine.model, batch, -1, logits=False)
    fudge = targets("fudge", student, p, batch.reward, batch.ended)
    exact = torch.tensor([world.value[leaf[: t + 1]] for leaf in world.leaves for t in range(len(leaf))])
    weight = torch.tensor([world.probability[leaf] for leaf in world.leaves]).float()
    gradients, losses = [], []
    for target in (fudge, exact):
        value = student(p.before, p.token)
        # regression_loss is a mean over responses, so scaled errors make it the expectation under the base policy.
        scale = (weight * len(weight)).sqrt()[p.response]
        loss = regression_loss(scale * value, scale * target, p.response, batch.length, "sum")
        gradients.append(torch.autograd.grad(loss, list(student.parameters())))
        losses.append(loss.item())
    assert abs(losses[0] - losses[1]) > 0.01
    for one, other in zip(*gradients, strict=True):
        assert one.abs().max() > 1e-4
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_cd_q_reaches_the_exact_values(tmp_path):
    """Trained on every response once, which is no policy's distribution: V is V* within .02 at every prefix.

    FUDGE on the same data finds the mean reward over that data instead, which is elsewhere.
    """
    world = World(2)
    prefixes = [leaf[: t + 1] for leaf in world.leaves for t in range(len(leaf))]
    exact = torch.tensor([world.value[y] for y in prefixes])
    inner = torch.tensor([y not in world.reward for y in prefixes])
    through = {y: [world.reward[leaf] for leaf in world.leaves if leaf[: len(y)] == y] for y in prefixes}
    uniform = torch.tensor([statistics.mean(through[y]) for y in prefixes])
    assert (uniform - exact)[inner].abs().max() > 0.2
    p = read_prefixes(world.engine.model, batch_of(encode_all(world.engine, world.examples())), -1, logits=False)
    run = {
        "epochs": 300,
        "lr": 5e-3,
        "batch": 57,
        "width": 256,
        "weight_decay": 0.0,
        "held_out": 0.0,
        "checkpoint_every": 10_000,
    }
    for method, wanted in (("cd-q", exact), ("fudge", uniform)):
        train_prefix_scorer(world.engine, world.examples(), tmp_path / method, PrefixTraining(method, **run))
        with torch.inference_mode():
            found = load_scorer(tmp_path / method).values_at(p.before, p.token)
        assert (found - wanted).abs().max() < 0.02, method


def test_a_target_is_the_reward_only_where_a_response_ended(world):
    """CD-Q by hand, and FUDGE's return of a response that was cut off."""
    student = student_of(world.engine)
    cut, whole = (3, 4), (5, 6, 0)
    text = world.engine.tokenizer.decode([1, 2, *cut]).removeprefix("w1 w2")
    items = encode_all(world.engine, [Example("w1 w2", text, 9.0, list(cut), ended=False), world.example(whole)])
    batch = batch_of(items)
    p = read_prefixes(world.engine.model, batch, -1, logits=True)
    with torch.inference_mode():
        ahead = []
        for prefix_ in ((3,), (3, 4), (5,), (5, 6)):
            output = world.engine.model(torch.tensor([[1, 2, *prefix_]]), output_hidden_states=True)
            state = output.hidden_states[-1][0, -1:].expand(TOKENS, -1)
            q = student(state, torch.arange(TOKENS))
            ahead.append((output.logits[0, -1].softmax(-1) * q).sum().item())
        q = targets("cd-q", student, p, batch.reward, batch.ended)
        fudge = targets("fudge", student, p, batch.reward, batch.ended)
    r = world.reward[whole]
    assert q.tolist() == pytest.approx([*ahead, r], abs=1e-5)
    assert fudge.tolist() == pytest.approx([ahead[1]] * 2 + [r] * 3, abs=1e-5)


def test_chunks_of_the_vocabulary_change_nothing(world, monkeypatch):
    student = student_of(world.engine)
    p = read_prefixes(world.engine.model, batch_of(encode_all(world.engine, world.examples()[:50])), -1, logits=True)
    whole = student.expected(p.after, p.logits)
    monkeypatch.setattr(values, "CHUNK", 3 * TOKENS)
    torch.testing.assert_close(student.expected(p.after, p.logits), whole)


def test_impossible_tokens_do_not_count():
    logits = torch.tensor([[0.0, 0.0, -math.inf]])
    assert expectation(logits, torch.tensor([[1.0, 3.0, -math.inf]])).item() == 2.0
    assert expectation(logits, torch.tensor([[1.0, 3.0, math.nan]])).item() == 2.0


def test_the_finished_scorer_is_the_student(world):
    student, hidden, token = student_of(world.engine), torch.randn(9, 64), torch.arange(9) % TOKENS
    with torch.inference_mode():
        wanted = student(hidden, token)
        torch.testing.assert_close(student.finished().values_at(hidden, token), wanted)


def test_padding_and_company_change_no_loss(small):
    engine, examples = small
    items, student = encode_all(engine, examples[:6]), student_of(engine)

    def loss_of(chosen, method, reduction):
        batch = batch_of(chosen)
        p = read_prefixes(engine.model, batch, -1, logits=True)
        target = targets(method, student, p, batch.reward, batch.ended)
        return regression_loss(student(p.before, p.token), target, p.response, batch.length, reduction).item()

    for method in ("fudge", "cd-q"):
        for reduction in ("sum", "token_mean"):
            alone = [loss_of([item], method, reduction) for item in items]
            assert loss_of(items, method, reduction) == pytest.approx(statistics.mean(alone), rel=1e-4)
    other_eos = [items[0]._replace(ids=[*items[0].ids[:-1], 5])]
    assert loss_of(other_eos, "fudge", "sum") != pytest.approx(loss_of(items[:1], "fudge", "sum"), rel=1e-3)


@torch.inference_mode()
def test_a_batch_reads_what_each_response_alone_does(model_dir, monkeypatch):
    """Hidden states and logits of ragged prompts and responses, against one unpadded pass for each."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    monkeypatch.setattr(values, "PASS", 0)
    rng = random.Random(1)
    sizes = [(rng.randint(1, 9), rng.randint(1, 20)) for _ in range(11)]  # two passes
    items = [Encoded([rng.randrange(1, 320) for _ in range(a + b)], a, 0.0, True, "") for a, b in sizes]
    p = read_prefixes(model, batch_of(items), 1, logits=True)
    assert p.response.tolist() == [i for i, (_, b) in enumerate(sizes) for _ in range(b)]
    assert p.token.tolist() == [token for item in items for token in item.ids[item.start :]]
    assert p.last.tolist() == [t == b - 1 for _, b in sizes for t in range(b)]
    for i, (a, b) in enumerate(sizes):
        output = model(torch.tensor([items[i].ids]), output_hidden_states=True)
        hidden, mine = output.hidden_states[1][0], p.response == i
        for found, wanted in (
            (p.before, hidden[a - 1 : a + b - 1]),
            (p.after, hidden[a:]),
            (p.logits, output.logits[0, a:]),
        ):
            torch.testing.assert_close(found[mine], wanted, rtol=1e-3, atol=1e-3)


def test_token_mean_is_the_sum_over_the_length():
    value, target = torch.tensor([1.0, 3.0, 5.0]), torch.zeros(3)
    response, length = torch.tensor([0, 0, 1]), torch.tensor([2, 1])
    assert regression_loss(value, target, response, length, "sum").item() == (0.5 + 4.5 + 12.5) / 2
    assert regression_loss(value, target, response, length, "token_mean").item() == ((0.5 + 4.5) / 2 + 12.5) / 2


# Runs


QUICK = PrefixTraining(epochs=2, batch=8, held_out=0.2, width=16)


def weights(directory):
    return load_file(Path(directory) / "model.safetensors")


def assert_same(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], **(tolerance or {"rtol": 0, "atol": 0}))


def test_an_epoch_is_every_example_once_in_whole_batches():
    order = list(Shuffled(10, 4, 1, lambda: 0))
    assert len(order) == 12
    assert sorted(order[:10]) == list(range(10))
    assert order == list(Shuffled(10, 4, 1, lambda: 0)) != list(Shuffled(10, 4, 1, lambda: 1))
    assert len(list(Shuffled(3, 8, 0, lambda: 0))) == 8


def test_whole_prompts_are_held_out(small):
    engine, examples = small
    items = encode_all(engine, examples)
    training, held_out, by = split(items, 0.2, seed=1)
    assert by == "prompt"
    assert len(training) + len(held_out) == 40
    assert held_out
    assert not {i.prompt for i in training} & {i.prompt for i in held_out}
    one = [item for item in items if item.prompt == items[0].prompt]
    training, held_out, by = split(one, 0.3, seed=1)
    assert by == "response"
    assert 0 < len(held_out) < len(training)
    assert split(items, 0.0, 0)[1] == []


@pytest.mark.parametrize("method", ["fudge", "cd-q"])
def test_accumulation_changes_nothing_and_runs_repeat(small, tmp_path, method):
    engine, examples = small
    for name, parts in (("a", 1), ("b", 1), ("c", 4)):
        settings = PrefixTraining(method, epochs=2, batch=8, held_out=0.0, width=16, accumulate=parts)
        train_prefix_scorer(engine, examples, tmp_path / name, settings)
    assert_same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert_same(weights(tmp_path / "a"), weights(tmp_path / "c"), rtol=1e-3, atol=1e-4)


def test_what_a_run_leaves(small, tmp_path):
    engine, examples = small
    settings = PrefixTraining(epochs=30, batch=8, held_out=0.2, width=16, layer=1)
    report = train_prefix_scorer(engine, examples, tmp_path / "scorer", settings)
    assert sorted(f.name for f in (tmp_path / "scorer").iterdir()) == [
        "config.json",
        "model.safetensors",
        "report.json",
    ]
    assert json.loads((tmp_path / "scorer" / "report.json").read_text()) == report
    assert report["held_out"]["responses"] + report["training_responses"] == len(examples)
    assert sum(part["prefixes"] for part in report["held_out"]["calibration"]) == report["held_out"]["prefixes"]
    assert report["held_out"]["correlation"] > 0.3
    scorer = load_scorer(tmp_path / "scorer")
    assert (scorer.layer, scorer.name, scorer.width) == (1, "scorer", 16)
    engine.set_scorer(tmp_path / "scorer")
    try:
        (result,) = engine.generate("pack my", Tokenwise(2.0), SamplingParams(max_tokens=5, seed=0))
    finally:
        engine.set_scorer(None)
    assert math.isfinite(result.reward)


def test_the_report_by_hand(small):
    """A scorer whose Q is a constant of the token; R^2 and calibration recomputed in plain Python."""
    engine, examples = small
    items = encode_all(engine, examples)
    scorer = PrefixScorer(engine.policy.hidden_size, engine.policy.vocab_size, 4)
    with torch.no_grad():
        scorer.head.weight.zero_()
        scorer.head.bias.copy_(torch.arange(engine.policy.vocab_size) / 100)
    cut = items[0]._replace(ended=False)
    report = prefix.prefix_report(engine.model, scorer, [*items, cut])
    pairs = [(token / 100, item.reward) for item in items for token in item.ids[item.start :]]
    v, r = zip(*pairs, strict=True)
    assert (report["responses"], report["cut_off"], report["prefixes"]) == (40, 1, len(pairs))
    rest = sum((b - a) ** 2 for a, b in pairs)
    assert report["r2"] == pytest.approx(1 - rest / (statistics.pvariance(r) * len(r)), abs=1e-5)
    assert report["correlation"] == pytest.approx(statistics.correlation(v, r), abs=1e-5)
    assert report["slope"] == pytest.approx(statistics.linear_regression(v, r).slope, abs=1e-5)
    mean = statistics.mean(part["value"] * part["prefixes"] for part in report["calibration"]) * 10 / len(pairs)
    assert mean == pytest.approx(statistics.mean(v), abs=1e-5)
    nothing = prefix.prefix_report(engine.model, scorer, [])
    assert (nothing["r2"], nothing["calibration"]) == (None, [])


INTERRUPTED = {"method": "cd-q", "epochs": 3, "batch": 8, "held_out": 0.0, "width": 16, "checkpoint_every": 3}
KILLED = f"""
import os, signal, sys
import torch
from transformers import TrainerCallback
from pyengine import Engine
from pyengine.training.data import read_examples
from pyengine.training.prefix import PrefixTraining, train_prefix_scorer

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 8:
            os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(1)
engine = Engine.from_pretrained(sys.argv[1])
settings = PrefixTraining(**{INTERRUPTED!r})
train_prefix_scorer(engine, read_examples(sys.argv[2], engine), sys.argv[3], settings, callbacks=[Kill()])
"""


def test_a_killed_run_resumes_to_the_same_bits(small, model_dirs, tmp_path):
    """Killed in the second of three epochs, two steps after a checkpoint; the data goes on where it stopped."""
    engine, out, data = small[0], tmp_path / "killed", tmp_path / "data.jsonl"
    write_examples(data, small[1])
    examples, settings = read_examples(data, engine), PrefixTraining(**INTERRUPTED)
    command = [sys.executable, "-c", KILLED, str(model_dirs["llama"]), str(data), str(out)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    assert not (out / "model.safetensors").exists()
    assert sorted(p.name for p in (out / "checkpoints").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    (out / "checkpoints" / "checkpoint-9").mkdir()  # as a run that is killed while it writes one leaves it
    with pytest.raises(InputError, match="holds checkpoints of an earlier run"):
        train_prefix_scorer(engine, examples, out, settings)
    with pytest.raises(InputError, match="of a run with another lr"):
        train_prefix_scorer(engine, examples, out, PrefixTraining(**INTERRUPTED | {"lr": 1.0}), resume=True)
    with pytest.raises(InputError, match="of a run with another data and examples"):
        train_prefix_scorer(engine, examples[1:], out, settings, resume=True)
    report = train_prefix_scorer(engine, examples, out, settings, resume=True)
    assert report["steps"] == 15
    train_prefix_scorer(engine, examples, tmp_path / "whole", settings)
    assert_same(weights(out), weights(tmp_path / "whole"))
    assert not (out / "checkpoints").exists()


def test_two_processes_give_what_one_gives(small, model_dirs, tmp_path):
    """Through `accelerate launch` on CPUs; 37 examples do not divide into batches of 8."""
    data = tmp_path / "data.jsonl"
    write_examples(data, words_examples(37))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--main_process_port", "0", "-m", "pyengine", "train", "scorer", "--method", "cd-q"]
    options = ["--data", str(data), "--model", str(model_dirs["llama"]), "--epochs", "2", "--batch", "8"]
    options += ["--width", "16", "--held-out", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, *options, "--out", str(tmp_path / "two")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    settings = PrefixTraining("cd-q", epochs=2, batch=8, width=16, held_out=0.0)
    report = train_prefix_scorer(small[0], read_examples(data, small[0]), tmp_path / "one", settings)
    both = json.loads((tmp_path / "two" / "report.json").read_text())
    assert (both["processes"], both["steps"], both["data"]) == (2, report["steps"], report["data"])
    assert_same(weights(tmp_path / "one"), weights(tmp_path / "two"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "ppo"}, "method must be fudge or cd-q, got 'ppo'"),
        ({"reduction": "mean"}, "reduction must be sum or token_mean"),
        ({"epochs": 0}, "epochs must be a whole number of at least 1"),
        ({"lr": math.nan}, "lr must be a finite number"),
        ({"held_out": 1.0}, "held_out must be a finite number in 0 .. 0.9"),
        ({"layer": 9}, r"reads layer 9, .* has 4"),
        ({"batch": 6, "accumulate": 4}, "make it a multiple of 4"),
    ],
)
def test_settings_that_cannot_be(small, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        train_prefix_scorer(*small, tmp_path / "no", PrefixTraining(**changes))
    assert not (tmp_path / "no").exists()


def test_a_loss_that_is_not_finite_stops_the_run(small, tmp_path):
    settings = PrefixTraining(epochs=20, batch=8, lr=1e20, held_out=0.0)
    with pytest.raises(InputError, match=r"a loss of (nan|inf) at step \d+; lower lr"):
        train_prefix_scorer(*small, tmp_path / "no", settings)


def test_bf16_trains_close_to_fp32(small, tmp_path):
    for name, bf16 in (("fp32", False), ("bf16", True)):
        train_prefix_scorer(*small, tmp_path / name, PrefixTraining(**vars(QUICK) | {"bf16": bf16}))
    one, other = weights(tmp_path / "fp32"), weights(tmp_path / "bf16")
    assert {w.dtype for w in other.values()} == {torch.float32}
    assert any(not torch.equal(one[name], other[name]) for name in one)
    assert_same(one, other, rtol=0.1, atol=0.02)


# The command line, and what the engine makes of it


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs `pyengine ARGUMENTS` in this process: (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["pyengine", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return end.value.code or 0, out, err

    return call


@pytest.mark.parametrize("method", ["fudge", "cd-q"])
def test_a_scorer_from_the_command_line_raises_the_exact_sentiment(run, engine, tmp_path, method):
    """1,200 roll-outs, then 96 prompts: the mean paired gain in exact sentiment is over three standard errors."""
    out = tmp_path / "mine"
    options = ("--rollouts", 1200, "--reward", "sentiment", "--epochs", 4, "--out", out)
    code, printed, err = run("train", "scorer", "--method", method, *options)
    assert (code, err) == (0, "")
    assert "R², correlation" in printed
    assert json.loads((out / "report.json").read_text())["held_out"]["r2"] > 0.3
    prompts, sampling = reviews.prompts(96), SamplingParams(seed=5)
    base = [reviews.sentiment_of(r.text) for r in engine.generate(prompts, sampling=sampling)]
    engine.set_scorer(out)
    for strategy in (Tokenwise(4.0), Blockwise(4, 16)):
        found = [reviews.sentiment_of(r.text) for r in engine.generate(prompts, strategy, sampling)]
        gain = [a - b for a, b in zip(found, base, strict=True)]
        assert statistics.mean(gain) > 3 * statistics.stdev(gain) / len(gain) ** 0.5, strategy
    code, printed, _ = run(
        "generate", PROMPT, "--scorer", out, "--strategy", "tokenwise", "--seed", 1, "--max-tokens", 9
    )
    assert code == 0
    assert "(exact)" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give --data FILE.jsonl, or --rollouts N"),
        (("--data", "x.jsonl", "--rollouts", 3), "give --data FILE.jsonl, or --rollouts N"),
        (("--data", "x.jsonl", "--reward", "length"), "--reward is for --rollouts"),
        (("--rollouts", 3), "--rollouts needs --reward"),
        (("--rollouts", 3, "--reward", "length", "--model", "m"), "need --prompts"),
        (("--rollouts", 0, "--reward", "length"), "--rollouts must be a whole number of at least 1"),
        (("--rollouts", 3, "--reward", "/no/such/scorer"), "scorer /no/such/scorer: no such directory"),
        (("--data", "/no/such.jsonl"), "/no/such.jsonl: No such file"),
        (("--data", "x.jsonl", "--method", "ppo"), "method must be fudge or cd-q"),
    ],
)
def test_bad_options_are_one_line(run, tmp_path, options, message):
    code, out, err = run("train", "scorer", "--out", tmp_path / "o", *options)
    assert (code, out) == (2, "")
    assert err.startswith("pyengine: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_embedded_scorers_are_no_worse_for_it():
    """The stored format is unchanged: the embedded prefix scorer still loads and reads the last layer."""
    scorer = load_scorer(pyengine.embedded("prefix"))
    assert (scorer.kind, scorer.layer, scorer.vocab_size) == ("prefix", -1, 745)
