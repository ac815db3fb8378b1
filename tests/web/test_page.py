"""The page as a person uses it, with the embedded model on its small grid."""

import re

import pytest

from pointillist.pipelines.video import read_clip, read_settings
from web.steps import choose, open_tab, settle, start, wait_for


def clips(served):
    return sorted(path for path in served.folder.glob("*.mp4") if "_" not in path.name)


def test_generate_compare_reload_and_load_settings(view, served):
    before = clips(served)
    page = view()
    settle(page, steps=30, prompt="a green square moving up on gray")  # so many that a fast machine shows some of them
    start(page)
    wait_for(page, re.compile(r"step \d+/30 · \d"))
    page.wait_for_selector("#job-generate img.job-preview")
    wait_for(page, "Done in")
    page.wait_for_selector("#generate-video video[src]")
    page.wait_for_function(
        "!document.querySelector('#generate-predicted').innerText.includes('Rough')"
    )  # it has learned
    [made] = set(clips(served)) - set(before)
    facts = read_settings(made)
    assert (facts["width"], facts["frames"], facts["steps"], facts["seed"]) == (64, 17, 30, 7)
    assert read_clip(made).shape == (17, 64, 64, 3)
    assert "seed 7" in page.inner_text("#generate-details")

    page.click("#generate-compare")
    page.click("#compare-start")
    page.wait_for_selector(".player[data-drawn='side 0']")
    drawn = page.evaluate(
        "[...document.querySelectorAll('.player canvas')].map(c => [c.width, c.height, "
        "c.getContext('2d').getImageData(0, 0, 64, 64).data.some(each => each > 60 && each < 255)])"
    )
    assert drawn == [[64, 64, True]] * 2
    for mode in ("slider", "difference"):
        page.click(f"button[data-mode={mode}]")
        page.wait_for_selector(f".player[data-drawn='{mode} 0']")
    page.locator(".player .frame").fill("9")
    page.wait_for_selector(".player[data-drawn='difference 9']")
    assert "frame 10/17" in page.inner_text(".player .said")
    numbers = page.inner_text("#compare-numbers")
    assert "PSNR" in numbers and "speed-up" in numbers and "Attention" in numbers
    twin = made.with_name(f"{made.stem}_dense.mp4")
    assert read_settings(twin)["plan"] == "none" and read_settings(twin)["seed"] == 7

    page.reload()
    page.wait_for_selector("#generate-video video[src]")  # the clip in hand is found again
    open_tab(page, "Gallery")
    page.wait_for_selector(f".card[data-name='{made.name}']")
    assert page.locator(".card").count() == len(clips(served))  # the dense twin is beside its clip, not another one
    page.click(f".card[data-name='{made.name}']")
    page.click("#gallery-load")
    page.wait_for_function("document.querySelector('#generate-prompt textarea').value.includes('green square')")
    assert page.input_value("#generate-seed input") == "7"


def test_cancel_in_the_middle_and_generate_again(view, served):
    before = clips(served)
    page = view()
    settle(page, steps=90)
    start(page)
    wait_for(page, re.compile(r"step [1-9]\d*/90"))
    page.click("#cancel-generate")
    wait_for(page, "Cancelled. Nothing was written.")
    job = served.engine.jobs[-1]
    assert job.state == "cancelled" and job.latest.step < 90 and clips(served) == before
    settle(page, steps=2)
    start(page)
    wait_for(page, "Done in")
    assert len(clips(served)) == len(before) + 1


def test_a_reloaded_page_finds_its_running_job(view, served):
    page = view()
    settle(page, steps=90)
    start(page)
    wait_for(page, re.compile(r"step [1-9]\d*/90"))
    page.reload()
    wait_for(page, re.compile(r"step [1-9]\d*/90"))
    page.click("#cancel-generate")
    wait_for(page, "Cancelled")


def test_the_speed_changes_what_is_predicted(view):
    page = view()
    choose(page, "generate-width", "176")
    kinds = {}
    for speed in (0, 3):
        page.locator("#generate-speed input[type=range]").fill(str(speed))
        legend = re.compile("reused") if speed else re.compile("^20 dense$")
        page.locator("#generate-predicted .legend span").filter(has_text=legend).first.wait_for()
        kinds[speed] = page.inner_text("#generate-predicted")
    assert "density 1.00" in kinds[0] and "as fast as dense" in kinds[3] and "density 1.00" not in kinds[3]


def test_a_dropped_file_loads_its_settings(view, served, tmp_path):
    import numpy as np

    from pointillist.pipelines.video import Clip, write_clips

    facts = {
        "prompt": "a blue star still on white", "negative_prompt": "", "model": "embedded", "seed": 11, "steps": 9,
        "frames": 21, "width": 96, "height": 80, "guidance": 3.0, "request": {"speed": "fast", "cache": "none"},
    }  # fmt: skip
    write_clips({tmp_path / "clip.gif": Clip(np.zeros((2, 16, 16, 3)), facts)}, 8)
    (tmp_path / "other.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    page = view()
    page.click("#generate-presets button")
    page.locator("#generate-drop input[type=file]").set_input_files(tmp_path / "other.png")
    page.get_by_text("carries no settings").first.wait_for()
    page.locator("#generate-drop button[aria-label='Clear']").first.click()
    page.locator("#generate-drop input[type=file]").set_input_files(tmp_path / "clip.gif")
    page.wait_for_function("document.querySelector('#generate-prompt textarea').value.includes('blue star')")
    values = {name: page.input_value(f"#generate-{name} input") for name in ("width", "height", "seed")}
    assert values == {"width": "96", "height": "80", "seed": "11"}
    assert page.input_value("#generate-speed input[type=range]") == "3"
    assert not page.is_checked("#generate-cache input")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_tab_fits_a_phone(view, scheme):
    page = view(width=390, height=844, color_scheme=scheme)
    from pointillist.web.app import TABS  # here, as gradio may be missing

    for _, title, _ in TABS:
        open_tab(page, title)
        page.wait_for_timeout(300)
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= 390, f"{title} is {wide} pixels wide"


def test_presets_stay_in_the_browser(view):
    page = view()
    settle(page, steps=33)
    page.click("#generate-presets button")
    page.fill("#generate-preset-name textarea, #generate-preset-name input", "mine")
    page.click("#generate-preset-save")
    page.wait_for_function("document.querySelector('#generate-preset input')?.value === 'mine'")
    page.reload()
    page.wait_for_selector("#generate-predicted .predicted")
    page.click("#generate-presets button")
    choose(page, "generate-preset", "mine")
    page.wait_for_function("document.querySelectorAll('#generate-predicted .steps i').length === 33")
