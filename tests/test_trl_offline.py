"""The offline trainer: plain SFT beside TRL's, filtered, reward-weighted and conditional losses by formula."""

from __future__ import annotations

import logging
import math

import pytest
import torch
import transformers
from datasets import Dataset, disable_progress_bars
from trl import SFTConfig, SFTTrainer

from pyengine import InputError
from pyengine.integrations.trl import OfflineConfig, OfflineTrainer
from pyengine.rewards import Statistics
from pyengine.rewards.conditioning import OPENRLHF, Conditioning

disable_progress_bars()
ROWS = [
    {"prompt": "pack my", "completion": " box with five dozen jugs", "reward": 2.0},
    {"prompt": "the quick", "completion": " fox", "reward": -1.0},
    {"prompt": "sphinx", "completion": " of quartz", "reward": 0.5},
    {"prompt": "the lazy", "completion": " dog jumps over", "reward": 0.0},
]
PLAIN = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "gradient_checkpointing": False,
    "per_device_train_batch_size": 4,
    "dataloader_pin_memory": False,
}


@pytest.fixture(scope="module")
def policy(model_dirs):
    """policy(): a small Llama, the same each time, and its tokenizer."""
    config = transformers.AutoConfig.from_pretrained(model_dirs["llama"], num_hidden_layers=1)

    def make():
        torch.manual_seed(1)
        model = transformers.LlamaForCausalLM(config)
        with torch.no_grad():
            model.lm_head.weight.mul_(6)
        return model

    make.tokenizer = transformers.AutoTokenizer.from_pretrained(model_dirs["llama"])
    return make


def made(policy, tmp_path, rows=ROWS, kind=OfflineTrainer, config=OfflineConfig, options=(), **settings):
    args = config(output_dir=str(tmp_path), **PLAIN | settings)
    data = Dataset.from_list(rows)
    return kind(policy(), args, train_dataset=data, processing_class=policy.tokenizer, **dict(options))


def batch_of(trainer):
    """All rows in their order."""
    trainer._set_signature_columns_if_needed()
    return trainer.data_collator(
        [{k: row[k] for k in trainer._signature_columns if k in row} for row in trainer.train_dataset]
    )


def step(trainer, count=None):
    """(loss, gradients, metrics) of all rows at once."""
    model = trainer.model.train()
    loss = trainer.compute_loss(model, batch_of(trainer), num_items_in_batch=count)
    loss.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}, metrics


def nll(trainer):
    """fp64 [N]: -log p of each response by the model's own logits, and its tokens."""
    batch = batch_of(trainer)
    with torch.no_grad():
        logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    kept = labels != -100
    logp = logits.double().log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return -torch.where(kept, logp, 0.0).sum(-1), kept.sum(-1)


def scores(rows=ROWS):
    rewards = torch.tensor([row["reward"] for row in rows]).double()
    return (rewards - rewards.mean()) / rewards.std(correction=0)


