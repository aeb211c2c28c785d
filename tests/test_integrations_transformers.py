"""Tokenwise in transformers' own loops gives the engine's tokens and the law itself; blocks are the engine's."""

from __future__ import annotations

import contextlib

import peft
import pytest
import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig
from transformers.generation.continuous_batching.model_runner import ModelRunner

import pyengine
from pyengine import (
    BestOfK,
    Blockwise,
    Engine,
    InputError,
    PrefixModel,
    PrefixScorer,
    SamplingParams,
    Tokenwise,
    reference,
)
from pyengine.integrations.transformers import TiltLogitsProcessor, best_of_k, blockwise

LAMBDAS = [0.0, 2.0, 8.0, -8.0] * 2
LENGTHS = [3, 300, 41, 8, 150, 16, 17, 90]
NEW = 24
WIDE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 384,
    "vocab_size": 320,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
}
CONFIGS = {"llama": transformers.LlamaConfig(**WIDE), "qwen2": transformers.Qwen2Config(**WIDE)}


def random_prefix(hidden, vocab, seed=7):
    """Values of a spread of about one, so that λ of 2 and 8 change greedy tokens."""
    torch.manual_seed(seed)
    scorer = PrefixScorer(hidden, vocab, width=16)
    with torch.no_grad():
        for parameter in scorer.parameters():
            parameter.mul_(6)
    return scorer


@pytest.fixture(scope="module", params=["llama", "qwen2", "embedded"])
def served(request, model_dirs):
    """(model, tokenizer, prefix scorer, prompts)"""
    if request.param == "embedded":
        directory = pyengine.embedded("policy")
        model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
        scorer = pyengine.load_scorer(pyengine.embedded("prefix"))
    else:
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(CONFIGS[request.param])
        tokenizer = AutoTokenizer.from_pretrained(model_dirs["llama"])
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(4)
        scorer = random_prefix(WIDE["hidden_size"], WIDE["vocab_size"])
    draw = torch.Generator().manual_seed(11)
    vocab = model.config.vocab_size
    most = model.config.max_position_embeddings - NEW
    prompts = [torch.randint(1, vocab, (min(n, most),), generator=draw).tolist() for n in LENGTHS]
    return model.eval(), tokenizer, scorer, prompts


def padded(prompts):
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def engines(served, weights=LAMBDAS, **sampling):
    model, tokenizer, scorer, prompts = served
    params = SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True, **sampling)
    found = Engine(model, tokenizer, scorer).generate(prompts, [Tokenwise(w) for w in weights], params)
    return [result.tokens for result in found]


def generated(model, processor, prompts, **arguments):
    arguments = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | arguments
    with processor.attached(model):
        return model.generate(**padded(prompts), logits_processor=[processor], **arguments)


def left_behind(model):
    return (
        model.get_output_embeddings()._forward_pre_hooks
        or model._forward_pre_hooks
        or "_get_logits_processor" in vars(model)
    )


@pytest.mark.parametrize("kind", ["head", "model"])
def test_greedy_tokens_are_the_engines(served, kind):
    model, tokenizer, scorer, prompts = served
    wanted = engines(served)
    if kind == "model":
        own = AutoModel.from_config(model.config)
        own.load_state_dict(model.base_model.state_dict())
        scorer = PrefixModel(own.eval(), tokenizer, scorer)
    processor = TiltLogitsProcessor(scorer, LAMBDAS, tokenizer=tokenizer)
    found = generated(model, processor, prompts)[:, max(map(len, prompts)) :].tolist()
    assert found == wanted
    assert found[1:4] != engines(served, [0.0] * 8)[1:4]  # the tilts are seen
    assert processor.tilted_rows == 6 * NEW
    assert not left_behind(model)


def test_calls_do_not_take_their_rows_for_each_others(served):
    """Two calls while a prefix model is attached, the second with a prompt longer than the first one's response."""
    model, tokenizer, head, prompts = served
    scorer = PrefixModel(model.base_model, tokenizer, head)
    found = []
    with TiltLogitsProcessor(scorer, 8.0, tokenizer=tokenizer).attached(model) as processor:
        for prompt in (prompts[4][:10], prompts[1][:40]):
            arguments = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            output = model.generate(**padded([prompt]), logits_processor=[processor], **arguments)
            found.append(output[0, len(prompt) :].tolist())
    own = model, tokenizer, head, [prompts[4][:10], prompts[1][:40]]
    assert found == engines(own, [8.0] * 2)


