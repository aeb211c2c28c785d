"""Trains everything that the package embeds: `python -m pyengine.training.embedded`.

In order: a tokenizer and a Llama-architecture language model on the review corpus; roll-outs of that
model, scored with the exact sentiment; on them a prefix scorer (CD-FUDGE) and a hidden-state probe; a
Bradley-Terry reward model on pairs of reviews. All seeds are fixed: the same machine type and number of
threads gives the same files.
"""

from __future__ import annotations

import math
import random
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from pyengine.engine import Engine
from pyengine.results import SamplingParams
from pyengine.scorers import PrefixScorer, Probe
from pyengine.worlds import reviews

EOS = "<|endoftext|>"
THREADS = 2  # part of the recipe: sums depend on it


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: every string can be encoded, every corpus word is one or two tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=768, special_tokens=[EOS], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS)


def batches_by_length(sequences: list[list[int]], size: int, epochs: int, seed: int) -> list[list[int]]:
    """Indices of batches of near-equal length in random order: little padding, every row once an epoch."""
    rng = random.Random(seed)
    out: list[list[int]] = []
    for _ in range(epochs):
        order = sorted(range(len(sequences)), key=lambda i: (len(sequences[i]), rng.random()))
        epoch = [order[i : i + size] for i in range(0, len(order), size)]
        rng.shuffle(epoch)
        out += epoch
    return out


def padded(rows: list[list[Any]], fill: float) -> torch.Tensor:
    """[N, T], right-padded with `fill`; int64 or fp32, as the rows are."""
    longest = max(map(len, rows))
    return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])


class BatchTrainer(Trainer):
    """transformers' Trainer over ready-made batches, in the order given."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


class PolicyTrainer(BatchTrainer):
    """Next-token loss, plus a linear read-out of the sentiment so far at every token of the completion.

    The hidden states of large language models carry sentiment by themselves; two layers of width 128
    have no need to count it (R^2 of a linear probe .01 without the read-out), so they are taught to.
    """

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, *_: Any, **__: Any) -> Any:
        known = inputs.pop("sentiment")
        output = model(**inputs, output_hidden_states=True)
        scored = known.isfinite()
        read = model.read_out(output.hidden_states[-1][scored])[:, 0]
        return output.loss + 3 * (read - known[scored]).square().mean()


class PairTrainer(BatchTrainer):
    """Bradley-Terry: each batch holds the preferred texts first, then the others in the same order."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, *_: Any, **__: Any) -> Any:
        chosen, rejected = model(**inputs).logits[:, 0].chunk(2)
        return -torch.nn.functional.logsigmoid(chosen - rejected).mean()


def fit(model: torch.nn.Module, batches: list[dict], lr: float, trainer: type[Trainer] = BatchTrainer) -> None:
    """One pass over `batches` with AdamW, linear warm-up and cosine decay."""
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            per_device_train_batch_size=1,
            num_train_epochs=1,
            learning_rate=lr,
            lr_scheduler_type="cosine",
            warmup_steps=len(batches) // 20,
            weight_decay=0.01,
            max_grad_norm=1.0,
            logging_steps=max(len(batches) // 10, 1),
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            seed=0,
            full_determinism=False,
            remove_unused_columns=False,
        )
        trainer(model=model, args=arguments, train_dataset=batches, data_collator=lambda items: items[0]).train()


def llama(hidden: int, layers: int, vocab: int, **extra: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        **extra,
    )


def train_policy(out: Path, count: int, epochs: int = 4) -> None:
    """The base model, in `out`: every token of prompt and completion is predicted, one EOS included."""
    pairs = list(reviews.corpus(count, seed=1))
    tokenizer = train_tokenizer([p + c for p, c in pairs])
    ids, sentiments = [], []
    for prompt, completion in pairs:
        encoded = tokenizer(prompt + completion, return_offsets_mapping=True)
        ends = [end - len(prompt) for _, end in encoded.offset_mapping]
        answered = [end for end in ends if end > 0]
        so_far = reviews.running_sentiment(completion, [*answered, len(completion)])
        ids.append([*encoded.input_ids, tokenizer.eos_token_id])
        sentiments.append([math.nan] * (len(ends) - len(answered)) + so_far)
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama(128, 2, len(tokenizer)))
    model.read_out = torch.nn.Linear(128, 1)
    batches = []
    for rows in batches_by_length(ids, 64, epochs, seed=2):
        chosen = [ids[i] for i in rows]
        batches.append(
            {
                "input_ids": padded(chosen, 0),
                "attention_mask": padded([[1] * len(s) for s in chosen], 0),
                "labels": padded(chosen, -100),
                "sentiment": padded([sentiments[i] for i in rows], math.nan),
            }
        )
    fit(model, batches, lr=3e-3, trainer=PolicyTrainer)
    del model.read_out
    save(model.eval(), tokenizer, out)


