"""The LM head that TRL's trainers get: the model's own log-probabilities, whatever is done to its logits."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import transformers
from trl.trainer import dpo_trainer
from trl.trainer.utils import add_fused_lm_head

from pyengine import InputError, losses
from pyengine.integrations.trl.head import Recorder, add_head, in_place_of, moments_of, numbers_of

SIZES = {
    "vocab_size": 200,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 0,
}
KINDS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "gemma2, softcap": lambda: transformers.Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.5),
    "cohere2, scale": lambda: transformers.Cohere2Config(**SIZES, logit_scale=0.25),
    "granite, divisor": lambda: transformers.GraniteConfig(**SIZES, logits_scaling=8.0),
    "phi, bias": lambda: transformers.PhiConfig(**SIZES),
}


def made(kind, dtype=torch.float32):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(KINDS[kind](), attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
        if getattr(model.get_output_embeddings(), "bias", None) is not None:
            model.get_output_embeddings().bias.normal_()
    return model.to(dtype).eval()


@pytest.fixture
def batch():
    torch.manual_seed(1)
    ids = torch.randint(1, 200, (4, 7))
    labels = ids.clone()
    labels[:, :2] = labels[1, 5:] = -100
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_is_that_of_the_models_logits(kind, batch):
    model = made(kind)
    kept, labels = batch["labels"][:, 1:] != -100, batch["input_ids"][:, 1:]
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1].double()
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    add_head(model, ("log_probs", "mean_logits"))
    out = model(**batch, fused_lm_head=True)
    want = {
        "log_probs": log_p.gather(-1, labels[..., None])[..., 0],
        "entropy": -(p * log_p).sum(-1),
        "log_sum_sq_probs": (p * p).sum(-1).log(),
        "mean_logits": logits.mean(-1),
        "is_top1": logits.argmax(-1) == labels,
        "greedy": log_p.gather(-1, labels[..., None])[..., 0] - log_p.amax(-1),
    }
    for name, value in want.items():
        value = torch.where(kept, value, torch.zeros_like(value))
        torch.testing.assert_close(out[name].to(value.dtype), value, rtol=1e-4, atol=2e-5, msg=name)
    assert torch.equal(out.label_mask, kept)
    assert out.loss.item() == pytest.approx(model(**batch).loss.item(), rel=1e-5)
    assert torch.equal(model(input_ids=batch["input_ids"]).logits.double()[:, :-1], logits)  # as before without it


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_trls_head(kind, batch):
    found = []
    for add in (add_fused_lm_head, add_head):
        model = made(kind)
        add(model)
        (model(**batch, fused_lm_head=True).log_probs * torch.linspace(0.5, 1, 6)).sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-5 * max(1.0, scale), msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_the_paired_loss_is_that_of_the_tokens(kind, batch):
    """Three products with the head against four, tokens against pairs: loss, gradients and sums agree."""
    reference, results = torch.randn(4) - 30, []
    loss = losses.weighted(losses.dpo_loss)
    model = made(kind)
    add_head(model, ("log_probs", "mean_logits"))
    paired = model(**batch, fused_lm_head=True, paired_loss=loss, reference_logp=reference)
    paired.loss.backward()
    results.append({name: p.grad for name, p in model.named_parameters()})
    model.zero_grad()
    recorder = Recorder(model)
    recorder(**batch, fused_lm_head=True)
    moments = moments_of(recorder.fused)
    sides = [type(moments)(*half) for half in zip(*(f.chunk(2) for f in moments), strict=True)]
    each = loss(*sides, *reference.chunk(2))
    each.mean().backward()
    results.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(paired.losses, each.detach(), rtol=1e-4, atol=1e-5)
    for side, want in zip(paired.sides(), sides, strict=True):
        for a, b in zip(side, want, strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(paired.mean_logits, recorder.fused.mean_logits.sum(-1), rtol=1e-4, atol=1e-4)
    assert torch.equal(paired.top1, recorder.fused.is_top1.sum(-1))
    for name, gradient in results[1].items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(results[0][name], gradient, rtol=1e-3, atol=1e-5 * max(1.0, scale), msg=name)


def test_autocast_multiplies_in_bf16_and_sums_in_fp32(batch):
    model = made("llama")
    add_head(model)
    exact = model(**batch, fused_lm_head=True).log_probs
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**batch, fused_lm_head=True)
    out.log_probs.sum().backward()
    assert out.log_probs.dtype == torch.float32
    assert model.lm_head.weight.grad.dtype == torch.float32
    assert 0 < (out.log_probs - exact).abs().max() < 0.2


def test_a_half_type_model(batch):
    model = made("gemma2, softcap", torch.bfloat16)
    add_head(model, ("mean_logits",))
    want = model(input_ids=batch["input_ids"]).logits[:, :-1].float()
    out = model(**batch, fused_lm_head=True)
    kept = out.label_mask
    torch.testing.assert_close(out.mean_logits[kept], want.mean(-1)[kept], atol=2e-2, rtol=2e-2)


def test_no_label_at_all_is_a_zero_with_a_gradient(batch):
    model = made("llama")
    add_head(model)
    out = model(input_ids=batch["input_ids"], labels=torch.full_like(batch["labels"], -100), fused_lm_head=True)
    out.loss.backward()
    assert out.loss == 0
    assert model.lm_head.weight.grad.abs().max() == 0


def test_logits_that_no_config_tells_of_are_refused():
    model = made("llama")
    forward = model.forward

    def shifted(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = out.logits * 1.1
        return out

    model.forward = shifted
    with pytest.raises(InputError, match="the logits of this llama model are not softcap"):
        add_head(model)
    with pytest.raises(InputError, match=r"multiplies its logits by 0.0; that must be above 0"):
        numbers_of(transformers.Cohere2Config(**SIZES, logit_scale=0.0))


def test_another_trl_is_named(monkeypatch):
    monkeypatch.delattr(dpo_trainer, "add_fused_lm_head")
    message = r"TRL [\d.]+ has no add_fused_lm_head to put this head in place of"
    with pytest.raises(InputError, match=message), in_place_of(dpo_trainer):
        pass


SHARDED = """
import os
import sys

