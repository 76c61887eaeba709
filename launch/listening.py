"""MIDI to hear and to see on the listening page."""

import contextlib
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

from subtractive_jax.errors import UserError
from subtractive_jax.page import pictures
from subtractive_jax.representation.audio import audio_writer
from subtractive_jax.representation.notes import read_score

LABELS = {  # of a song's versions, in the page's order
    "original": "Original",
    "without_stem": "Without the stem",
    "mix": "With the new stem",
    "stem": "New stem alone",
}
_SAMPLE_RATE = 44_100  # Hz
_GAIN = np.float32(3.0)  # of 25 songs as datasets have them the loudest peaked at 0.24


def render(
    folder: Path, versions: Mapping[str, bytes | None], labels: Mapping[str, str] = LABELS
) -> list[tuple[str, str]]:
    """Renders versions of one song to `folder/NAME.wav`, mono, as datasets are rendered.

    Args:
      versions: MIDI files by name, of one tempo map; a stem that several have alike is rendered once.
      labels: of the names, in order.

    Returns:
      (label, file) of each, for `page.Row.players`; none where the extra `pipeline` is not installed or the song cannot
      be rendered, and then a line to standard error says why.
    """
    named = {name: content for name in labels if (content := versions.get(name))}
    try:
        _render({folder / f"{name}.wav": content for name, content in named.items()})
    except ImportError:
        print("no players on the page: MIDI is rendered by the extra `pipeline`, not installed", file=sys.stderr)
        return []
    except UserError as error:
        print(f"no players on the page: {error}", file=sys.stderr)
        return []
    return [(labels[name], f"{name}.wav") for name in named]


def _render(versions: Mapping[Path, bytes]) -> None:
    """MIDI files to audio files."""
    from data_pipeline import grouping, render
    from data_pipeline.sources import midi

    songs = [midi.parse(content) for content in versions.values()]
    distinct: list[list[grouping.Part]] = []  # a stem's parts
    plays = np.zeros((len(songs), sum(len(grouping.parts(song)) for song in songs)), np.float32)
    for row, song in zip(plays, songs, strict=True):
        by_stem: dict[str, list[grouping.Part]] = {}
        for part in grouping.parts(song):
            by_stem.setdefault(part.stem, []).append(part)
        for parts in by_stem.values():
            if parts not in distinct:
                distinct.append(parts)
            row[distinct.index(parts)] = 1.0
    clock = max(map(render.Clock, songs), key=lambda clock: clock.end)
    stems = {str(index): parts for index, parts in enumerate(distinct)}
    blocks = render.render(stems, clock, _SAMPLE_RATE, "", render.renderer())
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(audio_writer(path, 1, _SAMPLE_RATE)) for path in versions]
        for block in tqdm(blocks, desc="rendering", unit="block", disable=None, leave=False):
            for write, line in zip(writers, _GAIN * plays[:, : len(distinct)] @ block, strict=True):
                write(line[None])


def picture(folder: Path, content: bytes, new: Collection[str], players: Sequence[tuple[str, str]]) -> bytes:
    """The piano roll of a MIDI file for `page.Row.picture`, as long as what the players play.

    Args:
      new: parts that stand out.
      players: what `render` returned.
    """
    seconds = soundfile.info(folder / players[0][1]).duration if players else None
    return pictures.piano_roll(read_score(content), new, seconds)
