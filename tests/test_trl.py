"""TRL's DPO and KTO trainers beside ours: the same batch through both, weights by formula, what is refused."""

from __future__ import annotations

import copy
import logging
import math

import peft
import pytest
import torch
import transformers
from datasets import Dataset, disable_progress_bars
from torch.nn.functional import logsigmoid
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.trainer import dpo_trainer

from pyengine import InputError
from pyengine.integrations.trl import PreferenceConfig, PreferenceTrainer, UnpairedConfig, UnpairedTrainer

disable_progress_bars()
PAIRS = [
    {"prompt": "pack my", "chosen": " box with five dozen jugs", "rejected": " dog"},
    {"prompt": "the quick", "chosen": " fox", "rejected": " jugs of quartz over the lazy box"},
    {"prompt": "sphinx", "chosen": " of quartz", "rejected": " with five"},
]
LABELLED = [
    {"prompt": "pack my", "completion": " box with five dozen jugs", "label": True},
    {"prompt": "the quick", "completion": " fox", "label": False},
    {"prompt": "sphinx", "completion": " of quartz", "label": True},
    {"prompt": "the lazy", "completion": " dog jumps", "label": False},
]
TRL_LOSSES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
PLAIN = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "gradient_checkpointing": False,
    "per_device_train_batch_size": 3,
    "dataloader_pin_memory": False,
}


@pytest.fixture(scope="module")
def policy(model_dirs):
    """policy(seed): a small Llama whose token probabilities are neither even nor certain, and its tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dirs["llama"])
    config = transformers.AutoConfig.from_pretrained(model_dirs["llama"], num_hidden_layers=2)

    def make(seed=1):
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(config)
        with torch.no_grad():
            model.lm_head.weight.mul_(6)
        return model

    make.tokenizer = tokenizer
    return make


def made(kind, config, policy, tmp_path, rows, reference=2, options=(), **settings):
    """A trainer on the rows, and its model."""
    model = policy(1)
    args = config(output_dir=str(tmp_path), **PLAIN | settings)
    given = {"train_dataset": Dataset.from_list(rows), "processing_class": policy.tokenizer} | dict(options)
    return kind(model, policy(reference) if reference else None, args, **given)


def step(trainer):
    """(loss, gradients, metrics) of the first batch."""
    model = trainer.model.train()
    loss = trainer.compute_loss(model, next(iter(trainer.get_train_dataloader())))
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return loss.detach(), gradients, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def same(one, other, more=()):
    torch.testing.assert_close(one[0], other[0], rtol=1e-5, atol=1e-6)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(other[1][name], gradient, rtol=1e-4, atol=1e-5 * max(scale, 1e-6), msg=name)
    assert {*other[2]} - {*one[2]} == {*more}
    for name, value in one[2].items():
        assert other[2][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize(
    ("loss", "theirs", "ours"),
    [
        ("sigmoid", {}, {}),
        ("ipo", {}, {}),
        ("hinge", {}, {}),
        ("sigmoid", {"use_weighting": True}, {"weights": "sampled", "weight_clamp": "none"}),
        ("ipo", {"use_weighting": True}, {"weights": "sampled", "weight_clamp": "none"}),
        ("apo_down", {}, {}),
        ("sft", {}, {}),
        ("sigmoid", {"ld_alpha": 0.5}, {"ld_alpha": 0.5}),
        ("ipo", {"f_divergence_type": "js_divergence"}, {"f_divergence_type": "js_divergence"}),
        (["sigmoid", "sft"], {"loss_weights": [1.0, 0.2]}, {"loss_weights": [1.0, 0.2]}),
    ],
)
def test_the_same_batch_through_trl(policy, tmp_path, loss, theirs, ours):
    kinds = [loss] if isinstance(loss, str) else loss
    one = made(DPOTrainer, DPOConfig, policy, tmp_path, PAIRS, loss_type=kinds, **theirs)
    other = made(
        PreferenceTrainer,
        PreferenceConfig,
        policy,
        tmp_path,
        PAIRS,
        loss_type=kinds,
        beta=0.1,
        **{"weights": "off"} | ours,
    )
    same(step(one), step(other), ["weights/mean"] if "weights" in ours else [])


@pytest.mark.parametrize("name", ["_compute_loss", "_prepare_dataset", "compute_ref_log_probs"])
def test_a_trl_with_other_methods_is_named(policy, tmp_path, monkeypatch, name):
    for base in (DPOTrainer, KTOTrainer):
        monkeypatch.delattr(base, name)
    with pytest.raises(InputError, match=rf"DPOTrainer of TRL [\d.]+ has no {name}; that of TRL 1.16 has"):
        made(PreferenceTrainer, PreferenceConfig, policy, tmp_path, PAIRS)
    with pytest.raises(InputError, match=rf"KTOTrainer of TRL [\d.]+ has no {name}; that of TRL 1.16 has"):
        made(UnpairedTrainer, UnpairedConfig, policy, tmp_path, LABELLED)


@pytest.mark.parametrize("kind", [*TRL_LOSSES, "simpo", "orpo"])
def test_every_loss_runs_or_says_why_not(policy, tmp_path, kind):
    """Weighted too: hinge and sft crash under TRL 1.16's use_weighting, aot is refused there."""
    smoothing = {"label_smoothing": 0.1} if kind in ("exo_pair", "robust") else {}
    free = kind in ("simpo", "orpo")

    def trainer(weights):
        settings = {"loss_type": [kind], "weights": weights} | smoothing
        reference = None if free else 2
        return made(PreferenceTrainer, PreferenceConfig, policy, tmp_path, PAIRS, reference, **settings)

    loss, gradients, _ = step(trainer("off"))
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in gradients.values())
    if free or kind in ("sigmoid", "hinge", "ipo"):
        weighted = step(trainer("sampled"))
        assert weighted[2]["weights/mean"] < 1
        assert weighted[0] != loss
        return
    reason = {"sft": "it is no preference", "aot": "it sorts the batch", "aot_unpaired": "it sorts the batch"}
    with pytest.raises(InputError, match=f"loss_type '{kind}' has no weights: {reason.get(kind, 'only sigmoid')}"):
        trainer("sampled")


