"""MUSDB18-HQ, 150 songs as uncompressed stems (Rafii et al. 2019): `musdb18hq:PATH`.

    PATH/
      train/                          100 songs
        Artist - Title/
          mixture.wav                 the sum of the stems: left out
          drums.wav  bass.wav  vocals.wav  other.wav
      test/                           50 songs

The splits are the collection's: `test` is `test`, and 14 named songs of `train` are `validation`, those of the
collection's own tool. Each song is its own group, for some artists have songs on both sides.
"""

from collections.abc import Iterator

from data_pipeline import decode, files
from data_pipeline.song import Rejected, Song

_STEMS = ("drums", "bass", "vocals", "other")
_VALIDATION = (  # https://github.com/sigsep/sigsep-mus-db, musdb/configs/mus.yaml
    "ANiMAL - Rockshow",
    "Actions - One Minute Smile",
    "Alexander Ross - Goodbye Bolero",
    "Clara Berry And Wooldog - Waltz For My Victims",
    "Fergessen - Nos Palpitants",
    "James May - On The Line",
    "Johnny Lokke - Promises & Lies",
    "Leaf - Summerghost",
    "Meaxic - Take A Step",
    "Patrick Talbot - A Reason To Leave",
    "Skelpolu - Human Mistakes",
    "Traffic Experiment - Sirens",
    "Triviul - Angelsaint",
    "Young Griffo - Pennies",
)

load = decode.load_stems


def find(folder: str) -> Iterator[Song | Rejected]:
    """The songs of `train` and `test`, by name."""
    members = files.list_files(folder)
    for split, name in dict.fromkeys(tuple(path.split("/")[:2]) for path in members if path.count("/") == 2):
        if split not in ("train", "test") or name.startswith("."):
            continue
        song_id = f"musdb18hq/{name}"
        path = files.join(folder, split, name)
        missing = [f"{stem}.wav" for stem in _STEMS if f"{split}/{name}/{stem}.wav" not in members]
        if missing:
            yield Rejected(song_id, path, f"no {', '.join(missing)}")
            continue
        yield Song(
            song_id=song_id,
            group_id=song_id,
            kind="musdb18hq",
            files=tuple((stem, files.join(path, f"{stem}.wav")) for stem in _STEMS),
            title=name.partition(" - ")[2] or name,
            split="validation" if split == "train" and name in _VALIDATION else split,
        )
