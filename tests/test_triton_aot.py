"""Every Triton kernel compiled ahead of time, without a GPU, as its wrapper launches it: no spills, little enough
shared memory, and no more instructions than bench/results/sass.json says.

`make sass` rewrites that and bench/results/triton_resources.json.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from pyengine.kernels import head_tilt, linear_logprob, select_block, tilt, tree_attention

TABLE = Path(__file__).parent.parent / "bench" / "results" / "triton_resources.json"
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block may have
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
VOCAB, WIDTH = 128_256, 4096


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def column(batch, dtype=torch.float32):
    return meta(1, dtype=dtype).expand(batch)


def launch_tilt(dtype, heads=1, masked=False, gumbel=False):
    columns = [column(64), column(64, torch.int64), column(64), column(64)]
    random = [column(64, torch.int64), column(64, torch.int64)]
    values = [meta(heads, 64, VOCAB, dtype=dtype), meta(64, heads, dtype=torch.float32)] if heads else [None, None]
    mask = meta(64, VOCAB, dtype=torch.bool) if masked else None
    tilt.tilt_sample(meta(64, VOCAB, dtype=dtype), *values, mask, *columns, *random, gumbel)


def launch_logits(dtype, softcap=None):
    rows = meta(4096, dtype=torch.float32)
    logits, target = meta(4096, VOCAB, dtype=dtype), meta(4096, dtype=torch.int64)
    linear_logprob.logits_logprob(logits, target, softcap=softcap)
    linear_logprob.grad_tile(logits, 0, target, rows, rows, rows, rows, softcap=softcap)


def launch_head(dtype, softcap=None, bias=None):
    hidden, weight = meta(4096, WIDTH, dtype=dtype), meta(VOCAB, WIDTH, dtype=dtype)
    linear_logprob.fused_forward(hidden, weight, bias, meta(4096, dtype=torch.int64), 1.0, softcap)


def launch_head_tilt(dtype, batch, heads=1, softcap=None):
    random = [column(batch, torch.int64), column(batch, torch.int64)]
    hidden, weight = meta(batch, WIDTH, dtype=dtype), meta(VOCAB, WIDTH, dtype=dtype)
    value_weight, weights = meta(heads, VOCAB, WIDTH, dtype=dtype), meta(batch, heads, dtype=torch.float32)
    values = [hidden, value_weight, None, weights] if heads else [None] * 4
    head_tilt.head_tilt_sample(hidden, weight, None, *values, None, softcap, column(batch), *random)


def launch_select(scores, hidden, probe):
    weights, reference = meta(2, dtype=torch.float32), meta(8, 2, dtype=torch.float32)
    random = [column(8, torch.int64), column(8, torch.int64)]
    select_block.select_block(scores, hidden, probe, weights, reference, True, 0.5, *random)


def launch_tree(dtype, width=128, window=0, softcap=0.0, sinks=None):
    """8 prompts of 16 branches, 32 query heads on 8: a decode step of Llama 3.1 8B."""
    pages, tails = meta(2048, 8, 64, width, dtype=dtype), meta(512, 8, 16, width, dtype=dtype)
    new, query = meta(128, 1, 8, width, dtype=dtype), meta(128, 1, 32, width, dtype=dtype)
    tree = [meta(*shape, dtype=torch.int32) for shape in ((8, 128), (8,), (9,), (128, 4), (128,))]
    tree_attention.tree_attention(query, new, new, pages, pages, tails, tails, *tree, 0.1, window, softcap, sinks)


BF16, FP32 = torch.bfloat16, torch.float32
LAUNCHES = {
    "tilt bf16": lambda: launch_tilt(BF16),
    "tilt bf16 gumbel": lambda: launch_tilt(BF16, gumbel=True),
    "logits bf16": lambda: launch_logits(BF16),
    "head bf16": lambda: launch_head(BF16),
    "head tilt bf16 16 rows": lambda: launch_head_tilt(BF16, 16),
    "head tilt bf16 64 rows": lambda: launch_head_tilt(BF16, 64),
    "tree bf16": lambda: launch_tree(BF16),
    "select scores": lambda: launch_select(meta(8, 8, 2, dtype=FP32), None, None),
    "select probe bf16": lambda: launch_select(None, meta(8, 8, WIDTH), meta(2, WIDTH)),
}
# Variants that take more registers, on one architecture.
HOPPER_LAUNCHES = {
    "tilt fp32, 3 heads, mask": lambda: launch_tilt(FP32, heads=3, masked=True),
    "logits fp32 softcap": lambda: launch_logits(FP32, softcap=30.0),
    "head bf16 softcap bias": lambda: launch_head(BF16, softcap=30.0, bias=meta(VOCAB)),
    "head fp32": lambda: launch_head(FP32),
    "head tilt fp32 64 rows": lambda: launch_head_tilt(FP32, 64),
    "tree fp32": lambda: launch_tree(FP32),
    "tree bf16 width 256, window, softcap, sinks": lambda: launch_tree(BF16, 256, 4096, 50.0, meta(32, dtype=FP32)),
    "head tilt bf16 64 rows softcap": lambda: launch_head_tilt(BF16, 64, softcap=30.0),
}


def recorded(launch, arch):
    """The launches of a wrapper on sm_`arch` as [(kernel, arguments by name, options)]; nothing runs."""
    calls = []

    def record(self, *args, grid, warmup, **options):
        named = dict(zip(self.arg_names, args, strict=False))
        named |= {name: options.pop(name) for name in list(options) if name in self.arg_names}
        calls.append((self, named, options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", record)
        patch.setattr(torch.cuda, "get_device_capability", lambda device: divmod(arch, 10))
        launch()
    return calls


def source_of(kernel, arguments):
    """The specialisation that Triton's launcher would make of these arguments."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or (isinstance(value, int) and value == 1 and special):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
        else:
            fits = isinstance(value, float) or -(2**31) <= value < 2**31
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32" if fits else "i64"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and special and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def resources(job, sass):
    """Registers, spills (the stack) and shared memory in bytes, as the machine code states them, and its counts."""
    name, arch, kernel, arguments, options = job
    binary = triton.compile(source_of(kernel, arguments), target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [sass.cuobjdump(), "--dump-resource-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        ((_, code),) = sass.kernels(Path(file.name)).items()
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", printed).groups())
    warps, shared = options["num_warps"], binary.metadata.shared
    row = {
        "launch": name,
        "kernel": kernel.__name__,
        "arch": f"sm_{arch}",
        "warps": warps,
        "registers": registers,
        "spilled": stack + local,
        "shared": shared,
    }
    # To read machine code takes half a second a kernel: sm_100 is counted where it is recorded.
    counted = name in LAUNCHES and (arch == 90 or (arch == 100 and os.environ.get("PYENGINE_RECORD")))
    turn = sass.turn_of(name, kernel.__name__, warps)
    return row, sass.counts(code, turn, registers, shared, warps) if counted else None


def test_no_kernel_spills_or_grows(sass):
    jobs = []
    for name, launch in (LAUNCHES | HOPPER_LAUNCHES).items():
        architectures = SHARED_LIMIT if name in LAUNCHES else [90]
        jobs += [(name, arch, *call) for arch in architectures for call in recorded(launch, arch)]
    with ThreadPoolExecutor(2) as pool:
        compiled = list(pool.map(partial(resources, sass=sass), jobs))
    table, counts = [row for row, _ in compiled], {}
    for row, counted in compiled:
        if counted:
            counts.setdefault(f"{row['launch']}, {row['kernel']}", {})[row["arch"]] = counted
    if os.environ.get("PYENGINE_RECORD"):
        sass.record("triton", triton.__version__, counts)
        note = {"triton": triton.__version__, "compiled only": "no GPU was involved", "vocab": VOCAB, "width": WIDTH}
        TABLE.write_text(json.dumps({"how": note, "kernels": table}, indent=2) + "\n")
    assert len({row["kernel"] for row in table}) == 12  # every kernel of the folder
    assert not [row for row in table if row["spilled"]]
    assert not sass.grown("triton", triton.__version__, counts)
    assert not [row for row in table if row["shared"] > SHARED_LIMIT[int(row["arch"][3:])]]
