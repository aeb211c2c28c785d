"""Settings from the environment, and the table of what serves each op on a GPU."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from pyengine import InputError, ops, reference
from pyengine.ops import backend as table
from pyengine.ops.settings import Settings, read_settings

ON_GPU = SimpleNamespace(is_cuda=True)
FORMS = ("linear_logprob", "logits_logprob", "linear_preference")


@pytest.fixture
def built(monkeypatch):
    """A machine with the CUDA and the Triton kernels; either may be taken away."""
    there = {"cuda": True, "triton": True}
    monkeypatch.setattr(table, "cuda_built", lambda: there["cuda"])
    monkeypatch.setattr(table, "triton_kernels", lambda stem: object() if there["triton"] else None)
    monkeypatch.setattr(table.settings, "gpu_backend", None)
    return there


class TestSettings:
    def test_of_an_empty_environment_and_of_a_full_one(self):
        assert read_settings({}) == Settings(None, None, "triton", False)
        given = {"PYENGINE_CPU_ISA": "portable", "PYENGINE_GPU_BACKEND": "reference", "PYENGINE_DEBUG": "1"}
        assert read_settings(given) == Settings("portable", "reference", "triton", True)
        assert not read_settings({"PYENGINE_DEBUG": "0"}).debug

    @pytest.mark.parametrize("name", ["PYENGINE_CPU_ISA", "PYENGINE_GPU_BACKEND", "PYENGINE_ATTENTION"])
    def test_a_value_that_cannot_be_names_its_variable(self, name):
        with pytest.raises(InputError, match=f"{name}.*mmx"):
            read_settings({name: "mmx"})


class TestTable:
    def test_every_op_is_in_it(self):
        named = {name for name in ops.__all__ if name[0].islower()}
        assert set(table.ON_GPU) == named

    def test_the_first_that_is_there_serves(self, built):
        first = {op: table.backend(op, ON_GPU) for op in table.ON_GPU}
        in_cuda = ("tilt_sample", "select_block")
        assert first == {op: "cuda" if op in in_cuda else "triton" for op in table.ON_GPU}
        built["cuda"] = False
        assert {table.backend(op, ON_GPU) for op in table.ON_GPU} == {"triton"}
        built["triton"] = False
        assert {table.backend(op, ON_GPU) for op in table.ON_GPU} == {"reference"}
        built["cuda"] = True
        assert table.backend("head_tilt_sample", ON_GPU) == "cuda"

    @pytest.mark.parametrize("op", table.ON_GPU)
    @pytest.mark.parametrize("asked", ["cuda", "triton", "reference"])
    def test_the_one_that_is_asked_for_serves_where_the_op_has_it(self, built, monkeypatch, op, asked):
        monkeypatch.setattr(table.settings, "gpu_backend", asked)
        has = table.ON_GPU[op].backends
        assert table.backend(op, ON_GPU) == (asked if asked in has else has[0])
        if asked != "reference":
            built[asked] = False
            if asked in has:
                with pytest.raises(ValueError, match=f"{op}: PYENGINE_GPU_BACKEND={asked}"):
                    table.backend(op, ON_GPU)

    def test_a_cpu_has_instruction_sets(self, isa):
        assert table.backend("tilt_sample", torch.zeros(1)) == isa


class TestReferenceAsBackend:
    """A GPU's ops by the reference, as PYENGINE_GPU_BACKEND=reference asks for; here on a CPU's tensors."""

    @pytest.fixture(autouse=True)
    def served_by_it(self, monkeypatch):
        for name in ("linear_logprob", "linear_preference"):
            monkeypatch.setattr(sys.modules[f"pyengine.ops.{name}"], "backend", lambda op, x: "reference")

    @staticmethod
    def problem():
        torch.manual_seed(0)
        hidden, weight, bias = torch.randn(4, 3, 8), torch.randn(11, 8), torch.randn(11)
        target = torch.randint(0, 11, (4, 3))
        target[1, 0] = -100
        return [t.requires_grad_() for t in (hidden, weight, bias)], target

    @staticmethod
    def preference(chosen, rejected, *_):
        return -torch.nn.functional.logsigmoid(chosen.logp - rejected.logp)

    def call(self, module, op, leaves, target):
        hidden, weight, bias = leaves
        options = {"temperature": 0.8, "softcap": 5.0}
        if op == "logits_logprob":
            return module.logits_logprob((hidden @ weight.T + bias).flatten(0, 1), target.flatten(), **options)
        if op == "linear_logprob":
            return module.linear_logprob(hidden.flatten(0, 1), weight, target.flatten(), bias=bias, **options)
        return module.linear_preference(hidden, weight, target, self.preference, bias=bias, **options)

    @pytest.mark.parametrize("op", FORMS)
    def test_values_and_gradients(self, op):
        (mine, target), (theirs, _) = self.problem(), self.problem()
        before = ops.LAUNCHES.copy()
        found, want = self.call(ops, op, mine, target), self.call(reference, op, theirs, target)
        assert ops.LAUNCHES - before == {f"{op}/reference": 1}
        flat = (lambda p: [p.loss, p.losses, *p.moments, p.top1]) if op == "linear_preference" else list
        for a, b in zip(flat(found), flat(want), strict=True):
            assert a.dtype == (torch.int64 if b.dtype == torch.int64 else torch.float32)
            torch.testing.assert_close(a, b.to(a.dtype))
        for out in (found, want):
            (out.loss if op == "linear_preference" else out.logp.sum() + out.entropy.sum()).backward()
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a.grad, b.grad)

    @pytest.mark.parametrize("op", FORMS)
    def test_a_target_outside_the_vocabulary_is_named(self, op):
        leaves, target = self.problem()
        target[2, 1] = 11
        with pytest.raises(ValueError, match=f"{op}: target 11 in row 7"):
            self.call(ops, op, leaves, target)
