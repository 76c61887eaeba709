"""The listening page: complete, self-contained, and safe against whatever an instruction holds."""

import html.parser
import io
import re

import numpy as np
import pytest
from PIL import Image

from subtractive_jax import page
from subtractive_jax.errors import UserError
from subtractive_jax.page import pictures
from subtractive_jax.representation import notes as midi
from subtractive_jax.representation.audio import write_audio

INSTRUCTIONS = (
    "Add rock drums",
    "Add indie drums with punchy beats",
    "Add reggae beats",
    "Add soft acoustic drums to enhance emotion",
    "Generate percussion with a lively Latin flair",
    "Add jazzy drums",
    "Add aggressive rock drums with cymbal crashes",
    "Add reggae beats",  # again, as restyling
)
SAMPLE_RATE = 16_000
PLAYERS = ("Original", "Without the stem", "With the new stem", "New stem alone")


class Elements(html.parser.HTMLParser):
    """The start tags of a page with their attributes, and which elements are open."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "img", "input"):  # which have no end tag
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


def _tones(seed):
    """Four seconds of decaying tones: something to see and to hear."""
    random = np.random.default_rng(seed)
    time = np.arange(4 * SAMPLE_RATE) / SAMPLE_RATE
    notes = [np.exp(-6 * (time % 0.5)) * np.sin(2 * np.pi * f * time) for f in random.uniform(80, 2000, 4)]
    return (0.2 * np.sum(notes, axis=0) + 0.003 * random.standard_normal(len(time))).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    rows = []
    for index, instruction in enumerate(INSTRUCTIONS):
        (folder / f"job {index}").mkdir()
        files = [(label, f"job {index}/{label.lower().replace(' ', '_')}.wav") for label in PLAYERS]
        for label, (_, file) in enumerate(files):
            write_audio(folder / file, _tones(10 * index + label), SAMPLE_RATE)
        rows.append(
            page.Row(
                title=f"job {index}",
                instruction=instruction,
                players=files,
                settings={"Seed": index, "Steps": 30, "Text guidance": 3.0, "Context guidance": 1.5},
                figures={"Onset F1": 0.731, "Stem level (dB)": -6.25},
                flags=["over_full_scale"] if index == 1 else [],
            )
        )
    page.write(folder, "Songs kept out of training", rows)
    return folder


@pytest.fixture(scope="module")
def elements(folder):
    return Elements((folder / "index.html").read_text())


def test_every_job_has_its_instruction_players_and_pictures(folder, elements):
    assert elements.open == []
    assert len(elements.all("article")) == len(INSTRUCTIONS)
    headings = re.findall(r"<h2[^>]*>(.*?)</h2>", (folder / "index.html").read_text())
    assert tuple(headings) == INSTRUCTIONS
    assert elements.text.count("over full scale") == 2  # in the table and in the row
    players, images = elements.all("audio"), elements.all("img")
    assert len(players) == len(images) == len(INSTRUCTIONS) * len(PLAYERS)
    assert all("controls" in player and player["aria-label"] in PLAYERS for player in players)
    assert all((folder / player["src"].replace("%20", " ")).is_file() for player in players)
    assert all(image["src"].startswith("data:image/webp;base64,") and image["alt"] for image in images)
    assert "0.731" in elements.text and "Text guidance" in elements.text


def test_nothing_is_requested_from_anywhere_else(folder, elements):
    text = re.sub(r"data:image/webp;base64,[\w+/=]+", "", (folder / "index.html").read_text())
    assert not re.search(r"https?:|//|@import|url\(", text)
    targets = [attributes.get("src") or attributes.get("href") for _, attributes in elements.tags]
    for target in filter(None, targets):
        assert target.startswith(("data:", "#", "job%20")), target


def test_text_is_escaped(tmp_path):
    hostile = '<script>alert("x")</script> & $title \' "'
    (tmp_path / 'a"b<c>.d').mkdir()
    write_audio(tmp_path / 'a"b<c>.d' / "mix.wav", _tones(0), SAMPLE_RATE)
    row = page.Row(hostile, hostile, [(hostile, 'a"b<c>.d/mix.wav')], {hostile: hostile}, {hostile: hostile}, hostile)
    elements = Elements(page.write(tmp_path, hostile, [row, row]).read_text())
    assert elements.open == [] and len(elements.all("script")) == 1
    assert elements.text.count(hostile) >= 8
    assert elements.all("audio")[0]["src"] == "a%22b%3Cc%3E.d/mix.wav"


def test_rows_may_be_other_things_than_jobs(tmp_path):
    text = page.write(tmp_path, "Windows", [page.Row("a", "b"), page.Row("c", "d")], kind="Window").read_text()
    assert (
        '<th scope="col"><button type="button">Window</button></th>' in text
        and 'aria-label="All windows"' in text
        and "Job" not in text
    )


def test_sections_stand_in_the_order_of_their_first_rows(tmp_path):
    sections = ["Generation", "Style transfer", "Generation", "MIDI"]
    rows = [page.Row(f"job {index}", "Add drums", section=section) for index, section in enumerate(sections)]
    text = page.write(tmp_path, "Three tables", rows).read_text()
    assert re.findall(r"<h2>(.*?)</h2>", text) == ["Generation", "Style transfer", "MIDI"]
    assert re.findall(r'<p class="job">job (\d)', text) == ["0", "2", "1", "3"]
    assert text.count("<table>") == 1 and 'aria-label="All jobs: Generation"' in text


def test_a_failed_job_is_shown_with_its_reason(tmp_path):
    text = page.write(tmp_path, "Jobs", [page.Row("bad", "Add drums", note="song.wav: no such audio file")]).read_text()
    assert "no such audio file" in text and "<audio" not in text


def test_a_missing_audio_file_is_named(tmp_path):
    with pytest.raises(UserError, match="gone.wav"):
        page.write(tmp_path, "Jobs", [page.Row("a", "b", [("Mix", "gone.wav")])])
    assert not (tmp_path / "index.html").exists()


def test_pictures_share_one_scale_of_colours():
    loud = pictures.mel_db(_tones(0)[None], SAMPLE_RATE)
    quiet = pictures.mel_db(0.01 * _tones(0)[None], SAMPLE_RATE)
    np.testing.assert_allclose(loud - quiet, 40.0, atol=2.0)
    together = pictures.data_uris([loud, quiet])
    assert together[0] != together[1] and together[0] == pictures.data_uris([loud])[0]


@pytest.mark.parametrize("samples", [1, 100, 16_000, 20 * 16_000])
def test_pictures_of_any_length(samples):
    image = pictures.mel_db(np.full((2, samples), 0.1, np.float32), SAMPLE_RATE)
    assert image.shape[0] == 80 and 1 <= image.shape[1] <= 900 and np.isfinite(image).all()
    assert pictures.data_uris([image])[0].startswith("data:image/webp")


@pytest.mark.parametrize("samples", [1, 100, 16_000])
def test_the_waveform_reaches_as_far_as_the_audio(samples):
    path = pictures.waveform(np.full((2, samples), 0.5, np.float32))
    points = [tuple(map(float, point.split(","))) for point in path[1:-1].split()]
    assert {y for _, y in points} == {25.0} and 0 <= min(x for x, _ in points) <= max(x for x, _ in points) <= 300
    assert len(points) == 2 * min(samples, 300)


def _score(seconds=8.0):
    """Two bars of drums, bass and guitar at 120 BPM, and rests to the end."""
    rows = {
        "drums": [(480 * beat, 480 * beat + 240, 36, 100) for beat in range(8)],
        "bass": [(0, 1920, 40, 100), (1920, 3840, 45, 20)],
        "guitar": [(960, 1920, 90, 127)],
    }
    parts = {stem: np.array(notes, midi.NOTE) for stem, notes in rows.items()}
    return midi.read_score(midi.write(480, parts, {}, [(0, 500_000)], [(0, 4, 4)], round(seconds * 960)))


def _pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def _columns(pixels, colour):
    """Where in the picture's width there is this colour, as shares; the legend is left out."""
    return np.flatnonzero((np.abs(pixels[40:] - colour).max(axis=2) < 12).any(axis=0)) / pixels.shape[1]


