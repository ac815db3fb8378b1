"""Pictures of every tab for the docs, of a page that is served for it: light and dark, wide and as on a phone.

    python tools/screenshots.py [--output docs/images/web] [--outputs FOLDER] [--size 128] [--steps 20]

It makes one clip and its dense twin and searches on the smallest grid first, or takes the latest of `--outputs`, where
there is one. Needs Playwright and a Chromium.
"""

from __future__ import annotations

import argparse
import re
import shutil
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright
from playwright.sync_api import Error as PlaywrightError

ROOT = Path(__file__).parents[1]
WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
LOOKS = {"light": WIDE, "dark": WIDE, "light_phone": PHONE, "dark_phone": PHONE}
WAIT = 900_000
PROMPT = "a green star rotating on navy"


def choose(page: Page, name: str, text: str) -> None:
    page.click(f"#{name} input")
    page.locator("ul[role=listbox] li").filter(has_text=text).first.click()


def make_clip(page: Page, size: int, steps: int, folder: Path) -> None:
    """A clip and its dense twin; on the way, Generate while it runs."""
    page.fill("#generate-prompt textarea", PROMPT)
    choose(page, "generate-width", str(size))
    choose(page, "generate-height", str(size))
    page.fill("#generate-seed input", "5")
    page.click("#generate-advanced button")
    page.locator("#generate-steps input[type=number]").fill(str(steps))
    page.locator("#generate-steps input[type=number]").press("Tab")
    page.click("#generate-advanced button")
    page.click("#generate-start")
    late = re.compile(rf"step ({'|'.join(map(str, range(steps // 4, steps)))})/|Done in")
    page.locator("#job-generate").get_by_text(late).first.wait_for()
    page.evaluate("scrollTo(0, 0)")
    page.screenshot(path=folder / "generate_running.png")
    page.locator("#job-generate").get_by_text("Done in").wait_for()
    page.wait_for_selector("#generate-video video[src]")
    page.click("#generate-compare")
    page.click("#compare-start")
    page.wait_for_selector(".player[data-drawn]")


def make_search(page: Page) -> None:
    """A search that takes a minute: its curve is that of a clip of 64 × 64."""
    open_tab(page, "Search")
    page.get_by_label("so many times as fast").click()
    page.fill("#search-number input", "1.5")
    for name, value in (("width", "64"), ("height", "64"), ("frames", "17"), ("steps", "20")):
        choose(page, f"search-{name}", value)
    page.click("#search-start")
    page.locator("#job-search").get_by_text("Done in").wait_for()


def show_gallery(page: Page) -> None:
    page.wait_for_selector(".card")
    page.locator(".card").first.click()
    page.wait_for_selector("#gallery-details .chips")


def show_compare(page: Page) -> None:
    page.wait_for_selector(".player[data-drawn]")


def show_generate(page: Page) -> None:
    page.wait_for_selector("#generate-video video[src]")


def show_system(page: Page) -> None:
    page.wait_for_selector(".facts")


def show_inspect(page: Page) -> None:
    """A head, and what a token of it sees; the clip is looked into first, if it was not yet."""
    page.click("#inspect-map button[data-pick='2,1']")
    page.wait_for_selector("#inspect-head img")
    if page.locator("#inspect-record").count():
        page.click("#inspect-record")
    page.wait_for_selector("#inspect-film img")


def show_search(page: Page) -> None:
    """The latest search, if there is one."""
    if page.input_value("#search-known input"):
        page.wait_for_selector("#search-curve [data-pick]")


def show_repaint(page: Page) -> None:
    """A stroke over the middle, and what it will take."""
    canvas = page.locator("#repaint-editor canvas").first
    page.wait_for_timeout(3000)
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 40, y)
    page.mouse.down()
    for step in range(9):
        page.mouse.move(x - 40 + 10 * step, y)
    page.mouse.up()
    page.wait_for_selector("#repaint-cost b")


