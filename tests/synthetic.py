"""Datasets and models of noise, in the real formats, made without TensorFlow: for tests of the trainer."""

import io
import json
import struct
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
import soundfile
from tokenizers import Tokenizer

from subtractive_jax import fingerprint, parts, records
from subtractive_jax.representation import notes as midi
from subtractive_jax.weights import model_folder

_GENRES = ("rock", "reggae", "jazz")
_TEXT_TOKENS = 5


def _varint(value: int) -> bytes:
    value &= 2**64 - 1
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def encode_example(features: dict[str, list[bytes] | list[int] | list[float]]) -> bytes:
    """A serialised `tf.train.Example`."""
    entries = []
    for key, values in features.items():
        if isinstance(values[0], bytes):
            value = _message(1, b"".join(_message(1, item) for item in values))
        elif isinstance(values[0], float):
            value = _message(2, _message(1, struct.pack(f"<{len(values)}f", *values)))
        else:
            value = _message(3, _message(1, b"".join(map(_varint, values))))
        entries.append(_message(1, _message(1, key.encode()) + _message(2, value)))
    return _message(1, b"".join(entries))


def read_payloads(path: Path) -> list[bytes]:
    """All payloads of a TFRecord file."""
    with open(path, "rb") as file:
        return list(records.read_records(file, str(path)))


def _encode(schema: dict[str, records.Feature], example: dict[str, Any]) -> bytes:
    def values(feature: records.Feature, value: Any) -> list:
        if feature.kind == "texts":
            return [text.encode() for text in value]
        if feature.kind == "text":
            return [value.encode()]
        if feature.kind == "bytes":
            return [value]
        if feature.kind == "tensor":
            return [np.asarray(value, feature.dtype).tobytes()]
        return [float(value)] if feature.dtype is np.float32 else [int(value)]

    return encode_example({key: values(feature, example[key]) for key, feature in schema.items()})


