"""MIDI to hear and to see on the listening page."""

import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import soundfile

from subtractive_jax.errors import UserError
from subtractive_jax.page import pictures
from subtractive_jax.representation.notes import read_score

LABELS = {  # of a song's versions, in the page's order
    "original": "Original",
    "without_stem": "Without the stem",
    "mix": "With the new stem",
    "stem": "New stem alone",
}
_SAMPLE_RATE = 44_100  # Hz


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
        from data_pipeline.sources import midi

        midi.render_versions({folder / f"{name}.wav": content for name, content in named.items()}, _SAMPLE_RATE)
    except ImportError:
        print("no players on the page: MIDI is rendered by the extra `pipeline`, not installed", file=sys.stderr)
        return []
    except UserError as error:
        print(f"no players on the page: {error}", file=sys.stderr)
        return []
    return [(labels[name], f"{name}.wav") for name in named]


def picture(folder: Path, content: bytes, new: Collection[str], players: Sequence[tuple[str, str]]) -> bytes:
    """The piano roll of a MIDI file for `page.Row.picture`, as long as what the players play.

    Args:
      new: parts that stand out.
      players: what `render` returned.
    """
    seconds = soundfile.info(folder / players[0][1]).duration if players else None
    return pictures.piano_roll(read_score(content), new, seconds)
