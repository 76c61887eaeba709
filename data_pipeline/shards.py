"""The Beam part: one element is one shard, written whole by one worker, song after song.

So memory is bounded by a song, nothing is shuffled between workers, and the bytes are the same whatever their number.
"""

import abc
import contextlib
import dataclasses
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import apache_beam as beam
import numpy as np
import tensorflow_datasets as tfds

from data_pipeline import (
    augment,
    copies,
    dataset,
    files,
    instructions,
    llm,
    note_windows,
    separation,
    sources,
    windows,
)
from data_pipeline.encode import encoders
from data_pipeline.song import Recording, Rejected, Song, Tools
from subtractive_jax import records
from subtractive_jax.errors import UserError
from subtractive_jax.representation import audio, from_config
from subtractive_jax.representation.mel import Mel
from subtractive_jax.representation.piano_roll import PianoRoll

_ENCODE_BATCH = 8  # examples
_TEXTS_BATCH = 64  # examples whose texts are encoded together
_NAMES_A_KEY = re.compile(r"\b[A-G](-?flat|-?sharp|[#b♯♭])?[ -](major|minor)\b", re.IGNORECASE)
_NAMES_A_TEMPO = re.compile(r"\bBPM\b", re.IGNORECASE)
_POOL = 4  # texts asked of a language model, for each that a window gets


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file to write: from songs (`windows`) or from another file (`latents`)."""

    split: str
    index: int
    count: int  # shards of the split
    songs: tuple[Song, ...] = ()
    other_takes: tuple[tuple[Song | None, ...], ...] = ()  # of each song, for each augmented copy
    source: str = ""  # a shard of `windows`

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(line: str) -> "Shard":
        fields = json.loads(line)
        songs = tuple(_song(song) for song in fields.pop("songs"))
        takes = tuple(tuple(song and _song(song) for song in own) for own in fields.pop("other_takes"))
        return Shard(**fields, songs=songs, other_takes=takes)


def song_from_json(line: str) -> Song:
    return _song(json.loads(line))


def _song(fields: dict[str, Any]) -> Song:
    return Song(**{**fields, "files": tuple((stem, path) for stem, path in fields["files"])})


def plan(songs: list[Song], splits: dict[str, str], songs_per_shard: int, augmentation: dict[str, Any]) -> list[Shard]:
    """Songs, sorted by id, to shards of `songs_per_shard` within each split; those of `train` with copies.

    Args:
      augmentation: `config.data.augmentation`.
    """
    groups: dict[str, list[Song]] = {}
    for song in songs:
        groups.setdefault(song.group_id, []).append(song)

    def other_takes(song: Song) -> tuple[Song | None, ...]:
        # Separation is dear, and what it leaves in a stem would sound with another take's rest.
        takes = groups[song.group_id] if augmentation.get("remix") and song.kind != "songs" else []
        numbers = range(1, augmentation["copies"] + 1)
        return tuple(augment.partner(song, takes, number, augmentation["seed"]) for number in numbers)

    shards = []
    for split in records.SPLITS:
        own = [song for song in songs if splits[song.song_id] == split]
        starts = range(0, len(own), songs_per_shard)
        for index, start in enumerate(starts):
            part = tuple(own[start : start + songs_per_shard])
            takes = tuple(other_takes(song) if split == "train" else () for song in part)
            shards.append(Shard(split, index, len(starts), part, takes))
    return shards


@dataclasses.dataclass
class Report:
    """What is to be known about a shard, beside its records."""

    rejected: list[dict[str, str]] = dataclasses.field(default_factory=list)
    notes: list[dict[str, str]] = dataclasses.field(default_factory=list)
    texts: Counter[str] = dataclasses.field(default_factory=Counter)  # where instructions came from
    copies: Counter[str] = dataclasses.field(default_factory=Counter)  # with another take, or without
    sums: dict[str, Any] = dataclasses.field(default_factory=dict)  # of latents, by key

    def reject(self, song_id: str, source: str, reason: str) -> None:
        self.rejected.append(dataclasses.asdict(Rejected(song_id, source, reason)))


class _WriteShards(beam.DoFn):
    """Writes each shard and yields, as JSON, what is to be known about it."""

    features: tfds.features.FeaturesDict  # made in setup(), on the worker

    def __init__(self, name: str, folder: str):
        self._name, self._folder = name, folder

    def process(self, shard: Shard) -> Iterator[str]:
        counts: Counter[str] = Counter()
        genres: Counter[str] = Counter()
        songs: set[str] = set()
        report = Report()

        def payloads() -> Iterator[bytes]:
            for example in self.examples(shard, report):
                counts[example["stem_name"]] += 1
                genres[json.loads(example["tags"]).get("genre") or "unknown genre"] += 1
                songs.add(example["song_id"])
                yield dataset.serialize(self.features, example)

        path = files.join(self._folder, dataset.shard_name(self._name, shard.split, shard.index, shard.count))
        size = dataset.write_shard(path, payloads())
        about = {"split": shard.split, "index": shard.index, "examples": counts.total(), "bytes": size}
        about |= {"counts": counts, "genres": genres, "songs": len(songs)}
        yield json.dumps(about | vars(report))

    @abc.abstractmethod
    def examples(self, shard: Shard, report: Report) -> Iterator[dict[str, Any]]:
        """A shard's examples in order."""


