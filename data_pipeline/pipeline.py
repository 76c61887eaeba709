"""From songs to `windows` and from `windows` to `latents`: two Beam pipelines, and what stands beside the shards."""

import collections
import contextlib
import dataclasses
import json
import re
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import apache_beam as beam
import numpy as np
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions, StreamingOptions
from ml_collections import ConfigDict
from tqdm import tqdm

from data_pipeline import dataset, duplicates, encode, files, shards, sources, splits, windows
from data_pipeline.song import Song, Tools
from subtractive_jax import records
from subtractive_jax.errors import UserError
from subtractive_jax.representation.mel import Mel

_NO_TOOLS = Tools()
_SHARD = re.compile(r"\w+-(\w+)\.tfrecord-(\d+)-of-(\d+)")


@contextlib.contextmanager
def _progress(folder: str, count: int, name: str) -> Iterator[None]:
    """Shows how many of `count` shards are there, while the block runs."""
    done = threading.Event()

    def watch() -> None:
        with tqdm(total=count, desc=name, unit="shard") as bar:
            while True:
                finished = done.wait(1.0 if files.is_local(folder) else 20.0)
                written = [path for path in files.list_files(folder) if _SHARD.fullmatch(path)]
                if fresh := len(written) - bar.n:
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


def parse_options(beam_options: list[str]) -> PipelineOptions:
    """Beam's options, which from then on hold for all access to files, too."""
    options = PipelineOptions([f"--{option}" for option in beam_options])
    if options.view_as(StandardOptions).runner in (None, "DirectRunner", "direct"):
        # Or Beam would first try to download another runner, Prism, which ignores direct_num_workers.
        options.view_as(StreamingOptions).update_compatibility_version = beam.__version__
    FileSystems.set_options(options)
    return options


def _through(steps: beam.PTransform, lines: Iterable[str], folder: str, beam_options: list[str]) -> list[str]:
    """Runs lines of text through Beam steps, by way of files, since a job's graph may not hold many of them."""
    given, taken = files.join(folder, "given.txt"), files.join(folder, "taken.txt")
    files.write_bytes(given, "".join(f"{line}\n" for line in lines).encode())
    options = parse_options(beam_options)
    try:
        with beam.Pipeline(options=options) as pipeline:
            out = pipeline | beam.io.ReadFromText(given) | beam.Reshuffle() | steps
            out | beam.io.WriteToText(taken, shard_name_template="", skip_if_empty=True)
    except Exception as error:  # what workers raise arrives as text
        if reason := re.search(r"UserError: (.+?)( \[while running .*)?$", str(error), re.MULTILINE):
            raise UserError(reason[1]) from error
        raise
    told = files.read_text(taken).splitlines() if files.exists(taken) else []
    files.delete([path for path in (given, taken) if files.exists(path)])
    return told


def _write(
    writer: beam.DoFn, plan: list[shards.Shard], folder: str, name: str, beam_options: list[str]
) -> list[dict[str, Any]]:
    """Writes the shards; what their workers tell of them, in order."""
    steps = beam.Map(shards.Shard.from_json) | beam.ParDo(writer)
    with _progress(folder, len(plan), name):
        told = _through(steps, (shard.to_json() for shard in plan), folder, beam_options)
    reports = [json.loads(line) for line in told]
    return sorted(reports, key=lambda report: (records.SPLITS.index(report["split"]), report["index"]))


def _alike(songs: list[Song], folder: str, beam_options: list[str]) -> list[tuple[str, str]]:
    """Pairs of songs, or of a song and a held-out one, that are the same music."""
    kept_out = [song for song in sources.find_songs([])[0] if song.song_id in splits.held_out()]
    heard = {song.song_id: song for song in (*kept_out, *songs)}.values()
    steps = beam.Map(shards.song_from_json) | duplicates.FindAlike() | beam.Map(json.dumps)
    lines = _through(steps, (json.dumps(dataclasses.asdict(song)) for song in heard), folder, beam_options)
    return sorted((a, b) for a, b in map(json.loads, lines))


