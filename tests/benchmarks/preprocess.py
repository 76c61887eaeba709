"""Preprocessing without separation and language model, against the loop over files that one would write with librosa.

python -m tests.benchmarks.preprocess [--cases=ratio,parts,hour,growth] [--suffix=wav] [--songs=4] [--minutes=3]

The material is the shipped songs of four stems, rendered at 44.1 kHz, made stereo and repeated. Both sides make the
same triples: windows as FLAC, loudness of every context, and mel spectrograms of mix, context and stem at the context's
gain. The loop writes the mix of a window once; ours writes it with every stem, looks for duplicates, and reads windows
back for the mel, as making `latents` does.

- `ratio`: all programs in turn, each in a process of its own, which first does songs of ten seconds, twice: the first
  time is printed as start-up, the second is subtracted. CPU seconds count all processes.
- `parts`: seconds of one core for each part of the work, and for the FFTs of the mel spectrograms alone.
- `hour`: a song of one hour in one process.
- `growth`: two workers and collections of 0.1, 1 and 10 hours, most of them hard links, so that the disk holds one.
"""

import collections
import contextlib
import functools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile
from absl import app, flags

if TYPE_CHECKING:
    from data_pipeline.song import Song

_RATE = 44_100  # Hz
_SHORT_SECONDS = 10
_WORKERS = {"one process": [], "two workers": ["direct_running_mode=multi_processing", "direct_num_workers=2"]}
_PROGRAMS = ("plain loop", *_WORKERS)
_LINK_SECONDS = 180
_HOURS = (0.1, 1.0, 10.0)
_MEL_BATCH = 8  # examples, as for latents

_CASES = flags.DEFINE_list("cases", ["ratio", "parts", "hour", "growth"], "What to measure.")
_SUFFIX = flags.DEFINE_enum("suffix", "wav", ("wav", "flac"), "Format of the stems.")
_SONGS = flags.DEFINE_integer("songs", 4, "Songs of `ratio` and `parts`.", 1, 7)
_MINUTES = flags.DEFINE_float("minutes", 3.0, "Length of each.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Times that each program of `ratio` runs.", 1)
_CHILD = flags.DEFINE_list("child", [], "Of one process: a program, windows or mels, folders of songs.")


def _config() -> Any:
    from configs import tiny

    config = tiny.get_config()
    config.data.songs_per_shard = 1
    return config


def _rendered() -> Iterator[dict[str, np.ndarray]]:
    """Shipped songs, int16 `[samples, 2]` by stem."""
    from data_pipeline import sources
    from data_pipeline.song import Tools

    for song in sources.find_songs([]).songs:
        recording = sources.load(song, _RATE, Tools())
        if recording.stems == tuple(_config().data.stems):
            mono = np.concatenate(list(recording.blocks), axis=1)
            left, right = (np.roll(mono, shift, axis=1) for shift in (0, 300))  # a few ms of width
            stereo = np.stack([left, right], axis=-1) / (2.0 * np.abs(mono).max())
            yield dict(zip(recording.stems, (32767 * stereo).astype(np.int16), strict=True))


def _write_songs(folder: Path, count: int, seconds: float, suffix: str) -> None:
    for i, (_, stems) in enumerate(zip(range(count), _rendered(), strict=False)):
        song = folder / f"song{i}"
        song.mkdir(parents=True)
        for stem, audio in stems.items():
            with soundfile.SoundFile(song / f"{stem}.{suffix}", "w", _RATE, 2, "PCM_16") as file:
                for start in range(0, int(seconds * _RATE), len(audio)):
                    file.write(audio[: int(seconds * _RATE) - start])


def _plain(songs: str, out: str) -> None:
    import librosa
    import pyloudnorm

    config = _config()
    mel = config.representation
    length, rate = mel.window_frames * mel.hop_length, mel.sample_rate
    spectrogram = functools.partial(
        librosa.feature.melspectrogram,
        sr=rate,
        n_fft=mel.n_fft,
        win_length=mel.win_length,
        hop_length=mel.hop_length,
        n_mels=mel.n_mels,
        fmin=mel.fmin,
        fmax=mel.fmax,
        power=1.0,
    )
    for song in sorted(Path(songs).iterdir()):
        stems = {path.stem: librosa.load(path, sr=rate, mono=True)[0] for path in sorted(song.iterdir())}
        mix = np.sum(list(stems.values()), axis=0)
        starts = range(0, len(mix) - length + 1, length)
        for start in starts:
            soundfile.write(f"{out}/{song.name}-{start}-mix.flac", mix[start : start + length], rate, "PCM_16")
        for name in config.data.stems:
            stem, context = stems[name], mix - stems[name]
            loudness = pyloudnorm.Meter(rate).integrated_loudness(context)
            gain = 10.0 ** ((config.data.loudness_lufs - loudness) / 20.0)
            quiet = 10.0 ** (config.data.min_stem_level_db / 20.0)
            levels = [quiet * np.sqrt(np.mean(signal**2)) for signal in (stem, context)]
            for start in starts:
                windows = [signal[start : start + length] for signal in (mix, context, stem)]
                if any(np.sqrt(np.mean(w**2)) < level for w, level in zip(windows[1:], levels, strict=True)):
                    continue
                for kind, window in zip(("context", "stem"), windows[1:], strict=True):
                    soundfile.write(f"{out}/{song.name}-{start}-{name}-{kind}.flac", window, rate, "PCM_16")
                mels = [np.log(np.maximum(spectrogram(y=gain * window), mel.log_floor)) for window in windows]
                np.save(f"{out}/{song.name}-{start}-{name}.npy", np.stack(mels).astype(np.float16))