class WriteSongs(_WriteShards):
    """Songs to shards of `windows`."""

    def __init__(self, folder: str, data: dict[str, Any], language_model: dict[str, Any] | None):
        """`language_model`: arguments of `llm.Writer`; templates write where there is none."""
        super().__init__("windows", folder)
        self._data, self._language_model = data, language_model

    def setup(self) -> None:
        self.features = dataset.features("windows", {})
        self._writer = llm.Writer(**self._language_model) if self._language_model else None

    def examples(self, shard: Shard, report: Report) -> Iterator[dict[str, Any]]:
        for song, other_takes in zip(shard.songs, shard.other_takes, strict=True):
            count = 0
            try:
                for example in self._song(song, other_takes, report):
                    count += 1
                    yield example
                if not count:
                    raise UserError("no window in which both a wanted stem and the rest are heard")
            except UserError as error:  # a machine's own faults, such as a full disk, end the build
                report.reject(song.song_id, song.files[0][1], str(error))

    @abc.abstractmethod
    def _song(self, song: Song, other_takes: tuple[Song | None, ...], report: Report) -> Iterator[dict[str, Any]]:
        """A song's examples, and those of its copies, one for each of `other_takes`."""

    def _texts(
        self, song: Song, tags: dict[str, Any], stem_names: list[str], report: Report
    ) -> Callable[..., list[str]]:
        """What gives a window its instructions: `instructions.instructions`, or picks from a language model's."""
        if self._writer is None:
            return instructions.instructions
        pool = self._writer.write(song, tags, stem_names, _POOL * self._data["instructions_per_window"])
        report.texts.update(pool.counts)
        return lambda _, stem_name, song_id, start_seconds, count: llm.pick(
            pool.texts[stem_name], song_id, start_seconds, stem_name, count
        )

    def _example(
        self,
        song: Song,
        tags: dict[str, Any],
        texts: Callable[..., list[str]],
        triple: windows.Triple | note_windows.Triple,
        **signals: Any,
    ) -> dict[str, Any]:
        """A triple as an example; `signals` are its `mix`, `context`, `stem`, `sample_rate` and `gain`."""
        caption, where = song.caption, (song.song_id, triple.start_seconds)
        if triple.semitones:
            tags = augment.transposed_tags(tags, triple.semitones)
        varied = [named for tag, named in (("semitones", _NAMES_A_KEY), ("speed", _NAMES_A_TEMPO)) if tag in tags]
        if any(named.search(caption) for named in varied):
            caption = ""
        return signals | {
            "stem_name": triple.stem_name,
            "song_id": song.song_id,
            "group_id": song.group_id,
            "start_seconds": triple.start_seconds,
            "tags": json.dumps(tags, sort_keys=True),
            "caption": caption or instructions.caption(tags, *where),
            "instructions": texts(tags, triple.stem_name, *where, self._data["instructions_per_window"]),
        }