def test_a_piano_roll_has_notes_where_they_are_played():
    whole = _pixels(pictures.piano_roll(_score()))
    longer = _pixels(pictures.piano_roll(_score(), seconds=16.0))
    guitar = _columns(whole, (213, 94, 0))
    assert guitar.min() == pytest.approx(1 / 8, abs=0.01) and guitar.max() == pytest.approx(2 / 8, abs=0.01)
    assert _columns(longer, (213, 94, 0)).max() == pytest.approx(1 / 8, abs=0.01)
    rows = np.flatnonzero((np.abs(whole[40:] - (213, 94, 0)).max(axis=2) < 12).any(axis=1))
    bass = np.flatnonzero((whole[40:, : whole.shape[1] // 8] @ (-1, 0, 1) > 100).any(axis=1))  # blue
    assert len(rows) and rows.max() < bass.min()  # pitch is upwards


def test_what_is_new_stands_out_of_a_piano_roll():
    alike, marked = (_pixels(pictures.piano_roll(_score(), new)) for new in ((), ("guitar",)))
    assert alike.shape == marked.shape
    assert len(_columns(marked, (213, 94, 0))) and not len(_columns(marked, (0, 114, 178)))  # the bass is pale
    assert len(_columns(alike, (28, 27, 34))) < len(_columns(marked, (28, 27, 34)))  # the guitar has an outline


@pytest.mark.parametrize("seconds", [0.001, 3_600.0])
def test_piano_rolls_of_any_length(seconds):
    assert 1600 <= Image.open(io.BytesIO(pictures.piano_roll(_score(), seconds=seconds))).width <= 12_000


def test_a_row_may_have_a_picture_and_no_players(tmp_path):
    picture = pictures.piano_roll(_score())
    text = page.write(tmp_path, "MIDI", [page.Row("job", "Add guitar", picture=picture)]).read_text()
    elements = Elements(text)
    (image,) = elements.all("img")
    assert image["src"].startswith("data:image/png;base64,") and elements.open == [] and not elements.all("audio")


def test_waveforms_of_a_row_share_one_scale(tmp_path):
    for name, level in (("loud", 0.1), ("half", 0.05), ("silent", 0.0)):
        write_audio(tmp_path / f"{name}.wav", np.full(4 * SAMPLE_RATE, level, np.float32), SAMPLE_RATE)
    players = [(name, f"{name}.wav") for name in ("loud", "half", "silent")]
    text = page.write(tmp_path, "Levels", [page.Row("quiet", "Add drums", players)]).read_text()
    paths = re.findall(r'<path d="M([\d., ]+)Z"', text)
    assert [min(int(point.split(",")[1]) for point in path.split()) for path in paths] == [0, 25, 50]
