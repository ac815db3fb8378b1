"""Inspect, Search, Repaint and Remote as a person uses them, on the smallest grids."""

import re
import socket
from pathlib import Path

import pytest

from pointillist.accel.plan import Plan
from pointillist.pipelines.generate import GenerateRequest
from pointillist.pipelines.outputs import Outputs
from pointillist.pipelines.video import read_clip, read_settings
from video_server import VideoServer
from web.conftest import WAIT
from web.steps import choose, open_tab, wait_for


@pytest.fixture(scope="module")
def clip(served):
    """A sparse clip on the small grid, 320 tokens, with what repainting needs."""
    outputs = Outputs(served.folder)
    output = outputs.new()
    request = GenerateRequest(
        prompt="a <b>red</b> circle", output=output, width=64, height=64, frames=17, steps=4, seed=1, pattern="pooled",
        density=0.4, keep=outputs.kept(output), warm_up=False,
    )  # fmt: skip
    return served.engine.submit(request).result().output


def in_hand(page, clip, button):
    open_tab(page, "Gallery")
    page.click(f".card[data-name='{clip.name}']")
    page.click(f"#gallery-{button}")


def test_through_the_map_to_a_head_and_a_token(view, served, clip):
    page = view()
    in_hand(page, clip, "inspect")
    page.wait_for_selector("#inspect-map button")
    assert "a <b>red</b> circle" in page.inner_text("#inspect-title")  # text, not markup
    assert page.locator("#inspect-map button").count() == 24 and page.locator("#inspect-steps button").count() == 4
    assert page.locator("#inspect-bill .bars").count() == 6
    assert page.locator("#inspect-map button").all_inner_texts() == ["40"] * 24
    page.click("#inspect-steps button >> nth=0")  # a dense step
    page.wait_for_function("document.querySelector('#inspect-map button')?.innerText === '100'")
    page.click("#inspect-steps button >> nth=2")
    page.wait_for_function("document.querySelector('#inspect-map button')?.innerText === '40'")
    page.click("#inspect-map button[data-pick='2,3']")
    page.wait_for_selector("#inspect-map button.on[data-pick='2,3']")
    page.click("#inspect-record")
    page.wait_for_selector("#inspect-film img")
    assert page.locator("#inspect-head img").count() == 2 and "Layer 2, head 3" in page.inner_text("#inspect-head")
    assert re.search(r"4\d% of the pairs, about \d+% of the attention", page.inner_text("#inspect-head"))
    assert page.locator("#inspect-film img").count() == 5  # latent frames
    last = page.locator("#inspect-film img").nth(4)
    box = last.bounding_box()
    last.click(position={"x": box["width"] * 0.99, "y": box["height"] * 0.01})
    page.get_by_text("latent frame 4, row 0, column 7").wait_for()
    page.click("#inspect-map button[data-pick='0,0']")  # another head needs no new recording
    page.get_by_text("Layer 0, head 0").wait_for()
    page.wait_for_function("document.querySelectorAll('#inspect-film img').length === 5")
    page.get_by_label("density").click()
    page.get_by_text("of the pairs are kept:").wait_for()


def test_a_plan_alone_has_a_map_and_what_its_search_recorded(view):
    page = view(width=390, height=844, color_scheme="dark")
    open_tab(page, "Inspect")
    choose(page, "inspect-source", "embedded-balanced")
    page.wait_for_selector("#inspect-map button")
    page.click("#inspect-map button[data-pick='3,1']")
    page.get_by_text("As the search recorded it").wait_for()
    assert page.locator("#inspect-head img").count() == 2 and page.locator("#inspect-record").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.timeout(900)
def test_search_shows_its_curve_and_hands_a_plan_over(view, served, tiny_folder):
    page = view()
    page.set_default_timeout(3 * WAIT)
    open_tab(page, "Search")
    page.get_by_label("so many times as fast").click()
    page.fill("#search-number input", "0.5")
    page.click("#search-start")
    wait_for(page, "must be a number from 1 to 1000", "search")
    page.fill("#search-number input", "1.3")
    page.fill("#search-model input", str(tiny_folder))
    page.press("#search-model input", "Enter")
    page.click("#search-frames input")
    page.get_by_role("option", name="1", exact=True).click()  # which the embedded model has not
    for name, value in (("width", "256"), ("height", "256"), ("steps", "6")):
        choose(page, f"search-{name}", value)
    page.get_by_role("button", name="More").click()
    choose(page, "search-hardware", "ryzen-7700x")
    page.click("#search-verify input")
    page.click("#search-start")
    wait_for(page, re.compile(r"step \d/6"), "search")
    page.click("#cancel-search")
    wait_for(page, "Cancelled", "search")
    page.click("#search-resume")  # it goes on where it stopped
    wait_for(page, "Done in", "search")
    page.wait_for_selector("#search-curve [data-pick]")
    assert page.locator("#search-resume").count() == 0
    points = page.locator("#search-curve [data-pick]")
    said = page.inner_text("#search-point")
    points.nth(points.count() - 1).locator("circle.hit").click()
    page.wait_for_function("said => document.querySelector('#search-point')?.innerText !== said", arg=said)
    page.click("#search-use")
    page.wait_for_selector("#tab-generate #generate-prompt")
    [plan] = (served.folder / "plans").glob("*.safetensors")
    assert Plan.load(plan).grid == (1, 16, 16)
    [found] = (served.folder / "searches").iterdir()
    assert (found / "plan.safetensors").is_file() and len(list((found / "points").iterdir())) == points.count()


