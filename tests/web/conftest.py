"""The page, served on a free port, and a real browser. Without a browser the tests skip, but not in CI."""

import os
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WAIT = 120_000
"""Milliseconds: machines differ, and nothing is timed here."""


@dataclass
class Served:
    """A page that is served."""

    url: str
    folder: Path
    engine: object
    page: object


def needed(thing: str, how: str):
    """Skip, or fail in CI."""
    if os.environ.get("CI"):
        pytest.fail(f"{thing} is missing, and CI must test the page: {how}")
    pytest.skip(f"{thing} is missing: {how}")


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    try:
        import gradio  # noqa: F401
    except ImportError:
        needed("gradio", "pip install '.[web]'")
    from pointillist.web.serve import serve

    folder = tmp_path_factory.mktemp("outputs")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page, engine = serve("127.0.0.1", port, folder, prevent_thread_lock=True, quiet=True)
    yield Served(f"http://127.0.0.1:{port}", folder, engine, page)
    engine.close()
    page.close()


@pytest.fixture(scope="session")
def browser():
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        needed("a browser", "make ci-setup installs Debian's chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        needed("playwright", "pip install '.[dev]'")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def view(browser, served):
    """Opens the page anew: `view()`, or `view(width=390, color_scheme="dark")`. Errors of its scripts fail the test."""
    contexts, errors = [], []

    def open_page(width=1280, height=900, **how):
        context = browser.new_context(viewport={"width": width, "height": height}, **how)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(WAIT)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: errors.extend(_foreign(request.url, served.url)))
        page.goto(served.url)
        page.wait_for_selector("#generate-predicted .predicted")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not errors


def _foreign(url, home):
    return [] if url.startswith((home, "data:", "blob:")) else [f"the page asked for {url}"]