class WriteAudio(WriteSongs):
    """Songs of any kind to windows of audio."""

    def __init__(
        self,
        folder: str,
        representation: dict[str, Any],
        data: dict[str, Any],
        tools: Tools,
        separates: bool = False,
        language_model: dict[str, Any] | None = None,
    ):
        """`separates`: some songs need a separator."""
        super().__init__(folder, data, language_model)
        self._separates = separates
        self._mel, self._tools = Mel.from_config(representation), tools

    def setup(self) -> None:
        super().setup()
        if self._separates:
            separation.separator(self._tools)  # a model that cannot be had ends the build, not every song of it

    def _song(self, song: Song, other_takes: tuple[Song | None, ...], report: Report) -> Iterator[dict[str, Any]]:
        rate, augmentation = self._mel.sample_rate, self._data["augmentation"]
        recording = self._load(song, None)
        with windows.hear(recording, rate, self._data["stems"]) as heard:
            report.notes += [{"song_id": song.song_id, "note": note} for note in recording.notes]
            clean = [name for name in heard.sets if self._is_clean(name, heard, song, report)]
            of_all = {key: tag for key, tag in recording.tags.items() if key not in self._varies(song, other_takes)}
            texts = self._texts(song, of_all, clean, report)
            yield from self._windows(song, heard, clean, texts, windows.as_it_is)
            for number, other_take in enumerate(other_takes, 1):
                seed, pitch = augmentation["seed"], augmentation["pitch_semitones"]
                performance = None
                if song.kind == "midi":  # notes can be played anew, which sounds better than a sound stretched
                    performance = augment.performance(song.song_id, number, seed, pitch, augmentation["tempo"])
                    pitch = 0.0
                copy = copies.Copy(song.song_id, number, seed, pitch, augmentation["gain_db"])
                with contextlib.ExitStack() as open_files:
                    takes = None
                    if other_take:
                        takes = open_files.enter_context(self._both(song, other_take, performance, report))
                    kind = "with another take" if takes else "of the song alone"
                    if performance and not takes:
                        alone = self._load(song, performance)
                        takes = open_files.enter_context(windows.hear(alone, rate, self._data["stems"]))
                    played = takes or heard
                    if played.samples < self._mel.window_samples:
                        report.notes.append({"song_id": song.song_id, "note": "a copy is shorter than one window"})
                        continue
                    report.copies[kind] += 1
                    yield from self._windows(song, played, clean, texts, copy)

    @staticmethod
    def _varies(song: Song, other_takes: tuple[Song | None, ...]) -> tuple[str, ...]:
        """Tags that do not hold for all copies of a song."""
        if not other_takes:
            return ()
        return ("key", "tempo") if song.kind == "midi" else ("key",)

    def _load(self, song: Song, performance: augment.Performance | None) -> Recording:
        if performance is None:
            return sources.load(song, self._mel.sample_rate, self._tools)
        return sources.midi.load(song, self._mel.sample_rate, self._tools, performance)

    @contextlib.contextmanager
    def _both(
        self, song: Song, other_take: Song, performance: augment.Performance | None, report: Report
    ) -> Iterator[windows.HeardSong | None]:
        """The song heard again beside another take; None where they do not fit, or the other one is damaged."""
        rate = self._mel.sample_rate
        with contextlib.ExitStack() as open_files:
            try:
                recordings = [self._load(take, performance) for take in (song, other_take)]
                takes = copies.side_by_side(recordings[0], recordings[1], rate)
                both = open_files.enter_context(windows.hear(takes, rate, self._data["stems"]))
            except UserError as error:
                report.notes.append({"song_id": song.song_id, "note": f"not mixed with another take: {error}"})
                both = None
            yield both

    def _windows(
        self,
        song: Song,
        heard: windows.HeardSong,
        stem_sets: list[str],
        texts: Callable[..., list[str]],
        play: windows.Play,
    ) -> Iterator[dict[str, Any]]:
        rate = self._mel.sample_rate
        mix, mix_flac = np.zeros(0, np.int16), b""  # the triples of a window share its mix
        for triple in windows.triples(
            heard,
            stem_sets,
            self._mel.window_samples,
            self._data["window_hop_frames"] * self._mel.hop_length,
            self._data["min_stem_level_db"],
            self._data["loudness_lufs"],
            play,
        ):
            own_tags = dict(heard.tags)
            if triple.stem_name in heard.bleed_db:
                own_tags["bleed_db"] = round(heard.bleed_db[triple.stem_name], 1)
            if triple.mix is not mix:
                mix, mix_flac = triple.mix, audio.flac_bytes(triple.mix, rate)
            yield self._example(
                song,
                own_tags,
                texts,
                triple,
                mix=mix_flac,
                context=audio.flac_bytes(triple.context, rate),
                stem=audio.flac_bytes(triple.stem, rate),
                sample_rate=rate,
                gain=triple.gain,
            )

    def _is_clean(self, name: str, heard: windows.HeardSong, song: Song, report: Report) -> bool:
        bleed_db = heard.bleed_db.get(name, -np.inf)
        if bleed_db <= self._data["max_bleed_db"]:
            return True
        reason = f"separation left {bleed_db:.0f} dB of it in the rest, over data.max_bleed_db"
        if np.isnan(bleed_db):
            reason = "sounds too little to tell how well it was separated"
        report.reject(song.song_id, song.files[0][1], f"{name}: {reason}")
        return False


