"""Training of probes on embeddings (Q-Probe): four losses, and a loop that reads each embedding once a step."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from pyengine.errors import InputError, real, whole
from pyengine.losses import ce_loss, pg_loss, q_loss, qp_loss
from pyengine.scorers import Probe
from pyengine.training.data import split
from pyengine.training.embeddings import ROWS, Pairs, Samples
from pyengine.training.groups import group_size, groups

Loss = Literal["q", "ce", "pg", "qp"]
BATCHES: dict[Loss, int] = {"q": 1000, "ce": 1000, "pg": 100, "qp": 1024}  # rows, groups for pg, pairs for qp
STEPS = 9  # in an epoch, at least, where there are so many rows
EPOCHS = 150  # the paper's
# What Adam can move a weight by is lr times its steps: 1.4 in the paper, 150 epochs of 190 batches at 5e-5. From fewer
# rows come fewer steps, and at 5e-5 the 150 of 576 rows moved none by more than .0075: it stayed what it was drawn as.
REACH, LEAST_LR = 1.4, 5e-5


@dataclass
class TrainedProbe:
    """A probe with how it came about: mean loss of each epoch on the rows trained on and on those held out.

    epoch: the one whose weights were kept, from 1. held_out: what the kept weights reach on the held-out prompts; r2 is
    of losses q and ce, against the mean reward there. warnings: what speaks against the probe, in words.
    """

    probe: Probe
    settings: dict[str, Any]
    train_loss: list[float] = field(default_factory=list)
    held_out_loss: list[float] = field(default_factory=list)
    held_out: dict[str, float] = field(default_factory=dict)
    epoch: int = 0

    @property
    def warnings(self) -> list[str]:
        r2 = self.held_out.get("r2", 0.0)
        if r2 >= 0:
            return []
        return [
            f"held-out R² is {r2:.2f}: the mean reward predicts better than this probe; give more responses, train for "
            "fewer epochs (--keep-best), or read another layer"
        ]

    def save(self, directory: str | Path) -> None:
        """The probe's own files and training.json."""
        self.probe.save(directory)
        report = {
            "settings": self.settings,
            "epoch": self.epoch,
            "held_out": self.held_out,
            "warnings": self.warnings,
            "train_loss": self.train_loss,
            "held_out_loss": self.held_out_loss,
        }
        (Path(directory) / "training.json").write_text(json.dumps(report, indent=1) + "\n")


