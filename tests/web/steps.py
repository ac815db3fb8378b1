"""What a person does on the page."""

from contextlib import suppress

from playwright.sync_api import Error as PlaywrightError


def choose(page, name, text):
    """In a dropdown."""
    page.click(f"#{name} input")
    page.locator("ul[role=listbox] li").filter(has_text=text).first.click()


def open_tab(page, title):
    page.get_by_role("tab", name=title).click()


def settle(page, steps, seed=7, prompt=None):
    """The smallest clip: 64 × 64, 17 frames."""
    if prompt is not None:
        page.fill("#generate-prompt textarea", prompt)
    for name in ("width", "height"):
        choose(page, f"generate-{name}", "64")
    choose(page, "generate-frames", "17 frames")
    page.fill("#generate-seed input", str(seed))
    page.press("#generate-seed input", "Tab")
    number = page.locator("#generate-steps input[type=number]")
    if not number.is_visible():
        page.click("#generate-advanced button")
    for _ in range(20):  # a page that has just come may still be given its values
        number.fill(str(steps))
        number.press("Tab")
        with suppress(PlaywrightError):
            return page.wait_for_function(
                "steps => document.querySelectorAll('#generate-predicted .steps i').length === steps",
                arg=steps,
                timeout=6000,
            )
    raise AssertionError(f"{steps} steps were never predicted: {page.inner_text('#generate-predicted')}")


def start(page):
    page.click("#generate-start")


def wait_for(page, words, name="generate"):
    """In the panel of a job."""
    page.locator(f"#job-{name}").get_by_text(words).first.wait_for()
