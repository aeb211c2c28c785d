"""A model is its owner's between passes: what the engine changes of it, what it keeps of it, and who waits for whom."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import peft
import pytest
import torch
import transformers

import pyengine
from pyengine import (
    BestOfK,
    Blockwise,
    Engine,
    InputError,
    PrefixScorer,
    RequestError,
    SamplingParams,
    Tokenwise,
    attention,
)
from pyengine.attention import NAME
from pyengine.scorers import RewardModel

LONG = "the quick brown fox " * 18  # more than a page of 64 tokens
SAMPLING = SamplingParams(max_tokens=9, seed=3)


def load(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def tokenizer_of(directory):
    return transformers.AutoTokenizer.from_pretrained(directory)


def judge_of(tokenizer):
    torch.manual_seed(3)
    sizes = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_labels=1, pad_token_id=0)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return RewardModel(model, tokenizer, "judge")


def fused_step(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def moving_average(model):
    for parameter in model.parameters():
        parameter.data.mul_(0.7)


def numpy_view(model):
    weight = next(p for n, p in model.named_parameters() if "down_proj" in n)
    weight.detach().numpy()[:] *= -1


def forward_hook(model):
    layer = next(m for n, m in model.named_modules() if n.endswith("layers.0.mlp"))
    layer.register_forward_hook(lambda module, given, output: 0.3 * output)


def adapters(model):
    """Two LoRA adapters in place, the first of them active."""
    config = peft.LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    peft.inject_adapter_in_model(config, model, "one")
    peft.inject_adapter_in_model(config, model, "two")
    switch(model, lambda layer: layer.set_adapter("one"))


def switch(model, change):
    for module in model.modules():
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            change(module)


CHANGES = {
    "a fused step of an optimizer": fused_step,
    "a write through .data": moving_average,
    "a write through a NumPy view": numpy_view,
    "a forward hook": forward_hook,
    "another adapter": lambda model: switch(model, lambda layer: layer.set_adapter("two")),
    "no adapter": lambda model: switch(model, lambda layer: layer.enable_adapters(False)),
    "another scaling": lambda model: switch(model, lambda layer: layer.set_scale("one", 5.0)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_has_changed_reads_a_prompt_anew(model_dirs, change):
    directory = model_dirs["llama"]
    model, tokenizer = load(directory), tokenizer_of(directory)
    if "adapter" in change or "scaling" in change:
        adapters(model)
    engine = Engine(model, tokenizer, cache_gb=0.01)
    frozen = Engine(model, tokenizer, cache_gb=0.01, frozen=True)
    before = engine.generate(LONG, None, SAMPLING)[0]
    assert frozen.generate(LONG, None, SAMPLING)[0].tokens == before.tokens
    CHANGES[change](model)
    want = Engine(model, tokenizer, cache_gb=0.01).generate(LONG, None, SAMPLING)[0]
    assert want.logp_base != pytest.approx(before.logp_base, abs=0.05)
    assert engine.generate(LONG, None, SAMPLING)[0] == want
    frozen.forget()
    assert frozen.generate(LONG, None, SAMPLING)[0] == want


@pytest.mark.parametrize("change", CHANGES)
def test_a_reward_model_that_has_changed_reads_a_prompt_anew(model_dirs, change):
    engine = Engine.from_pretrained(model_dirs["llama"], cache_gb=0.01)
    judge = judge_of(engine.tokenizer)
    if "adapter" in change or "scaling" in change:
        adapters(judge.model)
    engine.set_scorer(judge)
    assert engine._readers
    before = engine.generate(LONG, Blockwise(2, 4), SAMPLING)[0]
    CHANGES[change](judge.model)
    found = engine.generate(LONG, Blockwise(2, 4), SAMPLING)[0]
    assert found.reward != pytest.approx(before.reward, abs=1e-3)
    fresh = Engine.from_pretrained(model_dirs["llama"], judge, cache_gb=0.01)
    assert fresh.generate(LONG, Blockwise(2, 4), SAMPLING)[0] == found


def test_a_frozen_engine_forgets_what_its_readers_have_read_too(model_dirs):
    engine = Engine.from_pretrained(model_dirs["llama"], cache_gb=0.01, frozen=True)
    assert len(engine.encode(LONG)) > 64
    judge = judge_of(engine.tokenizer)
    engine.set_scorer(judge)
    assert engine._readers
    engine.generate(LONG, Blockwise(2, 4), SAMPLING)
    moving_average(judge.model)
    engine.forget()
    found = engine.generate(LONG, Blockwise(2, 4), SAMPLING)[0]
    fresh = Engine.from_pretrained(model_dirs["llama"], judge, cache_gb=0.01)
    assert fresh.generate(LONG, Blockwise(2, 4), SAMPLING)[0] == found


@pytest.mark.parametrize("frozen", [False, True])
def test_only_a_frozen_engine_keeps_what_it_has_read(model_dirs, frozen):
    engine, read = Engine.from_pretrained(model_dirs["llama"], cache_gb=0.01, frozen=frozen), []
    forward = engine._decoder._forward
    engine._decoder._forward = lambda work, ids, *rest: read.append(len(ids)) or forward(work, ids, *rest)
    n = len(engine.encode(LONG))
    (want,) = engine.generate(LONG, None, SAMPLING)
    assert read[0] == n
    read.clear()
    (found,) = engine.generate(LONG, None, SAMPLING)
    assert read[0] == (n - n // 64 * 64 if frozen else n)
    assert found.tokens == want.tokens
    stream = engine.stream(LONG, None, SAMPLING)
    next(stream)
    stream.close()
    read.clear()
    engine.generate([LONG, LONG], None, SAMPLING)
    assert read[0] == (2 * (n - n // 64 * 64) if frozen else 2 * n - n // 64 * 64)


def modes(model):
    return {name: module.training for name, module in model.named_modules()}


def test_dropout_does_not_run_while_an_engine_decodes(model_dirs):
    """Whatever mode the models are in, and they are given back in it."""
    config = transformers.GPT2Config(
        n_embd=64, n_layer=2, n_head=4, n_positions=96, vocab_size=320, eos_token_id=0, bos_token_id=0,
        resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    tokenizer = tokenizer_of(model_dirs["gpt2"])
    judge = judge_of(tokenizer)
    judge.model.config.attention_dropout = 0.5
    for layer in judge.model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    body = pyengine.PrefixModel(model.transformer, tokenizer, PrefixScorer(64, 320), "body")
    wanted = {}
    for training in (False, True):
        model.train(training)
        judge.model.train(training)
        model.transformer.h[0].eval()  # frozen by its owner
        for name, scorer, strategy in (
            ("as it reads", judge, Blockwise(2, 4)),
            ("as text", judge, None),
            ("a model of its own", body, Tokenwise(1.0)),
        ):
            engine = Engine(model, tokenizer, cache_gb=0.01)
            before = modes(model), modes(judge.model)
            assert before[0]["transformer.h.1.mlp"] == training
            engine.set_scorer(scorer)
            (found,) = engine.generate("the quick", strategy, SAMPLING)
            assert (modes(model), modes(judge.model)) == before
            assert wanted.setdefault(name, found) == found


def gradients(model):
    ids = torch.arange(3, 12)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    found = sum(parameter.grad is not None for parameter in model.parameters())
    model.zero_grad()
    return found


def test_a_model_is_its_owners_between_the_events_of_a_stream(model_dirs):
    model = load(model_dirs["llama"])
    model.train()
    engine = Engine(model, tokenizer_of(model_dirs["llama"]), cache_gb=0.01)
    want = engine.generate("the quick", None, SAMPLING)[0]
    ids = torch.arange(3, 12)[None]
    plain = model(input_ids=ids).logits
    tokens = []
    for event in engine.stream("the quick", None, SAMPLING):
        tokens += event.tokens
        assert model.training
        assert model.config._attn_implementation != NAME
        assert torch.equal(model(input_ids=ids).logits, plain)
        assert gradients(model) == len(list(model.parameters()))
    assert tokens == want.tokens


@pytest.mark.parametrize("strategy", [None, Blockwise(2, 4), BestOfK(2), Tokenwise(1.0)], ids=str)
def test_a_reward_may_call_the_base_model(model_dirs, strategy):
    """As self-certainty does, in one engine or in two."""
    engine = Engine.from_pretrained(model_dirs["llama"], cache_gb=0.01)
    other = Engine(engine.model, engine.tokenizer, cache_gb=0.01)

    def certainty(prompts, completions):
        found = []
        for prompt, completion in zip(prompts, completions, strict=True):
            ids = torch.tensor([engine.encode(prompt + completion)])
            found.append(engine.model(input_ids=ids).logits[0].log_softmax(-1).max(-1).values.mean().item())
        return found

    def answered(prompts, completions):
        return [float(len(r.tokens)) for r in other.generate(list(prompts), None, SamplingParams(max_tokens=2, seed=0))]

    engine.set_scorer([(1.0, certainty), (0.0, answered), (0.0, PrefixScorer(64, 320))])
    if isinstance(strategy, Tokenwise):
        engine.set_scorer([(0.0, certainty), (0.0, answered), (1.0, PrefixScorer(64, 320))])
    (result,) = engine.generate("the quick", strategy, SAMPLING)
    # special tokens are not in the text
    assert result.rewards["certainty"] == pytest.approx(certainty(["the quick"], [result.text])[0], abs=1e-5)
    assert result.rewards["answered"] in (1.0, 2.0)


def test_a_reward_that_calls_its_own_engine_is_told(model_dirs):
    engine = Engine.from_pretrained(model_dirs["llama"], cache_gb=0.01)
    engine.set_scorer(lambda prompts, completions: engine.generate(list(prompts)))
    with pytest.raises(RequestError, match="this engine is decoding"):
        engine.generate("the quick", BestOfK(2), SAMPLING)
    engine.set_scorer(None)
    assert engine.generate("the quick", None, SAMPLING)


class TestThreads:
    def test_calls_of_several_threads_share_the_engine(self, model_dirs):
        """The second comes while a scorer of the first is at work, follows another scorer, and is what it is alone."""
        engine = Engine.from_pretrained(model_dirs["llama"], cache_gb=0.01)
        want = engine.generate("sphinx", None, SAMPLING)
        inside, go = threading.Event(), threading.Event()

        def slow(prompts, completions):
            inside.set()
            assert go.wait(10)
            return [0.0] * len(completions)

        done = []
        handle = engine.submit("the quick", BestOfK(2), SAMPLING, pyengine.lsc(slow, 0.0))
        thread = threading.Thread(target=lambda: done.append(handle.result()))
        thread.start()
        assert inside.wait(10)
        other = engine.submit("sphinx", None, SAMPLING)
        with pytest.raises(TimeoutError, match=r"not done after 0\.1 seconds"):
            other.result(timeout=0.1)
        engine.set_scorer(None)
        with pytest.raises(InputError, match="this engine is decoding: end or close what is open before changing its"):
            engine.forget()
        go.set()
        thread.join()
        assert len(done) == 1
        assert done[0].rewards
        assert [other.result()] == want
        engine.forget()

    def test_a_scorer_may_ask_the_engine_while_it_is_being_set(self, model_dirs):
        engine, found = Engine.from_pretrained(model_dirs["llama"], cache_gb=0.01), []

        class Asking(PrefixScorer):
            def check(self, policy):
                found.extend(engine.generate("sphinx", None, SAMPLING))

        thread = threading.Thread(target=engine.set_scorer, args=(Asking(64, 320),), daemon=True)
        thread.start()
        thread.join(30)
        assert not thread.is_alive(), "it waits for itself"
        assert found == Engine.from_pretrained(model_dirs["llama"], cache_gb=0.01).generate("sphinx", None, SAMPLING)
        assert len(engine.parts) == 1

    def test_two_engines_on_one_model_queue_for_each_pass(self, model_dirs):
        model, tokenizer = load(model_dirs["llama"]), tokenizer_of(model_dirs["llama"])
        engines = [Engine(model, tokenizer, cache_gb=0.01) for _ in range(2)]
        prompts = ["the quick brown fox", "pack my box", LONG]
        sampling = [SamplingParams(max_tokens=40, seed=i) for i in range(3)]
        want = engines[0].generate(prompts, None, sampling)
        found = {}

        def run(i):
            torch.set_num_threads(1)  # each thread's own, on which the last bits depend
            found[i] = [engines[i].generate(prompts, None, sampling) for _ in range(4)]

        threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(results == want for i in range(2) for results in found[i])
        assert not [name for name, module in model.named_modules() if "forward" in vars(module)]
        assert model.config._attn_implementation != NAME

    def test_a_thread_that_trains_while_another_decodes_gets_its_gradients(self, model_dirs):
        """The quick forwards, which have none, are there for the decoding thread's passes only."""
        from pyengine.ops.linear import lent, quick_forwards

        model = load(model_dirs["llama"])
        with lent(quick_forwards(model)):
            assert gradients(model) == len(list(model.parameters()))