def train_probe(
    data: Samples | Pairs,
    loss: Loss,
    *,
    hidden: Sequence[int] = (),
    layer: int | None = None,
    name: str = "probe",
    lr: float | None = None,
    epochs: int = EPOCHS,
    batch: int | None = None,
    beta_train: float | None = None,
    group: int | None = None,
    held_out: float = 0.1,
    keep_best: bool = False,
    seed: int = 0,
    progress: bool | None = None,
) -> TrainedProbe:
    """A probe by Adam on one of the losses; every epoch visits all rows in a new order, the last batch may be short.

    Args:
        data: samples for "q", "ce" (rewards in [0, 1]) and "pg", pairs for "qp".
        hidden: widths of the hidden layers; () is linear. layer: the hidden state that the embeddings are, which the
            probe will read in the engine; None is the data's own. name: of the probe.
        batch: rows, for "pg" groups, for "qp" pairs; None is 1000, 100 and 1024 as in the paper, or a ninth of the data
            if that is less.
        lr: Adam's learning rate; None is 5e-5 as in the paper, or what moves a weight as far in the steps that there
            are: 1.4 over their number.
        beta_train: of the softmax in "pg" only; None is 1. What is used to select later is that call's own beta.
        group: samples of a prompt in one group of "pg", drawn anew every epoch; None takes all of a prompt's.
        held_out: share of the prompts that are not trained on. keep_best: keep the epoch with the lowest loss there.
        seed: of the split, the initial weights and the order.

    For "q" and "ce" the probe starts as the mean reward; the others see differences, and their bias stays 0.
    Raises InputError, naming the row or the prompt, for data that the loss cannot use, and for losses that run away.
    """
    settings = probe_settings(
        loss,
        isinstance(data, Pairs),
        lr=lr,
        epochs=epochs,
        batch=batch,
        beta_train=beta_train,
        group=group,
        held_out=held_out,
        keep_best=keep_best,
        seed=seed,
    )
    beta = settings.get("beta_train", 1.0)
    if loss == "pg":  # of all prompts: one that is odd may fall to either side
        settings["group"] = group = group_size(data.prompt, group)
    layer = _layer_of(data, layer)
    order = torch.Generator().manual_seed(seed)
    train, test = (torch.tensor(rows, dtype=torch.long) for rows in split(data.prompt.tolist(), held_out, seed))
    problem = _problem(data, loss, train, beta)
    units = len(train) // group if loss == "pg" and group is not None else len(train)
    settings |= pace(loss, units, epochs, batch, lr)
    batch, rate = settings["batch"], settings["lr"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        probe = Probe(problem.width, layer, name, hidden)
    torch.nn.init.constant_(probe.head.bias, problem.start)
    if problem.biased:
        torch.nn.init.zeros_(probe.head.weight)  # every response has the mean at first
    else:
        probe.head.bias.requires_grad_(False)
    fit = TrainedProbe(probe, settings)
    tested = list(_batches(data.prompt, test, loss, batch, group, None)) if held_out else []
    step = _step(probe, problem, rate)
    best: dict[str, Tensor] = {}
    hide = None if progress is None else not progress
    bar = tqdm(range(1, epochs + 1), desc=f"probe, {loss}", unit="epoch", disable=hide)
    for epoch in bar:
        total, count = torch.zeros(()), 0
        for pick in _batches(data.prompt, train, loss, batch, group, order):
            total += len(pick) * step(pick)
            count += len(pick)
        fit.train_loss.append(total.item() / count)
        if not math.isfinite(fit.train_loss[-1]):
            raise InputError(f"train_probe: the loss is {fit.train_loss[-1]} in epoch {epoch}; lower lr from {rate:g}")
        if tested:
            fit.held_out_loss.append(_mean_loss(probe, problem, tested))
            if not math.isfinite(fit.held_out_loss[-1]):
                raise InputError(
                    f"train_probe: the held-out loss is {fit.held_out_loss[-1]} in epoch {epoch}; lower lr from "
                    f"{rate:g}"
                )
        if keep_best and fit.held_out_loss[-1] == min(fit.held_out_loss):
            best, fit.epoch = {name: value.clone() for name, value in probe.state_dict().items()}, epoch
        bar.set_postfix(loss=f"{fit.train_loss[-1]:.4f}", refresh=False)
    if keep_best:
        probe.load_state_dict(best)
    else:
        fit.epoch = epochs
    probe.head.bias.requires_grad_(True)
    probe.eval()
    if tested:
        fit.held_out = _metrics(probe, problem, tested)
    return fit


def probe_settings(
    loss: Loss,
    paired: bool,
    *,
    lr: float | None = None,
    epochs: int = EPOCHS,
    batch: int | None = None,
    beta_train: float | None = None,
    group: int | None = None,
    held_out: float = 0.1,
    keep_best: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """The settings of `train_probe`, those that follow from the data as None.

    paired: whether the data are pairs. InputError for what cannot be, before anything is embedded.
    """
    if loss not in BATCHES:
        raise InputError(f"train_probe: loss must be one of {', '.join(BATCHES)}, got {loss!r}")
    if paired != (loss == "qp"):
        raise InputError(f"train_probe: loss {loss!r} needs {'Pairs' if loss == 'qp' else 'Samples'}")
    found: dict[str, Any] = {
        "loss": loss,
        "lr": None if lr is None else real(lr, "train_probe: lr", 1e-12),
        "epochs": whole(epochs, "train_probe: epochs", 1),
        "batch": None if batch is None else whole(batch, "train_probe: batch", 1),
        "held_out": real(held_out, "train_probe: held_out", 0, 0.9),
        "seed": whole(seed, "train_probe: seed", 0),
    }
    if keep_best and not held_out:
        raise InputError("train_probe: keep_best needs held_out > 0")
    if loss != "pg":
        for name, value in (("beta_train", beta_train), ("group", group)):
            if value is not None:
                raise InputError(f"train_probe: {name} is for loss 'pg', not for {loss!r}")
        return found
    beta = real(1.0 if beta_train is None else beta_train, "train_probe: beta_train")
    if beta <= 0:
        raise InputError(f"train_probe: beta_train must be above 0, got {beta}")
    return found | {"beta_train": beta, "group": None if group is None else whole(group, "train_probe: group", 1)}


def pace(loss: Loss, units: int, epochs: int, batch: int | None, lr: float | None) -> dict[str, Any]:
    """batch and lr, as given or as `train_probe` takes them for so many rows, groups or pairs to train on."""
    batch = max(1, min(BATCHES[loss], units // STEPS)) if batch is None else batch
    steps = max(epochs, EPOCHS) * -(-units // batch)  # fewer epochs are no reason for longer steps
    return {"batch": batch, "lr": max(LEAST_LR, REACH / max(1, steps)) if lr is None else lr}


def _layer_of(data: Samples | Pairs, layer: int | None) -> int:
    """The hidden state that the embeddings are."""
    if layer is not None and data.layer is not None and layer != data.layer:
        raise InputError(f"train_probe: the embeddings are of layer {data.layer}, not of layer {layer}: leave it out")
    found = data.layer if layer is None else layer
    if found is None:
        raise InputError("train_probe: the embeddings do not say which hidden state they are; give the layer")
    return whole(found, "train_probe: layer", -(2**31))


def _batches(
    prompt: Tensor, rows: Tensor, loss: Loss, batch: int, group: int | None, order: torch.Generator | None
) -> Iterator[Tensor]:
    """Every row once: indices [n], or [n, K] for pg; in a random order if one is given."""
    if loss == "pg":
        assert group is not None
        rows = rows[groups(prompt[rows], group, order)]
    elif order is not None:
        rows = rows[torch.randperm(len(rows), generator=order)]
    yield from rows.split(batch)


@dataclass
class _Problem:
    """The rows that a probe reads and what its outputs are compared with.

    chosen [N, D]: embeddings; rejected: what the probe's value of is subtracted, for pairs.
    objective: (Q or Q_w - Q_l of the picked rows, their indices) -> mean loss.
    """

    chosen: Tensor
    rejected: Tensor | None
    objective: Callable[[Tensor, Tensor], Tensor]
    biased: bool
    target: Tensor | None
    start: float = 0.0  # of the bias
    probability: bool = False  # whether sigmoid(Q) is what meets the target
    beta: float = 1.0  # of the softmax over a group

    @property
    def width(self) -> int:
        return self.chosen.shape[1]


def _problem(data: Samples | Pairs, loss: Loss, train: Tensor, beta: float) -> _Problem:
    if isinstance(data, Pairs):
        return _Problem(data.chosen, data.rejected, lambda margin, _: qp_loss(margin, 0.0), False, None)
    reward = data.reward.float()
    if loss == "ce":
        bad = ((reward < 0) | (reward > 1)).nonzero()[:, 0]
        if len(bad):
            row = int(bad[0])
            raise InputError(f"loss 'ce' needs rewards in 0 .. 1, row {row} has {reward[row]:g}")
    if loss == "pg":
        baseline = reward[train].mean().item()
        objective = lambda q, pick: pg_loss(q, reward[pick], baseline, beta)  # noqa: E731
        return _Problem(data.embeddings, None, objective, False, reward, beta=beta)
    compare, mean = (q_loss if loss == "q" else ce_loss), reward[train].mean()
    start = float(mean if loss == "q" else mean.logit(1e-3))
    return _Problem(data.embeddings, None, lambda q, pick: compare(q, reward[pick]), True, reward, start, loss == "ce")


def _step(probe: Probe, problem: _Problem, lr: float) -> Callable[[Tensor], Tensor]:
    """One Adam step on the picked rows; returns their mean loss before it."""
    trained = [p for p in probe.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=lr, fused=True)
    if not probe.hidden:
        return _linear_step(probe, problem, optimizer)
    chosen, rejected = _reader(problem.chosen), _reader(problem.rejected)

    def step(pick: Tensor) -> Tensor:
        rows = pick.flatten()
        q = probe(chosen(rows))
        if problem.rejected is not None:
            q = q - probe(rejected(rows))
        loss = problem.objective(q.view(pick.shape), pick)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _linear_step(probe: Probe, problem: _Problem, optimizer: torch.optim.Optimizer) -> Callable[[Tensor], Tensor]:
    """The same for Q = w.x + b, where memory binds: a batch is copied together once and read by two GEMVs.

    Pairs are w.(x_w - x_l), one matrix of differences: half of what would else be read in each epoch. Autograd
    differentiates the loss in Q only, n numbers; dL/dw = X' dL/dQ.
    """
    weight, bias = probe.head.weight, probe.head.bias
    read = _reader(problem.chosen if problem.rejected is None else _differences(problem.chosen, problem.rejected))
    weight.grad = torch.zeros_like(weight)
    if bias.requires_grad:
        bias.grad = torch.zeros_like(bias)

    def step(pick: Tensor) -> Tensor:
        x = read(pick.flatten())
        with torch.no_grad():
            q = torch.mv(x, weight[0]) + bias
        loss = problem.objective(q.requires_grad_().view(pick.shape), pick)
        (slope,) = torch.autograd.grad(loss, q)
        assert weight.grad is not None
        torch.mv(x.T, slope, out=weight.grad[0])
        if bias.grad is not None:
            bias.grad[0] = slope.sum()
        optimizer.step()
        return loss.detach()

    return step


def _differences(chosen: Tensor, rejected: Tensor) -> Tensor:
    """chosen - rejected in fp32, without fp32 copies of either."""
    out = torch.empty(chosen.shape)
    for start in range(0, len(out), ROWS):
        rows = slice(start, start + ROWS)
        torch.sub(chosen[rows].float(), rejected[rows].float(), out=out[rows])
    return out


def _reader(matrix: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Rows of [N, D] as fp32, in memory that the next call uses again: large fresh blocks cost a page fault a page."""
    kept: dict[str, Tensor] = {}

    def read(rows: Tensor) -> Tensor:
        assert matrix is not None
        if len(kept.get("raw", ())) < len(rows):
            kept["raw"] = matrix.new_empty(len(rows), matrix.shape[1])
            kept["fp32"] = kept["raw"] if matrix.dtype == torch.float32 else kept["raw"].float()
        raw, out = kept["raw"][: len(rows)], kept["fp32"][: len(rows)]
        torch.index_select(matrix, 0, rows, out=raw)
        return out if out is raw or matrix.dtype == torch.float32 else out.copy_(raw)

    return read


@torch.no_grad()
def _outputs(probe: Probe, problem: _Problem, pick: Tensor) -> Tensor:
    """Q of the picked rows, or Q_w - Q_l."""
    rows = pick.flatten()
    q = probe(problem.chosen[rows])
    return (q if problem.rejected is None else q - probe(problem.rejected[rows])).view(pick.shape)


@torch.no_grad()
def _mean_loss(probe: Probe, problem: _Problem, batches: Sequence[Tensor]) -> float:
    total = sum(len(pick) * problem.objective(_outputs(probe, problem, pick), pick).item() for pick in batches)
    return total / sum(map(len, batches))


def _metrics(probe: Probe, problem: _Problem, batches: Sequence[Tensor]) -> dict[str, float]:
    """What the loss means: accuracy of pairs, correlation with the reward, R² where it is what is predicted, for groups
    the mean reward of all samples, of softmax selection with beta_train and of argmax selection."""
    q = torch.cat([_outputs(probe, problem, pick) for pick in batches])
    found = {"rows": float(q.numel()), "loss": _mean_loss(probe, problem, batches)}
    if problem.target is None:
        return found | {"accuracy": (q > 0).float().mean().item(), "margin": q.mean().item()}
    reward = problem.target[torch.cat(list(batches))]
    both = torch.stack([(q.sigmoid() if problem.probability else q).flatten(), reward.flatten()]).double()
    found["correlation"] = torch.corrcoef(both)[0, 1].nan_to_num().item() if q.numel() > 1 else 0.0
    if problem.biased and both[1].var(correction=0) > 0:
        found["r2"] = 1 - ((both[0] - both[1]).square().mean() / both[1].var(correction=0)).item()
    if q.dim() == 2:
        soft = (torch.softmax(q / problem.beta, 1) * reward).sum(1)
        best = reward.gather(1, q.argmax(1, keepdim=True))
        found |= {
            "reward_base": reward.mean().item(),
            "reward_softmax": soft.mean().item(),
            "reward_argmax": best.mean().item(),
        }
    return found
