"""The page at `/`, in a browser."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
ROOT = Path(__file__).parent.parent
SHOT = ROOT / "docs" / "serve_page.png"
# Nothing of the browser's own may call out.
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine: install Debian's package, or set CHROMIUM")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(serve):
    return serve()


@pytest.fixture
def page(browser, server):
    page = browser.new_page(viewport={"width": 1180, "height": 860})
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: page.errors.append(request.url) if page.server.url not in request.url else None)
    page.server = server
    page.goto(page.server.url)
    page.wait_for_selector(".scorer")
    yield page
    assert page.errors == []
    page.close()


def test_an_answer_streams_in_and_a_block_opens(page):
    page.fill("#tilt_k", "4")
    page.fill("#seed", "11")
    page.click("#run")
    page.wait_for_selector("#stop", state="hidden")
    body = {"prompt": page.input_value("#prompt"), "max_tokens": 96, "seed": 11, "tilt_candidates": True}
    body |= {"tilt_strategy": "blockwise", "tilt_k": 4, "tilt_block_tokens": 8, "tilt_scorer": "prefix"}
    choice = page.server.post("/v1/completions", body)[1]["choices"][0]
    assert page.text_content("#answer") == choice["text"]
    assert page.text_content("#reward") == f"{choice['tilt']['reward']:.3f}"
    assert page.text_content("#kl") == f"{choice['tilt']['kl']:.2f}"
    assert page.text_content("#drawn") == str(choice["tilt"]["drawn_tokens"])
    blocks = page.query_selector_all(".block")
    assert len(blocks) == len(choice["tilt"]["candidates"]) > 1
    blocks[1].click()
    block = choice["tilt"]["candidates"][1]
    texts = [cell.text_content() for cell in page.query_selector_all("#candidates td.text")]
    assert sorted(texts) == sorted(candidate["text"] for candidate in block["candidates"])
    assert page.text_content("#candidates tr.kept td.text") == block["candidates"][block["chosen"]]["text"]
    if "PYENGINE_SCREENSHOT" in os.environ:
        page.screenshot(path=SHOT)


def test_tokens_stream_in_without_blocks(page):
    page.select_option("#strategy", "tokenwise")
    assert page.is_hidden("#tilt_k")
    assert page.is_disabled("#scorer-length")
    page.click("#run")
    page.wait_for_selector("#stop", state="hidden")
    assert page.text_content("#answer")
    assert page.query_selector(".block") is None
    assert float(page.text_content("#kl")) > 0


def test_what_the_server_refuses_is_shown(page):
    page.fill("#max_tokens", "100000")
    page.click("#run")
    page.wait_for_selector("#error:not(:empty)")
    assert "--max-tokens" in page.text_content("#error")
    page.errors.clear()  # the browser reports the 400 too


def test_an_answer_can_be_stopped(page):
    page.fill("#max_tokens", "400")
    page.fill("#tilt_k", "32")
    page.fill("#temperature", "3")
    page.click("#run")
    page.wait_for_selector(".block")
    page.click("#stop")
    page.wait_for_selector("#stop", state="hidden")
    page.wait_for_timeout(500)
    assert page.server.metrics()["pyengine_rows"] == 0
    assert page.server.metrics()["pyengine_cancelled_total"] == 1
