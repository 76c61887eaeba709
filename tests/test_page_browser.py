"""The listening page in a real browser: Chromium without a window, driven by Playwright."""

import shutil

import numpy as np
import pytest

from subtractive_jax import page
from subtractive_jax.page import pictures
from subtractive_jax.representation import notes as midi
from subtractive_jax.representation.audio import write_audio

RATE = 16_000
PLAYERS = ("Original", "Without the stem", "With the new stem", "New stem alone")
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="the page was not tried: Playwright is not installed")
    path = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if path is None:
        pytest.skip(f"the page was not tried: none of {', '.join(_BROWSERS)} is installed")
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    arguments += ["--autoplay-policy=no-user-gesture-required"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


def _piano_roll():
    notes = np.array([(0, 480, 60, 90), (7680, 8160, 64, 90)], midi.NOTE)
    content = midi.write(480, {"keys": notes}, {}, [(0, 500_000)], [(0, 4, 4)], 7680)
    return pictures.piano_roll(midi.read_score(content), seconds=8.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    time = np.arange(8 * RATE) / RATE
    for number in range(len(PLAYERS)):
        tone = 0.3 * np.exp(-4 * (time % 0.5)) * np.sin(2 * np.pi * 220 * (number + 1) * time)
        write_audio(folder / f"{number}.wav", tone.astype(np.float32), RATE)
    players = [(label, f"{number}.wav") for number, label in enumerate(PLAYERS)]
    rows = [
        page.Row(
            f"song {index}",
            ("Add reggae beats", "Add jazzy drums")[index % 2],
            players if index < 4 else (),
            {"Seed": index, "Steps": 30},
            {"Onset agreement (F1)": round(1.0 / (index + 1), 3), "Stem against music (dB)": -6.0 - index},
            section=("Generation", "Style transfer")[index >= 20],
            flags=["silent_stem"] if index == 1 else [],
            picture=_piano_roll() if index == 2 else b"",
        )
        for index in range(24)
    ]
    page.write(folder, "24 jobs with tiny", rows)
    return folder


@pytest.fixture
def opened(browser, folder):
    """The page, which may ask nothing of anybody and must not complain."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    opened, troubles = context.new_page(), []
    opened.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: troubles.append(str(error)))
    opened.on(
        "request", lambda request: None if request.url[:5] in ("file:", "data:") else troubles.append(request.url)
    )
    opened.goto((folder / "index.html").as_uri())
    yield opened
    context.close()
    assert troubles == []


def _times(opened):
    return opened.eval_on_selector_all("#row-0 audio", "all => all.map(audio => audio.currentTime)")


def _heard(opened):
    return opened.eval_on_selector_all("#row-0 audio", "all => all.map(audio => !audio.muted && !audio.paused)")


def _wait(opened, condition):
    opened.wait_for_function(condition, timeout=15_000)


PLAYS = "document.querySelector('#row-0 audio').currentTime > 0.3"
TOGETHER = """() => {
  const times = [...document.querySelectorAll("#row-0 audio")].map(audio => audio.currentTime);
  return Math.max(...times) - Math.min(...times) < 0.1;
}"""


def test_all_versions_play_together_and_one_is_heard(opened):
    opened.click("#row-0 .play")
    _wait(opened, PLAYS)
    assert _heard(opened) == [True, False, False, False]
    opened.click("#row-0 .version >> text=With the new stem")
    assert _heard(opened) == [False, False, True, False]
    _wait(opened, TOGETHER)
    assert _times(opened)[2] > 0.3
    opened.click("#row-0 .play")
    paused = _times(opened)
    opened.wait_for_timeout(200)
    assert _times(opened) == paused and opened.get_attribute("#row-0 .play", "aria-label") == "Play"


def test_everything_can_be_done_with_the_keyboard(opened):
    opened.keyboard.press("Space")
    _wait(opened, PLAYS)
    opened.keyboard.press("3")
    assert opened.get_attribute("#row-0 figure:nth-child(3) .version", "aria-pressed") == "true"
    opened.keyboard.press("ArrowRight")
    _wait(opened, "document.querySelectorAll('#row-0 audio')[2].currentTime > 5")
    opened.keyboard.press("ArrowLeft")
    _wait(opened, "document.querySelectorAll('#row-0 audio')[2].currentTime < 5")
    opened.keyboard.press("j")
    assert opened.evaluate("document.activeElement.closest('article').id") == "row-1"
    opened.keyboard.press("Space")  # on the focused play button
    _wait(opened, "document.querySelector('#row-1 audio').currentTime > 0")
    assert not any(_heard(opened))
    opened.keyboard.press("k")
    assert opened.evaluate("document.activeElement.closest('article').id") == "row-0"


def test_a_click_into_a_picture_goes_there(opened):
    picture = opened.locator("#row-0 figure:nth-child(2) .picture")
    picture.click(position={"x": 0.8 * picture.bounding_box()["width"], "y": 20})
    _wait(opened, "document.querySelector('#row-0 output').value.startsWith('0:06')")
    assert opened.get_attribute("#row-0 figure:nth-child(2) .version", "aria-pressed") == "true"
    opened.click("#row-0 .play")
    _wait(opened, "document.querySelectorAll('#row-0 audio')[1].currentTime > 6.5")


def test_the_piano_roll_shows_and_sets_the_position(opened):
    roll = opened.locator("#row-2 .roll")
    roll.click(position={"x": 0.5 * roll.bounding_box()["width"], "y": 40})
    _wait(opened, "document.querySelector('#row-2 output').value.startsWith('0:04')")
    head = opened.locator("#row-2 .roll .playhead")
    assert head.is_visible()
    share = (head.bounding_box()["x"] - roll.bounding_box()["x"]) / roll.bounding_box()["width"]
    assert abs(share - 0.5) < 0.01
    opened.click("#row-2 .play")
    _wait(opened, "parseFloat(document.querySelector('#row-2 .roll .playhead').style.left) > 53")


def test_the_end_is_an_end_and_play_begins_again(opened):
    opened.click("#row-0 .play")
    _wait(opened, PLAYS)
    opened.keyboard.press("ArrowRight")
    opened.keyboard.press("ArrowRight")
    _wait(opened, "!document.querySelector('#row-0').classList.contains('playing')")
    opened.click("#row-0 .play")
    _wait(
        opened,
        "document.querySelector('#row-0 audio').currentTime < 4 && !document.querySelector('#row-0 audio').paused",
    )


def test_tables_are_sorted_by_any_column(opened):
    names = "tr[data-row] th"
    assert opened.locator(f"section:first-of-type {names}").first.text_content() == "song 0"
    head = opened.locator("section:first-of-type th", has_text="Onset agreement")
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert opened.locator(f"section:first-of-type {names}").all_text_contents()[:2] == ["song 19", "song 18"]
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    assert opened.locator(f"section:first-of-type {names}").first.text_content() == "song 0"


def test_the_search_leaves_what_it_finds(opened):
    opened.fill("#search", "jazzy 3")
    assert opened.locator("tbody tr:visible th").all_text_contents() == ["song 3", "song 13", "song 23"]
    assert opened.locator("article:visible").count() == 3 and opened.text_content(".found") == "3 of 24"
    opened.fill("#search", "")
    assert opened.locator("article:visible").count() == 24


@pytest.mark.parametrize("width", [320, 700, 1600])
def test_nothing_is_wider_than_the_window(opened, width):
    opened.set_viewport_size({"width": width, "height": 800})
    assert opened.evaluate("document.documentElement.scrollWidth") <= width


def test_without_scripts_there_are_the_browsers_own_players(browser, folder):
    context = browser.new_context(java_script_enabled=False)
    opened = context.new_page()
    opened.goto((folder / "index.html").as_uri())
    assert opened.locator("audio[controls]:visible").count() == 16
    assert opened.locator(".transport:visible, .version:visible").count() == 0
    context.close()
