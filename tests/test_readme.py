"""Every code block of the README and of docs/ runs."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from pyengine import cli

ROOT = Path(__file__).parent.parent
PAGES = {
    page.name: re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
ELSEWHERE = {"vllm.md", "sglang.md"}  # run in tests/hosts, where these are
HERE = {name: blocks for name, blocks in PAGES.items() if name not in ELSEWHERE}
# A server runs until it is told to end; the first of its page is there while the rest of that page runs.
SERVE = "pyengine serve"
COMMANDS = {
    line: None
    for blocks in HERE.values()
    for language, code in blocks
    if language == "sh"
    for line in code.replace("\\\n", " ").splitlines()
    if line.strip()
}
PROGRAMS = {name: [code for language, code in blocks if language == "python"] for name, blocks in HERE.items()}


def test_only_languages_that_are_run_here():
    assert {language for blocks in PAGES.values() for language, _ in blocks} == {"python", "sh"}


@contextmanager
def serving(command):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", *shlex.split(command)], stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        said = ""
        while "is served at" not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()


@pytest.fixture(scope="module")
def served():
    with serving(SERVE):
        yield


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command, tmp_path, request, monkeypatch, capsys):
    """`make` targets must exist (running them here would run this test again); the rest must succeed.

    Those that need no shell run in this process: one of their own imports for five seconds.
    """
    words = shlex.split(command, comments=True)
    if command == SERVE:
        return request.getfixturevalue("served")
    if command.startswith(SERVE):
        with serving(command):
            return
    if words[0] == "curl":
        request.getfixturevalue("served")
    if words[0] == "make":
        subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
        return
    if words[0] == "pyengine" and not set("|&;<>$").intersection(command):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        assert capsys.readouterr().out
        return
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("page", [name for name, blocks in PROGRAMS.items() if blocks])
def test_python_blocks_in_order(page, tmp_path, request):
    """One after the other in one program, as a reader would type them."""
    if page in ("serving.md", "driver.md"):
        request.getfixturevalue("served")
    (tmp_path / "page.py").write_text("\n".join(PROGRAMS[page]))
    done = subprocess.run([sys.executable, "page.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    path = ROOT / page if page == "README.md" else ROOT / "docs" / page
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
        assert (path.parent / link).exists(), link
