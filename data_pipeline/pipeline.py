"""From songs to `windows` and from `windows` to `latents`: two Beam pipelines, and what stands beside the shards."""

import collections
import contextlib
import dataclasses
import json
import re
import threading
from collections.abc import Iterator
from typing import Any

import apache_beam as beam
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from data_pipeline import dataset, duplicates, encode, engine, files, shards, sources, splits, windows
from data_pipeline.song import Rejected, Song, Tools
from subtractive_jax import records
from subtractive_jax.errors import UserError
from subtractive_jax.representation import from_config
from subtractive_jax.representation.mel import Mel
from subtractive_jax.representation.piano_roll import PianoRoll

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


def _write(
    writer: beam.DoFn, plan: list[shards.Shard], folder: str, name: str, beam_options: list[str]
) -> list[dict[str, Any]]:
    """Writes the shards; what their workers tell of them, in order."""
    steps = beam.Map(shards.Shard.from_json) | beam.ParDo(writer)
    with _progress(folder, len(plan), name):
        told = engine.run(steps, (shard.to_json() for shard in plan), folder, beam_options)
    reports = [json.loads(line) for line in told]
    return sorted(reports, key=lambda report: (records.SPLITS.index(report["split"]), report["index"]))


def _compare(songs: list[Song], folder: str, beam_options: list[str]) -> list[duplicates.Finding]:
    """Which songs, or a song and a held-out one, are the same music; and which are unreadable."""
    copies = []
    own = {song.song_id for song in songs}
    for song in sources.find_songs([]).songs:
        if song.song_id in splits.held_out() and song.song_id not in own:
            path = files.join(folder, f"{song.song_id}.mid")  # for workers that have this package elsewhere
            files.write_bytes(path, files.read_bytes(song.files[0][1]))
            copies.append(dataclasses.replace(song, files=(("midi", path),)))
    steps = (
        beam.Map(shards.song_from_json)
        | duplicates.FindAlike()
        | beam.Map(lambda finding: json.dumps(dataclasses.asdict(finding)))
    )
    lines = engine.run(
        steps, (json.dumps(dataclasses.asdict(song)) for song in (*copies, *songs)), folder, beam_options
    )
    files.delete([song.files[0][1] for song in copies])
    return [duplicates.Finding(**json.loads(line)) for line in lines]


