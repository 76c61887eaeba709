"""Slakh2100, songs of the Lakh MIDI dataset played by sampled instruments (Manilow et al. 2019): `slakh2100:PATH`.

    PATH/
      train/  validation/  test/      or the tracks themselves, as in BabySlakh; omitted/ is left out: its songs are
        Track00001/                   others of the collection once more
          metadata.yaml               UUID: name of the MIDI file in Lakh
                                      stems: {S00: {is_drum: false, program_num: 30, audio_rendered: true,
                                                    midi_program_name: Distortion Guitar, ...}, ...}
          stems/S00.flac              or .wav
          mix.flac, all_src.mid, MIDI/S00.mid: left out

Stems are added up by `notes.stem_of_program`. Those that were never rendered are not in the mix either. The splits
are the collection's, and songs from one MIDI file are one group.
"""

from collections.abc import Collection, Iterator

import yaml

from data_pipeline import decode, files
from data_pipeline.song import Rejected, Song
from subtractive_jax.errors import UserError
from subtractive_jax.representation.notes import stem_of_program

load = decode.load_stems
_SPLITS = ("train", "validation", "test")


def find(folder: str) -> Iterator[Song | Rejected]:
    """The songs of a folder, by path."""
    members = files.list_files(folder)
    for path in members:
        relative, _, name = path.rpartition("/")
        split = files.name(relative.rpartition("/")[0])
        if name != "metadata.yaml" or not relative or split == "omitted":
            continue
        song_id = f"slakh2100/{files.name(relative)}"
        try:
            yield _song(song_id, folder, relative, members, split if split in _SPLITS else "")
        except UserError as error:
            yield Rejected(song_id, files.join(folder, relative), str(error))


def _song(song_id: str, folder: str, relative: str, members: Collection[str], split: str) -> Song:
    try:
        data = yaml.safe_load(files.read_bytes(files.join(folder, relative, "metadata.yaml")))
        rendered = {name: source for name, source in data["stems"].items() if source["audio_rendered"]}
        uuid = str(data["UUID"])
        instruments: dict[str, set[str]] = {}
        paths = []
        for name, source in rendered.items():
            program, drums = int(source["program_num"]), bool(source["is_drum"])
            if not drums and program not in range(128):
                raise ValueError(f"{name} has the program {program}")
            stem = stem_of_program(program, drums)
            instruments.setdefault(stem, set()).add(str(source["midi_program_name"]))
            paths.append((stem, _audio(f"{relative}/stems/{name}", members)))
    except UserError:
        raise
    except Exception as error:  # pyyaml raises whatever the damaged text leads to
        reason = " ".join(str(error).split())
        raise UserError(f"metadata.yaml is not as Slakh writes it ({type(error).__name__}: {reason})") from error
    if len(instruments) < 2:
        raise UserError("fewer than two stems")
    return Song(
        song_id=song_id,
        group_id=f"slakh2100/{uuid}",
        kind="slakh2100",
        files=tuple((stem, files.join(folder, path)) for stem, path in paths),
        tags={"stems": {stem: {"instruments": sorted(names)} for stem, names in instruments.items()}},
        split=split,
    )


def _audio(path: str, members: Collection[str]) -> str:
    for suffix in (".flac", ".wav"):
        if path + suffix in members:
            return path + suffix
    raise UserError(f"no such file: {path}.flac")