def build_windows(
    config: ConfigDict,
    data_dir: str,
    source: list[str],
    beam_options: list[str],
    tools: Tools = _NO_TOOLS,
    language_model: dict[str, Any] | None = None,
    max_rejected: float = 1.0,
) -> None:
    """Renders or separates the songs of all sources and writes `windows`.

    Args:
      source: texts `KIND:PATH`.
      language_model: arguments of `llm.Writer`, which then writes the instructions.
      max_rejected: largest share of songs that may be refused.

    Raises:
      UserError: the dataset is there already, a source or stem is unknown, or too few songs are usable.
    """
    representation = config.representation.to_dict()
    Mel.from_config(representation)
    for name in config.data.stems:
        windows.check_stem_set(name)
    with dataset.new_dataset(data_dir, "windows") as folder:
        songs, refused = sources.find_songs(source)
        rejected = [dataclasses.asdict(item) for item in refused]
        _stop_if_mostly_refused(len(songs), rejected, max_rejected, source)
        alike = _alike(songs, folder, beam_options)
        if alike:
            family, count = collections.Counter(splits.families(songs, alike).values()).most_common(1)[0]
            print(f'{len(alike)} pairs of songs are the same music; the largest family has {count} songs ("{family}")')
        split_of = splits.assign(songs, alike, config.data.validation_fraction, config.data.test_fraction)
        plan = shards.plan(songs, split_of, config.data.songs_per_shard, config.data.augmentation.to_dict())
        separates = any(song.kind == "songs" for song in songs)
        data = config.data.to_dict()
        writer = shards.WriteWindows(folder, representation, data, tools, separates, language_model)
        reports = _write(writer, plan, folder, "windows", beam_options) if plan else []
        rejected += [item for report in reports for item in report["rejected"]]
        _stop_if_mostly_refused(sum(report["songs"] for report in reports), rejected, max_rejected, source)
        metadata = {
            "representation": representation,
            "window_frames": config.representation.window_frames,
            "schema_version": records.SCHEMA_VERSION,
            "data": data,
            "sources": source,
            "renderer": tools.renderer,
            "alike": alike,
            "texts": sum((collections.Counter(report["texts"]) for report in reports), collections.Counter()),
        }
        notes = [note for report in reports for note in report["notes"]]
        dataset.finish(folder, "windows", dataset.features("windows", {}), reports, metadata, rejected, notes)
    _tell(data_dir, "windows", reports, rejected)


def check_sources(data_dir: str, source: list[str]) -> None:
    """Raises UserError where the `windows` that are there were made from other sources."""
    made_from = records.read_metadata(data_dir, "windows")["sources"]
    if made_from != source:
        raise UserError(
            f"{dataset.folder(data_dir, 'windows')} was made from {', '.join(made_from) or 'the shipped songs'}: "
            "give another --data_dir for other sources, or no --source to encode what is there"
        )


def _stop_if_mostly_refused(used: int, rejected: list[dict[str, str]], max_rejected: float, source: list[str]) -> None:
    where = ", ".join(source) or "the shipped songs"
    refused = len({item["song_id"] or item["source"] for item in rejected})
    reasons = collections.Counter(item["reason"] for item in rejected).most_common(1)
    example = f" (most often: {reasons[0][0]})" if reasons else ""
    if not used:
        raise UserError(f"no usable song in {where}{example}")
    if refused > max_rejected * (used + refused):
        share = refused / (used + refused)
        raise UserError(f"{share:.0%} of the songs in {where} are refused, over --max_rejected{example}")


def build_latents(config: ConfigDict, data_dir: str, model: str, beam_options: list[str]) -> None:
    """Encodes `windows` and writes `latents`.

    Raises:
      UserError: there are no windows, the dataset is there already, or windows, config and model differ in
        representation.
    """
    source = dataset.folder(data_dir, "windows")
    windows_metadata = records.read_metadata(data_dir, "windows")
    representation = windows_metadata["representation"]
    _same(source, representation, "the config", config.representation.to_dict())
    with dataset.new_dataset(data_dir, "latents") as folder:
        encoders = encode.encoders(model)
        _same(source, representation, f"model {model}", encoders.representation)
        about, latent_shape = encoders.metadata(), encoders.latent_shape()
        found = {path: _SHARD.fullmatch(path) for path in files.list_files(source)}
        plan = [
            shards.Shard(match[1], int(match[2]), int(match[3]), source=files.join(source, path))
            for path, match in found.items()
            if match
        ]
        writer = shards.WriteLatents(folder, model, latent_shape, about["text_dim"])
        reports = _write(writer, plan, folder, "latents", beam_options)
        rejected = [item for report in reports for item in report["rejected"]]
        metadata = {key: windows_metadata[key] for key in ("representation", "window_frames", "schema_version", "data")}
        metadata |= about | _statistics(reports)
        schema = dataset.features("latents", shards.latent_shapes(latent_shape, about["text_dim"]))
        dataset.finish(folder, "latents", schema, reports, metadata, rejected, [])
    _tell(data_dir, "latents", reports, rejected)


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
    texts: collections.Counter[str] = collections.Counter()
    for report in reports:
        examples[report["split"]] += report["examples"]
        texts.update(report["texts"])
    counts = ", ".join(f"{split} {count}" for split, count in examples.items())
    notes = sum(len(report["notes"]) for report in reports)
    print(f"{dataset.folder(data_dir, name)}: {counts} examples; {len(rejected)} rejected, {notes} noted")
    if texts:
        print("instructions: " + ", ".join(f"{count} {origin}" for origin, count in texts.most_common()))
