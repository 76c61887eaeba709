"""From songs to `windows` and from `windows` to `latents`: two Beam pipelines, and what stands beside the shards."""

import collections
import contextlib
import dataclasses
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
from apache_beam.options.pipeline_options import PipelineOptions
from ml_collections import ConfigDict
from tqdm import tqdm

from data_pipeline import dataset, grouping, shards, sources
from data_pipeline.encode import Encoders
from subtractive_jax import records
from subtractive_jax.errors import UserError, unknown_name
from subtractive_jax.representation.mel import Mel


@contextlib.contextmanager
def _progress(folder: Path, count: int, name: str) -> Iterator[None]:
    """Shows how many of `count` shards are there, while the block runs."""
    done = threading.Event()

    def watch() -> None:
        with tqdm(total=count, desc=name, unit="shard") as bar:
            while True:
                finished = done.wait(1.0)
                if fresh := sum(1 for _ in folder.glob(f"{name}-*.tfrecord-*")) - bar.n:
                    bar.update(fresh)
                if finished:
                    return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _run(
    writer: beam.DoFn, plan: list[shards.Shard], folder: Path, name: str, beam_options: list[str]
) -> list[dict[str, Any]]:
    """Runs the pipeline; what its workers tell of the shards, in order."""
    reports = folder / "reports.jsonl"
    options = PipelineOptions([f"--{option}" for option in beam_options])
    with _progress(folder, len(plan), name), beam.Pipeline(options=options) as pipeline:
        told = pipeline | beam.Create(plan) | beam.Reshuffle() | beam.ParDo(writer)
        told | beam.io.WriteToText(str(reports), shard_name_template="")
    lines = [json.loads(line) for line in reports.read_text().splitlines()]
    reports.unlink()
    return sorted(lines, key=lambda report: (records.SPLITS.index(report["split"]), report["index"]))


def build_windows(config: ConfigDict, data_dir: str, source: list[str], beam_options: list[str]) -> None:
    """Renders the songs of all sources and writes `windows`.

    Raises:
      UserError: the dataset is there already, a source or stem is unknown, or no song is usable.
    """
    representation = config.representation.to_dict()
    Mel.from_config(representation)
    for stem in config.data.stems:
        if stem not in grouping.STEMS:
            raise unknown_name("stem", stem, grouping.STEMS)
    with dataset.new_dataset(data_dir, "windows") as folder:
        songs, refused = sources.find_songs(source)
        fractions = config.data.validation_fraction, config.data.test_fraction
        plan = shards.plan(songs, [sources.split_of(song, *fractions) for song in songs], config.data.songs_per_shard)
        writer = shards.WriteWindows(folder, representation, config.data.to_dict())
        reports = _run(writer, plan, folder, "windows", beam_options) if plan else []
        rejected = [dataclasses.asdict(item) for item in refused]
        rejected += [item for report in reports for item in report["rejected"]]
        if not sum(report["examples"] for report in reports):
            first = f" (the first: {rejected[0]['song_id']}: {rejected[0]['reason']})" if rejected else ""
            raise UserError(f"no usable song in {', '.join(source) or 'the shipped songs'}{first}")
        metadata = {
            "representation": representation,
            "window_frames": config.representation.window_frames,
            "schema_version": records.SCHEMA_VERSION,
            "data": config.data.to_dict(),
        }
        dataset.finish(folder, "windows", dataset.features("windows", {}), reports, metadata, rejected)
    _tell(data_dir, "windows", reports, rejected)


def build_latents(config: ConfigDict, data_dir: str, model: str, beam_options: list[str]) -> None:
    """Encodes `windows` and writes `latents`.

    Raises:
      UserError: there are no windows, the dataset is there already, or windows, config and model differ in
        representation.
    """
    source = records.dataset_dir(data_dir, "windows")
    windows_metadata = records.read_metadata(data_dir, "windows")
    representation = windows_metadata["representation"]
    _same(str(source), representation, "the config", config.representation.to_dict())
    with dataset.new_dataset(data_dir, "latents") as folder:
        encoders = Encoders(model)
        _same(str(source), representation, f"model {model}", encoders.representation)
        about, latent_shape = encoders.metadata(), encoders.latent_shape()
        plan = [_latents_shard(path) for path in sorted(source.glob("windows-*.tfrecord-*"))]
        writer = shards.WriteLatents(folder, model, latent_shape, about["text_dim"])
        reports = _run(writer, plan, folder, "latents", beam_options)
        rejected = [item for report in reports for item in report["rejected"]]
        metadata = {key: windows_metadata[key] for key in ("representation", "window_frames", "schema_version", "data")}
        metadata |= about | _statistics(reports)
        schema = dataset.features("latents", shards.latent_shapes(latent_shape, about["text_dim"]))
        dataset.finish(folder, "latents", schema, reports, metadata, rejected)
    _tell(data_dir, "latents", reports, rejected)


def _latents_shard(path: Path) -> shards.Shard:
    match = re.fullmatch(r"windows-(\w+)\.tfrecord-(\d+)-of-(\d+)", path.name)
    assert match is not None
    return shards.Shard(match[1], int(match[2]), int(match[3]), source=str(path))


def _same(name: str, values: dict[str, Any], other_name: str, other: dict[str, Any]) -> None:
    for field in sorted({*values, *other}):
        if values.get(field) != other.get(field):
            raise UserError(
                f"representation.{field} is {values.get(field)} in {name}, but {other.get(field)} in {other_name}"
            )


def _statistics(reports: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Mean and standard deviation of the training split's latents by channel; empty without such a split."""
    train = [report["sums"] for report in reports if report["split"] == "train" and report["sums"]]
    statistics: dict[str, list[float]] = {}
    for key, name, sampled in (  # a context enters the denoiser as its posterior's mode
        ("mix_latent", "latent", True),
        ("context_latent", "context", False),
        ("stem_latent", "stem", True),
    ):
        mean, std = shards.mean_and_std(np.sum([s[key] for s in train], axis=0), sampled) if train else ([], [])
        statistics |= {f"{name}_mean": mean, f"{name}_std": std}
    return statistics


def _tell(data_dir: str, name: str, reports: list[dict[str, Any]], rejected: list[dict[str, str]]) -> None:
    examples: collections.Counter[str] = collections.Counter()
    for report in reports:
        examples[report["split"]] += report["examples"]
    counts = ", ".join(f"{split} {count}" for split, count in examples.items())
    print(f"{records.dataset_dir(data_dir, name)}: {counts} examples; {len(rejected)} rejected")