HOME = str(Path(pyengine.__file__).parent)


def interrupted(call, at):
    """Raises KeyboardInterrupt at this line of the package that `call` comes to; False if it ends before."""
    count = 0

    def lines(frame, event, argument):
        nonlocal count
        if event == "line":
            count += 1
            if count == at:
                raise KeyboardInterrupt
        return lines

    def calls(frame, event, argument):
        return lines if frame.f_code.co_filename.startswith(HOME) else None

    before = sys.gettrace()
    sys.settrace(calls)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def free_for_others(*locks):
    """Whether another thread gets these."""
    got = []

    def take():
        for lock in locks:
            got.append(lock.acquire(timeout=2))
            lock.release()

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    return got == [True] * len(locks)


class Interrupted:
    """An engine with a reader and a prefix scorer, and what must be so after every interrupt."""

    def __init__(self, directory):
        self.model = load(directory)
        self.model.train()
        self.model.model.layers[1].eval()
        self.engine = Engine(self.model, tokenizer_of(directory), cache_gb=0.005)
        self.judge = judge_of(self.engine.tokenizer)
        self.engine.set_scorer([(1.0, self.judge), (1.0, PrefixScorer(64, 320))])
        self.ids = torch.arange(3, 12)[None]
        self.plain = self.model(input_ids=self.ids).logits
        self.modes = modes(self.model), modes(self.judge.model)
        self.parts = self.engine.parts
        self.prompts = ["the quick brown fox", "sphinx", LONG]
        self.sampling = [SamplingParams(max_tokens=5, seed=i) for i in range(3)]

    def blockwise(self):
        return self.engine.generate(self.prompts, Blockwise(2, 3), self.sampling)

    def replayed(self):
        self.engine._decoder.waits = True
        try:
            return self.engine.generate(self.prompts, Blockwise(2, 3), self.sampling)
        finally:
            self.engine._decoder.waits = False

    def tokenwise(self):
        with self.engine.following(self.parts[1].scorer):
            return self.engine.generate(self.prompts, Tokenwise(1.0), self.sampling)

    def streamed(self):
        stream = self.engine.stream(self.prompts[0], Blockwise(2, 2), self.sampling[0])
        first = next(stream)
        stream.close()
        return first.tokens

    def check(self, where):
        for model in (self.model, self.judge.model):
            assert not [n for n, module in model.named_modules() if "forward" in vars(module)], where
            assert model.config._attn_implementation != NAME, where
        assert (modes(self.model), modes(self.judge.model)) == self.modes, where
        assert torch.equal(self.model(input_ids=self.ids).logits, self.plain), where
        for decoder in (self.engine._decoder, *self.engine._readers.values()):
            decoder.cache.check_integrity()
            assert decoder.cache.pages_in_use == 0, where
            assert decoder.cache.leaves_free == decoder.cache.leaves, where
        assert self.engine._core._driver is None, where
        assert free_for_others(attention._PASSING, self.engine._core._changed), where
        assert self.engine._core.schedule.idle, where
        assert self.engine.parts == self.parts, where


