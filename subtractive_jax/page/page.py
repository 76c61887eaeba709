"""Writes the listening page."""

import dataclasses
import html
import os
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from subtractive_jax.page import pictures
from subtractive_jax.representation.audio import read_audio

_TEMPLATE = Path(__file__).with_name("template.html")


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
    """

    title: str
    instruction: str
    players: Sequence[tuple[str, str]] = ()
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    figures: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    note: str = ""


def write(folder: str | os.PathLike[str], title: str, rows: Sequence[Row], kind: str = "Job") -> Path:
    """Writes `folder/index.html`, which needs nothing but the audio files its rows name.

    Args:
      kind: what a row is, in a word.

    Returns:
      The path of the page.

    Raises:
      UserError: an audio file is missing or unreadable.
    """
    folder = Path(folder)
    text = Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=html.escape(title),
        table=_table(rows, kind) if len(rows) > 1 else "",
        rows="\n".join(_card(folder, index, row) for index, row in enumerate(rows)),
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


def _table(rows: Sequence[Row], kind: str) -> str:
    """All rows at a glance: a line each, with links to the players below."""
    columns = list(dict.fromkeys(name for row in rows for name in row.figures))
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in (kind, "Instruction", *columns))
    lines = []
    for index, row in enumerate(rows):
        cells = "".join(f"<td>{_text(row.figures.get(name, '–'))}</td>" for name in columns)
        link = f'<th scope="row"><a href="#job-{index}">{_text(row.title)}</a></th>'
        lines.append(f"<tr>{link}<td>{_text(row.instruction)}</td>{cells}</tr>")
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="All {_text(kind.lower())}s">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _card(folder: Path, index: int, row: Row) -> str:
    images = pictures.data_uris([pictures.mel_db(*read_audio(folder / file)) for _, file in row.players])
    players = "".join(_player(label, file, image) for (label, file), image in zip(row.players, images, strict=True))
    facts = "".join(
        f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>"
        for name, value in (*row.figures.items(), *row.settings.items())
    )
    return (
        f'<article id="job-{index}" aria-labelledby="title-{index}">'
        f'<header><p class="job">{_text(row.title)}</p><h2 id="title-{index}">{_text(row.instruction)}</h2></header>'
        + (f'<p class="note">{_text(row.note)}</p>' if row.note else "")
        + (f'<div class="players">{players}</div>' if players else "")
        + (f"<dl>{facts}</dl>" if facts else "")
        + "</article>"
    )


def _player(label: str, file: str, image: str) -> str:
    label, source = _text(label), html.escape(urllib.parse.quote(file))
    return (
        f'<figure><figcaption>{label}</figcaption><div class="picture">'
        f'<img src="{image}" alt="Mel spectrogram: {label}"><span class="playhead" hidden></span></div>'
        f'<audio controls preload="metadata" src="{source}" aria-label="{label}"></audio></figure>'
    )
