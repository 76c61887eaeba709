"""The Beam part: one element is one shard, written whole by one worker, song after song.

So memory is bounded by a song, nothing is shuffled between workers, and the bytes are the same whatever their number.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import tensorflow_datasets as tfds

from data_pipeline import dataset, instructions, render, sources, windows
from data_pipeline.encode import Encoders
from subtractive_jax import records
from subtractive_jax.errors import UserError
from subtractive_jax.representation import audio
from subtractive_jax.representation.mel import Mel

_ENCODE_BATCH = 8  # examples


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file to write: from songs (`windows`) or from another file (`latents`)."""

    split: str
    index: int
    count: int  # shards of the split
    songs: tuple[sources.Song, ...] = ()
    source: str = ""  # a shard of `windows`


def plan(songs: list[sources.Song], splits: list[str], songs_per_shard: int) -> list[Shard]:
    """Songs, sorted by id, to shards of `songs_per_shard` within each split."""
    shards = []
    for split in records.SPLITS:
        own = [song for song, its_split in zip(songs, splits, strict=True) if its_split == split]
        starts = range(0, len(own), songs_per_shard)
        for index, start in enumerate(starts):
            shards.append(Shard(split, index, len(starts), tuple(own[start : start + songs_per_shard])))
    return shards


class _WriteShards(beam.DoFn):
    """Writes each shard and yields, as JSON, what is to be known about it."""

    features: tfds.features.FeaturesDict  # made in setup(), on the worker

    def __init__(self, name: str, folder: Path):
        self._name, self._folder = name, folder

    def process(self, shard: Shard) -> Iterator[str]:
        counts: Counter[str] = Counter()
        rejected: list[dict[str, str]] = []

        def payloads() -> Iterator[bytes]:
            for example in self.examples(shard, rejected):
                counts[example["stem_name"]] += 1
                yield dataset.serialize(self.features, example)

        path = self._folder / dataset.shard_name(self._name, shard.split, shard.index, shard.count)
        size = dataset.write_shard(path, payloads())
        about = {"split": shard.split, "index": shard.index, "examples": counts.total(), "bytes": size}
        yield json.dumps(about | {"counts": counts, "rejected": rejected} | self.statistics())

    def examples(self, shard: Shard, rejected: list[dict[str, str]]) -> Iterator[dict[str, Any]]:
        """A shard's examples in order; what is refused is added to `rejected`."""
        raise NotImplementedError

    def statistics(self) -> dict[str, Any]:
        """Sums over the shard just written."""
        return {}


class WriteWindows(_WriteShards):
    """Songs to shards of `windows`."""

    def __init__(self, folder: Path, representation: dict[str, Any], data: dict[str, Any]):
        super().__init__("windows", folder)
        self._mel, self._data = Mel.from_config(representation), data

    def setup(self) -> None:
        self.features = dataset.features("windows", {})

    def examples(self, shard: Shard, rejected: list[dict[str, str]]) -> Iterator[dict[str, Any]]:
        for song in shard.songs:
            count = 0
            try:
                for example in self._song(song):
                    count += 1
                    yield example
                if not count:
                    raise UserError("no window in which both a wanted stem and the rest are heard")
            except (UserError, OSError) as error:
                rejected.append(dataclasses.asdict(sources.Rejected(song.song_id, song.path, str(error))))

    def _song(self, song: sources.Song) -> Iterator[dict[str, Any]]:
        rate = self._mel.sample_rate
        stems, tags = render.load_stems(song, rate)
        for triple in windows.triples(
            stems,
            self._data["stems"],
            rate,
            self._mel.window_samples,
            self._data["window_hop_frames"] * self._mel.hop_length,
            self._data["min_stem_level_db"],
            self._data["loudness_lufs"],
        ):
            where = (song.song_id, triple.start_seconds)
            yield {
                "mix": audio.flac_bytes(triple.mix, rate),
                "context": audio.flac_bytes(triple.context, rate),
                "stem": audio.flac_bytes(triple.stem, rate),
                "sample_rate": rate,
                "stem_name": triple.stem_name,
                "song_id": song.song_id,
                "group_id": song.group_id,
                "start_seconds": triple.start_seconds,
                "gain": triple.gain,
                "tags": json.dumps(tags, sort_keys=True),
                "caption": instructions.caption(tags, *where),
                "instructions": instructions.instructions(
                    tags, triple.stem_name, *where, self._data["instructions_per_window"]
                ),
            }