@functools.cache
def _mel_encode() -> Callable[[np.ndarray], Any]:
    import jax

    from subtractive_jax.representation.mel import Mel

    return jax.jit(Mel.from_config(_config().representation.to_dict()).encode)


def _mels(data_dir: str) -> None:
    """Reads windows and encodes them in batches, as `encode.py` does, up to the autoencoder."""
    from data_pipeline import dataset
    from subtractive_jax import records
    from subtractive_jax.representation.audio import read_audio, to_mono

    folder = dataset.folder(data_dir, "windows")
    audio: list[np.ndarray] = []
    for shard in sorted(Path(folder).glob("*.tfrecord-*-of-?????")):
        for payload in dataset.read_shard(str(shard)):
            raw = records.decode_example(payload)
            window = {key: records.decode_feature(feature, raw[key]) for key, feature in records.WINDOWS.items()}
            audio += [to_mono(read_audio(window[key])[0]) * window["gain"] for key in ("mix", "context", "stem")]
            if len(audio) == 3 * _MEL_BATCH:
                np.asarray(_mel_encode()(np.stack(audio)))
                audio = []
    if audio:
        np.asarray(_mel_encode()(np.stack(audio)))


def _build(songs: str, out: str, program: str) -> None:
    from data_pipeline import pipeline

    with contextlib.redirect_stdout(sys.stderr):
        pipeline.build_windows(_config(), out, [f"stems:{songs}"], _WORKERS[program])


def _usage() -> dict[str, float]:
    own, others = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return dict(
        wall=time.perf_counter(),
        cpu=sum(usage.ru_utime + usage.ru_stime for usage in (own, others)),
        own_mb=own.ru_maxrss / 1024,
        worker_mb=others.ru_maxrss / 1024,
    )


def _measure(program: str, until: str, *folders: str) -> list[dict[str, float]]:
    """Of each folder, in this process and in turn: seconds; bytes written; the largest memory so far, without mels."""
    figures = []
    for songs in folders:
        with tempfile.TemporaryDirectory() as out:
            before = _usage()
            if program == "plain loop":
                _plain(songs, out)
                built = after = _usage()
            else:
                _build(songs, out, program)
                built = _usage()
                if until == "mels":
                    _mels(out)
                after = _usage()
            size = sum(path.stat().st_size for path in Path(out).rglob("*") if path.is_file())
        clocks = {clock: after[clock] - before[clock] for clock in ("wall", "cpu")}
        build_clocks = {f"build_{clock}": built[clock] - before[clock] for clock in ("wall", "cpu")}
        figures.append(built | clocks | build_clocks | {"bytes": size})
    return figures