@contextlib.contextmanager
def batching(model, processor, **arguments):
    """A manager of continuous batching that the processor tilts."""
    arguments = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0} | arguments
    with (
        processor.attached(model),
        model.continuous_batching_context_manager(
            generation_config=transformers.GenerationConfig(**arguments),
            continuous_batching_config=ContinuousBatchingConfig(
                per_request_processors=True, max_batch_tokens=64, num_blocks=32
            ),
        ) as manager,
    ):
        yield manager


def results(manager, count):
    found = [manager.get_result(timeout=60) for _ in range(count)]
    return {result.request_id: result for result in found}


def test_continuous_batching_with_a_weight_for_each_request(served):
    """Half of the requests join when two of the others are done; one that gives no weight has the default."""
    model, _, scorer, prompts = served
    processor = TiltLogitsProcessor(scorer, 8.0)
    with batching(model, processor) as manager:
        for i in range(4):
            own = {} if LAMBDAS[i] == 8 else {"tilt_weight": LAMBDAS[i]}
            manager.add_request(prompts[i], request_id=str(i), **own)
        found = results(manager, 2)
        for i in range(4, 8):
            manager.add_request(prompts[i], request_id=str(i), tilt_weight=LAMBDAS[i])
        found |= results(manager, 6)
    assert [found[str(i)].generated_tokens for i in range(8)] == engines(served)
    assert processor.tilted_rows == 6 * NEW
    assert not left_behind(model)


@pytest.mark.parametrize("sampled", [False, True])
def test_a_request_of_a_batch_that_asks_for_nonsense_fails_alone(served, sampled):
    model, _, scorer, prompts = served
    nonsense = {"words": "2", "nan": float("nan"), "large": 1e39, "larger": 10**400}
    with batching(model, TiltLogitsProcessor(scorer, 0.0), max_new_tokens=4, do_sample=sampled, top_k=0) as manager:
        for name, weight in nonsense.items():
            manager.add_request(prompts[0], request_id=name, tilt_weight=weight)
        manager.add_request(prompts[0], request_id="good")
        found = results(manager, 5)
    assert len(found["good"].generated_tokens) == 4
    assert sampled or found["good"].generated_tokens == engines(served, [0.0] * 8)[0][:4]
    for name in nonsense:
        assert "tilt_weight" in found[name].error


def test_a_manager_keeps_its_temperature_whatever_else_the_model_does(served, monkeypatch):
    """A greedy `generate` with the same processor, between two requests of a manager at T = 0.7."""
    model, _, scorer, prompts = served
    seen = drawn_from(monkeypatch)
    processor = TiltLogitsProcessor(scorer, 2.0)
    arguments = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
    with batching(model, processor, max_new_tokens=1, do_sample=True, temperature=0.7, top_k=0) as manager:
        model.generate(**padded(prompts[:1]), logits_processor=[processor], **arguments)
        manager.add_request(prompts[2])
        results(manager, 1)
    assert (torch.log_softmax(seen[-1][-1], -1) - law(served, 2.0, 0.7)[2]).abs().max() < 1e-3


def drawn_from(monkeypatch):
    """The scores [N, V] that continuous batching draws from, pass by pass."""
    seen = []
    draw = ModelRunner._sample

    def note(self, scores, *rest):
        seen.append(scores[0].clone())
        return draw(self, scores, *rest)

    monkeypatch.setattr(ModelRunner, "_sample", note)
    return seen