def log_probs(model, trainer):
    """fp64 log-softmax [2P, T - 1, V] and labels of the first batch, from the model's own logits."""
    batch = next(iter(trainer.get_train_dataloader()))
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].double()
    labels = batch["input_ids"][:, 1:]
    mask = batch["completion_mask"][:, 1:].bool()
    return logits.log_softmax(-1), labels, mask


def log_weights(log_p, labels, mask, weights):
    """(1/|y|) sum_t a_t with a_t by the definitions of WPO, on probabilities."""
    p = log_p.exp()
    against = {"none": torch.ones_like(p[..., 0]), "greedy": p.amax(-1), "sampled": (p * p).sum(-1)}[weights]
    a = (p.gather(-1, labels[..., None])[..., 0] / against).log()
    return torch.where(mask, a, 0.0).sum(-1) / mask.sum(-1)


@pytest.mark.parametrize("weights", ["none", "greedy", "sampled"])
@pytest.mark.parametrize(
    ("variant", "clamp"), [("both", "product"), ("both", "none"), ("chosen", "product"), ("rejected", "none")]
)
def test_weights_are_those_of_the_formula(policy, tmp_path, weights, variant, clamp):
    settings = {"weights": weights, "weight_variant": variant, "weight_clamp": clamp}
    trainer = made(PreferenceTrainer, PreferenceConfig, policy, tmp_path, PAIRS, **settings)
    model, reference = trainer.model.eval(), trainer.ref_model
    with torch.no_grad():
        parts = [log_probs(m, trainer) for m in (model, reference)]
    sums = [torch.where(m, p.gather(-1, y[..., None])[..., 0], 0.0).sum(-1) for p, y, m in parts]
    chosen, rejected = log_weights(*parts[0], weights).chunk(2)
    log_w = {"both": chosen + rejected, "chosen": chosen, "rejected": rejected}[variant]
    w = log_w.exp().clamp(max=1 if clamp == "product" else math.inf)
    a, b = (sums[0] - sums[1]).chunk(2)
    loss, _, metrics = step(trainer)
    assert loss.item() == pytest.approx(-(w * logsigmoid(0.01 * (a - b))).mean().item(), rel=1e-5)
    assert metrics["weights/mean"] == pytest.approx(w.mean().item(), rel=1e-5)
    assert metrics["rewards/margins"] == pytest.approx(0.01 * (a - b).mean().item(), rel=1e-4)