import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from pyengine import losses
from pyengine.integrations.trl.head import add_head

# A file, not a port: two launches on a busy machine can take the same port, or wait too long for each other on it.
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=int(sys.argv[2]), world_size=2)
mesh = init_device_mesh("cpu", (2,))
config = transformers.LlamaConfig(vocab_size=200, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                                  num_attention_heads=2, num_key_value_heads=1, pad_token_id=0)

def made():
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    add_head(model)
    return model

def loss(model, rank, paired):
    ids = torch.randint(1, 200, (4, 6), generator=torch.Generator().manual_seed(rank))
    given = {"input_ids": ids, "labels": ids, "fused_lm_head": True}
    return model(**given, paired_loss=losses.simpo_loss).loss if paired else -model(**given).log_probs.mean()

for paired in (True, False):
    whole = made()
    ((loss(whole, 0, paired) + loss(whole, 1, paired)) / 2).backward()
    for own_group in (False, True):
        model = made()
        for part in (*model.model.layers, *([model.lm_head] if own_group else []), model):
            fully_shard(part, mesh=mesh)
        loss(model, dist.get_rank(), paired).backward()
        for (name, want), found in zip(whole.named_parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(found.grad.full_tensor(), want.grad, msg=f"{paired} {own_group} {name}")
# Torch keeps the mesh, and with it the group's threads, of which one may let go of a tensor while the interpreter ends:
# that aborts the process ("terminate called without an active exception"), two times in sixteen where they are slow.
os._exit(0)
"""


def test_fsdp2_averages_the_gradients_of_its_processes(tmp_path):
    """Two processes with a batch each: also where the head is a group of its own, whose forward is never called."""
    (tmp_path / "sharded.py").write_text(SHARDED)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, "sharded.py", str(tmp_path / "store"), str(rank)],
            cwd=tmp_path,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)


def test_trl_has_its_own_head_and_loader_again_even_after_an_error():
    def interrupted():
        with in_place_of(dpo_trainer, reference=False):
            assert dpo_trainer.add_fused_lm_head is add_head
            assert dpo_trainer.create_model_from_path("never loaded") is None
            raise KeyError

    own = dpo_trainer.add_fused_lm_head, dpo_trainer.create_model_from_path
    with pytest.raises(KeyError):
        interrupted()
    assert (dpo_trainer.add_fused_lm_head, dpo_trainer.create_model_from_path) == own