def test_a_wrapper_of_the_model_hides_nothing(served):
    """PEFT's passes `generate` on to the model inside it."""
    model, _, scorer, prompts = served
    bare = type(model)(model.config)
    bare.load_state_dict(model.state_dict())
    wrapped = peft.get_peft_model(bare, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    arguments = {"max_new_tokens": 1, "do_sample": True, "temperature": 0.7, "top_k": 0, "pad_token_id": 0}
    arguments |= {"return_dict_in_generate": True, "output_scores": True}
    output = generated(wrapped, TiltLogitsProcessor(scorer, 2.0), prompts, **arguments)
    assert (torch.log_softmax(output.scores[0], -1) - law(served, 2.0, 0.7)).abs().max() < 1e-3
    with pytest.raises(InputError, match="beam search"):
        generated(wrapped, TiltLogitsProcessor(scorer, 2.0), prompts[:1], num_beams=2)
    with TiltLogitsProcessor(scorer).attached(wrapped), pytest.raises(InputError, match="pass it as"):
        wrapped.generate(**padded(prompts[:1]), max_new_tokens=1, pad_token_id=0)


def test_attachments_end_in_any_order(served):
    model, _, scorer, prompts = served
    first, second = TiltLogitsProcessor(scorer, 1.0), TiltLogitsProcessor(scorer, 2.0)
    one, other = first.attached(model), second.attached(model)
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    with pytest.raises(InputError, match="pass it as"):
        model.generate(**padded(prompts[:1]), max_new_tokens=1, pad_token_id=0)
    other.__exit__(None, None, None)
    assert not left_behind(model)
    model.generate(**padded(prompts[:1]), max_new_tokens=1, pad_token_id=0)


def test_a_prefix_model_is_not_asked_about_embeddings(served):
    model, tokenizer, head, prompts = served
    scorer = PrefixModel(model.base_model, tokenizer, head)
    embedded = model.get_input_embeddings()(torch.tensor(prompts[:1]))
    processor = TiltLogitsProcessor(scorer, tokenizer=tokenizer)
    with processor.attached(model), pytest.raises(InputError, match="inputs_embeds"):
        model.generate(inputs_embeds=embedded, logits_processor=[processor], max_new_tokens=2, pad_token_id=0)


def law(served, weight, temperature):
    """log softmax(l / T + λ V) after each prompt, fp32 [N, V], from the model's own pass over it."""
    model, _, scorer, prompts = served
    rows = []
    for prompt in prompts:
        with torch.inference_mode():
            output = model(torch.tensor([prompt]), output_hidden_states=True)
            values = scorer.values({-1: output.hidden_states[-1][:, -1]})
        rows.append(torch.log_softmax(output.logits[:, -1] / temperature + weight * values, -1))
    return torch.cat(rows)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_the_law_is_that_of_the_paper_at_every_temperature(served, temperature):
    model, _, scorer, prompts = served
    arguments = {"max_new_tokens": 1, "do_sample": True, "temperature": temperature, "top_k": 0, "pad_token_id": 0}
    arguments |= {"return_dict_in_generate": True, "output_scores": True}
    output = generated(model, TiltLogitsProcessor(scorer, 2.0), prompts, **arguments)
    wanted = law(served, 2.0, temperature)
    assert (torch.log_softmax(output.scores[0], -1) - wanted).abs().max() < 1e-3
    output = generated(model, TiltLogitsProcessor(scorer, 2.0), prompts, **arguments, top_p=0.9)
    column = torch.ones(len(wanted))
    kept = reference._kept(wanted.double(), 0 * column.long(), 0.9 * column, 0 * column)
    assert torch.equal(output.scores[0] > -torch.inf, kept)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_the_law_in_continuous_batching(served, temperature, monkeypatch):
    """Also of a request with a temperature of its own."""
    model, _, scorer, prompts = served
    seen = drawn_from(monkeypatch)
    own = {} if temperature == 1 else {"temperature": 2.5}
    with batching(
        model, TiltLogitsProcessor(scorer, 2.0), max_new_tokens=1, do_sample=True, temperature=temperature, top_k=0
    ) as manager:
        manager.add_request(prompts[2])
        results(manager, 1)
        manager.add_request(prompts[2], tilt_weight=-8.0, **own)
        results(manager, 1)
    first, second = (torch.log_softmax(x[-1], -1) for x in seen)
    assert (first - law(served, 2.0, temperature)[2]).abs().max() < 1e-3
    assert (second - law(served, -8.0, own.get("temperature", 1.0))[2]).abs().max() < 1e-3


def test_a_budget_is_what_each_token_costs(served):
    model, _, scorer, prompts = served
    arguments = {
        "max_new_tokens": 3,
        "do_sample": True,
        "temperature": 0.7,
        "top_k": 0,
        "return_dict_in_generate": True,
    }
    arguments |= {"output_scores": True, "output_logits": True}
    output = generated(model, TiltLogitsProcessor(scorer, kl_budget=0.2), prompts, **arguments)
    for tilted, base in zip(output.scores, output.logits, strict=True):
        policy, base = torch.log_softmax(tilted, -1), torch.log_softmax(base / 0.7, -1)
        kl = (policy.exp() * (policy - base)).sum(-1)
        assert ((kl - 0.2).abs() < 0.004).all()


def test_samples_of_a_prompt_have_its_weight(served):
    """`generate` puts the samples of one prompt side by side."""
    model, _, scorer, prompts = served
    arguments = {"max_new_tokens": 1, "do_sample": True, "top_k": 0, "return_dict_in_generate": True}
    arguments |= {"output_scores": True, "num_return_sequences": 2}
    output = generated(model, TiltLogitsProcessor(scorer, [0.0, -8.0]), prompts[2:4], **arguments)
    found = torch.log_softmax(output.scores[0], -1)
    wanted = [law(served, weight, 1.0)[2 + i] for i, weight in enumerate((0.0, -8.0)) for _ in range(2)]
    assert (found - torch.stack(wanted)).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"num_beams": 2}, "beam search"),
        ({"prompt_lookup_num_tokens": 2}, "assisted decoding"),
        ({"guidance_scale": 2.0}, "guidance"),
    ],
)
def test_what_cannot_be_tilted_is_refused(served, arguments, said):
    model, _, scorer, prompts = served
    with pytest.raises(InputError, match=said):
        generated(model, TiltLogitsProcessor(scorer, 2.0), prompts[:1], **arguments)
    assert not left_behind(model)