@pytest.mark.parametrize("count", [None, torch.tensor(40)])
def test_plain_sft_over_tokens_is_trls(policy, tmp_path, count):
    """count: the tokens of a step of which this batch is a part."""
    ours = made(policy, tmp_path, method="sft", reduction="token_mean")
    rows = [{k: v for k, v in row.items() if k != "reward"} for row in ROWS]
    theirs = made(policy, tmp_path, rows, SFTTrainer, SFTConfig)
    assert [r["input_ids"] for r in ours.train_dataset] == [r["input_ids"] for r in theirs.train_dataset]
    one, other = step(theirs, count), step(ours, count)
    assert other[0].item() == pytest.approx(one[0].item(), rel=1e-5)
    for name, gradient in one[1].items():
        torch.testing.assert_close(other[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    assert {*other[2]} - {*one[2]} == {"weights/mean", "retained"}
    assert {k: other[2][k] for k in one[2]} == pytest.approx(one[2], rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "weigh"),
    [
        ({"method": "sft"}, lambda z: torch.ones_like(z)),
        ({"method": "fa"}, lambda z: (z > 0).double()),
        ({"method": "fa", "threshold": 0.2}, lambda z: (z > 0.2).double()),
        ({"method": "rwr"}, lambda z: (z / 5).exp()),
        ({"method": "rwr", "beta": 0.5, "weight_cap": 3.0}, lambda z: (z / 0.5).exp().clamp(max=3)),
        ({"method": "rwr", "beta": math.inf}, lambda z: torch.ones_like(z)),
    ],
)
@pytest.mark.parametrize("reduction", ["sum", "token_mean"])
def test_losses_are_those_of_the_formula(policy, tmp_path, settings, weigh, reduction):
    trainer = made(policy, tmp_path, reduction=reduction, **settings)
    each, tokens = nll(trainer)
    w = weigh(scores())
    want = (w * each).sum() / (len(w) if reduction == "sum" else tokens.sum())
    loss, gradients, metrics = step(trainer)
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert metrics["weights/mean"] == pytest.approx(w.mean().item(), rel=1e-5)
    assert metrics["retained"] == (w > 0).double().mean().item()
    assert gradients["lm_head.weight"].abs().max() > 0


def test_a_trl_with_other_methods_is_named(policy, tmp_path, monkeypatch):
    monkeypatch.delattr(SFTTrainer, "_prepare_dataset")
    with pytest.raises(InputError, match=r"SFTTrainer of TRL [\d.]+ has no _prepare_dataset"):
        made(policy, tmp_path)


def test_a_batch_of_which_nothing_is_kept_is_a_zero_with_a_gradient(policy, tmp_path):
    trainer = made(policy, tmp_path, method="fa")
    trainer.train_dataset = trainer.train_dataset.select([1, 3])
    loss, gradients, metrics = step(trainer)
    assert (loss.item(), metrics["retained"]) == (0, 0)
    assert all(g is not None and not g.any() for g in gradients.values())
    with pytest.raises(InputError, match="no response has z > 5: nothing is left"):
        made(policy, tmp_path, method="fa", threshold=5.0)


@pytest.mark.parametrize("conditioning", [None, OPENRLHF])
def test_conditional_alignment_states_the_reward_and_does_not_train_on_it(policy, tmp_path, conditioning):
    tokenizer, template = policy.tokenizer, conditioning or Conditioning()
    trainer = made(policy, tmp_path, options={"conditioning": conditioning}, method="ca")
    for row, prepared, z in zip(ROWS, trainer.train_dataset, scores().tolist(), strict=True):
        prompt = tokenizer(template.prompt(row["prompt"], z)).input_ids
        assert prepared["input_ids"][: len(prompt)] == prompt
        assert prepared["labels"][: len(prompt)] == [-100] * len(prompt)
        said = prepared["labels"][len(prompt) :]
        assert said == prepared["input_ids"][len(prompt) :]
        assert tokenizer.decode(said) == row["completion"] + "<eos>"
    each, _ = nll(trainer)
    assert step(trainer)[0].item() == pytest.approx(each.mean().item(), rel=1e-5)


def test_statistics_and_template_are_frozen_and_lie_beside_every_checkpoint(policy, tmp_path):
    trainer = made(policy, tmp_path, method="ca", max_steps=2, save_steps=1, save_strategy="steps", disable_tqdm=True)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    want = Statistics.of([row["reward"] for row in ROWS])
    for place in ("checkpoint-1", "checkpoint-2", "model"):
        assert Statistics.load(tmp_path / place / "reward_statistics.json") == want
        assert Conditioning.load(tmp_path / place / "conditioning.json") == Conditioning()
    given = Statistics(10.0, 2.0)
    weights = made(policy, tmp_path, options={"statistics": given}, method="rwr").train_dataset["weight"]
    assert list(weights) == pytest.approx([math.exp((row["reward"] - 10) / 2 / 5) for row in ROWS], rel=1e-5)


def test_given_tokens_cuts_and_ends(policy, tmp_path, caplog):
    """tokens are taken as they are, what was cut off gets no EOS, and max_length cuts with a warning."""
    tokenizer = policy.tokenizer
    ids = tokenizer(" fox", add_special_tokens=False).input_ids
    spelled = tokenizer.convert_tokens_to_ids(list("Ġfox"))
    rows = [
        {"prompt": "the", "completion": " fox", "reward": 1.0, "tokens": [*spelled, 0], "ended": True},
        {"prompt": "the", "completion": " fox", "reward": 0.0, "tokens": None, "ended": False},
        {"prompt": "the", "completion": " fox jumps over the lazy dog", "reward": 0.0, "tokens": None, "ended": True},
    ]
    with caplog.at_level(logging.WARNING, "pyengine"):
        trainer = made(policy, tmp_path, rows, method="rwr", max_length=6)
    prompt = tokenizer("the").input_ids
    found = [row["input_ids"] for row in trainer.train_dataset]
    assert found[0] == [*prompt, *spelled, 0]
    assert found[1] == prompt + ids
    assert len(found[2]) == 6
    assert trainer.cut == 1
    assert "the train dataset: 1 responses are cut at 6 tokens" in caplog.text


def test_messages_are_tokenised_by_trl(policy, tmp_path):
    tokenizer = policy.tokenizer
    plain = tokenizer.chat_template
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    rows = [
        {"prompt": [{"role": "user", "content": r["prompt"]}], "reward": r["reward"]}
        | {"completion": [{"role": "assistant", "content": r["completion"]}]}
        for r in ROWS
    ]
    try:
        trainer = made(policy, tmp_path, rows, method="fa")
        assert step(trainer)[0] > 0
        with pytest.raises(InputError, match="holds messages: ca states the reward in a prompt of text"):
            made(policy, tmp_path, rows, method="ca")
    finally:
        tokenizer.chat_template = plain
    assert list(trainer.train_dataset["weight"]) == [1, 0, 1, 0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "ppo"}, "method must be one of sft, fa, rwr, ca"),
        ({"reduction": "mean"}, "reduction must be one of"),
        ({"method": "fa", "beta": 2.0}, "beta is read by method 'rwr', not by 'fa'"),
        ({"method": "rwr", "threshold": 1.0}, "threshold is read by method 'fa'"),
        ({"method": "sft", "weight_cap": 1.0}, "weight_cap is read by method 'rwr'"),
        ({"method": "rwr", "beta": 0.0}, "beta must be above 0"),
        ({"method": "rwr", "beta": 1e-3}, r"row 0 of the train dataset: exp\(z / beta\) is inf at z = 1.5"),
        ({"packing": True}, "packing=True: rows of several responses have no one weight"),
        ({"padding_free": True}, "padding_free=True: rows of several"),
        ({"assistant_only_loss": True}, "assistant_only_loss=True: the response is what"),
        ({"completion_only_loss": False}, "completion_only_loss=False: the response alone"),
        ({"loss_type": "dft"}, "loss_type='dft': the loss is the method's"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is not read"),
        ({"use_liger_kernel": True}, "Liger rewrites"),
    ],
)
def test_what_would_be_ignored_is_refused(policy, tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        made(policy, tmp_path, **{"method": "rwr"} | settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward": math.nan}, "reward 0 must be a finite number"),
        ({"completion": "  "}, "row 0 of the train dataset: the response is empty"),
        ({"prompt": ""}, "row 0 of the train dataset: the prompt is empty"),
        ({"tokens": [5, 7]}, "row 0 of the train dataset: its tokens do not spell"),
    ],
)
def test_a_row_at_fault_is_named(policy, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        made(policy, tmp_path, [ROWS[0] | change, *ROWS[1:]], method="rwr")


def test_nothing_is_left_where_prompts_fill_max_length(policy, tmp_path):
    with pytest.raises(InputError, match="the train dataset: every prompt fills max_length"):
        made(policy, tmp_path, method="sft", max_length=1)


def test_an_option_that_asks_for_nothing_is_no_fault(policy, tmp_path):
    made(policy, tmp_path, method="sft", eval_packing=False)


def test_missing_columns_and_statistics(policy, tmp_path):
    rows = [{"prompt": "a", "completion": "b"}]
    with pytest.raises(InputError, match="the train dataset lacks reward"):
        made(policy, tmp_path, rows, method="fa")
    with pytest.raises(InputError, match="the train dataset lacks prompt and completion"):
        made(policy, tmp_path, [{"text": "a"}], method="sft")
    stream = {"train_dataset": Dataset.from_list(ROWS).to_iterable_dataset(), "processing_class": policy.tokenizer}
    args = OfflineConfig(str(tmp_path), method="rwr", max_steps=1, **PLAIN)
    with pytest.raises(InputError, match="statistics: a data set that is streamed"):
        OfflineTrainer(policy(), args, **stream)
    trainer = OfflineTrainer(policy(), args, statistics=Statistics(0.375, 1.08), **stream)
    assert next(iter(trainer.train_dataset))["weight"] == pytest.approx(math.exp((2 - 0.375) / 1.08 / 5))
