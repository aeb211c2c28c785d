"""What bench/sass.py finds in a listing whose instructions were counted by hand."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

# A lane of two warps reads 16 bytes of bf16 a turn; rare rows take nine more instructions, and so does a first turn.
LISTING = """
        /*0000*/                   S2R R0, SR_TID.X ;                        /* 0x0000000000007919 */
                                                                             /* 0x000e220000002500 */
        /*0010*/                   LDC.64 R2, c[0x0][0x210] ;                /* 0x00008400ff027b82 */
        /*0020*/                   IMAD.WIDE R2, R0, 0x10, R2 ;              /* 0x0000001000027825 */
        /*0030*/                   BRA 0x50 ;                                /* 0x0000000000007947 */
        /*0040*/                   NOP ;                                     /* 0x0000000000007918 */
        /*0050*/                   LDG.E.128 R4, desc[UR4][R2.64] ;          /* 0x0000000402047981 */
        /*0060*/                   IMAD.U32 R8, R4, 0x10000, RZ ;            /* 0x0001000004087824 */
        /*0070*/                   FADD R9, R9, R8 ;                         /* 0x0000000809097221 */
        /*0080*/                   MUFU.EX2 R10, R9 ;                        /* 0x00000009000a7308 */
        /*0090*/              @!P1 BRA 0xd0 ;                                /* 0x0000000000309947 */
        /*00a0*/                   FMUL R10, R10, R10 ;                      /* 0x0000000a0a0a7220 */
        /*00b0*/                   FMUL R10, R10, R10 ;                      /* 0x0000000a0a0a7220 */
        /*00c0*/                   FMUL R10, R10, R10 ;                      /* 0x0000000a0a0a7220 */
        /*00d0*/                   SHFL.BFLY PT, R11, R10, 0x10, 0x1f ;      /* 0x0e001f000a0b7f89 */
        /*00e0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;             /* 0x0000000000007b1d */
        /*00f0*/                   ISETP.NE.AND P0, PT, R11, RZ, PT ;        /* 0x000000ff0b00720c */
        /*0100*/               @P0 BRA 0x50 ;                                /* 0xfffffffc00500947 */
        /*0110*/                   STG.E desc[UR4][R2.64], R11 ;             /* 0x0000000b02007986 */
        /*0120*/                   EXIT ;                                    /* 0x000000000000794d */
        /*0130*/                   BRA 0x130;                                /* 0xfffffffc00fc7947 */