def show_remote(page: Page) -> None:
    """A clip that a server made."""
    page.fill("#remote-prompt textarea", "a lake at sunrise")
    for name, value in (("width", 128), ("height", 128), ("frames", 17), ("steps", 20), ("seed", 3)):
        page.fill(f"#remote-{name} input", str(value))
        page.press(f"#remote-{name} input", "Tab")
    page.click("#remote-start")
    page.wait_for_selector("#remote-video video[src]")


SHOWN = {
    "generate": show_generate, "compare": show_compare, "gallery": show_gallery, "system": show_system,
    "inspect": show_inspect, "search": show_search, "repaint": show_repaint,
    "remote": show_remote,
}  # fmt: skip
"""What to wait for and to click in a tab, by its id; others are shown as they open."""


def open_tab(page: Page, title: str) -> None:
    page.get_by_role("tab", name=title, exact=True).click()


def photograph(
    browser: Browser, url: str, state: Any, folder: Path, tabs: list[tuple[str, str]], chosen: list[str]
) -> None:
    for looks in chosen:
        size = LOOKS[looks]
        context = browser.new_context(viewport=size, color_scheme=looks.partition("_")[0], storage_state=state)  # type: ignore[arg-type]
        page = context.new_page()
        page.set_default_timeout(WAIT // 10)
        page.goto(url)
        page.wait_for_selector("#generate-predicted .predicted")
        for name, title in tabs:
            open_tab(page, title)
            try:
                SHOWN.get(name, lambda page: None)(page)
            except PlaywrightError as error:  # a picture of what is there says more than none
                print(f"{name}: {str(error).partition(chr(10))[0]}", file=sys.stderr)
            page.wait_for_timeout(2000)
            page.screenshot(path=folder / f"{name}_{looks}.png", full_page=True)
            wide = page.evaluate("document.documentElement.scrollWidth")
            print(f"{name}_{looks}.png" + (f": {wide} pixels are too wide" if wide > size["width"] else ""), flush=True)
        context.close()


def main() -> None:
    from pointillist.web.app import REMOTE, TABS
    from pointillist.web.serve import serve
    from video_server import VideoServer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/images/web"))
    parser.add_argument("--outputs", type=Path)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--looks", default=",".join(LOOKS))
    parser.add_argument("--tabs", default=",".join(name for name, *_ in TABS + REMOTE))
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    chosen, looks = given.tabs.split(","), given.looks.split(",")
    with tempfile.TemporaryDirectory() as beside, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        folder, port = given.outputs or Path(beside) / "outputs", free_port()
        page, engine = serve("127.0.0.1", port, folder, prevent_thread_lock=True, quiet=True)
        url = f"http://127.0.0.1:{port}"
        state = prepare(browser, url, folder, given)
        photograph(browser, url, state, given.output, [(n, title) for n, title, _ in TABS if n in chosen], looks)
        engine.close()
        page.close()
        if "remote" in chosen:  # by a stand-in for the server
            port = free_port()
            with VideoServer(Path(beside)) as server:
                page, engine = serve("127.0.0.1", port, folder, remote=server.url, prevent_thread_lock=True, quiet=True)
                tabs = [(name, title) for name, title, _ in REMOTE]
                photograph(browser, f"http://127.0.0.1:{port}", None, given.output, tabs, looks)
                engine.close()
                page.close()
        browser.close()


def prepare(browser: Browser, url: str, folder: Path, given: argparse.Namespace) -> Any:
    """Something to show: a clip, its dense twin, a search. Gives what the browser remembers."""
    first = browser.new_context(viewport=WIDE).new_page()  # type: ignore[arg-type]
    first.set_default_timeout(WAIT)
    first.goto(url)
    first.wait_for_selector("#generate-predicted .predicted")
    if any(folder.glob("*_dense.mp4")):
        open_tab(first, "Gallery")
        show_gallery(first)
        first.click("#gallery-compare")
        show_compare(first)
    else:
        make_clip(first, given.size, given.steps, given.output)
        make_search(first)
    return first.context.storage_state()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    main()