class WriteNotes(WriteSongs):
    """Songs of MIDI to windows of notes."""

    def __init__(
        self,
        folder: str,
        representation: dict[str, Any],
        data: dict[str, Any],
        language_model: dict[str, Any] | None = None,
    ):
        super().__init__(folder, data, language_model)
        self._roll = PianoRoll.from_config(representation)

    def _song(self, song: Song, other_takes: tuple[Song | None, ...], report: Report) -> Iterator[dict[str, Any]]:
        data, augmentation = self._data, self._data["augmentation"]
        score, tags = sources.midi.load_notes(song)
        folded = self._roll.folded(score)
        remarks = [*score.remarks, *([f"notes moved by octaves into the roll's pitches: {folded}"] if folded else [])]
        report.notes += [{"song_id": song.song_id, "note": remark} for remark in remarks]
        stem_sets = [name for name in data["stems"] if windows.stem_set(name) <= score.parts.keys()]
        known = {key: value for key, value in tags.items() if key != "key" or not other_takes}
        texts = self._texts(song, known, stem_sets, report)
        for number in range(len(other_takes) + 1):

            def transposition(start_seconds: float, number: int = number) -> int:
                settings = augmentation["seed"], augmentation["pitch_semitones"]
                return augment.transposition(song.song_id, start_seconds, number, *settings) if number else 0

            for triple in note_windows.triples(
                score, stem_sets, self._roll, data["window_hop_bars"], data["min_onsets"], transposition
            ):
                stems = {stem: tags["stems"][stem] | triple.tags.get(stem, {}) for stem in tags["stems"]}
                yield self._example(
                    song,
                    tags | {"stems": stems},
                    texts,
                    triple,
                    mix=triple.mix,
                    context=triple.context,
                    stem=triple.stem,
                    sample_rate=0,
                    gain=1.0,
                )


