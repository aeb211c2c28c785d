"""One WPO training step beside TRL's: reference and policy forward, weighted DPO loss, backward; no optimizer.

A pair of responses of 512 tokens through a Llama of two layers, fp32, all threads of the machine. TRL 1.16's
`DPOTrainer(use_weighting=True)`, as shipped and at its best chunk, and TRL's trainer on pyengine's head, which makes
four products with it where `PreferenceTrainer` makes three to four. No clamp, which TRL does not have.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no bench may reach for a hub

import copy

import pytest
import torch
import transformers
from datasets import Dataset, disable_progress_bars
from trl import DPOConfig, DPOTrainer
from trl.trainer import dpo_trainer
from trl.trainer import utils as trl_utils

import pyengine
from pyengine.integrations.trl import PreferenceConfig, PreferenceTrainer
from pyengine.integrations.trl.head import in_place_of

TESTS = ["linear_preference", "trl_head"]
PROMPT = 8
TRL_SHIPPED, TRL_BEST = trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE, 1024
ROWS = [{"prompt": "Review of the Harbour, a bakery:", "chosen": " The bread is good.", "rejected": " It is not."}]


def models(vocab, width):
    """A policy and another as its reference."""
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=7 * width // 2,
        num_hidden_layers=2,
        num_attention_heads=max(1, width // 64),
        num_key_value_heads=max(1, width // 128),
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    return tuple(transformers.LlamaForCausalLM(config) for _ in range(2))


def trainers(vocab, width, directory):
    """{name: trainer}, each with models of its own and equal weights."""
    policy, reference = models(vocab, width)
    common = {"output_dir": str(directory), "bf16": False, "report_to": "none", "gradient_checkpointing": False}
    common |= {"dataloader_pin_memory": False, "use_cpu": True, "beta": 0.01}
    tokenizer = transformers.AutoTokenizer.from_pretrained(pyengine.embedded("policy"))
    data = {"train_dataset": Dataset.from_list(ROWS), "processing_class": tokenizer}
    disable_progress_bars()

    def theirs():
        args = DPOConfig(use_weighting=True, **common)
        return DPOTrainer(copy.deepcopy(policy), copy.deepcopy(reference), args, **data)

    out = {"TRL": theirs()}
    with in_place_of(dpo_trainer):
        out["TRL on pyengine's head"] = theirs()
    args = PreferenceConfig(weights="sampled", weight_clamp="none", **common)
    out["pyengine"] = PreferenceTrainer(policy, reference, args, **data)
    for trainer in out.values():
        trainer.current_gradient_accumulation_steps = 1  # which a training loop would set
    return out


def batch(vocab, length):
    torch.manual_seed(1)
    ids = torch.randint(1, vocab, (2, PROMPT + length))
    ids[1, :PROMPT] = ids[0, :PROMPT]
    mask = torch.ones_like(ids)
    completion = mask.clone()
    completion[:, :PROMPT] = 0
    return {"input_ids": ids, "attention_mask": mask, "completion_mask": completion}


def step(trainer, inputs, chunk=TRL_SHIPPED, keep=False):
    """The loss; the gradients stay with the model where they are kept."""
    trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE = chunk
    try:
        loss = trainer.training_step(trainer.model, dict(inputs))
    finally:
        trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE = TRL_SHIPPED
    if not keep:
        trainer.model.zero_grad(set_to_none=True)
    return loss


def differences(one, other, inputs):
    """Of `other` from `one`: of the loss, and the greatest of a gradient, each relative to the greatest value there."""
    losses = [step(trainer, inputs, keep=True).item() for trainer in (one, other)]
    gradients = [dict(trainer.model.named_parameters()) for trainer in (one, other)]
    worst = max(
        ((p.grad - gradients[1][name].grad).abs().max() / p.grad.abs().max()).item() for name, p in gradients[0].items()
    )
    for trainer in (one, other):
        trainer.model.zero_grad(set_to_none=True)
    return {"loss": abs(losses[0] - losses[1]) / abs(losses[0]), "gradients": worst}


@pytest.mark.parametrize(("vocab", "width", "length"), [(128_256, 1024, 512)])
def test_peers(race, peak, rows, tmp_path, vocab, width, length):
    made, inputs = trainers(vocab, width, tmp_path), batch(vocab, length)
    ours, theirs = made["pyengine"], made["TRL"]
    found = differences(theirs, ours, inputs)
    assert max(found.values()) < 1e-4, found
    runs = {
        "TRL, as shipped": lambda: step(theirs, inputs),
        f"TRL, chunk {TRL_BEST} (its best)": lambda: step(theirs, inputs, TRL_BEST),
        "TRL on pyengine's head (four products)": lambda: step(made["TRL on pyengine's head"], inputs),
    }
    raced = race(lambda: step(ours, inputs), runs, rounds=3)
    if raced is None:
        return
    times, samples = raced
    megabytes = {name: round(peak(run) / 1e6) for name, run in {**runs, "pyengine": lambda: step(ours, inputs)}.items()}
    rows.append(
        {
            "what": "WPO step: reference, policy, backward",
            "pairs": 1,
            "prompt": PROMPT,
            "length": length,
            "vocab": vocab,
            "width": width,
            "seconds": {name: round(t, 3) for name, t in times.items()},
            "times_trl": {name: round(t / times["TRL, as shipped"], 3) for name, t in times.items()},
            "extra_peak_megabytes": megabytes,
            "differs_from_trl": {name: float(f"{value:.2g}") for name, value in found.items()},
            "samples": samples,
        }
    )


def test_smoke(benchmark, tmp_path):
    made, inputs = trainers(3000, 64, tmp_path), batch(3000, 5)
    for name in ("pyengine", "TRL on pyengine's head"):
        assert max(differences(made["TRL"], made[name], inputs).values()) < 1e-4
    assert benchmark.pedantic(lambda: step(made["pyengine"], inputs), rounds=1) > 0
