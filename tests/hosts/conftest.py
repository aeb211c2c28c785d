"""What all hosts' tests share: `pytest tests/hosts`, in an environment that has vLLM."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from cases import embedded_case, random_case


@pytest.fixture(scope="session")
def cases(tmp_path_factory):
    """{name: Case}"""
    folder = tmp_path_factory.mktemp("models")
    found = [random_case("llama", 1, folder / "llama"), random_case("qwen2", 1, folder / "qwen2"), embedded_case(2)]
    return {case.name: case for case in found}
