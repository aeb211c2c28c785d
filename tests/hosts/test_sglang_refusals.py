"""What SGLang with pyengine refuses, and what it does where pyengine fails, without a server."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from sglang_server import environment

from pyengine import PrefixScorer

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def case(cases):
    return cases["llama"]


SETTINGS = {
    "speculative_algorithm": {"speculative_algorithm": "NGRAM"},
    "tp_size": {"tp_size": 2},
    "pp_size": {"pp_size": 2},
    "dp_size": {"dp_size": 2},
    "disaggregation_mode": {"disaggregation_mode": "decode"},
    "enable_single_batch_overlap": {"enable_single_batch_overlap": True},
    "enable_mixed_chunk": {"enable_mixed_chunk": True},
    "enable_torch_compile": {"enable_torch_compile": True},
    "tokenizer_worker_num": {"tokenizer_worker_num": 2},
    "is_embedding": {"is_embedding": True},
}
STAND_INS = {
    "dllm_algorithm": "LowConfidence",
    "attn_cp_size": 2,
    "enable_dp_attention": True,
    "enable_pdmux": True,
    "enable_two_batch_overlap": True,
    "enable_watermark": True,
    "device": "npu",
}


@pytest.fixture(scope="module")
def refused(case, tmp_path_factory):
    folder = tmp_path_factory.mktemp("refused")
    PrefixScorer(64, 700, width=8).save(folder / "vocabulary")
    PrefixScorer(64, 745, width=8, layer=1).save(folder / "layer")
    wrong = {"vocabulary": str(folder / "vocabulary"), "layer": str(folder / "layer")}
    cases = {"model": str(case.model), "settings": SETTINGS, "stand_ins": STAND_INS, "scorers": wrong}
    (folder / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, str(HERE / "sglang_refusals.py"), str(folder / "cases.json")]
    scorers = environment({"one": case.scorer})
    done = subprocess.run(command, env=scorers, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_each_setting_under_which_a_tilt_could_be_lost_is_refused(refused):
    assert refused["known"] == sorted([*SETTINGS, *STAND_INS])
    for name in refused["known"]:
        assert refused["said"][name].startswith(f"InputError: pyengine does not tilt with {name}=")


def test_what_does_not_fit_is_refused_with_the_reason(refused):
    said = refused["said"]
    assert "scores a vocabulary of 700 tokens" in said["vocabulary"]
    assert "reads layer 1 of 3" in said["layer"]
    assert "logits processor" in said["processor"]
    assert "did not take pyengine's hook" in said["hook"]
    assert said["version"].startswith("SystemExit: pyengine: InputError: SGLang 0.5.24")
    assert "drawn past pyengine" in said["token"]
    assert said["admission"].startswith("RuntimeError: True ('pyengine: ZeroDivisionError: of its own'")
    assert said["admission"].endswith("pyengine: ZeroDivisionError: of its own")