class WriteLatents(_WriteShards):
    """Shards of `windows` to shards of `latents`, one to one."""

    def __init__(self, folder: Path, model: str, latent_shape: tuple[int, int, int], text_dim: int):
        super().__init__("latents", folder)
        self._model, self._shapes = model, latent_shapes(latent_shape, text_dim)

    def setup(self) -> None:
        self._encoders = Encoders(self._model)
        self.features = dataset.features("latents", self._shapes)

    def examples(self, shard: Shard, rejected: list[dict[str, str]]) -> Iterator[dict[str, Any]]:
        self._sums: dict[str, np.ndarray] = {}
        self._encoders.forget_texts()
        batch: list[dict[str, Any]] = []
        for payload in records.read_tfrecord(shard.source):
            raw = records.decode_example(payload)
            window = {key: records.decode_feature(feature, raw[key]) for key, feature in records.WINDOWS.items()}
            try:
                texts = self._encoders.encode_texts([*window["instructions"], window["caption"]])
            except UserError as error:
                where = f"{window['start_seconds']:.2f} s, {window['stem_name']}"
                rejected.append(dataclasses.asdict(sources.Rejected(window["song_id"], where, str(error))))
                continue
            states = {
                "instruction_states": np.concatenate(texts[:-1]),
                "instruction_lengths": np.array([len(text) for text in texts[:-1]], np.int32),
                "caption_states": texts[-1],
            }
            batch.append(window | states)
            if len(batch) == _ENCODE_BATCH:
                yield from self._with_latents(batch)
                batch = []
        if batch:
            yield from self._with_latents(batch)

    def _with_latents(self, batch: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for window, latents in zip(batch, self._encoders.encode_audio(batch), strict=True):
            for key, moments in latents.items():
                self._sums[key] = self._sums.get(key, 0.0) + moment_sums(moments)
            example = window | latents
            yield {key: example[key] for key in records.LATENTS}

    def statistics(self) -> dict[str, Any]:
        return {"sums": {key: sums.tolist() for key, sums in self._sums.items()}}


def latent_shapes(latent_shape: tuple[int, int, int], text_dim: int) -> dict[str, tuple[int | None, ...]]:
    """The tensor shapes of `latents` for latents `[F, T, 2C]` and text states `[L, text_dim]`."""
    return {
        **dict.fromkeys(("mix_latent", "context_latent", "stem_latent"), latent_shape),
        **dict.fromkeys(("instruction_states", "caption_states"), (None, text_dim)),
        "instruction_lengths": (None,),
    }


def moment_sums(moments: np.ndarray) -> np.ndarray:
    """Of one latent `[F, T, 2C]`, by channel `[4, C]`: count, sum of means, of squared means, of variances."""
    mean, log_variance = np.split(moments.astype(np.float64), 2, axis=-1)
    count = np.full(mean.shape[-1], mean[..., 0].size, np.float64)
    return np.stack([count, *(x.sum(axis=(0, 1)) for x in (mean, np.square(mean), np.exp(log_variance)))])


def mean_and_std(sums: np.ndarray, sampled: bool) -> tuple[list[float], list[float]]:
    """Mean and standard deviation by channel from `moment_sums`, of samples of the posterior or of its mode."""
    count, mean, square, variance = sums
    spread = square / count - np.square(mean / count) + (variance / count if sampled else 0.0)
    return (mean / count).tolist(), np.sqrt(np.maximum(spread, 1e-12)).tolist()