class WriteLatents(_WriteShards):
    """Shards of `windows` to shards of `latents`, one to one."""

    def __init__(
        self, folder: str, model: str, representation: dict[str, Any], shapes: dict[str, tuple[int | None, ...]]
    ):
        """`shapes`: of all tensors."""
        super().__init__("latents", folder)
        self._model, self._shapes, self._representation = model, shapes, from_config(representation)

    def setup(self) -> None:
        self._encoders = encoders(self._model)
        self.features = latent_features(self._shapes, self._representation)

    def examples(self, shard: Shard, report: Report) -> Iterator[dict[str, Any]]:
        sums: dict[str, np.ndarray] = {}
        known_texts: dict[str, np.ndarray] = {}
        payloads = dataset.read_shard(shard.source)
        while batch := list(itertools.islice(payloads, _TEXTS_BATCH)):
            read = [found for payload in batch if (found := self._read(payload, report))]
            # All at once: a text encoder is slow on a few texts.
            self._encoders.encode_texts([text for _, texts in read for text in texts], known_texts)
            for start in range(0, len(read), _ENCODE_BATCH):
                encoded = [
                    window | _text_states([known_texts[text] for text in texts])
                    for window, texts in read[start : start + _ENCODE_BATCH]
                ]
                yield from self._with_latents(encoded, sums)
        report.sums = {key: value.tolist() for key, value in sums.items()}

    def _read(self, payload: bytes, report: Report) -> tuple[dict[str, Any], list[str]] | None:
        """A window, and its instructions and caption as the text encoder reads them; None where it is rejected."""
        raw = records.decode_example(payload)
        window = {key: records.decode_feature(feature, raw[key]) for key, feature in records.WINDOWS.items()}
        song_id, caption = window["song_id"], self._encoders.shortened(window["caption"])
        if caption != window["caption"]:
            note = f"caption cut to {len(caption.split())} words: the text encoder reads no more"
            report.notes.append({"song_id": song_id, "note": note})
        read = [text for text in window["instructions"] if self._encoders.reads(text)]
        if not read:
            where = f"{window['start_seconds']:.2f} s, {window['stem_name']}"
            report.reject(song_id, where, "every instruction is longer than the text encoder reads")
            return None
        if len(read) < len(window["instructions"]):
            note = "instructions longer than the text encoder reads left out"
            report.notes.append({"song_id": song_id, "note": note})
        window["instructions"] = read
        return window, [*read, caption]

    def _with_latents(self, batch: list[dict[str, Any]], sums: dict[str, np.ndarray]) -> Iterator[dict[str, Any]]:
        if isinstance(self._representation, PianoRoll):
            encoded = [note_windows.latents(self._representation, window) for window in batch]
        else:
            encoded = self._encoders.encode_audio(batch)
        for window, latents in zip(batch, encoded, strict=True):
            for key, latent in latents.items():
                own = roll_sums(latent) if isinstance(self._representation, PianoRoll) else moment_sums(latent)
                sums[key] = sums.get(key, 0.0) + own
            example = window | latents
            yield {key: example[key] for key in records.LATENTS}


def _text_states(states: list[np.ndarray]) -> dict[str, np.ndarray]:
    """The states of a window's instructions and caption, as the record has them."""
    *instructions, caption = states
    return {
        "instruction_states": np.concatenate(instructions),
        "instruction_lengths": np.array([len(text) for text in instructions], np.int32),
        "caption_states": caption,
    }


def latent_features(
    shapes: dict[str, tuple[int | None, ...]], representation: Mel | PianoRoll
) -> tfds.features.FeaturesDict:
    """The features of `latents`; piano rolls, which are nearly all zeros, are compressed."""
    packed = ("mix_latent", "context_latent", "stem_latent") if isinstance(representation, PianoRoll) else ()
    return dataset.features("latents", shapes, zlib=packed)


def moment_sums(moments: np.ndarray) -> np.ndarray:
    """Of one latent `[F, T, 2C]`, by channel `[4, C]`: count, sum of means, of squared means, of variances."""
    mean, log_variance = np.split(moments.astype(np.float64), 2, axis=-1)
    count = np.full(mean.shape[-1], mean[..., 0].size, np.float64)
    return np.stack([count, *(x.sum(axis=(0, 1)) for x in (mean, np.square(mean), np.exp(log_variance)))])


def roll_sums(roll: np.ndarray) -> np.ndarray:
    """`moment_sums` of a roll `[F, T, C]`, which is its own mode and has no variance."""
    cells = roll.reshape(-1, roll.shape[-1]).astype(np.float64)
    return np.stack(
        [np.full(cells.shape[1], len(cells)), cells.sum(0), np.square(cells).sum(0), np.zeros(cells.shape[1])]
    )


def mean_and_std(sums: np.ndarray, sampled: bool) -> tuple[list[float], list[float]]:
    """Mean and standard deviation by channel from `moment_sums`, of samples of the posterior or of its mode."""
    count, mean, square, variance = sums
    spread = square / count - np.square(mean / count) + (variance / count if sampled else 0.0)
    return (mean / count).tolist(), np.sqrt(np.maximum(spread, 1e-12)).tolist()
