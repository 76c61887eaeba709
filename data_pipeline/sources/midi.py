"""Multitrack MIDI (`midi:PATH`), rendered with a SoundFont or taken as notes. A folder of one of two layouts:

  PATH/<any name>.jsonl    one object a song: `id`, `midi` (path of its file inside the folder), and optionally
  PATH/...                 `group_id`, `title`, `caption` and the tags of `song.TAGS`. Other keys are passed over.

  PATH/.../<name>.mid      without a manifest, every .mid and .midi file at any depth, such as the Lakh dataset as it is
                           unpacked: PATH/lmd_full/0/<md5>.mid. A song's id is its path without the suffix. Files of the
                           same MD5 name are one group, which is how Lakh repeats a song.

Tracks named `<stem>/<instrument>` are grouped by those names, other files by General MIDI program (`notes.py`).
"""

import contextlib
import io
import json
import posixpath
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mido
import numpy as np
from tqdm import tqdm

from data_pipeline import files, grouping, render, sidecars
from data_pipeline.augment import Performance, transposed_tags
from data_pipeline.song import TAGS, Recording, Rejected, Song, Tools
from subtractive_jax.errors import UserError
from subtractive_jax.representation.audio import audio_writer
from subtractive_jax.representation.notes import MAX_BYTES, STEMS, Score, read_score

_SUFFIXES = (".mid", ".midi")
_MD5 = re.compile(r"[0-9a-f]{32}")
_ENDLESS_NUMBER = re.compile(rb"[\x80-\xff]{1000}")  # mido reads any, in time that grows with the square of its length
_GAIN = np.float32(3.0)  # of 25 songs rendered the loudest peaked at 0.24
_AS_WRITTEN = Performance()
_PLAUSIBLE_TEMPO = (20.0, 400.0)  # beats a minute


def find(folder: str) -> Iterator[Song | Rejected]:
    """The folder's songs: of its manifest in the manifest's order, or of its MIDI files by path.

    Raises:
      UserError: there is more than one manifest.
    """
    listed = list(files.list_files(folder))
    manifests = [path for path in listed if "/" not in path and path.endswith(".jsonl") and path not in sidecars.NAMES]
    if len(manifests) > 1:
        raise UserError(f"{folder}: more than one manifest ({', '.join(manifests)}); keep one")
    if manifests:
        yield from _of_manifest(folder, manifests[0], frozenset(listed))
        return
    for path in listed:
        song_id, suffix = posixpath.splitext(path)
        if suffix.lower() in _SUFFIXES:
            name = files.name(song_id)
            group_id = name if _MD5.fullmatch(name) else song_id
            yield Song(song_id, group_id, "midi", (("midi", files.join(folder, path)),))


def _of_manifest(folder: str, manifest: str, listed: frozenset[str]) -> Iterator[Song | Rejected]:
    lines = files.read_bytes(files.join(folder, manifest)).splitlines()
    for number, line in enumerate(lines, 1):
        try:
            yield _song(folder, json.loads(line), listed)
        except (UserError, ValueError, RecursionError) as error:  # json's own are the last two
            yield Rejected("", f"{manifest}:{number}", str(error))


def _song(folder: str, row: object, listed: frozenset[str]) -> Song:
    if not isinstance(row, dict):
        raise UserError("a manifest line is a JSON object")
    texts = {key: row.get(key) or "" for key in ("id", "midi", "group_id", "title", "caption")}
    for key, text in texts.items():
        if not isinstance(text, str) or (not text and key in ("id", "midi")):
            raise UserError(f'the key "{key}" of a manifest line is a text')
    name = posixpath.normpath(texts["midi"])
    path = files.join(folder, name)
    if files.is_local(path) and not Path(path).resolve().is_relative_to(Path(folder).resolve()):
        raise UserError(f'the path "{texts["midi"]}" leads out of the source folder')
    if name not in listed:
        raise UserError(f'no such file "{texts["midi"]}" in the source folder')
    return Song(
        texts["id"],
        texts["group_id"] or texts["id"],
        "midi",
        (("midi", path),),
        {key: row[key] for key in TAGS if row.get(key) is not None},
        texts["title"],
        texts["caption"],
    )