def _features_json(schema: dict[str, records.Feature], shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    def feature(key: str, kind: str) -> dict[str, Any]:
        if kind != "tensor":
            return {}
        return {"tensor": {"shape": {"dimensions": [str(size) for size in shapes[key]]}, "encoding": "bytes"}}

    return {"featuresDict": {"features": {key: feature(key, item.kind) for key, item in schema.items()}}}


def _write(data_dir: Path, name: str, counts: dict[str, int], make: Any, metadata: dict, shapes: dict) -> None:
    directory = records.dataset_dir(data_dir, name)
    directory.mkdir(parents=True)
    schema = records.SCHEMAS[name]
    generator = np.random.default_rng(0)
    for split, count in counts.items():
        shards = 2 if split == "train" else 1
        for shard in range(shards):
            payloads = (_encode(schema, make(i, generator)) for i in range(shard, count, shards))
            path = directory / f"{name}-{split}.tfrecord-{shard:05d}-of-{shards:05d}"
            path.write_bytes(b"".join(map(records.frame, payloads)))
    (directory / "features.json").write_text(json.dumps(_features_json(schema, shapes)))
    (directory / "metadata.json").write_text(json.dumps(dict(metadata, schema_version=records.SCHEMA_VERSION)))


def _about(i: int, stem: str) -> dict[str, Any]:
    genre = _GENRES[i % len(_GENRES)]
    return dict(
        stem_name=stem,
        song_id=f"song-{i}",
        group_id=f"song-{i}",
        start_seconds=0.0,
        gain=1.0,
        tags=json.dumps({"genre": genre, "tempo": 90.0 + i, "stems": {stem: {"pieces": {"snare": i}}, "other": {}}}),
        caption=f"{genre} song number {i}",
        instructions=[f"Add {genre} {stem}", f"Put in {stem} for a {genre} song {i}"],
    )


def write_windows(data_dir: Path, config: ml_collections.ConfigDict, train: int = 12, validation: int = 3) -> None:
    """Sines and noise."""
    representation = config.representation
    samples = representation.window_frames * representation.hop_length

    def make(i: int, generator: np.random.Generator) -> dict[str, Any]:
        time = np.arange(samples) / representation.sample_rate
        context = 0.3 * np.sin(2 * np.pi * 110.0 * (1 + i) * time)
        stem = 0.1 * generator.standard_normal(samples)

        def flac(audio: np.ndarray) -> bytes:
            buffer = io.BytesIO()
            soundfile.write(buffer, audio, representation.sample_rate, format="FLAC", subtype="PCM_16")
            return buffer.getvalue()

        audio = dict(mix=flac(context + stem), context=flac(context), stem=flac(stem))
        return audio | dict(sample_rate=representation.sample_rate) | _about(i, config.data.stems[i % 2])

    metadata = dict(representation=representation.to_dict())
    _write(data_dir, "windows", dict(train=train, validation=validation), make, metadata, {})


def window_of_notes(song: dict[str, list[tuple[float, float, int]]]) -> bytes:
    """Sixteen beats of (beat, beats, pitch) by stem as in `windows`: beat 0 is the bar line, one more is before it."""
    tracks = {}
    for stem, played in song.items():
        rows = [(round((1 + at) * 480), round((1 + at + long) * 480), pitch, 80) for at, long, pitch in played]
        tracks[stem] = np.array(sorted(rows), midi.NOTE)
    return midi.write(480, tracks, {}, [(0, 500_000)], [(0, 1, 4), (480, 4, 4)], 17 * 480)


def write_note_windows(data_dir: Path, config: ml_collections.ConfigDict, counts: dict[str, int]) -> None:
    """Songs of drums, bass, guitar and keys in several keys and rhythms, of each a window for every missing part."""
    stems = ("drums", "bass", "guitar", "keys")

    def make(i: int, generator: np.random.Generator) -> dict[str, Any]:
        del generator
        song, key, stem = i // len(stems), i // len(stems) % 12, stems[i % len(stems)]
        chords = [[(key + step + tone) % 12 for tone in (0, 4, 7)] for step in (0, 5, 7, 0)]
        every = (0.5, 1.0, 2.0)[song % 3]
        beats = np.arange(0, 16, every).tolist()
        played = {
            "drums": [(beat, 0.1, 38 if beat % 2 else 36) for beat in beats],
            "bass": [(beat, every, 36 + chords[int(beat // 4)][0]) for beat in beats],
            "guitar": [(beat, 1.0, 48 + tone) for beat in range(song % 2, 16, 2) for tone in chords[beat // 4]],
            "keys": [(4.0 * bar, 4.0, 60 + tone) for bar in range(4) for tone in chords[bar]],
        }
        rest = {name: part for name, part in played.items() if name != stem}
        files = {"mix": played, "context": rest, "stem": {stem: played[stem]}}
        return {name: window_of_notes(parts) for name, parts in files.items()} | dict(sample_rate=0) | _about(i, stem)

    _write(data_dir, "windows", counts, make, dict(representation=config.representation.to_dict()), {})


def write_latents(
    data_dir: Path, config: ml_collections.ConfigDict, parent: Path, train: int = 12, validation: int = 3
) -> None:
    """Noise, marked as encoded by the model folder `parent`."""
    params = model_folder.load(parent).params
    channels, width = config.autoencoder.latent_channels, config.text_encoder.d_model
    stride = 2 ** (len(config.autoencoder.block_out_channels) - 1)
    shape = (config.representation.n_mels // stride, config.representation.window_frames // stride, 2 * channels)

    def make(i: int, generator: np.random.Generator) -> dict[str, Any]:
        latents = {f"{name}_latent": generator.standard_normal(shape) for name in ("mix", "context", "stem")}
        texts = dict(
            instruction_states=generator.standard_normal((2 * _TEXT_TOKENS, width)),
            instruction_lengths=[_TEXT_TOKENS, _TEXT_TOKENS],
            caption_states=generator.standard_normal((_TEXT_TOKENS, width)),
        )
        return latents | texts | _about(i, config.data.stems[i % 2])

    hashes = [fingerprint.params_hash(params[part]) for part in ("autoencoder", "text_encoder")]
    metadata = dict(
        representation=config.representation.to_dict(),
        config_hash=fingerprint.dataset_hash(config.representation.to_dict(), *hashes, records.SCHEMA_VERSION),
        text_padding=config.text_padding,
        null_text_states=np.ones((1, width)).tolist(),
        latent_mean=[0.5] * channels,
        latent_std=[2.0] * channels,
        context_std=[4.0] * channels,
    )
    shapes = {f"{name}_latent": shape for name in ("mix", "context", "stem")}
    shapes |= dict(instruction_states=(-1, width), instruction_lengths=(-1,), caption_states=(-1, width))
    _write(data_dir, "latents", dict(train=train, validation=validation), make, metadata, shapes)


def random_params(shapes: Any, seed: int = 0) -> Any:
    """Parameters of the given shapes with activations of a sensible size; JAX's own initialisers compile for long."""
    generator = np.random.default_rng(seed)

    def leaf(path: Any, shape: jax.ShapeDtypeStruct) -> np.ndarray:
        if path[-1].key == "scale":
            return np.ones(shape.shape, np.float32)
        fan_in = max(np.prod(shape.shape[:-1]), 1)
        return (generator.standard_normal(shape.shape) / np.sqrt(fan_in)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def write_model(path: Path, config: ml_collections.ConfigDict, names: tuple[str, ...], tokenizer: Tokenizer) -> Path:
    """A model folder of untrained parts."""
    params = {part: random_params(parts.network(part, config).shapes()) for part in names}
    model_folder.save(path, model_folder.ModelFiles(config, params, tokenizer), dtype="float32", card="Noise.\n")
    return path