@pytest.mark.parametrize("loss", ["simpo", "orpo"])
def test_no_reference_is_loaded_where_the_loss_has_none(policy, tmp_path, monkeypatch, loss):
    loaded, real = [], dpo_trainer.create_model_from_path
    monkeypatch.setattr(dpo_trainer, "create_model_from_path", lambda *a, **k: loaded.append(1) or real(*a, **k))
    path = tmp_path / "model"
    policy(1).save_pretrained(path)
    policy.tokenizer.save_pretrained(path)
    args = PreferenceConfig(str(tmp_path), loss_type=[loss], weights="off", **PLAIN)
    trainer = PreferenceTrainer(str(path), args=args, train_dataset=Dataset.from_list(PAIRS))
    assert (len(loaded), trainer.ref_model) == (1, None)
    model = trainer.model.eval()
    with torch.no_grad():
        log_p, labels, mask = log_probs(model, trainer)
    each = torch.where(mask, log_p.gather(-1, labels[..., None])[..., 0], 0.0).sum(-1) / mask.sum(-1)
    (a, b), (odds_a, odds_b) = each.chunk(2), (each - torch.log1p(-each.exp())).chunk(2)
    want = -logsigmoid(2 * (a - b) - 0.5) if loss == "simpo" else -a - 0.1 * logsigmoid(odds_a - odds_b)
    found, _, metrics = step(trainer)
    assert found.item() == pytest.approx(want.mean().item(), rel=1e-5)
    if loss == "simpo":
        assert metrics["rewards/margins"] == pytest.approx(2 * (a - b).mean().item(), rel=1e-4)


def test_a_reference_computed_beforehand_is_the_same(policy, tmp_path):
    found = [
        step(made(PreferenceTrainer, PreferenceConfig, policy, tmp_path, PAIRS, precompute_ref_log_probs=before))
        for before in (False, True)
    ]
    same(*found)


