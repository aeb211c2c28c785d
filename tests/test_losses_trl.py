"""The same batch through TRL's trainers and through our losses: values, and gradients of every parameter."""

from __future__ import annotations

import os
from functools import partial

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import pytest
import torch
import transformers
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

import pyengine
from pyengine import ops
from pyengine.losses import (
    OrpoLoss,
    dpo_loss,
    hinge_loss,
    ipo_loss,
    kto_baseline,
    kto_loss,
    odds_ratio_loss,
    sequence_moments,
    simpo_loss,
    weighted,
    weighted_nll,
)
from pyengine.ops import SequenceMoments, TokenLogprob

PAIRS = [
    {"prompt": "The food", "chosen": " was very good.", "rejected": " was bad"},
    {"prompt": "We", "chosen": " liked it", "rejected": " did not like the place at all."},
    {"prompt": "A nice place, but", "chosen": " the service", "rejected": " expensive and slow"},
]
UNPAIRED = [
    {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
    for pair in PAIRS
    for side in ("chosen", "rejected")
][:5]  # three desirable, two not


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(pyengine.embedded("policy"))


def make_model(tokenizer, seed):
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)  # logits that differ clearly
    return model


def settings(tmp_path_factory):
    directory = str(tmp_path_factory.mktemp("trl"))
    return {"output_dir": directory, "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}


@pytest.fixture(scope="module")
def dpo(tmp_path_factory, tokenizer):
    return DPOTrainer(
        make_model(tokenizer, 0),
        ref_model=make_model(tokenizer, 1),
        args=DPOConfig(**settings(tmp_path_factory), use_weighting=True),  # its head is built for that
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer,
    )


def batch_of(trainer):
    return trainer.data_collator(list(trainer.train_dataset))


def logits_of(model, ids, attention_mask):
    """Logits of the tokens to come, and which those are."""
    return model(input_ids=ids, attention_mask=attention_mask).logits[:, :-1], ids[:, 1:]


def moments_of(model, ids, attention_mask, kept):
    logits, labels = logits_of(model, ids, attention_mask)
    fields = ops.logits_logprob(logits.flatten(0, 1), labels.flatten())
    return sequence_moments(TokenLogprob(*(f.unflatten(0, labels.shape) for f in fields)), kept[:, 1:].bool())


def halves(moments):
    pairs = len(moments.logp) // 2
    return [SequenceMoments(*(f[half] for f in moments)) for half in (slice(pairs), slice(pairs, None))]


def paired(trainer, batch, loss):
    names = ("input_ids", "attention_mask", "completion_mask")
    moments = moments_of(trainer.model, *(batch[name] for name in names))
    with torch.no_grad():
        reference = moments_of(trainer.ref_model, *(batch[name] for name in names)).logp
    return loss(*halves(moments), *reference.chunk(2))


def assert_same(ours, theirs, model):
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    parameters = list(model.parameters())
    found, want = (torch.autograd.grad(loss, parameters) for loss in (ours, theirs))
    assert max(gradient.abs().max() for gradient in want) > 1e-3
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5 * b.abs().max().item(), rtol=1e-3)