def draw_over_the_middle(page):
    canvas = page.locator("#repaint-editor canvas").first
    page.wait_for_timeout(1500)  # the editor tells nobody when it is ready to be drawn on
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 40, y)
    page.mouse.down()
    for step in range(9):
        page.mouse.move(x - 40 + 10 * step, y)
    page.mouse.up()


def test_a_reloaded_page_can_be_drawn_on(view, served, clip):
    page = view()
    in_hand(page, clip, "repaint")
    page.wait_for_function("document.querySelector('#repaint-prompt textarea')?.value === 'a <b>red</b> circle'")
    page.reload()
    page.wait_for_selector("#generate-predicted .predicted")
    open_tab(page, "Repaint")
    draw_over_the_middle(page)
    page.wait_for_selector("#repaint-cost b")


def test_repaint_what_was_drawn_over(view, served, clip):
    page = view()
    in_hand(page, clip, "repaint")
    page.wait_for_function("document.querySelector('#repaint-prompt textarea')?.value === 'a <b>red</b> circle'")
    page.click("#repaint-start")
    wait_for(page, "nothing is drawn", "repaint")
    draw_over_the_middle(page)
    page.wait_for_selector("#repaint-cost b")
    assert re.search(r"of the pixels, \d+% of a whole", page.inner_text("#repaint-cost"))
    page.fill("#repaint-prompt textarea", "a green square")
    page.click("#repaint-start")
    wait_for(page, "Done in", "repaint")
    page.wait_for_selector("#repaint-video video[src]")
    made = max(served.folder.glob("*.mp4"), key=lambda path: path.stat().st_mtime)
    facts = read_settings(made)
    assert facts["prompt"] == "a green square" and facts["psnr_outside"] == 100 and 0 < facts["area"] < 0.6
    assert Path(facts["repaint"]["clip"]) == clip and made.with_suffix(".safetensors").is_file()
    page.get_by_text("every pixel is as it was").wait_for()


@pytest.fixture
def with_a_server(browser, tmp_path):
    """A page that was started with a server, and the server."""
    from pointillist.web.serve import serve

    with VideoServer(tmp_path, polls=4) as server, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        page, engine = serve(
            "127.0.0.1", port, tmp_path / "outputs", remote=server.url, prevent_thread_lock=True, quiet=True
        )
        context = browser.new_context(viewport={"width": 1280, "height": 900})
        tab = context.new_page()
        tab.set_default_timeout(120_000)
        tab.goto(f"http://127.0.0.1:{port}")
        yield tab, server, tmp_path / "outputs"
        context.close()
        engine.close()
        page.close()


def test_a_server_makes_the_clip(with_a_server):
    page, server, folder = with_a_server
    open_tab(page, "Remote")
    page.fill("#remote-prompt textarea", "a lake at sunrise")
    for name, value in (("width", 64), ("height", 48), ("frames", 9), ("steps", 5), ("seed", 3)):
        page.fill(f"#remote-{name} input", str(value))
        page.press(f"#remote-{name} input", "Tab")
    page.click("#remote-start")
    wait_for(page, "Done in", "remote")
    page.wait_for_selector("#remote-video video[src]")
    [made] = folder.glob("*.mp4")
    assert read_clip(made).shape == (9, 48, 64, 3) and read_settings(made)["seed"] == 3
    server.fail = "CUDA out of memory"
    page.click("#remote-start")
    wait_for(page, "could not make the clip: CUDA out of memory", "remote")
    server.fail, server.polls = "", 10**6
    page.click("#remote-start")
    wait_for(page, re.compile("generating at|waiting at"), "remote")
    page.click("#cancel-remote")
    wait_for(page, "Cancelled", "remote")
    assert len(server.deleted) == 1
