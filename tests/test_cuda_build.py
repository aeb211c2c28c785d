"""The CUDA sources through nvcc for each architecture: they compile, what their kernels take of a GPU, and no more
instructions than bench/results/sass.json says.

`make cuda-resources` rewrites bench/results/cuda_resources.json from what this test parses, and those counts.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results" / "cuda_resources.json"
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
KERNELS = {"tilt.cu": 11, "select_block.cu": 1}  # and how many kernels each holds, template instances included

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc here")


def demangled(name):
    """`tilt_sums<true, false>` from the mangled name of a kernel."""
    done = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True)
    kernel = re.search(
        r"(\w+(?:<[^>]*>)?)\([^()]*\)\s*$", done.stdout.replace("(bool)1", "true").replace("(bool)0", "false")
    )
    assert kernel, done.stdout
    return kernel[1]


WARPS = {"tilt_sums": 2, "tilt_draw": 8, "choose": 4}


def resources(source, architecture, out):
    """{kernel: registers, spills, shared memory} of one file, from ptxas."""
    compute = architecture.replace("sm", "compute")
    command = ["nvcc", "-std=c++17", "-O3", f"-gencode=arch={compute},code={architecture}", "-cubin", "-Xptxas=-v"]
    path = ROOT / "csrc" / "cuda" / source
    done = subprocess.run(
        [*command, "-o", str(out / f"{source}.{architecture}"), str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr.lower(), done.stderr
    found = {}
    for part in done.stderr.split("Compiling entry function '")[1:]:
        shared = re.search(r"(\d+) bytes smem", part)
        numbers = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        assert numbers, part
        assert registers, part
        found[demangled(part.split("'")[0])] = {
            "registers": int(registers[1]),
            "spill_stores": int(numbers[2]),
            "spill_loads": int(numbers[3]),
            "shared": int(shared[1]) if shared else 0,
        }
    return found


def counted(sass, cubin, used):
    """{kernel: its counts} of one file, of the kernels that have a turn in bench/sass.py."""
    by_name = {demangled(name): code for name, code in sass.kernels(cubin).items()}
    assert by_name.keys() == used.keys()
    out = {}
    for kernel in by_name.keys() & sass.TURNS.keys():
        warps = WARPS[kernel.split("<")[0]]
        own = used[kernel]
        turn = sass.turn_of("", kernel, warps)
        out[kernel] = sass.counts(by_name[kernel], turn, own["registers"], own["shared"], warps)
    return out


def test_kernels_compile_without_spills_or_growth(tmp_path, sass):
    jobs = [(source, architecture) for architecture in ARCHITECTURES for source in KERNELS]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda job: resources(*job, tmp_path), jobs))
    table = {}
    for (source, architecture), kernels in zip(jobs, found, strict=True):
        assert len(kernels) == KERNELS[source], (source, sorted(kernels))
        for kernel, used in kernels.items():
            table.setdefault(kernel, {})[architecture] = used
            where = f"{kernel} on {architecture}"
            assert used["spill_stores"] == used["spill_loads"] == 0, where
            assert used["registers"] <= 255, where
            assert used["shared"] <= 48 << 10, where
    counts = {}
    for (source, architecture), kernels in zip(jobs, found, strict=True):
        if architecture != "sm_80":
            for kernel, row in counted(sass, tmp_path / f"{source}.{architecture}", kernels).items():
                counts.setdefault(kernel, {})[architecture.rstrip("a")] = row
    version = re.search(r"release ([\d.]+)", subprocess.check_output(["nvcc", "--version"], text=True))
    assert version
    if os.environ.get("PYENGINE_RECORD"):
        sass.record("nvcc", version[1], counts)
        RESULTS.write_text(json.dumps({"nvcc": version[1], "kernels": table}, indent=2, sort_keys=True) + "\n")
    recorded = json.loads(RESULTS.read_text())["kernels"]
    assert recorded.keys() == table.keys()
    assert not sass.grown("nvcc", version[1], counts)