def test_pairs_with_equal_tokens_are_left_out(policy, tmp_path, caplog):
    long = {"prompt": "pack", "chosen": " the dog the dog the dog", "rejected": " the dog the dog the fox"}
    rows = [*PAIRS, {"prompt": "the", "chosen": " fox", "rejected": " fox"}, long]
    with caplog.at_level(logging.WARNING, "pyengine"):
        whole = made(PreferenceTrainer, PreferenceConfig, policy, tmp_path, rows)
        cut = made(PreferenceTrainer, PreferenceConfig, policy, tmp_path, rows, max_length=6)
    assert (len(whole.train_dataset), len(cut.train_dataset)) == (4, 3)
    assert "the train dataset: 1 of 5 pairs have the same tokens on both sides; they are left out" in caplog.text
    with pytest.raises(InputError, match="1 of 1 pairs have the same tokens on both sides; nothing is left"):
        made(PreferenceTrainer, PreferenceConfig, policy, tmp_path, rows[3:4])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_weighting": True}, "is weights='sampled', weight_clamp='none' here"),
        ({"weights": "greed"}, "weights must be one of off, none, greedy, sampled, got 'greed'"),
        ({"weight_variant": "W"}, "weight_variant must be one of"),
        ({"weight_clamp": "1"}, "weight_clamp must be one of"),
        ({"weights": "off", "weight_variant": "chosen"}, "weight_variant: weights are off"),
        ({"ld_alpha": 0.5}, "ld_alpha: only TRL's code reads that, and it has no weights here"),
        ({"f_divergence_type": "forward_kl"}, "f_divergence_type: only TRL's code"),
        ({"loss_type": ["sigmoid", "sft"]}, "several losses, or loss_weights: only TRL's code"),
        ({"loss_weights": [0.5]}, "several losses, or loss_weights: only TRL's code"),
        ({"loss_type": ["simpo"], "ld_alpha": 0.5, "weights": "off"}, "simpo goes with no ld_alpha"),
        ({"loss_type": ["sft", "orpo"], "weights": "off"}, "orpo goes with no several losses"),
        ({"loss_type": ["ipo"], "label_smoothing": 0.1}, "label_smoothing is not read by loss_type ipo"),
        ({"label_smoothing": 0.1, "ld_alpha": 0.5, "weights": "off"}, "not read by loss_type sigmoid with ld_alpha"),
        ({"simpo_gamma": 1.0}, "simpo_gamma is not read by loss_type sigmoid"),
        ({"discopop_tau": 1.0}, "discopop_tau is not read by"),
        ({"ipo_normalize": False}, "ipo_normalize is not read by"),
        ({"f_alpha_divergence_coef": 0.7}, "f_alpha_divergence_coef is read only with f_divergence_type='alpha"),
        ({"ref_model_mixup_alpha": 0.7}, "ref_model_mixup_alpha is read only with sync_ref_model=True"),
        ({"precompute_ref_batch_size": 3}, "precompute_ref_batch_size is read only with precompute"),
        ({"loss_type": ["simpo"], "precompute_ref_log_probs": True}, "'simpo' has no reference policy"),
        ({"loss_type": ["orpo"], "sync_ref_model": True}, "'orpo' has no reference policy"),
        ({"loss_type": ["orpo"]}, "ref_model: loss_type 'orpo' has no reference policy"),
        ({"beta": -1.0}, "dpo_loss: beta must be above 0"),
        ({"label_smoothing": 0.7}, r"label_smoothing must be a finite number in 0 .. 0.5"),
        ({"padding_free": True}, "padding_free=True: TRL's DPO trainer would fall back"),
        ({"train_sampling_strategy": "group_by_length"}, "'group_by_length': a pair has two lengths"),
        ({"train_sampling_strategy": "batch_rebalance"}, "'batch_rebalance': a pair has two lengths"),
        ({"use_liger_kernel": True}, "use_liger_kernel=True: Liger rewrites"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is not read"),
    ],
)
def test_what_would_be_ignored_is_refused(policy, tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        made(PreferenceTrainer, PreferenceConfig, policy, tmp_path, PAIRS, **settings)


def test_other_configs_and_mixtures_of_experts_are_refused(policy, tmp_path):
    with pytest.raises(InputError, match="takes a PreferenceConfig, got a DPOConfig"):
        made(PreferenceTrainer, DPOConfig, policy, tmp_path, PAIRS)
    config = transformers.MixtralConfig(
        vocab_size=320, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, router_aux_loss_coef=0.1, pad_token_id=0,
    )  # fmt: skip
    experts = lambda seed: transformers.MixtralForCausalLM(config)  # noqa: E731
    experts.tokenizer = policy.tokenizer
    with pytest.raises(InputError, match=r"load-balancing loss, .* set router_aux_loss_coef=0.0"):
        made(PreferenceTrainer, PreferenceConfig, experts, tmp_path, PAIRS)
    loss, _, _ = step(made(PreferenceTrainer, PreferenceConfig, experts, tmp_path, PAIRS, router_aux_loss_coef=0.0))
    assert loss.isfinite()


class TestAdapters:
    def test_the_reference_is_the_base_and_only_adapters_learn(self, policy, tmp_path):
        lora = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        trainer = made(PreferenceTrainer, PreferenceConfig, policy, tmp_path, PAIRS, None, {"peft_config": lora})
        assert trainer.ref_model is None
        loss, gradients, metrics = step(trainer)
        assert {name for name, g in gradients.items() if g is not None} == set(gradients)
        assert all("lora_" in name for name in gradients)
        assert metrics["rewards/margins"] != 0
        merged = copy.deepcopy(trainer.model).merge_and_unload().requires_grad_()
        both = lambda seed: merged if seed == 1 else policy(1)  # noqa: E731
        both.tokenizer = policy.tokenizer
        found = step(made(PreferenceTrainer, PreferenceConfig, both, tmp_path, PAIRS))
        assert found[0].item() == pytest.approx(loss.item(), rel=1e-5)
        assert found[2] == pytest.approx(metrics, rel=1e-4, abs=1e-5)

    def test_an_adapter_on_the_head_is_refused(self, policy, tmp_path):
        lora = peft.LoraConfig(r=2, target_modules=["lm_head"])
        with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
            made(PreferenceTrainer, PreferenceConfig, policy, tmp_path, PAIRS, None, {"peft_config": lora})


@pytest.mark.parametrize("tokens", [False, True])
def test_prompts_that_fill_max_length(policy, tmp_path, tokens):
    """Rows of tokens too, which TRL itself would not take."""
    ids = {"prompt_ids": [5, 6, 7, 8], "chosen_ids": [9], "rejected_ids": [10], "completion_ids": [9], "label": True}
    pairs, labelled = ([ids], [ids]) if tokens else (PAIRS, LABELLED)
    for make in (
        lambda: made(PreferenceTrainer, PreferenceConfig, policy, tmp_path, pairs, max_length=1),
        lambda: made(UnpairedTrainer, UnpairedConfig, policy, tmp_path, labelled, max_length=1),
    ):
        with pytest.raises(InputError, match="the train dataset: every prompt fills max_length; nothing is left"):
            make()


class TestUnpaired:
    def test_weights_of_responses_to_images_are_refused(self, policy, tmp_path):
        rows = [row | {"images": [[0]]} for row in LABELLED]
        with pytest.raises(InputError, match="weights: those of responses to images are not computed"):
            made(UnpairedTrainer, UnpairedConfig, policy, tmp_path, rows)

    @pytest.mark.parametrize("settings", [{}, {"loss_type": "apo_zero_unpaired", "desirable_weight": 1.5}])
    def test_unweighted_it_is_trls(self, policy, tmp_path, settings):
        settings |= {"per_device_train_batch_size": 4}
        one = made(KTOTrainer, KTOConfig, policy, tmp_path, LABELLED, **settings)
        other = made(UnpairedTrainer, UnpairedConfig, policy, tmp_path, LABELLED, weights="off", **settings)
        same(step(one), step(other))

    @pytest.mark.parametrize("weights", ["none", "greedy", "sampled"])
    @pytest.mark.parametrize("precomputed", [False, True])
    def test_weights_are_normalised_within_each_class(self, policy, tmp_path, weights, precomputed):
        settings = {"weights": weights, "per_device_train_batch_size": 4, "precompute_ref_log_probs": precomputed}
        settings |= {"desirable_weight": 0.7, "beta": 0.3}
        trainer = made(UnpairedTrainer, UnpairedConfig, policy, tmp_path, LABELLED, **settings)
        with torch.no_grad():
            parts = [log_probs(m, trainer) for m in (trainer.model.eval(), policy(2))]
        sums = [torch.where(m, p.gather(-1, y[..., None])[..., 0], 0.0).sum(-1) for p, y, m in parts]
        w, rho = log_weights(*parts[0], weights).exp(), sums[0] - sums[1]
        loss, gradients, metrics = step(trainer)
        z0 = metrics["kl"]
        good, bad = torch.tensor([0, 2]), torch.tensor([1, 3])
        want = 0.7 * (w[good] / w[good].sum() * (1 - torch.sigmoid(0.3 * (rho[good] - z0)))).sum()
        want += (w[bad] / w[bad].sum() * (1 - torch.sigmoid(0.3 * (z0 - rho[bad])))).sum()
        assert loss.item() == pytest.approx(want.item(), rel=1e-5)
        assert gradients["lm_head.weight"].abs().max() > 0
        assert metrics["rewards/chosen"] == pytest.approx(0.3 * rho[good].mean().item(), rel=1e-4)

    def test_a_class_that_is_not_in_the_batch(self, policy, tmp_path):
        trainer = made(UnpairedTrainer, UnpairedConfig, policy, tmp_path, [LABELLED[0], LABELLED[2]])
        loss, gradients, _ = step(trainer)
        assert loss.isfinite()
        assert all(g.isfinite().all() for g in gradients.values())

    def test_a_last_batch_of_one_does_not_meet_itself(self, policy, tmp_path):
        rows = LABELLED[:3]
        for kind, config, mismatched in ((KTOTrainer, KTOConfig, False), (UnpairedTrainer, UnpairedConfig, True)):
            data = made(kind, config, policy, tmp_path, rows, per_device_train_batch_size=2).train_dataset
            assert (data[2]["KL_completion_ids"] != data[2]["completion_ids"]) == mismatched
        assert data[2]["KL_completion_ids"] == data[1]["completion_ids"]
        assert data[0]["KL_completion_ids"] == data[1]["completion_ids"]

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"per_device_train_batch_size": 1}, "per_device_train_batch_size must be at least 2"),
            ({"weights": "W"}, "weights must be one of"),
            ({"beta": 0.0}, "beta must be a finite number"),
            ({"desirable_weight": -1.0}, "desirable_weight must be a finite number"),
            ({"use_liger_kernel": True}, "Liger rewrites"),
        ],
    )
    def test_what_cannot_be_is_refused(self, policy, tmp_path, settings, message):
        with pytest.raises(InputError, match=message):
            made(UnpairedTrainer, UnpairedConfig, policy, tmp_path, LABELLED, **settings)