def _check_data(data: ConfigDict, representation: Mel | PianoRoll) -> None:
    """Raises UserError unless `config.data` can be meant."""
    for name in data.stems:
        windows.check_stem_set(name)
    augmentation = data.augmentation
    wanted = [
        ("stems", list(data.stems), len(data.stems) > 0, "at least one"),
        ("songs_per_shard", data.songs_per_shard, data.songs_per_shard > 0, "1 or more"),
        ("instructions_per_window", data.instructions_per_window, data.instructions_per_window > 0, "1 or more"),
        ("validation_fraction", data.validation_fraction, data.validation_fraction >= 0, "0 or more"),
        ("test_fraction", data.test_fraction, data.test_fraction >= 0, "0 or more"),
        ("test_fraction", data.test_fraction, data.validation_fraction + data.test_fraction <= 1, "at most 1 in sum"),
        ("augmentation.copies", augmentation.copies, augmentation.copies >= 0, "0 or more"),
        ("augmentation.pitch_semitones", augmentation.pitch_semitones, augmentation.pitch_semitones >= 0, "0 or more"),
    ]
    if isinstance(representation, PianoRoll):
        parts = "+".join(data.stems).split("+")
        wanted += [
            ("stems", list(data.stems), {*parts} <= {*representation.parts}, "made of config.representation.parts"),
            ("window_hop_bars", data.window_hop_bars, data.window_hop_bars > 0, "1 or more"),
            ("min_onsets", data.min_onsets, data.min_onsets > 0, "1 or more"),
        ]
    else:
        wanted += [
            ("window_hop_frames", data.window_hop_frames, data.window_hop_frames > 0, "1 or more"),
            ("min_stem_level_db", data.min_stem_level_db, data.min_stem_level_db < 0, "below 0"),
            ("loudness_lufs", data.loudness_lufs, -70 < data.loudness_lufs <= 0, "between -70 and 0"),
            ("augmentation.tempo", augmentation.tempo, augmentation.tempo >= 0, "0 or more"),
            ("augmentation.gain_db", augmentation.gain_db, augmentation.gain_db >= 0, "0 or more"),
        ]
    for field, value, is_good, range_ in wanted:
        if not is_good:
            raise UserError(f"config.data.{field} is {value}: it must be {range_}")


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
    representation, data = config.representation.to_dict(), config.data.to_dict()
    _check_data(config.data, from_config(representation))
    with dataset.new_dataset(data_dir, "windows") as folder:
        found = sources.find_songs(source)
        if is_roll := representation["name"] == "piano_roll":
            for song in found.songs:
                if song.kind != "midi":
                    raise UserError(f"--source={song.kind}: piano rolls are made from notes: give midi:FOLDER")
        songs, rejected = found.songs, [dataclasses.asdict(item) for item in found.rejected]
        total = len(songs) + len(rejected)
        _stop_if_mostly_refused(len(songs), total, max_rejected, rejected, data_dir)
        if found.unknown:
            print(f"{found.unknown} lines of tables beside the music are for songs that are not there")
        findings = _compare(songs, folder, beam_options)
        unreadable = {finding.song_ids[0]: finding.reason for finding in findings if finding.kind == "unreadable"}
        for song in songs:
            if song.song_id in unreadable:
                item = Rejected(song.song_id, song.files[0][1], unreadable[song.song_id])
                rejected.append(dataclasses.asdict(item))
        songs = [song for song in songs if song.song_id not in unreadable]
        _stop_if_mostly_refused(len(songs), total, max_rejected, rejected, data_dir)
        alike = sorted((a, b) for finding in findings if finding.kind == "alike" for a, b in [finding.song_ids])
        if crowded := sum(finding.kind == "crowded" for finding in findings):
            print(f"{crowded} groups of more than a thousand similar songs were compared with one of them only")
        split_of = splits.assign(songs, alike, config.data.validation_fraction, config.data.test_fraction)
        counts = collections.Counter(split_of.values())
        print("songs: " + ", ".join(f"{split} {counts[split]}" for split in records.SPLITS))
        if alike:
            family, count = collections.Counter(splits.families(songs, alike).values()).most_common(1)[0]
            print(f'{len(alike)} pairs of songs are the same music; the largest family has {count} songs ("{family}")')
        plan = shards.plan(songs, split_of, config.data.songs_per_shard, data["augmentation"])
        if is_roll:
            writer: shards.WriteSongs = shards.WriteNotes(folder, representation, data, language_model)
        else:
            separates = any(song.kind == "songs" for song in songs)
            writer = shards.WriteAudio(folder, representation, data, tools, separates, language_model)
        reports = _write(writer, plan, folder, "windows", beam_options)
        rejected += [item for report in reports for item in report["rejected"]]
        rejected += [dataclasses.asdict(item) for item in found.rejected_lines]
        used = sum(report["songs"] for report in reports)
        _stop_if_mostly_refused(used, total, max_rejected, rejected, data_dir)
        metadata = {
            "representation": representation,
            "schema_version": records.SCHEMA_VERSION,
            "data": data,
            "sources": source,
            "tools": dataclasses.asdict(tools),
            "language_model": language_model and language_model["model"],
            "alike": alike,
            "texts": _sum(reports, "texts"),
            "copies": _sum(reports, "copies"),
        }
        notes = [note for report in reports for note in report["notes"]]
        dataset.finish(folder, "windows", dataset.features("windows", {}), reports, metadata, rejected, notes)
    _tell(data_dir, "windows", reports, rejected)


def _sum(reports: list[dict[str, Any]], key: str) -> collections.Counter[str]:
    return sum((collections.Counter(report[key]) for report in reports), collections.Counter())


def check_windows(config: ConfigDict, data_dir: str, source: list[str]) -> None:
    """Raises UserError where the `windows` that are there were made otherwise than is now asked for."""
    metadata = records.read_metadata(data_dir, "windows")
    there = dataset.folder(data_dir, "windows")
    if source and metadata["sources"] != source:
        raise UserError(
            f"{there} was made from {', '.join(metadata['sources']) or 'the shipped songs'}: give another --data_dir "
            "for other sources, or no --source to encode what is there"
        )
    _same("data", there, _in_use(metadata["data"]), "the config", _in_use(config.data.to_dict()))


