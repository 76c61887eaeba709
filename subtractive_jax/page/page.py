"""Writes the listening page."""

import base64
import dataclasses
import html
import io
import itertools
import os
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from PIL import Image

from subtractive_jax.page import pictures
from subtractive_jax.sampling.song import mono, song_file

_TEMPLATE = Path(__file__).with_name("template.html")
_FILTERED_FROM = 20  # rows; fewer need no search


@dataclasses.dataclass(frozen=True)
class Row:
    """One job, or one window of a dataset, on the page.

    Attributes:
      title: what it is called; unique on a page.
      instruction: the text the model is given.
      players: (label, audio file relative to the page's folder) in the order they are shown.
      settings: what went in, such as seed, steps and guidance; shown as name and value.
      figures: what was measured; shown as name and value, and as columns of the page's table.
      note: a remark, such as why a job failed.
      section: the heading it stands under, such as "Style transfer".
      flags: what a listener should know first, such as "silent_stem".
      picture: a PNG file over the players, as long as what they play, such as a piano roll; none if empty.
    """

    title: str
    instruction: str
    players: Sequence[tuple[str, str]] = ()
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    figures: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    note: str = ""
    section: str = ""
    flags: Sequence[str] = ()
    picture: bytes = b""


def write(folder: str | os.PathLike[str], title: str, rows: Sequence[Row], kind: str = "Job") -> Path:
    """Writes `folder/index.html`, which needs nothing but the audio files its rows name.

    Rows of one section stand together, sections in the order of their first row.

    Args:
      kind: what a row is, in a word.

    Returns:
      The path of the page.

    Raises:
      UserError: an audio file is missing or unreadable.
    """
    folder = Path(folder)
    places = {section: place for place, section in enumerate(dict.fromkeys(row.section for row in rows))}
    ordered = sorted(rows, key=lambda row: places[row.section])
    numbers = itertools.count()
    sections = []
    for name, group in itertools.groupby(ordered, key=lambda row: row.section):
        numbered = [(next(numbers), row) for row in group]
        parts = [f"<h2>{_text(name)}</h2>"] if name else []
        parts += [_table(numbered, kind, name)] if len(numbered) > 1 else []
        parts += [_card(folder, index, row, 3 if name else 2) for index, row in numbered]
        sections.append("<section>" + "\n".join(parts) + "</section>")
    text = Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=html.escape(title),
        search=_search(kind) if len(rows) > _FILTERED_FROM else "",
        keys="" if any(row.players for row in rows) else "hidden",
        sections="\n".join(sections),
    )
    path = folder / "index.html"
    temporary = folder / ".index.html.tmp"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    return path


def _text(value: Any) -> str:
    if isinstance(value, float):
        value = f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    elif isinstance(value, (list, tuple)):
        value = ", ".join(str(item) for item in value) or "none"
    return html.escape(str(value))


def _search(kind: str) -> str:
    name = _text(kind.lower())
    return (
        f'<label class="search">Show {name}s with <input type="search" id="search" autocomplete="off"></label>'
        '<p class="found" role="status"></p>'
    )


def _table(rows: Sequence[tuple[int, Row]], kind: str, section: str) -> str:
    """A section at a glance: a line a row, with links to the players below."""
    columns = list(dict.fromkeys(name for _, row in rows for name in row.figures))
    names = (kind, "Instruction", *columns, *(["Flags"] if any(row.flags for _, row in rows) else []))
    head = "".join(f'<th scope="col"><button type="button">{_text(name)}</button></th>' for name in names)
    lines = []
    for index, row in rows:
        cells = "".join(f"<td>{_text(row.figures.get(name, '–'))}</td>" for name in columns)
        flags = f"<td>{_badges(row)}</td>" if "Flags" in names else ""
        link = f'<th scope="row"><a href="#row-{index}">{_text(row.title)}</a></th>'
        lines.append(f'<tr data-row="{index}">{link}<td>{_text(row.instruction)}</td>{cells}{flags}</tr>')
    label = f"All {_text(kind.lower())}s" + (f": {_text(section)}" if section else "")
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _badges(row: Row) -> str:
    return "".join(f'<span class="badge">{_text(flag.replace("_", " "))}</span>' for flag in row.flags)


def _card(folder: Path, index: int, row: Row, level: int) -> str:
    heard = [mono(song_file(folder / file), pictures.SAMPLE_RATE)[0][None] for _, file in row.players]
    images = pictures.data_uris([pictures.mel_db(audio, pictures.SAMPLE_RATE) for audio in heard])
    loudest = max((float(np.abs(audio).max()) for audio in heard), default=0.0) or 1.0
    players = "".join(
        _player(number, label, file, image, pictures.waveform(audio / np.float32(loudest)))
        for number, ((label, file), image, audio) in enumerate(zip(row.players, images, heard, strict=True))
    )
    facts = "".join(
        f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>"
        for name, value in (*row.figures.items(), *row.settings.items())
    )
    return (
        f'<article id="row-{index}" aria-labelledby="title-{index}">'
        f'<header><p class="job">{_text(row.title)}</p>'
        f'<h{level} class="instruction" id="title-{index}">{_text(row.instruction)}</h{level}>{_badges(row)}</header>'
        + (f'<p class="note">{_text(row.note)}</p>' if row.note else "")
        + (_TRANSPORT if players else "")
        + (_roll(row) if row.picture else "")
        + (f'<div class="players" role="group" aria-label="Versions">{players}</div>' if players else "")
        + (f"<dl>{facts}</dl>" if facts else "")
        + "</article>"
    )


_TRANSPORT = (
    '<div class="transport" hidden><button type="button" class="play" aria-label="Play">'
    '<svg viewBox="0 0 24 24" aria-hidden="true"><path d="M7 4v16l13-8z"/><path d="M6 4h4v16H6zM14 4h4v16h-4z"/></svg>'
    '</button><input type="range" class="position" min="0" max="1" step="any" value="0" aria-label="Position">'
    "<output></output></div>"
)


def _roll(row: Row) -> str:
    image = Image.open(io.BytesIO(row.picture))
    source = "data:image/png;base64," + base64.b64encode(row.picture).decode()
    return (
        '<div class="roll" tabindex="0" role="region" aria-label="Piano roll">'
        f'<div class="picture" style="min-width:{image.width // 2}px">'
        f'<img src="{source}" alt="Piano roll: {_text(row.title)}" loading="lazy">'
        '<span class="playhead" hidden></span></div></div>'
    )


def _player(number: int, label: str, file: str, image: str, waveform: str) -> str:
    label, source = _text(label), html.escape(urllib.parse.quote(file))
    key = f"<kbd>{number + 1}</kbd>" if number < 9 else ""
    return (
        f'<figure><figcaption><button type="button" class="version" aria-pressed="false" hidden>{key}{label}</button>'
        f'<span class="label">{label}</span></figcaption><div class="picture">'
        f'<img src="{image}" alt="Mel spectrogram: {label}" loading="lazy">'
        f'<svg class="wave" viewBox="0 0 300 100" preserveAspectRatio="none" aria-hidden="true">'
        f'<path d="{waveform}"/></svg>'
        f'<span class="playhead" hidden></span></div>'
        f'<audio controls preload="none" src="{source}" aria-label="{label}"></audio></figure>'
    )