def _run(*child: str) -> list[dict[str, float]]:
    command = [sys.executable, "-m", "tests.benchmarks.preprocess", f"--child={','.join(child)}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def _ratio(root: Path) -> None:
    short, long = str(root / "short"), str(root / "long")
    _write_songs(Path(short), _SONGS.value, _SHORT_SECONDS, _SUFFIX.value)
    _write_songs(Path(long), _SONGS.value, 60.0 * _MINUTES.value, _SUFFIX.value)
    rounds = [
        {program: _run(program, "mels", short, short, long) for program in _PROGRAMS} for _ in range(_ROUNDS.value)
    ]
    seconds = _SONGS.value * (60.0 * _MINUTES.value - _SHORT_SECONDS)
    print(f"{_SONGS.value} songs of {_MINUTES.value:g} minutes, 4 stems, {_SUFFIX.value}; medians of {_ROUNDS.value}")
    loop: dict[str, float] = {}
    for program in _PROGRAMS:
        spent = {
            clock: statistics.median(measured[program][2][clock] - measured[program][1][clock] for measured in rounds)
            for clock in ("wall", "cpu", "build_cpu")
        }
        loop = loop or spent
        spent["start_up"] = statistics.median(measured[program][0]["wall"] for measured in rounds)
        print(
            f"{program:12} {spent['wall']:6.2f} s, {spent['cpu']:6.2f} CPU s (build alone {spent['build_cpu']:.2f}), "
            f"{seconds / spent['cpu']:.0f} times real time a core; start-up {spent['start_up']:.1f} s; "
            f"loop / this: {loop['wall'] / spent['wall']:.2f} wall, {loop['cpu'] / spent['cpu']:.2f} CPU",
            flush=True,
        )


def _parts(root: Path) -> None:
    import scipy.fft

    from data_pipeline import dataset, decode, duplicates, shards, sources, windows
    from data_pipeline.song import Tools
    from subtractive_jax.representation.audio import flac_bytes, read_audio
    from subtractive_jax.representation.level import LoudnessMeter

    _write_songs(root, _SONGS.value, 60.0 * _MINUTES.value, _SUFFIX.value)
    songs = sources.find_songs([f"stems:{root}"]).songs
    config = _config()
    mel, data = config.representation, config.data
    length = mel.window_frames * mel.hop_length
    spent: dict[str, float] = collections.defaultdict(float)

    @contextlib.contextmanager
    def timed(part: str) -> Iterator[None]:
        since = time.process_time()
        yield
        spent[part] += time.process_time() - since

    def drain(rate: int, song: "Song") -> None:
        for _, path in song.files:
            collections.deque(decode.open_audio(path, rate, []), maxlen=0)

    writer = shards.WriteWindows("", mel.to_dict(), data.to_dict(), Tools())
    writer.setup()
    for song in songs:
        with timed("decode, downmix"):
            drain(_RATE, song)
        with timed("decode, downmix, resample"):
            drain(mel.sample_rate, song)
        with timed("audit for duplicates"):
            duplicates.signature(song)
        recording = sources.load(song, mel.sample_rate, Tools())
        blocks = list(recording.blocks)
        recording.blocks = iter(blocks)
        with timed("loudness"):
            meter = LoudnessMeter(mel.sample_rate, len(recording.stems))
            for block in blocks:
                meter.add(block)
        with contextlib.ExitStack() as stack:
            with timed("loudness, levels, temporary file"):
                heard = stack.enter_context(windows.hear(recording, mel.sample_rate, data.stems))
            limits = (length, length, data.min_stem_level_db, data.loudness_lufs)
            with timed("triples"):
                triples = list(windows.triples(heard, heard.sets, *limits))
        signals = [signal for triple in triples for signal in (triple.mix, triple.context, triple.stem)]
        with timed("FLAC, if all were encoded"):
            coded = [flac_bytes(signal, mel.sample_rate) for signal in signals]
        shard = shards.Shard("train", 0, 1, (song,), ((),))
        with timed("all from file to examples"):
            examples = list(writer.examples(shard, shards.Report()))
        with timed("protobuf, TFRecord"):
            payloads = (dataset.serialize(writer.features, example) for example in examples)
            dataset.write_shard(str(root / f"{song.song_id}.tfrecord"), payloads)
        with timed("FLAC decode"):
            decoded = [read_audio(content)[0][0] for content in coded]
        batches = np.stack(decoded[: len(decoded) // 24 * 24]).reshape(-1, 3 * _MEL_BATCH, length)
        np.asarray(_mel_encode()(batches[0]))
        with timed("mel"):
            for batch in batches:
                np.asarray(_mel_encode()(batch))
        for batch in batches.reshape(-1, length):
            frames = np.ascontiguousarray(np.lib.stride_tricks.sliding_window_view(batch, mel.n_fft)[:: mel.hop_length])
            with timed("the mel's FFTs alone"):
                scipy.fft.rfft(frames)
    print(f"{_SONGS.value} songs of {_MINUTES.value:g} minutes, 4 stems, {_SUFFIX.value}")
    for part, seconds in spent.items():
        print(f"{part:34} {seconds:6.2f} CPU s")


def _tell(what: str, hours: float, figures: dict[str, float]) -> None:
    print(
        f"{what}: {figures['build_wall']:.0f} s, {figures['build_cpu']:.0f} CPU s "
        f"({figures['build_cpu'] / hours:.0f} an hour of music); peak memory {figures['own_mb']:.0f} MB, of the "
        f"largest child {figures['worker_mb']:.0f} MB; {figures['bytes'] / hours / 1e6:.0f} MB of windows an hour",
        flush=True,
    )


def _hour(root: Path) -> None:
    _write_songs(root, 1, 3600.0, _SUFFIX.value)
    _tell("a song of an hour, one process", 1.0, _run("one process", "windows", str(root))[0])


def _growth(root: Path) -> None:
    _write_songs(root / "songs", _SONGS.value, _LINK_SECONDS, _SUFFIX.value)
    originals = sorted((root / "songs").iterdir())
    for hours in _HOURS:
        folder = root / f"{hours:g}"
        for i in range(round(hours * 3600 / _LINK_SECONDS)):
            shutil.copytree(originals[i % len(originals)], folder / f"song{i:04d}", copy_function=os.link)
        _tell(f"{hours:g} hours, two workers", hours, _run("two workers", "windows", str(folder))[0])


def main(argv: list[str]) -> None:
    del argv
    if _CHILD.value:
        print(json.dumps(_measure(*_CHILD.value)))
        return
    for case in _CASES.value:
        with tempfile.TemporaryDirectory() as root:
            {"ratio": _ratio, "parts": _parts, "hour": _hour, "growth": _growth}[case](Path(root))


if __name__ == "__main__":
    app.run(main)