def _in_use(data: dict[str, Any]) -> dict[str, Any]:
    """`config.data` without the settings of copies that are not made; earlier versions had fewer of them."""
    copies = data["augmentation"]["copies"]
    return data if copies else {**data, "augmentation": {"copies": copies}}


def check_encoders(config: ConfigDict, model: str) -> None:
    """Raises UserError where the model has no encoders, or not for the config's representation."""
    _encoders(config.representation.to_dict(), "the config", model)


def _encoders(representation: dict[str, Any], name: str, model: str) -> encode.Encoders:
    """The encoders of a model, checked against the representation of `name`; notes need a text encoder only."""
    encoders = encode.encoders(model)
    if representation["name"] == "mel":
        _same("representation", name, representation, f"model {model}", encoders.representation)
        encoders.check_autoencoder()
    return encoders


def _stop_if_mostly_refused(
    used: int, total: int, max_rejected: float, rejected: list[dict[str, str]], data_dir: str
) -> None:
    """Raises UserError if more than `max_rejected` of the songs are not used; `data_dir` then tells why."""
    if used and total - used <= max_rejected * total:
        return
    path = files.join(data_dir, "rejected.jsonl")
    dataset.write_rows(path, rejected)
    reasons = collections.Counter(item["reason"] for item in rejected).most_common(1)
    example = f" (most often: {reasons[0][0]})" if reasons else ""
    if not used:
        raise UserError(f"no usable song: {path} tells why{example}")
    raise UserError(f"{total - used} of {total} songs refused, over --max_rejected: {path} tells why{example}")


def build_latents(config: ConfigDict, data_dir: str, model: str, beam_options: list[str]) -> None:
    """Encodes `windows` and writes `latents`.

    Raises:
      UserError: there are no windows, the dataset is there already, or windows, config and model differ in
        representation.
    """
    source = dataset.folder(data_dir, "windows")
    windows_metadata = records.read_metadata(data_dir, "windows")
    representation = windows_metadata["representation"]
    _same("representation", source, representation, "the config", config.representation.to_dict())
    with dataset.new_dataset(data_dir, "latents") as folder:
        encoders = _encoders(representation, source, model)
        about = encoders.metadata(representation)
        shapes = _latent_shapes(representation, encoders, about["text_dim"])
        found = {path: _SHARD.fullmatch(path) for path in files.list_files(source)}
        plan = [
            shards.Shard(match[1], int(match[2]), int(match[3]), source=files.join(source, path))
            for path, match in found.items()
            if match
        ]
        writer = shards.WriteLatents(folder, model, representation, shapes)
        reports = _write(writer, plan, folder, "latents", beam_options)
        rejected = [item for report in reports for item in report["rejected"]]
        if not any(report["examples"] for report in reports):
            raise UserError(f"no window of {source} can be encoded (the first: {rejected[0]['reason']})")
        notes = [note for report in reports for note in report["notes"]]
        metadata = {key: windows_metadata[key] for key in ("representation", "schema_version", "data")}
        metadata |= about | _statistics(reports)
        schema = shards.latent_features(shapes, from_config(representation))
        if representation["name"] == "piano_roll":
            metadata["posterior"] = "none"
        dataset.finish(folder, "latents", schema, reports, metadata, rejected, notes)
    _tell(data_dir, "latents", reports, rejected)


def _same(section: str, name: str, values: dict[str, Any], other_name: str, other: dict[str, Any]) -> None:
    values, other = (json.loads(json.dumps(fields)) for fields in (values, other))  # tuples are lists in files
    for field in sorted({*values, *other}):
        if values.get(field) != other.get(field):
            raise UserError(
                f"{section}.{field} is {values.get(field)} in {name}, but {other.get(field)} in {other_name}"
            )


def _latent_shapes(
    representation: dict[str, Any], encoders: encode.Encoders, text_dim: int
) -> dict[str, tuple[int | None, ...]]:
    """The shapes of the tensors of `latents`."""
    match from_config(representation):
        case PianoRoll() as roll:
            given = (roll.octaves, roll.window_steps, roll.channels)
            context = (*given[:2], roll.context_channels)
        case Mel():
            given = context = encoders.latent_shape()
    return {
        **{"mix_latent": given, "context_latent": context, "stem_latent": given},
        **dict.fromkeys(("instruction_states", "caption_states"), (None, text_dim)),
        "instruction_lengths": (None,),
    }


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