@pytest.fixture(scope="module")
def at_work(model_dirs):
    return Interrupted(model_dirs["llama"])


@pytest.mark.parametrize("call", ["blockwise", "replayed", "tokenwise", "streamed"])
def test_an_interrupt_at_any_line_leaves_model_and_cache_whole(at_work, call):
    """A sample of the lines; PYENGINE_INTERRUPT_EVERY=1 takes all of them, and half an hour."""
    run = getattr(at_work, call)
    want = run()
    total = lines_of(run)
    every = int(os.environ.get("PYENGINE_INTERRUPT_EVERY", "97"))
    hit = 0
    for at in range(1 + total % every, total, every):
        assert interrupted(run, at) or at > 0.98 * total, at  # a run is a few lines longer or shorter
        hit += 1
        at_work.check(f"{call} at line {at} of {total}")
        if hit % 16 == 0:
            assert run() == want, at
    assert run() == want
    assert hit > 20
    print(f"{call}: {hit} of {total} lines interrupted")


def lines_of(call):
    """How many lines of the package `call` comes to."""
    count = 0

    def lines(frame, event, argument):
        nonlocal count
        count += event == "line"
        return lines

    before = sys.gettrace()
    sys.settrace(lambda frame, *_: lines if frame.f_code.co_filename.startswith(HOME) else None)
    try:
        call()
    finally:
        sys.settrace(before)
    return count
