"""What a source of songs yields: songs that are not yet read, and their music as a stream."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

# What a collection may say about a song's sound. Titles and free text stay out of the records.
TAGS = ("genre", "style", "mood", "tempo", "key", "time_signature", "dynamics", "feel", "stems")


@dataclasses.dataclass(frozen=True)
class Song:
    """One song: what identifies it, where its music is, what is known about it.

    Attributes:
      song_id: unique over all sources of a build.
      group_id: what splits never straddle, such as groove family, album or piece; the song's id if nothing is known.
      kind: a key of `sources.KINDS`.
      files: (stem, path) in a fixed order; a stem may have several. The stem is `mix` for a song yet to be separated
        and `midi` for notes.
      tags: of `TAGS`.
      title: what people call the song, where known: instructions may not say it. (An id made of file names may.)
      caption: a person's description of the full mix; empty where there is none.
      split: `train`, `validation` or `test` where the collection fixes it; otherwise empty.
    """

    song_id: str
    group_id: str
    kind: str
    files: tuple[tuple[str, str], ...]
    tags: dict[str, Any] = dataclasses.field(default_factory=dict)
    title: str = ""
    caption: str = ""
    split: str = ""


@dataclasses.dataclass(frozen=True)
class Rejected:
    """A refused input: one line of `rejected.jsonl`."""

    song_id: str
    source: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Tools:
    """What turns a source's files into stems, where they are not audio stems already.

    Attributes:
      soundfonts: paths of SoundFonts, of which each song has one; that of the `pretty_midi` package when empty.
      renderer: what plays notes: `fluidsynth` or `midirenderer`; what the machine has when empty.
      separator: name of a Demucs model.
      separator_repo: folder with Demucs models of your own; Demucs' own models when empty.
      separator_device: `cpu` or `cuda`.
    """

    soundfonts: tuple[str, ...] = ()
    renderer: str = ""
    separator: str = "htdemucs"
    separator_repo: str = ""
    separator_device: str = "cpu"


@dataclasses.dataclass
class Recording:
    """One song's music.

    Attributes:
      stems: names, in the order of the rows of a block.
      blocks: float32 `[stems, samples]`, of any lengths, mono, at the rate asked for; read once, in order.
      tags: the song's tags and what the music itself tells, such as `stems: {name: {...}}`.
      separated: the stems are estimates, so each may leave a rest of itself in the others.
      notes: what was unusual and how it was dealt with; complete when the blocks are read.
    """

    stems: tuple[str, ...]
    blocks: Iterator[np.ndarray]
    tags: dict[str, Any]
    separated: bool = False
    notes: list[str] = dataclasses.field(default_factory=list)
