"""What prefixes are regressed on, against a world whose every response is enumerated."""

from __future__ import annotations

import math
import random
import statistics

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pyengine import Engine, PrefixScorer, load_scorer
from pyengine.training import values
from pyengine.training.data import Encoded, Example, encode_all
from pyengine.training.prefix import PrefixTraining, train_prefix_scorer
from pyengine.training.values import Batch, Student, collate, expectation, read_prefixes, regression_loss, targets

TOKENS = 8


def batch_of(items):
    return Batch(**collate(items))


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


def student_of(engine, mean=0.0, width=32, seed=0, drawn=None):
    """A student with random weights everywhere."""
    torch.manual_seed(seed)
    student = Student(PrefixScorer(engine.policy.hidden_size, engine.policy.vocab_size, width), mean, drawn)
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
    p = read_prefixes(world.engine.model, batch, -1, "fudge")
    fudge = targets("fudge", student, p, batch.reward)
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
    p = read_prefixes(world.engine.model, batch_of(encode_all(world.engine, world.examples())), -1)
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
    with torch.inference_mode():
        ahead = []
        for prefix_ in ((3,), (3, 4), (5,), (5, 6)):
            output = world.engine.model(torch.tensor([[1, 2, *prefix_]]), output_hidden_states=True)
            state = output.hidden_states[-1][0, -1:].expand(TOKENS, -1)
            q = student(state, torch.arange(TOKENS))
            ahead.append((output.logits[0, -1].softmax(-1) * q).sum().item())
        q, fudge = (
            targets(method, student, read_prefixes(world.engine.model, batch, -1, method), batch.reward)
            for method in ("cd-q", "fudge")
        )
    r = world.reward[whole]
    assert q.tolist() == pytest.approx([*ahead, r], abs=1e-5)
    assert fudge.tolist() == pytest.approx([ahead[1]] * 2 + [r] * 3, abs=1e-5)


def test_chunks_of_the_vocabulary_change_nothing(world, monkeypatch):
    student = student_of(world.engine)
    p = read_prefixes(world.engine.model, batch_of(encode_all(world.engine, world.examples()[:50])), -1, "cd-q")
    whole = student.expected(p.after[p.ahead], p.logits)
    monkeypatch.setattr(values, "CHUNK", 3 * TOKENS)
    torch.testing.assert_close(student.expected(p.after[p.ahead], p.logits), whole)


def test_impossible_tokens_do_not_count():
    logits = torch.tensor([[0.0, 0.0, -math.inf]])
    assert expectation(logits, torch.tensor([[1.0, 3.0, -math.inf]])).item() == 2.0
    assert expectation(logits, torch.tensor([[1.0, 3.0, math.nan]])).item() == 2.0


@pytest.mark.parametrize("drawn", [None, [1, 4, 5]])
def test_the_finished_scorer_is_the_student(world, drawn):
    """Whether its head has all tokens or those that were drawn: the others have what all share."""
    student = student_of(world.engine, drawn=None if drawn is None else torch.tensor(drawn))
    hidden, token, logits = torch.randn(9, 64), torch.arange(9) % TOKENS, torch.randn(9, TOKENS)
    with torch.inference_mode():
        wanted, expected, shared = student(hidden, token), student.expected(hidden, logits), student.shared
        assert student.scorer.head.out_features == (TOKENS if drawn is None else 3)
        scorer = student.finished()
        torch.testing.assert_close(scorer.values_at(hidden, token), wanted)
        torch.testing.assert_close((logits.softmax(-1) * scorer.values({-1: hidden})).sum(-1), expected)
        if drawn:
            others = torch.tensor([t not in drawn for t in token.tolist()])
            torch.testing.assert_close(wanted[others], shared(scorer.features(hidden))[others, 0])


@torch.inference_mode()
def test_a_batch_reads_what_each_response_alone_does(model_dir, monkeypatch):
    """Hidden states and logits of ragged prompts and responses, against one unpadded pass for each."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    monkeypatch.setattr(values, "PASS", 0)
    rng = random.Random(1)
    sizes = [(rng.randint(1, 9), rng.randint(1, 20)) for _ in range(11)]  # two passes
    items = [Encoded([rng.randrange(1, 320) for _ in range(a + b)], a, 0.0, True, "") for a, b in sizes]
    items[3] = items[3]._replace(ended=False)
    p = read_prefixes(model, batch_of(items), 1, "cd-q")
    assert p.ahead.tolist() == [t < b - 1 or i == 3 for i, (_, b) in enumerate(sizes) for t in range(b)]
    assert p.response.tolist() == [i for i, (_, b) in enumerate(sizes) for _ in range(b)]
    assert p.token.tolist() == [token for item in items for token in item.ids[item.start :]]
    assert p.last.tolist() == [t == b - 1 for _, b in sizes for t in range(b)]
    for i, (a, b) in enumerate(sizes):
        output = model(torch.tensor([items[i].ids]), output_hidden_states=True)
        hidden, mine, after = output.hidden_states[1][0], p.response == i, output.logits[0, a:]
        torch.testing.assert_close(
            p.logits[p.response[p.ahead] == i], after if i == 3 else after[:-1], rtol=1e-3, atol=1e-3
        )
        for found, wanted in (
            (p.before, hidden[a - 1 : a + b - 1]),
            (p.after, hidden[a:]),
        ):
            torch.testing.assert_close(found[mine], wanted, rtol=1e-3, atol=1e-3)


def test_token_mean_is_the_sum_over_the_length():
    value, target = torch.tensor([1.0, 3.0, 5.0]), torch.zeros(3)
    response, length = torch.tensor([0, 0, 1]), torch.tensor([2, 1])
    assert regression_loss(value, target, response, length, "sum").item() == (0.5 + 4.5 + 12.5) / 2
    assert regression_loss(value, target, response, length, "token_mean").item() == ((0.5 + 4.5) / 2 + 12.5) / 2