def load(song: Song, sample_rate: int, tools: Tools, performance: Performance = _AS_WRITTEN) -> Recording:
    """The song rendered. Tags that the source does not give are read from the notes.

    Played otherwise than written, it has the tag `speed`, its tempo is that, and with a tag `semitones` it has no key.

    Raises:
      UserError: the file is damaged, of a type without a common time, without notes or length, or too long.
    """
    ((_, path),) = song.files
    midi = read(path)
    parts = grouping.parts(midi)
    if not parts:
        raise UserError("the MIDI file holds no notes")
    clock = render.Clock(midi, performance.speed)
    played = [part.transposed(performance.semitones) for part in parts]
    stems = {stem: own for stem in STEMS if (own := [part for part in played if part.stem == stem])}
    version = f"{song.song_id}|{performance.number}" if performance.number else song.song_id
    soundfont = render.soundfont_of(version, tools.soundfonts)
    blocks = render.render(stems, clock, sample_rate, soundfont, tools.renderer or render.renderer())
    seconds = clock.samples(clock.end, 1000) / 1000
    if not seconds:
        raise UserError("the MIDI file ends where it begins")
    tags: dict[str, Any] = {"stems": {stem: grouping.describe(own, seconds) for stem, own in stems.items()}}
    tempo = clock.beats_per_minute(min(part.notes()[0][0] for part in parts))
    if _PLAUSIBLE_TEMPO[0] <= tempo <= _PLAUSIBLE_TEMPO[1]:
        tags["tempo"] = round(tempo, 1)
    endless = sum(_endless(part) for part in parts)
    notes = [f"notes without end: {endless}; they sound as long as their instrument does"] if endless else []
    return Recording(tuple(stems), blocks, _as_played(tags, song.tags, performance), notes=notes)


def _as_played(heard: dict[str, Any], written: dict[str, Any], performance: Performance) -> dict[str, Any]:
    """A song's tags: those of its source, which tell of it as it is written, before those of its notes as played."""
    if performance == _AS_WRITTEN:
        return heard | written
    tags = heard | written | {"speed": round(performance.speed, 3)}
    if "tempo" in written:
        tags["tempo"] = round(written["tempo"] * performance.speed, 1)
    return transposed_tags(tags, performance.semitones) if performance.semitones else tags


def render_versions(versions: Mapping[Path, bytes], sample_rate: int) -> None:
    """Renders MIDI files of one tempo map, such as a song with and without a stem, to mono audio files.

    A stem that several have alike is rendered once, so that it sounds the same in all of them.

    Args:
      versions: the MIDI files by the audio files to be written.

    Raises:
      UserError: a file is damaged, too long or has too many parts.
    """
    songs = [parse(content) for content in versions.values()]
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
    blocks = render.render(stems, clock, sample_rate, "", render.renderer())
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(audio_writer(path, 1, sample_rate)) for path in versions]
        for block in tqdm(blocks, desc="rendering", unit="block", disable=None, leave=False):
            for write, line in zip(writers, _GAIN * plays[:, : len(distinct)] @ block, strict=True):
                write(line[None])


def load_notes(song: Song) -> tuple[Score, dict[str, Any]]:
    """The song's notes, and its tags: those of the source, and of each stem its instruments.

    Raises:
      UserError: the file is damaged, of a type without a common time, without notes, or too long.
    """
    ((_, path),) = song.files
    with files.open_file(path) as file:
        score = read_score(file.read(MAX_BYTES + 1))
    known = song.tags.get("stems", {})
    stems = {stem: {"instruments": list(names)} | known.get(stem, {}) for stem, names in score.instruments.items()}
    first = min(int(part["start"][0]) for part in score.parts.values())
    tempo = 60e6 / [tempo for tick, tempo in score.tempos if tick <= first][-1]
    tags = {"tempo": round(tempo, 1)} if _PLAUSIBLE_TEMPO[0] <= tempo <= _PLAUSIBLE_TEMPO[1] else {}
    return score, tags | song.tags | {"stems": stems}


def read(path: str) -> mido.MidiFile:
    with files.open_file(path) as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise UserError(f"a MIDI file of more than {MAX_BYTES >> 20} MB")
    return parse(content)


def parse(content: bytes) -> mido.MidiFile:
    """A MIDI file's content.

    Raises:
      UserError: it is damaged, or of a type without a common time.
    """
    if _ENDLESS_NUMBER.search(content):
        raise UserError("not readable as MIDI (a number of a thousand bytes)")
    try:
        midi = mido.MidiFile(file=io.BytesIO(content), clip=True)
    except Exception as error:  # mido raises whatever the damaged bytes lead to
        raise UserError(f"not readable as MIDI ({type(error).__name__}: {error})") from error
    if midi.type == 2 or midi.ticks_per_beat <= 0:
        raise UserError("MIDI of type 2 or with SMPTE time is not supported; save it as type 1")
    return midi


def _endless(part: grouping.Part) -> int:
    """How many of the part's keys stay down; drums ring out by themselves."""
    down = set()
    for _, message in part.events:
        if message.type == "note_on" and message.velocity:
            down.add(message.note)
        elif message.type in ("note_on", "note_off"):
            down.discard(message.note)
    return 0 if part.percussion else len(down)
