"""What a folder of datasets holds: counts, and a page that plays and shows a random sample of windows.

  python -m data_pipeline.inspect --data_dir=DIR                    # counts; the page is DIR/inspect/index.html
  python -m data_pipeline.inspect --data_dir=gs://... --page=DIR    # a page of a remote dataset

Counted are examples by split, stem and genre, refused inputs by reason, and what was converted, by note.
"""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from absl import flags
from tqdm import tqdm

from launch import program
from subtractive_jax import page, records, storage
from subtractive_jax.errors import UserError
from subtractive_jax.page.pictures import piano_roll
from subtractive_jax.representation.notes import read_score

_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder with the datasets; may be remote.", required=True)
_PAGE = flags.DEFINE_string("page", None, "Folder to write the page into; DIR/inspect if not given.")
_EXAMPLES = flags.DEFINE_integer("examples", 12, "Windows on the page; 0 for counts alone.", lower_bound=0)
_SEED = flags.DEFINE_integer("seed", 0, "Which windows are drawn.", lower_bound=0)

_SIGNALS = {"mix": "Mix", "context": "Context: mix without the stem", "stem": "Stem"}
_RATE = 44_100  # Hz, at which notes are rendered
_ABOUT = ("song_id", "stem_name", "tags")


def _table(title: str, counts: Counter[str]) -> list[str]:
    rows = sorted(counts.items(), key=lambda row: (-row[1], row[0]))
    return [f"  {title}", *(f"    {count:8d}  {name}" for name, count in rows)] if rows else []


def _count(name: str, split: str, examples: records.Split) -> tuple[int, Counter[str], Counter[str]]:
    """Number of songs, and examples by stem and by genre: as the build has counted them, or else from all records."""
    if "genres" in examples.metadata:
        songs, stems, genres = (examples.metadata[key][split] for key in ("songs", "counts", "genres"))
        return songs, Counter(stems), Counter(genres)
    found, by_stem, by_genre = set(), Counter[str](), Counter[str]()
    for example in tqdm(examples, desc=f"{name} {split}", unit="example", disable=None, leave=False):
        found.add(example["song_id"])
        by_stem[example["stem_name"]] += 1
        by_genre[json.loads(example["tags"]).get("genre") or "unknown genre"] += 1
    return len(found), by_stem, by_genre


def _lines(data_dir: str, name: str, file: str) -> list[dict[str, str]]:
    """A JSON Lines file beside the shards; empty where there is none."""
    folder = storage.Folder(records.dataset_dir(data_dir, name))
    return [json.loads(line) for line in folder.read(file).splitlines()] if file in folder.sizes() else []


def report(data_dir: str, name: str) -> str:
    """The report on dataset `windows` or `latents` as text.

    Raises:
      UserError: the dataset is missing or damaged.
    """
    lines = [records.dataset_dir(data_dir, name)]
    for split in records.SPLITS:
        examples = records.Split(data_dir, name, split, _ABOUT)
        songs, stems, genres = _count(name, split, examples)
        lines += [f"{split}: {len(examples)} examples of {songs} songs, {examples.nbytes / 1e6:.1f} MB"]
        lines += _table("stem", stems) + _table("genre", genres)
    for what, file, key in (("rejected", "rejected.jsonl", "reason"), ("noted", "notes.jsonl", "note")):
        told = _lines(data_dir, name, file)
        lines += [f"{what}: {len(told)}", *_table(key, Counter(item[key] for item in told))]
    return "\n".join(lines)


def write_page(data_dir: str, folder: str | os.PathLike[str], count: int, seed: int) -> Path:
    """Writes a page with `count` windows drawn from all splits: audio files, pictures, texts and tags.

    Windows of notes are rendered; their MIDI files lie beside.

    Returns:
      The path of the page; it can be moved with its folder, and needs nothing else.

    Raises:
      UserError: the dataset is missing, damaged or empty.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    splits = [records.Split(data_dir, "windows", split) for split in records.SPLITS]
    ends = np.cumsum([len(examples) for examples in splits])
    if not ends[-1]:
        raise UserError(f"{records.dataset_dir(data_dir, 'windows')}: no window to show")
    notes: dict[str, list[str]] = {}
    for item in _lines(data_dir, "windows", "notes.jsonl"):
        notes.setdefault(item["song_id"], []).append(item["note"])
    drawn = np.sort(np.random.default_rng(seed).choice(ends[-1], min(count, ends[-1]), replace=False)).tolist()
    rows = []
    for number, index in enumerate(tqdm(drawn, desc="page", unit="window", disable=None, leave=False)):
        split = int(np.searchsorted(ends, index, side="right"))
        example = splits[split][index - int(ends[split]) + len(splits[split])]
        rows.append(_row(folder, number, records.SPLITS[split], example, notes.get(example["song_id"], [])))
    return page.write(folder, f"{len(rows)} of {ends[-1]} windows", rows, kind="Window")


def _row(folder: Path, number: int, split: str, example: dict[str, Any], notes: list[str]) -> page.Row:
    names = {signal: f"{number:03d}_{signal}" for signal in _SIGNALS}
    players = [(label, f"{names[signal]}.flac") for signal, label in _SIGNALS.items()]
    picture = b""
    if example["sample_rate"]:
        for signal, name in names.items():
            (folder / f"{name}.flac").write_bytes(example[signal])
    else:
        from data_pipeline.sources import midi  # takes seconds, with Beam

        for signal, name in names.items():
            (folder / f"{name}.mid").write_bytes(example[signal])
        midi.render_versions({folder / f"{name}.flac": example[signal] for signal, name in names.items()}, _RATE)
        seconds = soundfile.info(folder / players[0][1]).duration
        picture = piano_roll(read_score(example["mix"]), example["stem_name"].split("+"), seconds)
    tags = json.loads(example["tags"])
    instruction, *others = example["instructions"] or [""]
    figures = {"Split": split, "Missing": example["stem_name"], "Genre": tags.pop("genre", None) or "unknown"}
    if "bleed_db" in tags:
        figures["Bleed (dB)"] = tags.pop("bleed_db")
    stems = tags.pop("stems", {})
    settings = {
        "Caption": example["caption"],
        "Other instructions": " · ".join(others) or "none",
        "Gain": float(example["gain"]),
        **{name.replace("_", " ").capitalize(): value for name, value in tags.items()},
        **{f"Tags of {name}": json.dumps(stems[name]) for name in example["stem_name"].split("+") if name in stems},
    }
    title = f"{example['song_id']}, {example['start_seconds']:.2f} s, {example['stem_name']}"
    return page.Row(title, instruction, players, settings, figures, "; ".join(notes), picture=picture)


def main() -> None:
    data_dir = _DATA_DIR.value
    names = [name for name in records.SCHEMAS if storage.Folder(records.dataset_dir(data_dir, name)).sizes()]
    if not names:
        raise UserError(f"{data_dir}: no dataset here; python -m data_pipeline.build writes one")
    print("\n\n".join(report(data_dir, name) for name in names))
    if "windows" in names and _EXAMPLES.value:
        if storage.is_remote(data_dir) and not _PAGE.value:
            raise UserError(f"{data_dir} is remote: give --page=DIR, a local folder, or --examples=0 for counts alone")
        print(f"\n{write_page(data_dir, _PAGE.value or Path(data_dir, 'inspect'), _EXAMPLES.value, _SEED.value)}")


if __name__ == "__main__":
    program.run(main)