def save(model: Any, tokenizer: Any, out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    model.config.use_cache = True  # Trainer turned it off
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


class Rollouts(NamedTuple):
    """Response tokens of sampled reviews, flattened to [N] rows.

    before, at: hidden state [N, D] of the policy before and at each token; token: [N];
    reward: exact sentiment [N] of the whole response that the token belongs to.
    """

    before: torch.Tensor
    at: torch.Tensor
    token: torch.Tensor
    reward: torch.Tensor


@torch.inference_mode()
def roll_out(policy: Path, count: int, seed: int) -> Rollouts:
    """`count` responses of the policy to the corpus prompts, drawn by the engine."""
    engine = Engine.from_pretrained(policy)
    prompts = reviews.prompts(count)
    sampling = [SamplingParams(max_tokens=160, seed=seed + i) for i in range(count)]
    results = engine.generate(prompts, sampling=sampling)
    parts = []
    for start in tqdm(range(0, count, 64), desc="hidden states", disable=None):
        group = results[start : start + 64]
        heads = [engine.tokenizer(r.prompt).input_ids for r in group]
        ids = [h + r.tokens for h, r in zip(heads, group, strict=True)]
        mask = padded([[1] * len(i) for i in ids], 0)
        hidden = engine.model.model(input_ids=padded(ids, 0), attention_mask=mask).last_hidden_state
        for row, (head, result) in enumerate(zip(heads, group, strict=True)):
            n, end = len(result.tokens), len(head) + len(result.tokens)
            reward = torch.full((n,), reviews.sentiment_of(result.text))
            states = hidden[row]
            parts.append(
                Rollouts(states[end - n - 1 : end - 1], states[end - n : end], torch.tensor(result.tokens), reward)
            )
    return Rollouts(*(torch.cat(column).clone() for column in zip(*parts, strict=True)))


def explained(prediction: torch.Tensor, target: torch.Tensor) -> float:
    """R^2."""
    return 1 - ((prediction - target).var() / target.var()).item()


def train_prefix(data: Rollouts, held_out: Rollouts, vocab: int, out: Path, epochs: int = 12) -> None:
    """CD-FUDGE: every prefix of a response is regressed on the response's reward."""
    torch.manual_seed(0)
    scorer = PrefixScorer(data.before.shape[1], vocab, name="prefix")
    batch = min(4096, len(data.token))
    steps = epochs * (len(data.token) // batch)
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    order = torch.Generator().manual_seed(1)
    progress = tqdm(total=steps, desc="prefix scorer", disable=None)
    for _ in range(epochs):
        rows = torch.randperm(len(data.token), generator=order)
        for i in range(len(rows) // batch):
            pick = rows[i * batch : (i + 1) * batch]
            error = scorer.values_at(data.before[pick], data.token[pick]) - data.reward[pick]
            optimizer.zero_grad()
            (0.5 * error.square().mean()).backward()
            optimizer.step()
            schedule.step()
            progress.update()
    progress.close()
    with torch.inference_mode():
        found = explained(scorer.values_at(held_out.before, held_out.token), held_out.reward)
    print(f"prefix scorer: R^2 {found:.3f} over all held-out prefixes")
    scorer.save(out)


def train_probe(data: Rollouts, held_out: Rollouts, out: Path) -> None:
    """A linear probe by ridge regression of the reward on the hidden state at every token (L_Q)."""
    x = torch.cat([data.at, torch.ones(len(data.at), 1)], -1).double()
    gram = x.T @ x + 1e-3 * len(x) * torch.eye(x.shape[1], dtype=torch.float64)
    solution = torch.linalg.solve(gram, x.T @ data.reward.double()).float()
    probe = Probe(data.at.shape[1])
    with torch.no_grad():
        probe.head.weight.copy_(solution[None, :-1])
        probe.head.bias.copy_(solution[-1:])
        found = explained(probe.head(held_out.at)[:, 0], held_out.reward)
    print(f"probe: R^2 {found:.3f} over all held-out prefixes")
    probe.save(out)


def train_reward_model(policy: Path, out: Path, pairs: int, held_out: int, epochs: int = 2) -> None:
    """Bradley-Terry on pairs of reviews whose labels are drawn with P = sigmoid(4 * difference)."""
    tokenizer = AutoTokenizer.from_pretrained(policy)
    rng = random.Random(3)
    texts = list(reviews.corpus(2 * (pairs + held_out), seed=4))
    ids = [tokenizer(p + c).input_ids for p, c in texts]
    rewards = [reviews.sentiment_of(c) for _, c in texts]
    couples = []
    for i in range(0, 2 * pairs, 2):
        wins = rng.random() < 1 / (1 + math.exp(-4 * (rewards[i] - rewards[i + 1])))
        couples.append((i, i + 1) if wins else (i + 1, i))
    torch.manual_seed(5)
    config = llama(64, 2, len(tokenizer), num_labels=1)
    model = LlamaForSequenceClassification(config)
    batches = []
    for rows in batches_by_length([ids[a] + ids[b] for a, b in couples], 32, epochs, seed=6):
        chosen = [ids[couples[i][0]] for i in rows] + [ids[couples[i][1]] for i in rows]
        batches.append({"input_ids": padded(chosen, 0), "attention_mask": padded([[1] * len(s) for s in chosen], 0)})
    fit(model, batches, lr=2e-3, trainer=PairTrainer)
    model.eval()
    with torch.inference_mode():
        rest = range(2 * pairs, 2 * (pairs + held_out))
        test = [ids[i] for i in rest]
        mask = padded([[1] * len(s) for s in test], 0)
        score = model(input_ids=padded(test, 0), attention_mask=mask).logits[:, 0]
    truth = torch.tensor([rewards[i] for i in rest])
    a, b = score[::2] - score[1::2], truth[::2] - truth[1::2]
    print(f"reward model: orders {((a * b)[b != 0] > 0).float().mean():.3f} of held-out pairs rightly")
    save(model, tokenizer, out)


def main(home: Path, scale: float = 1.0) -> None:
    """Train the policy and its scorers into `home`; scale shrinks the data, for tests."""
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    train_policy(home / "policy", count=int(30_000 * scale))
    data = roll_out(home / "policy", int(16_000 * scale), seed=10)
    held_out = roll_out(home / "policy", int(1000 * scale), seed=900_000)
    vocab = AutoConfig.from_pretrained(home / "policy").vocab_size
    train_prefix(data, held_out, vocab, home / "prefix")
    train_probe(data, held_out, home / "probe")
    train_reward_model(home / "policy", home / "reward-model", int(12_000 * scale), int(1000 * scale))


if __name__ == "__main__":
    main(Path(__file__).parent.parent / "embedded")