def test_a_model_that_assists_is_refused(served):
    model, _, scorer, prompts = served
    other = type(model)(model.config).eval()
    with pytest.raises(InputError, match="assisted decoding"):
        generated(model, TiltLogitsProcessor(scorer, 2.0), prompts[:1], assistant_model=other)


def test_no_way_around_it(served):
    model, _, scorer, prompts = served
    processor = TiltLogitsProcessor(scorer, 2.0)
    with pytest.raises(InputError, match=r"with processor\.attached"):
        model.generate(**padded(prompts[:1]), logits_processor=[processor], max_new_tokens=1, pad_token_id=0)
    with processor.attached(model), pytest.raises(InputError, match=r"logits_processor=\[processor\]"):
        model.generate(**padded(prompts[:1]), max_new_tokens=1, pad_token_id=0)
    with processor.attached(model), pytest.raises(InputError, match="attached already"), processor.attached(model):
        pass
    ids = torch.tensor(prompts[:1])
    with processor.attached(model):
        logits = model(ids).logits[:, -1]
        with pytest.raises(InputError, match="does not know the temperature"):  # a loop of one's own
            processor(ids, logits)
        made = {"generation_config": transformers.GenerationConfig(), "logits_processor": [processor]}
        model._get_logits_processor(**made, input_ids_seq_length=3)
        model(ids)
        processor(ids, logits)
        with pytest.raises(InputError, match="more tokens than the model made passes"):
            processor(ids, logits)
    for weights in ([1, 2, 3], [1]):
        with pytest.raises(InputError, match=f"{len(weights)} weights for 2 prompts"):
            generated(model, TiltLogitsProcessor(scorer, weights), prompts[:2])
    with pytest.raises(InputError, match="weight is empty"):
        TiltLogitsProcessor(scorer, [])
    narrow = PrefixScorer(8, model.config.vocab_size)
    with pytest.raises(InputError, match="states of width 8"), TiltLogitsProcessor(narrow).attached(model):
        pass
    other = PrefixScorer(model.config.hidden_size, 77)
    with pytest.raises(InputError, match="77 tokens"), TiltLogitsProcessor(other).attached(model):
        pass
    early = PrefixScorer(model.config.hidden_size, model.config.vocab_size, layer=1)
    with pytest.raises(InputError, match="reads layer 1"), TiltLogitsProcessor(early).attached(model):
        pass
    with pytest.raises(InputError, match="scores whole prefixes"), TiltLogitsProcessor(len).attached(model):
        pass
    with pytest.raises(InputError, match="no top_k"):
        generated(model, TiltLogitsProcessor(scorer, kl_budget=0.1), prompts[:1], do_sample=True, top_k=5)
    for refused in (TiltLogitsProcessor(scorer, [1.0]), TiltLogitsProcessor(scorer, kl_budget=0.1)):
        with pytest.raises(InputError, match="continuous batching"), batching(model, refused):
            pass
    assert not left_behind(model)


# Blocks

ENDS = list(range(20, 60))
DRAW = {
    "do_sample": True,
    "temperature": 0.8,
    "top_k": 0,
    "max_new_tokens": NEW,
    "eos_token_id": ENDS,
    "pad_token_id": 0,
}