"""
A_TURN = "LDG IMAD FADD MUFU BRA SHFL BAR ISETP BRA"


def names(path):
    return " ".join(instruction.name for instruction in path)


def test_the_hot_path_is_the_shortest_turn_that_loads_its_elements(sass):
    code = sass.parse(LISTING)
    assert len(code) == 20
    ((head, body),) = sass.loops(code)
    assert (head, sorted(body)) == (5, list(range(5, 17)))
    path, loop = sass.hot_path(code, sass.Turn(16, 2, 2))
    assert (names(path), loop) == (A_TURN, True)


def test_else_the_hot_path_is_the_kernels_which_may_take_several_turns(sass):
    path, loop = sass.hot_path(sass.parse(LISTING.replace("LDG.E.128", "LDG.E")), sass.NO_VECTORS)
    assert (names(path), loop) == (f"S2R LDC IMAD BRA {A_TURN} STG EXIT", False)
    path, loop = sass.hot_path(sass.parse(LISTING), sass.Turn(48, 2, 2))
    assert (names(path), loop) == (f"S2R LDC IMAD BRA {A_TURN} {A_TURN} {A_TURN} STG EXIT", False)


def test_a_way_that_does_not_load_its_elements_is_an_error(sass):
    with pytest.raises(ValueError, match="no way through this kernel loads 24 bytes a lane"):
        sass.hot_path(sass.parse(LISTING), sass.Turn(24, 2, 2))
    with pytest.raises(ValueError, match=r"XYZ\.FTZ at 0x70 is of no pipe"):
        sass.counts(sass.parse(LISTING.replace("FADD", "XYZ.FTZ")), sass.Turn(16, 2, 2), 32, 0, 2)


def test_counts_and_what_they_allow(sass):
    """8 elements a lane and 9 instructions; 32 blocks of 2 warps; 512 bytes a warp and turn against 16.45 a clock."""
    found = sass.counts(sass.parse(LISTING), sass.Turn(16, 2, 2), 32, 0, 2)
    assert found["elements"] == 8
    assert found["instructions"] == 1.12
    assert found["pipes"] == {"alu": 0.12, "fma": 0.12, "imad": 0.12, "mufu": 0.12, "memory": 0.25, "control": 0.38}
    assert (found["barriers"], found["shuffles"], found["ctas"]) == (1, 1, 32)
    # 700 for the load, then 4, 4, 20 (the result of each), 24 for the shuffle, of which the barrier takes 31
    # and the comparison and the branch 4.
    assert found["chain"] == 1 + 700 + 4 + 4 + 20 + max(24, 1 + 30) + 1 + 4
    wide = sass.counts(sass.parse(LISTING), sass.Turn(16, 2, 2), 255, 0, 8)
    assert wide["ctas"] == 1
    assert wide["bound"] == "latency"
    assert wide["share"] == round(8 * 512 / wide["chain"] / sass.BYTES_A_CLOCK, 3)


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "ctas"),
    [
        (32, 0, 1, 32),
        (168, 0, 1, 12),
        (172, 49152, 8, 1),
        (128, 49152, 8, 2),
        (32, 0, 16, 4),
        (32, 113 << 10, 4, 1),  # the system takes 1 KB of each
        (169, 0, 4, 2),  # registers come in steps of 8
    ],
)
def test_blocks_that_a_multiprocessor_holds(sass, registers, shared, warps, ctas):
    assert sass.resident(registers, shared, warps) == ctas


def test_what_is_outside_a_loop_is_shared_among_its_turns(sass):
    """The kernel around one turn: S2R, LDC, IMAD and BRA before it, STG and EXIT behind it."""
    found = sass.counts(sass.parse(LISTING), sass.Turn(16, 2, 2, 4), 32, 0, 2)
    assert found["instructions"] == round((9 + (4 + 2) / 4) / 8, 2)


def test_a_loop_around_the_one_that_loads_is_not_the_hot_path(sass):
    """The store's line, turned into a branch back to the kernel's second instruction, makes an outer loop."""
    outer = LISTING.replace("STG.E desc[UR4][R2.64], R11 ;   ", "@P2 BRA 0x10 ;").replace(
        "                   @P2 BRA", "              @P2 BRA"
    )
    code = sass.parse(outer)
    assert [head for head, _ in sass.loops(code)] == [1, 5]
    path, loop = sass.hot_path(code, sass.Turn(16, 2, 2))
    assert (names(path), loop) == (A_TURN, True)
    with pytest.raises(ValueError, match="no way through this kernel"):  # the shortest turn passes no FMUL, none ends
        sass.hot_path(code, sass.Turn(16, 2, 2, through="FMUL"))


def test_growth_is_named(sass, monkeypatch, tmp_path):
    monkeypatch.setattr(sass, "TABLE", tmp_path / "sass.json")
    row = sass.counts(sass.parse(LISTING), sass.Turn(16, 2, 2), 32, 0, 2)
    sass.record("nvcc", "13.0", {"fold": {"sm_90": row}})
    assert not sass.grown("nvcc", "13.0", {"fold": {"sm_90": row}})
    more = {"fold": {"sm_90": row | {"instructions": 1.15}}}
    assert sass.grown("nvcc", "13.0", more) == ["fold on sm_90: instructions rose from 1.12 to 1.15"]
    assert not sass.grown("nvcc", "13.1", more)
    assert sass.grown("nvcc", "13.0", {}) == ["other kernels: ['fold']"]
    assert "| fold | sm_90 | 1.12 |" in sass.markdown()


@pytest.fixture
def predicted(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "bench"))
    return importlib.import_module("predicted")


def test_what_is_foreseen_of_an_op(predicted, monkeypatch, tmp_path):
    """Half of 4.3 TB/s for the bytes, 1.98e6 clocks are 1 ms, and a launch where kernels do not overlap."""
    row = {"share": 0.5, "chain": 1980}
    names = [name for _, op in predicted.OPS.values() for name in (op.streams, op.ends)]
    (tmp_path / "sass.json").write_text(json.dumps({"triton": {"kernels": {name: {"sm_90": row} for name in names}}}))
    monkeypatch.setattr(predicted.sass, "TABLE", tmp_path / "sass.json")
    assert predicted.fractions({"what": "tilt_sample", "batch": 43, "vocab": 10**5}) == {
        "pyengine triton": round(4e-6 / (8e-6 + 1e-6), 3)
    }
    one_program = predicted.fractions({"what": "tilt_sample", "batch": 1, "vocab": 43 * 1000})["pyengine triton"]
    assert one_program == round(40e-9 / (1e-6 + 1e-6), 3)
    assert [predicted.tree_turns({"prefix": n}) for n in (100, 2048, 2049, 4097, 10**6)] == [8, 8, 16, 32, 32]
    found = predicted.fractions({"what": "logits_logprob, forward", "tokens": 86, "vocab": 10**5})
    assert found == {"pyengine": round(4e-6 / (8e-6 + 1e-6 + 1e-6), 3)}
    tree = {"what": "tree_attention", "prompts": 8, "prefix": 8192, "branches": 16}
    assert (
        predicted.sums_bytes(tree) == 9 / 8 * 0.125 * 4 * 8 * 8192 * 8 * 128
    )  # of keys and values, and the tail's part
    (share,) = predicted.fractions(tree).values()
    assert 0.43 < share < 0.45
    assert predicted.fractions({"what": "select_block"}) == {}

    def section(rig):
        yield {"what": "tilt_sample", "batch": 43, "vocab": 10**5}

    for small in (False, True):
        (out,) = predicted.beside(section)(SimpleNamespace(small=small))
        assert ("predicted_fraction_of_floor" in out) != small
