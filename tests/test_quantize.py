"""Eight-bit weights, and what narrow numbers are said to cost."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

import pyengine
from pyengine import Engine, InputError, SamplingParams, Tokenwise, costs, quantize
from pyengine.ops import linear as layers
from pyengine.ops.linear import FEW, Int8Linear, int8_linear
from pyengine.worlds import reviews


def loaded():
    return AutoModelForCausalLM.from_pretrained(pyengine.embedded("policy"), dtype=torch.float32).eval()


@pytest.mark.parametrize("rows", [0, 1, 3, 8, FEW, FEW + 1])
@pytest.mark.parametrize(("outputs", "width"), [(1, 1), (25, 64), (97, 200), (300, 77)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_product_in_fp64(isa, monkeypatch, rows, outputs, width, dtype):
    """Sizes that divide no vector, block or part; every number that eight bits hold."""
    monkeypatch.setattr(layers, "WIDENED", 3 * width)
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, width, generator=generator).to(dtype)
    weight = torch.randint(-128, 128, (outputs, width), generator=generator, dtype=torch.int8)
    scale, bias = torch.rand(outputs, generator=generator) / 64, torch.randn(outputs, generator=generator)
    for b in (None, bias):
        want = x.double() @ (weight.double() * scale[:, None]).mT + (0 if b is None else b)
        for steady in (False, True):
            found = int8_linear(x[None], weight, scale, b, steady)
            assert (found.dtype, found.shape) == (dtype, (1, rows, outputs))
            rounding = 0 if dtype is torch.float32 else 2**-8
            torch.testing.assert_close(found[0].double(), want, atol=3e-6 * width**0.5, rtol=rounding)


def test_a_layer_keeps_each_output_to_half_a_step():
    layer = torch.nn.Linear(96, 40)
    with torch.no_grad():
        layer.weight[3] = 0
        layer.weight[4] *= 1e6
    narrow = Int8Linear(layer)
    assert narrow.weight.abs().amax(1).tolist() == [127] * 3 + [0] + [127] * 36
    error = (narrow.weight * narrow.scale[:, None] - layer.weight).abs()
    assert (error <= 0.5001 * narrow.scale[:, None]).all()
    x = torch.randn(2, 96)
    assert torch.equal(narrow(x)[:, 3], layer.bias[3].expand(2))


def test_drift_is_the_kl_from_fp32_on_the_models_own_text():
    model = loaded()
    ids, wanted = quantize.own_text(model)
    assert torch.equal(quantize.own_text(model)[0], ids)
    assert quantize.drift(model, ids, wanted).most < 1e-9
    quantize.quantize_int8(model)
    found = quantize.drift(model, ids, wanted)
    with torch.inference_mode():
        logp = model(ids).logits[:, :-1].log_softmax(-1)
    kl = (wanted.exp() * (wanted - logp)).sum(-1)
    assert found == pytest.approx((kl.mean().item(), kl.max().item(), 8 * 24), rel=1e-3)
    assert 1e-6 < found.mean < 0.01
    likelihood = wanted.gather(2, ids[:, 1:, None]).mean()
    entropy = -(wanted.exp() * wanted).sum(-1).mean()
    assert likelihood.item() == pytest.approx(-entropy.item(), abs=0.3)  # it was drawn from the model


def test_an_engine_decodes_with_eight_bits_and_says_what_they_cost(caplog):
    with caplog.at_level(logging.WARNING, "pyengine"):
        engine = Engine.from_pretrained(pyengine.embedded("policy"), quantize="int8")
    (said,) = re.findall(
        r"int8 weights, [\d.]+ MB, beside [\d.]+ MB of others in fp32; KL from fp32 (\S+) nats a token", caplog.text
    )
    model = loaded()
    text = quantize.own_text(model)
    quantize.quantize_int8(model)
    assert float(said) == pytest.approx(quantize.drift(model, *text).mean, rel=0.1)
    engine.set_scorer(pyengine.embedded("prefix"))
    sampling = SamplingParams(max_tokens=12, seed=1)
    results = engine.generate(reviews.prompts(3), Tokenwise(2.0), sampling)
    for result in results:
        ids = torch.tensor([result.prompt_ids + result.tokens])
        with torch.inference_mode():
            logp = model(ids).logits[0, :-1].log_softmax(-1)[-len(result.tokens) :]
        want = logp.gather(1, torch.tensor(result.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(result.logp_base), want, atol=1e-4, rtol=0)


def test_a_row_of_eight_bits_is_what_it_is_alone():
    engine = Engine.from_pretrained(pyengine.embedded("policy"), quantize="int8", batch_invariant=True)
    prompts, sampling = reviews.prompts(40), SamplingParams(max_tokens=6, seed=0)
    together = engine.generate(prompts, sampling=sampling)
    for i in (0, 17):
        (alone,) = engine.generate(prompts[i], sampling=sampling)
        assert (alone.tokens, alone.logp_base) == (together[i].tokens, together[i].logp_base)


def test_what_a_pass_reads_is_counted_in_bytes():
    model = loaded()
    before = costs.weights_of(model)
    table = model.get_input_embeddings().weight
    assert before.head_bytes == 4 * before.head == 4 * table.numel()  # the head is the embedding
    quantize.quantize_int8(model)
    after = costs.weights_of(model)
    assert (after.body, after.head) == (before.body, before.head)
    assert after.head_bytes == after.head
    assert after.body < after.body_bytes < 1.02 * after.body  # norms are fp32
    assert model.get_input_embeddings().weight is table


def test_other_numbers_are_measured_where_there_is_memory_for_fp32(caplog, monkeypatch, tmp_path):
    with caplog.at_level(logging.WARNING, "pyengine"):
        engine = Engine.from_pretrained(pyengine.embedded("policy"), dtype=torch.bfloat16)
        assert engine.model.dtype == torch.bfloat16
        assert re.search(r"policy: bfloat16; KL from fp32 [\d.e-]+ nats", caplog.text)
        caplog.clear()
        Engine.from_pretrained(pyengine.embedded("policy"))
        assert "KL" not in caplog.text
    engine.model.save_pretrained(tmp_path)
    engine.tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(quantize, "host_memory", lambda: 1e5)
    with caplog.at_level(logging.WARNING, "pyengine"):
        engine = Engine.from_pretrained(tmp_path, quantize="int8")
    assert (
        "int8 weights, 0.39 MB, beside 0.00256 MB of others in fp32; KL from fp32 is not measured: that takes 0.00"
        in caplog.text
    )
    assert engine.model.dtype == torch.float32
    assert engine.generate("Review", sampling=SamplingParams(max_tokens=3, seed=0))[0].tokens


def test_the_frequencies_of_positions_are_not_rounded():
    """Else token 4,000 is .7 off its angle, which no short text shows."""
    model = loaded()
    before = model.model.rotary_emb.inv_freq.clone()
    quantize.narrowed(model, torch.bfloat16, None)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(model.model.rotary_emb.inv_freq, before)
    as_loaded = AutoModelForCausalLM.from_pretrained(pyengine.embedded("policy"), dtype=torch.bfloat16)
    for (name, ours), (_, theirs) in zip(model.named_buffers(), as_loaded.named_buffers(), strict=True):
        assert ours.dtype == theirs.dtype, name


@torch.inference_mode()
def test_a_layer_that_was_cast_is_an_error():
    x = torch.randn(2, 8)
    for cast in (torch.float16, torch.float64):
        with pytest.raises(RuntimeError, match=r"a scale and a bias in fp32: the layer was cast"):
            Int8Linear(torch.nn.Linear(8, 4)).to(cast)(x)


@pytest.mark.parametrize("rows", [3, FEW + 8])
def test_no_gradient_is_lost_in_silence(rows):
    layer, x = Int8Linear(torch.nn.Linear(8, 4)), torch.randn(rows, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"int8 weights have no gradient"):
        layer(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int4"}, "quantize must be None or \"int8\", got 'int4'"),
        ({"quantize": "int8", "device": "cuda"}, "int8 weights are for a CPU, device is 'cuda'"),
        ({"quantize": "int8", "dtype": torch.bfloat16}, "dtype is torch.bfloat16: leave it out"),
    ],
)
def test_what_is_not_there_is_refused(options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        Engine.from_pretrained(pyengine.embedded("policy"), **options)


class Bare(torch.nn.Module):
    device = torch.device("cpu")


def test_a_layer_with_two_names_stays_one():
    model = Bare()
    model.one = model.other = torch.nn.Linear(3, 5)
    assert quantize.quantize_int8(model) == 15
    assert model.one is model.other
    assert type(model.one) is Int8Linear


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(InputError, match="a Bare has no linear layer"):
        quantize.quantize_int8(Bare())