@pytest.mark.parametrize("strategy", [Blockwise(4, 8), BestOfK(3), Blockwise(3, 4, "softmax", 0.5)])
def test_blocks_are_the_engines(served, strategy):
    model, tokenizer, scorer, prompts = served
    made = best_of_k if isinstance(strategy, BestOfK) else blockwise
    size = () if isinstance(strategy, BestOfK) else (strategy.block_tokens,)
    custom = made(scorer, tokenizer, strategy.k, *size, strategy.selection, strategy.beta)
    output = model.generate(**padded(prompts), **DRAW, custom_generate=custom, seed=5, return_dict_in_generate=True)
    params = [SamplingParams(NEW, 0.8, seed=5 + i, stop_token_ids=ENDS, ignore_eos=True) for i in range(len(prompts))]
    wanted = Engine(model, tokenizer, scorer).generate(prompts, strategy, params)
    assert [result.tokens for result in output.results] == [result.tokens for result in wanted]
    assert [result.kl for result in output.results] == [result.kl for result in wanted]
    longest = max(map(len, prompts))
    for row, prompt, result in zip(output.sequences.tolist(), prompts, wanted, strict=True):
        assert row[longest - len(prompt) : longest + len(result.tokens)] == prompt + result.tokens
        assert set(row[longest + len(result.tokens) :]) <= {0}
    assert any(len(result.tokens) < NEW for result in wanted)  # padding is seen


def test_seeds_of_blocks_come_from_torch_where_none_is_given(served):
    model, tokenizer, scorer, prompts = served
    custom = blockwise(scorer, tokenizer, 2, 8)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(model.generate(torch.tensor(prompts[:1]), **DRAW, num_return_sequences=2, custom_generate=custom))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert not torch.equal(found[0][0], found[0][1])
    torch.manual_seed(1)
    other = type(model)(model.config).eval()
    output = other.generate(torch.tensor(prompts[:1]), **DRAW, custom_generate=custom, seed=3)
    params = SamplingParams(NEW, 0.8, seed=3, stop_token_ids=ENDS, ignore_eos=True)
    (wanted,) = Engine(other, tokenizer, scorer).generate([prompts[0]], Blockwise(2, 8), params)
    assert output[0].tolist() == prompts[0] + wanted.tokens


def test_what_a_block_cannot_follow_is_refused(served):
    model, tokenizer, scorer, prompts = served
    custom, inputs = blockwise(scorer, tokenizer, 2, 8), padded(prompts[:2])
    for arguments, said in (
        ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size"),
        ({"num_beams": 2}, "num_beams"),
        ({"typical_p": 0.5}, "typical_p"),
        ({"do_sample": False}, "do_sample=True"),
        ({"logits_processor": [transformers.InfNanRemoveLogitsProcessor()]}, "InfNanRemoveLogitsProcessor"),
        ({"stopping_criteria": [transformers.MaxTimeCriteria(9)]}, "MaxTimeCriteria"),
        ({"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}, "not inputs_embeds"),
    ):
        with pytest.raises((InputError, ValueError), match=said):
            model.generate(**inputs, **(DRAW | arguments), custom_generate=custom)
    right = {"input_ids": inputs["input_ids"].flip(1), "attention_mask": inputs["attention_mask"].flip(1)}
    with pytest.raises(InputError, match="padding_side='left'"):
        model.generate(**right, **DRAW, custom_generate=custom)


def test_stop_strings_and_the_least_length_hold_in_blocks():
    directory = pyengine.embedded("policy")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    custom, inputs = blockwise(pyengine.embedded("probe"), tokenizer, 4, 8), tokenizer("The food", return_tensors="pt")
    free = DRAW | {"eos_token_id": model.config.eos_token_id, "max_new_tokens": 32}
    ended = model.generate(**inputs, **free, custom_generate=custom, seed=1, stop=["."])
    assert tokenizer.decode(ended[0]).rstrip().endswith(".")
    assert tokenizer.decode(ended[0]).count(".") == 1
    short = model.generate(**inputs, **free, custom_generate=custom, seed=1)
    long = model.generate(**inputs, **(free | {"min_new_tokens": 30}), custom_generate=custom, seed=1)
    with pytest.raises(InputError, match="leave out the least length"):
        model.generate(**inputs, **(free | {"min_new_tokens": 6}), custom_generate=custom, stop=".")
    assert short.shape[1] < inputs["input_ids"].shape[1] + 30 <= long.shape[1]
