"""Three models with scorers, and what their tokens must be in every host, by transformers and a plain reference."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import pyengine
from pyengine import PrefixModel, PrefixScorer

LENGTHS = (3, 7, 16, 31, 64, 120, 200, 300)
WEIGHTS = (0.0, 2.0, 8.0, -8.0)
NEW = 24  # tokens
GAP = 1e-3  # between the first and the second logit, at least: no rounding crosses it
HERE = Path(__file__).parent


@dataclass
class Case:
    """A model, its scorer, and the greedy tokens of each (prompt, λ)."""

    name: str
    model: Path
    scorer: Path
    prompts: list[list[int]]
    tokens: dict[tuple[int, float], list[int]]


def length(i):
    """Of the i-th request in a batch: they end at different times."""
    return NEW - (5 * i) % 17


@torch.inference_mode()
def values(scorer, hidden):
    """V of every next token in plain torch: hidden [N, D] -> [N, V]."""
    trunk, head = scorer.trunk, scorer.head
    inner = hidden @ trunk.weight.T + trunk.bias
    return inner / (1 + torch.exp(-inner)) @ head.weight.T + head.bias


class Reference(transformers.LogitsProcessor):
    """logits + λ V at temperature 0. valued: of (tokens so far [N, T], what the output head reads [N, D])."""

    def __init__(self, model, valued, weights):
        self.valued, self.weights, self.gaps = valued, torch.tensor(weights)[:, None], []
        self.hook = model.lm_head.register_forward_pre_hook(lambda _, inputs: setattr(self, "hidden", inputs[0][:, -1]))

    def __call__(self, input_ids, scores):
        scores = scores + self.weights * self.valued(input_ids, self.hidden)
        best = scores.topk(2).values
        self.gaps.append((best[:, 0] - best[:, 1]).min().item())
        return scores


def expected(directory, prompts, valued):
    """{(prompt, λ): greedy tokens}; no two logits are so near each other that rounding could swap them."""
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    found, gap = {}, float("inf")
    for i, prompt in enumerate(prompts):
        reference = Reference(model, valued, WEIGHTS)
        ids = torch.tensor([prompt] * len(WEIGHTS))
        rows = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW,
            eos_token_id=None, pad_token_id=0, logits_processor=[reference],
        )  # fmt: skip
        reference.hook.remove()
        gap = min(gap, *reference.gaps)
        found |= {(i, w): row for w, row in zip(WEIGHTS, rows[:, len(prompt) :].tolist(), strict=True)}
    assert gap > GAP, f"{directory}: two logits are {gap:.2g} apart; take another seed"
    return found


def expect(name, model, scorer, prompts):
    loaded = pyengine.load_scorer(scorer)
    return Case(name, model, scorer, prompts, expected(model, prompts, lambda _, hidden: values(loaded, hidden)))


def prefix_model(case, folder):
    """A case's model as a scorer beside another one's: (its directory, `valued` for a reference)."""
    tokenizer, model = AutoTokenizer.from_pretrained(case.model), AutoModel.from_pretrained(case.model).eval()
    head = pyengine.load_scorer(case.scorer)
    PrefixModel(model, tokenizer, head).save(folder)
    return folder, lambda ids, _: values(head, model(ids).last_hidden_state[:, -1])


def random_case(kind, seed, folder):
    """fp32, with logits of a few nats, and the embedded policy's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(pyengine.embedded("policy"))
    config = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}[kind](
        vocab_size=745, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    scorer = PrefixScorer(64, 745, width=32, name=kind)
    with torch.no_grad():
        model.lm_head.weight.mul_(25)
        scorer.trunk.weight.mul_(3)
        scorer.head.weight.mul_(3)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    scorer.save(folder / "scorer")
    return expect(kind, folder / "model", folder / "scorer", drawn_prompts(seed))


def embedded_case(seed):
    model, scorer = pyengine.embedded("policy"), pyengine.embedded("prefix")
    return expect("embedded", model, scorer, drawn_prompts(seed))


def drawn_prompts(seed):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 745, (n,), generator=draw).tolist() for n in LENGTHS]


def run_vllm(folder, engines, v2=False):
    """What `vllm_run.py` writes about these engines."""
    (folder / "job.json").write_text(json.dumps({"engines": engines}))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "V2": str(int(v2))}
    command = [sys.executable, str(HERE / "vllm_run.py"), str(folder / "job.json"), str(folder / "out.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((folder / "out.json").read_text()), done.stdout + done.stderr