@pytest.mark.parametrize("weighting", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize(
    ("kind", "loss"),
    [("sigmoid", dpo_loss), ("ipo", ipo_loss), ("hinge", hinge_loss)],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_dpo_trainer(dpo, monkeypatch, kind, loss, weighting):
    """TRL weights without a clamp; its weighted hinge fails in the backward, so of that the value only."""
    monkeypatch.setattr(dpo, "loss_types", [kind])
    monkeypatch.setattr(dpo, "beta", 0.3)
    monkeypatch.setattr(dpo, "use_weighting", weighting)
    batch, loss = batch_of(dpo), partial(loss, beta=0.3)
    ours = paired(dpo, batch, weighted(loss, clamp="none") if weighting else loss).mean()
    theirs = dpo.compute_loss(dpo.model, batch)
    if weighting:
        assert (ours - paired(dpo, batch, loss).mean()).abs() > 1e-2
    if kind == "hinge" and weighting:
        torch.testing.assert_close(ours, theirs)
        ours.backward()
        dpo.model.zero_grad()
    else:
        assert_same(ours, theirs, dpo.model)


def test_label_smoothing(dpo, monkeypatch):
    """In TRL's losses of one pair: "aot", where there is nothing to sort, is DPO with label smoothing."""
    monkeypatch.setattr(dpo, "loss_types", ["aot"])
    monkeypatch.setattr(dpo, "use_weighting", False)
    monkeypatch.setattr(dpo, "beta", 0.3)
    monkeypatch.setattr(dpo, "label_smoothing", 0.15)
    for row in dpo.train_dataset:
        batch = dpo.data_collator([row])
        ours = paired(dpo, batch, partial(dpo_loss, beta=0.3, label_smoothing=0.15)).mean()
        assert_same(ours, dpo.compute_loss(dpo.model, batch), dpo.model)


def test_sft_of_the_chosen(dpo, monkeypatch):
    """TRL's is a mean over the tokens of the batch."""
    monkeypatch.setattr(dpo, "loss_types", ["sft"])
    monkeypatch.setattr(dpo, "use_weighting", False)
    batch = batch_of(dpo)
    ours = paired(dpo, batch, lambda chosen, *_: weighted_nll(chosen, torch.ones(3), "token_mean"))
    assert_same(ours, dpo.compute_loss(dpo.model, batch), dpo.model)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_authors_wpo(dpo, smoothing):
    """wzhouad/WPO's formula, from probabilities: W is clamped as a product and weights both terms."""
    batch = batch_of(dpo)
    kept, beta = batch["completion_mask"][:, 1:].double(), 0.05
    logps = []
    for model in (dpo.model, dpo.ref_model):
        logits, labels = logits_of(model, batch["input_ids"], batch["attention_mask"])
        p = logits.double().softmax(-1)
        p_label = p.gather(-1, labels[..., None])[..., 0]
        logps.append((p_label.log() * kept).sum(-1))
        if model is dpo.model:
            log_w = ((p_label.log() - p.square().sum(-1).log()) * kept).sum(-1) / kept.sum(-1)
            w = log_w.detach().exp()
    ratio = logps[0] - logps[1].detach()
    h = beta * (ratio[:3] - ratio[3:])
    losses = -(1 - smoothing) * h.sigmoid().log() - smoothing * (-h).sigmoid().log()
    theirs = ((w[:3] * w[3:]).clamp(max=1) * losses).mean()
    ours = paired(dpo, batch, weighted(partial(dpo_loss, beta=beta, label_smoothing=smoothing)))
    torch.testing.assert_close(ours.mean().double(), theirs, atol=1e-6, rtol=1e-5)
    parameters = list(dpo.model.parameters())
    for a, b in zip(*(torch.autograd.grad(x.mean(), parameters) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5 * b.abs().max().item(), rtol=1e-3)


@pytest.mark.parametrize("swapped", [False, True], ids=["z0 > 0", "z0 = 0"])
def test_kto_trainer(tmp_path_factory, tokenizer, swapped):
    """With its z0 from mismatched completions, which the clamp makes 0 for one order of the models."""
    trainer = KTOTrainer(
        make_model(tokenizer, int(swapped)),
        ref_model=make_model(tokenizer, int(not swapped)),
        args=KTOConfig(
            **settings(tmp_path_factory),
            beta=0.2,
            desirable_weight=1.3,
            undesirable_weight=0.6,
            per_device_train_batch_size=5,
        ),
        train_dataset=Dataset.from_list(UNPAIRED),
        processing_class=tokenizer,
    )
    batch = batch_of(trainer)
    names = ("input_ids", "attention_mask", "completion_mask")
    moments = moments_of(trainer.model, *(batch[name] for name in names))
    with torch.no_grad():
        reference = moments_of(trainer.ref_model, *(batch[name] for name in names)).logp
        mismatched = [
            moments_of(model, *(batch[f"KL_{name}"] for name in names)).logp
            for model in (trainer.model, trainer.ref_model)
        ]
    z0 = kto_baseline(*mismatched)
    assert (z0 == 0) == swapped
    ours = kto_loss(
        moments, reference, batch["label"], z0, beta=0.2, desirable_weight=1.3, undesirable_weight=0.6
    ).mean()
    assert_same(ours, trainer.compute_loss(trainer.model, batch), trainer.model)


def simple_batch(lengths):
    """For the experimental trainers: one prompt token, chosen and rejected responses of these lengths."""
    torch.manual_seed(2)
    batch = {"prompt_input_ids": torch.randint(1, 700, (len(lengths), 1))}
    batch["prompt_attention_mask"] = torch.ones_like(batch["prompt_input_ids"])
    for side, name in enumerate(("chosen", "rejected")):
        counts = torch.tensor([1 + pair[side] for pair in lengths])
        attention = (torch.arange(counts.max()) < counts[:, None]).long()
        ids = torch.randint(1, 700, attention.shape) * attention
        ids[:, :1] = batch["prompt_input_ids"]
        kept = attention.bool() & (torch.arange(counts.max()) > 0)
        batch |= {f"{name}_input_ids": ids, f"{name}_attention_mask": attention}
        batch[f"{name}_labels"] = ids.masked_fill(~kept, -100)
    return batch


def simple_sides(model, batch):
    return [
        moments_of(model, batch[f"{n}_input_ids"], batch[f"{n}_attention_mask"], batch[f"{n}_labels"] != -100)
        for n in ("chosen", "rejected")
    ]


def test_simpo(tmp_path_factory, tokenizer):
    options = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 1.5, "simpo_gamma": 0.7, "max_length": 64}
    trainer = CPOTrainer(
        make_model(tokenizer, 0),
        args=CPOConfig(**settings(tmp_path_factory), **options),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer,
    )
    batch = simple_batch([(3, 6), (7, 2), (4, 4)])
    ours = simpo_loss(*simple_sides(trainer.model, batch), beta=1.5, gamma=0.7).mean()
    assert_same(ours, trainer.compute_loss(trainer.model, batch), trainer.model)


def test_orpo(tmp_path_factory, tokenizer):
    """TRL's NLL is a mean over the batch's tokens, the prompt's too: as ours for one prompt token and equal lengths."""
    trainer = ORPOTrainer(
        make_model(tokenizer, 0),
        args=ORPOConfig(**settings(tmp_path_factory), beta=0.3, max_length=64),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer,
    )
    batch = simple_batch([(5, 6), (5, 2), (5, 4)])
    sides = simple_sides(trainer.model, batch)
    assert_same(OrpoLoss(lam=0.3)(*sides).mean(), trainer.compute_loss(trainer.model, batch), trainer.model)
    batch = simple_batch([(3, 6), (7, 2), (4, 4)])
    sides = simple_sides(trainer.model, batch)
    ours = weighted_nll(sides[0], torch.ones(3), "token_mean") + 0.3 * odds_ratio_loss(*sides).mean()
    assert_same(ours, trainer.compute_loss(trainer.model, batch), trainer.model)
