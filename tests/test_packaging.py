"""The traps of packaging, each pinned: what the wheel holds, what it needs, and the name `kernels`."""

from __future__ import annotations

import resource
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import pyengine
from pyengine import _C

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def python(code, cwd):
    """stdout of the program; a failure shows its stderr."""
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built as a newcomer's pip does: in isolation, with nothing but what build-system.requires names."""
    out = tmp_path_factory.mktemp("wheel")
    source = tmp_path_factory.mktemp("source") / "clone"
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.split(b"\0")
    for name in filter(None, files):
        path = ROOT / name.decode()
        if path.is_file():
            copy = source / name.decode()
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", out, source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return path, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_wheel_builds_in_isolation_in_little_time(wheel):
    """Of a processor, as other tests run beside it: 20 s on Zen 4, 56 on Sapphire Rapids."""
    assert wheel[1] < 90
    needs = [requirement.split(">")[0] for requirement in PROJECT["build-system"]["requires"]]
    assert needs == ["scikit-build-core", "pybind11"]  # no torch, no nvcc


def test_wheel_holds_one_package_with_everything_it_needs(wheel):
    names = zipfile.ZipFile(wheel[0]).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"pyengine"}
    assert sum(name.startswith("pyengine/_C.") for name in names) == 1
    for part in ("policy", "prefix", "probe", "reward-model"):
        assert f"pyengine/embedded/{part}/model.safetensors" in names
    assert "pyengine/kernels/__init__.py" not in names
    assert "pyengine/py.typed" in names
    assert not [name for name in names if "__pycache__" in name or name.endswith((".bin", ".pt", ".pkl"))]


def test_perf_finds_the_names_of_the_kernels(wheel):
    """Neither pybind11 nor the install strips them; `block` of linear is local to its file."""
    archive = zipfile.ZipFile(wheel[0])
    (module,) = [archive.read(name) for name in archive.namelist() if name.startswith("pyengine/_C.")]
    for name in (b"8pyengine14tree_attentionE", b"8pyengine11tilt_sampleE", b"_ZN12_GLOBAL__N_15blockI"):
        assert name in module


def test_installed_wheel_works_away_from_the_repository(wheel, tmp_path):
    zipfile.ZipFile(wheel[0]).extractall(tmp_path / "site")
    code = f"""
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in type(f).__module__]
sys.path.insert(0, {str(tmp_path / "site")!r})
import pyengine
assert pyengine.__file__.startswith({str(tmp_path)!r}), pyengine.__file__
from pyengine import Engine, SamplingParams
engine = Engine.from_pretrained(pyengine.embedded("policy"))
print(engine.generate("Review of the Harbour, a bakery:", sampling=SamplingParams(max_tokens=4, seed=1))[0].text)
"""
    assert python(code, tmp_path).strip()


def test_extension_does_not_link_torch():
    linked = subprocess.run(["ldd", _C.__file__], capture_output=True, text=True, check=True).stdout
    assert "torch" not in linked
    assert "c10" not in linked


def test_the_folder_kernels_is_never_taken_for_the_package_kernels(tmp_path):
    """transformers imports whatever `kernels` it finds; ours must not be it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = "import importlib.util as u; s = u.find_spec('kernels'); print(s and s.submodule_search_locations)"
    assert str(ROOT) not in python(code, tmp_path)
    assert python("from transformers import Trainer, LlamaForCausalLM; print(Trainer.__name__)", ROOT) == "Trainer\n"


def test_nothing_puts_the_repository_on_the_path(tmp_path):
    assert PROJECT["tool"]["scikit-build"]["wheel"]["packages"] == []
    options = PROJECT["tool"]["pytest"]["ini_options"]
    assert "--import-mode=importlib" in options["addopts"]
    assert "pythonpath" not in options
    assert not (ROOT / "tests" / "__init__.py").exists()
    path = python("import sys; print('\\n'.join(sys.path))", tmp_path).splitlines()
    assert not {str(ROOT), str(ROOT.parent)} & set(path)


def test_package_works_from_the_repository_root():
    """`python -m bench.something` puts the root first: the extension must still be found."""
    assert python("import pyengine.ops; print(pyengine._C.instruction_set())", ROOT).strip()


def test_embedded_models_are_small_and_plain():
    files = [f for f in pyengine.embedded("policy").parent.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 3_000_000
    assert {f.suffix for f in files} <= {".json", ".safetensors"}


def test_exported_names_exist():
    for name in pyengine.__all__:
        assert getattr(pyengine, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        pyengine.nothing  # noqa: B018
