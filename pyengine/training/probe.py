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
from pyengine.training.embeddings import ROWS, Pairs, Samples

Loss = Literal["q", "ce", "pg", "qp"]
BATCHES: dict[Loss, int] = {"q": 1000, "ce": 1000, "pg": 100, "qp": 1024}  # rows, groups for pg, pairs for qp


@dataclass
class TrainedProbe:
    """A probe with how it came about: mean loss of each epoch on the rows trained on and on those held out.

    epoch: the one whose weights were kept, from 1. held_out: what the kept weights reach on the held-out prompts.
    """

    probe: Probe
    settings: dict[str, Any]
    train_loss: list[float] = field(default_factory=list)
    held_out_loss: list[float] = field(default_factory=list)
    held_out: dict[str, float] = field(default_factory=dict)
    epoch: int = 0

    def save(self, directory: str | Path) -> None:
        """The probe's own files and training.json."""
        self.probe.save(directory)
        report = {
            "settings": self.settings,
            "epoch": self.epoch,
            "held_out": self.held_out,
            "train_loss": self.train_loss,
            "held_out_loss": self.held_out_loss,
        }
        (Path(directory) / "training.json").write_text(json.dumps(report, indent=1) + "\n")


def train_probe(
    data: Samples | Pairs,
    loss: Loss,
    *,
    hidden: Sequence[int] = (),
    layer: int = -1,
    name: str = "probe",
    lr: float = 5e-5,
    epochs: int = 150,
    batch: int | None = None,
    beta_train: float = 1.0,
    group: int | None = None,
    held_out: float = 0.1,
    keep_best: bool = False,
    seed: int = 0,
    progress: bool | None = None,
) -> TrainedProbe:
    """A probe by Adam on one of the losses; every epoch visits all rows in a new order, the last batch may be short.

    Args:
        data: samples for "q", "ce" (rewards in [0, 1]) and "pg", pairs for "qp".
        hidden: widths of the hidden layers; () is linear. layer, name: kept in the probe for the engine.
        batch: rows, for "pg" groups, for "qp" pairs; None is 1000, 100 and 1024 as in the paper.
        beta_train: of the softmax in "pg". What is used to select later is that call's own beta.
        group: samples of a prompt in one group of "pg", drawn anew every epoch; None takes all of a prompt's.
        held_out: share of the prompts that are not trained on. keep_best: keep the epoch with the lowest loss there.
        seed: of the split, the initial weights and the order.

    The bias is trained for "q" and "ce" only: the others see differences, and it stays 0.
    Raises InputError, naming the row or the prompt, for data that the loss cannot use.
    """
    if loss not in BATCHES:
        raise InputError(f"train_probe: loss must be one of {', '.join(BATCHES)}, got {loss!r}")
    batch = whole(BATCHES[loss] if batch is None else batch, "train_probe: batch", 1)
    epochs, lr = whole(epochs, "train_probe: epochs", 1), real(lr, "train_probe: lr", 0)
    if keep_best and not held_out:
        raise InputError("train_probe: keep_best needs held_out > 0")
    settings: dict[str, Any] = {
        "loss": loss,
        "lr": lr,
        "epochs": epochs,
        "batch": batch,
        "held_out": held_out,
        "seed": seed,
    }
    if loss == "pg":
        settings |= {"beta_train": beta_train, "group": group}
    order = torch.Generator().manual_seed(seed)
    train, test = split(data.prompt, held_out, order)
    problem = _problem(data, loss, train, beta_train)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        probe = Probe(problem.width, layer, name, hidden)
    if not problem.biased:
        torch.nn.init.zeros_(probe.head.bias)
        probe.head.bias.requires_grad_(False)
    fit = TrainedProbe(probe, settings)
    tested = list(_batches(data.prompt, test, loss, batch, group, None)) if held_out else []
    step = _step(probe, problem, lr)
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
            raise InputError(f"train_probe: the loss is {fit.train_loss[-1]} in epoch {epoch}; lower lr from {lr:g}")
        if tested:
            fit.held_out_loss.append(_mean_loss(probe, problem, tested))
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


