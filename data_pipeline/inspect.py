"""What a folder of datasets holds: examples by split, stem and genre, and why inputs were rejected.

python -m data_pipeline.inspect --data_dir=DIR
"""

import json
from collections import Counter

from absl import flags

from launch import program
from subtractive_jax import records
from subtractive_jax.errors import UserError

_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder with the datasets.", required=True)


def _table(title: str, counts: Counter[str]) -> list[str]:
    return [f"  {title}", *(f"    {count:8d}  {key}" for key, count in counts.most_common())] if counts else []


def report(data_dir: str, name: str) -> str:
    """The report on dataset `windows` or `latents` as text.

    Raises:
      UserError: the dataset is missing or damaged.
    """
    lines = [f"{records.dataset_dir(data_dir, name)}"]
    for split in records.SPLITS:
        examples = records.Split(data_dir, name, split, keys=("song_id", "stem_name", "tags"))
        songs, stems, genres = set(), Counter[str](), Counter[str]()
        for index in range(len(examples)):
            example = examples[index]
            songs.add(example["song_id"])
            stems[example["stem_name"]] += 1
            genres[json.loads(example["tags"]).get("genre") or "unknown genre"] += 1
        lines += [f"{split}: {len(examples)} examples of {len(songs)} songs, {examples.nbytes / 1e6:.1f} MB"]
        lines += _table("stem", stems) + _table("genre", genres)
    refused = (records.dataset_dir(data_dir, name) / "rejected.jsonl").read_text().splitlines()
    lines += [f"rejected: {len(refused)}", *_table("reason", Counter(json.loads(line)["reason"] for line in refused))]
    return "\n".join(lines)


def main() -> None:
    names = [name for name in records.SCHEMAS if records.dataset_dir(_DATA_DIR.value, name).exists()]
    if not names:
        raise UserError(f"{_DATA_DIR.value}: no dataset here; python -m data_pipeline.build writes one")
    print("\n\n".join(report(_DATA_DIR.value, name) for name in names))


if __name__ == "__main__":
    program.run(main)