def split(prompt: Tensor, share: float, order: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows held out, so that no prompt is on both sides; at least one prompt on each."""
    share = real(share, "held_out", 0, 0.9)
    if share == 0:
        return torch.arange(len(prompt)), torch.arange(0)
    known = prompt.unique()
    if len(known) < 2:
        raise InputError("held_out: holding prompts out needs at least two of them; give held_out=0 to train on all")
    out = torch.isin(prompt, known[torch.randperm(len(known), generator=order)[: max(1, round(share * len(known)))]])
    return (~out).nonzero()[:, 0], out.nonzero()[:, 0]


def groups(prompt: Tensor, size: int | None, order: torch.Generator | None) -> Tensor:
    """Rows [G, K] so that all of a group have one prompt; with `order` they are drawn anew, else as they stand.

    size: K, which must divide the samples of every prompt; None is all of them, as many for each prompt.
    Raises InputError that names the first prompt with another number.
    """
    known, place, count = prompt.unique(return_inverse=True, return_counts=True)
    wanted = int(count.mode().values) if size is None else whole(size, "train_probe: group", 1)
    odd = ((count != wanted) if size is None else (count % wanted != 0)).nonzero()[:, 0]
    if len(odd):
        number, found = int(known[odd[0]]), int(count[odd[0]])
        others = f"{wanted} like the others" if size is None else f"a multiple of {wanted}"
        raise InputError(f"prompt {number} has {found} samples, loss 'pg' needs {others}; draw more or leave some out")
    if order is None:
        return place.argsort(stable=True).view(-1, wanted)
    shuffled = place + torch.rand(len(place), generator=order, dtype=torch.float64)
    rows = shuffled.argsort().view(-1, wanted)
    return rows[torch.randperm(len(rows), generator=order)]


def _batches(
    prompt: Tensor, rows: Tensor, loss: Loss, batch: int, group: int | None, order: torch.Generator | None
) -> Iterator[Tensor]:
    """Every row once: indices [n], or [n, K] for pg; in a random order if one is given."""
    if loss == "pg":
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
    probability: bool = False  # whether sigmoid(Q) is what meets the target

    @property
    def width(self) -> int:
        return self.chosen.shape[1]


def _problem(data: Samples | Pairs, loss: Loss, train: Tensor, beta: float) -> _Problem:
    if isinstance(data, Pairs) != (loss == "qp"):
        raise InputError(f"train_probe: loss {loss!r} needs {'Pairs' if loss == 'qp' else 'Samples'}")
    if isinstance(data, Pairs):
        return _Problem(data.chosen, data.rejected, lambda margin, _: qp_loss(margin, 0.0), False, None)
    reward = data.reward.float()
    if loss == "ce":
        bad = ((reward < 0) | (reward > 1)).nonzero()[:, 0]
        if len(bad):
            row = int(bad[0])
            raise InputError(f"loss 'ce' needs rewards in 0 .. 1, row {row} has {reward[row]:g}")
    if loss == "pg":
        if real(beta, "train_probe: beta_train") <= 0:
            raise InputError(f"train_probe: beta_train must be above 0, got {beta}")
        baseline = reward[train].mean().item()
        objective = lambda q, pick: pg_loss(q, reward[pick], baseline, beta)  # noqa: E731
        return _Problem(data.embeddings, None, objective, False, reward)
    compare = q_loss if loss == "q" else ce_loss
    return _Problem(data.embeddings, None, lambda q, pick: compare(q, reward[pick]), True, reward, loss == "ce")


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
    """What the loss means: accuracy of pairs, correlation with the reward, reward of softmax and argmax selection."""
    q = torch.cat([_outputs(probe, problem, pick) for pick in batches])
    found = {"rows": float(q.numel()), "loss": _mean_loss(probe, problem, batches)}
    if problem.target is None:
        return found | {"accuracy": (q > 0).float().mean().item(), "margin": q.mean().item()}
    reward = problem.target[torch.cat(list(batches))]
    both = torch.stack([(q.sigmoid() if problem.probability else q).flatten(), reward.flatten()]).double()
    found["correlation"] = torch.corrcoef(both)[0, 1].nan_to_num().item() if q.numel() > 1 else 0.0
    if q.dim() == 2:
        best = reward.gather(1, q.argmax(1, keepdim=True))
        found |= {"reward_base": reward.mean().item(), "reward_argmax": best.mean().item()}
    return found
