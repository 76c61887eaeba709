"""Preprocessing without separation and language model, against the loop over files that one would write with librosa.

python -m tests.benchmarks.preprocess [--cases=ratio,parts,hour,growth] [--suffix=wav] [--songs=4] [--minutes=3]

The material is the shipped songs of four stems, rendered at 44.1 kHz, made stereo and repeated. Both sides make the same
triples, windows as FLAC, loudness of every context, and mel spectrograms of mix, context and stem at the context's gain.
The loop writes the mix of a window once; ours writes it with every stem, looks for duplicates, and reads windows back
for the mel, as making `latents` does.

- `ratio`: all programs in turn, each in a process of its own. Start-up, which is what the same takes for songs of ten
  seconds, is subtracted and printed apart. CPU seconds count all processes.
- `parts`: seconds of one core for each part of the work, and for the FFTs of the mel spectrograms alone.
- `hour`: a song of one hour in one process.
- `growth`: two workers and collections of 0.1, 1 and 10 hours, most of them hard links, so that the disk holds one.
"""

import contextlib
import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from absl import app, flags

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
_CHILD = flags.DEFINE_list("child", [], "Of one process: a program and folders of songs, each measured.")


def _config() -> Any:
    from configs import tiny

    config = tiny.get_config()
    config.data.songs_per_shard = 1
    return config


def _rendered() -> Iterator[dict[str, np.ndarray]]:
    """Shipped songs, int16 `[samples, 2]` by stem."""
    from data_pipeline import sources
    from data_pipeline.song import Tools

    for song in sources.find_songs([])[0]:
        recording = sources.load(song, _RATE, Tools())
        if recording.stems == tuple(_config().data.stems):
            mono = np.concatenate(list(recording.blocks), axis=1)
            left, right = (np.roll(mono, shift, axis=1) for shift in (0, 300))  # a few ms of width
            stereo = np.stack([left, right], axis=-1) / (2.0 * np.abs(mono).max())
            yield {stem: np.int16(32767 * own) for stem, own in zip(recording.stems, stereo, strict=True)}


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
        mix = sum(stems.values())
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
                np.save(f"{out}/{song.name}-{start}-{name}.npy", np.float16(mels))


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


def _measure(program: str, *folders: str) -> list[dict[str, float]]:
    """Of each folder, in this process and in turn: seconds; the largest memory so far; bytes written."""
    figures = []
    for songs in folders:
        with tempfile.TemporaryDirectory() as out:
            before = _usage()
            if program == "plain loop":
                _plain(songs, out)
            else:
                _build(songs, out, program)
                built = _usage()
                _mels(out)
            after = _usage()
            if program != "plain loop":
                after |= {f"build_{clock}": built[clock] - before[clock] for clock in ("wall", "cpu")}
            size = sum(path.stat().st_size for path in Path(out).rglob("*") if path.is_file())
        figures.append(after | {clock: after[clock] - before[clock] for clock in ("wall", "cpu")} | {"bytes": size})
    return figures


def _run(*child: str) -> list[dict[str, float]]:
    command = [sys.executable, "-m", "tests.benchmarks.preprocess", f"--child={','.join(child)}"]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}
    )
    return json.loads(done.stdout.splitlines()[-1])


def _ratio(root: Path) -> None:
    short, long = str(root / "short"), str(root / "long")
    _write_songs(Path(short), _SONGS.value, _SHORT_SECONDS, _SUFFIX.value)
    _write_songs(Path(long), _SONGS.value, 60.0 * _MINUTES.value, _SUFFIX.value)
    rounds = [{program: _run(program, short, long) for program in _PROGRAMS} for _ in range(_ROUNDS.value)]
    seconds = _SONGS.value * (60.0 * _MINUTES.value - _SHORT_SECONDS)
    print(f"{_SONGS.value} songs of {_MINUTES.value:g} minutes, 4 stems, {_SUFFIX.value}; medians of {_ROUNDS.value}")
    net: dict[tuple[str, str], float] = {}
    for program in _PROGRAMS:
        for clock in ("wall", "cpu"):
            net[program, clock] = statistics.median(r[program][1][clock] - r[program][0][clock] for r in rounds)
        start_up = statistics.median(r[program][0]["wall"] for r in rounds)
        print(
            f"{program:12} {net[program, 'wall']:6.2f} s, {net[program, 'cpu']:6.2f} CPU s "
            f"({seconds / net[program, 'cpu']:.0f} times real time a core); start-up {start_up:.1f} s; "
            f"loop / this: {net['plain loop', 'wall'] / net[program, 'wall']:.2f} wall, "
            f"{net['plain loop', 'cpu'] / net[program, 'cpu']:.2f} CPU"
        )


def _parts(root: Path) -> None:
    import scipy.fft

    from data_pipeline import dataset, decode, duplicates, shards, sources, windows
    from data_pipeline.song import Tools
    from subtractive_jax import records
    from subtractive_jax.representation.audio import flac_bytes, read_audio
    from subtractive_jax.representation.level import LoudnessMeter

    folder = root / "parts"
    _write_songs(folder, _SONGS.value, 60.0 * _MINUTES.value, _SUFFIX.value)
    songs, _ = sources.find_songs([f"stems:{folder}"])
    config = _config()
    rate, length = (
        config.representation.sample_rate,
        config.representation.window_frames * config.representation.hop_length,
    )
    spent: dict[str, float] = {}

    @contextlib.contextmanager
    def timed(part: str) -> Iterator[None]:
        since = time.process_time()
        yield
        spent[part] = spent.get(part, 0.0) + time.process_time() - since

    def drain(at_rate: int) -> None:
        for song in songs:
            for _, path in song.files:
                for _ in decode.open_audio(path, at_rate, []):
                    pass

    with timed("decode, downmix"):
        drain(_RATE)
    with timed("resample"):
        drain(rate)
    spent["resample"] -= spent["decode, downmix"]
    with timed("duplicates audit"):
        for song in songs:
            duplicates.signature(song)
    writer = shards.WriteWindows("", config.representation.to_dict(), config.data.to_dict(), Tools())
    writer.setup()
    for song in songs:
        recording = sources.load(song, rate, Tools())
        blocks = list(recording.blocks)
        recording.blocks = iter(blocks)
        meter = LoudnessMeter(rate, len(recording.stems))
        with timed("loudness"):
            for block in blocks:
                meter.add(block)
        with timed("levels, temporary file"):
            hearing = windows.hear(recording, rate, config.data.stems)
            heard = hearing.__enter__()
        data = config.data
        with timed("windows"):
            triples = list(
                windows.triples(heard, heard.sets, length, length, data.min_stem_level_db, data.loudness_lufs)
            )
        with timed("FLAC encode"):
            coded = [flac_bytes(signal, rate) for t in triples for signal in (t.mix, t.context, t.stem)]
        with timed("all of a song"):
            ...
        hearing.__exit__(None, None, None)
        with timed("FLAC decode"):
            audio = [read_audio(content)[0][0] for content in coded]
        stacked = np.stack(audio[: len(audio) // 24 * 24]).reshape(-1, 24, length)
        np.asarray(_mel_encode()(stacked[0]))
        with timed("mel"):
            for batch in stacked:
                np.asarray(_mel_encode()(batch))
        frames = np.lib.stride_tricks.sliding_window_view(stacked, 1024, axis=-1)[..., ::160, :]
        for batch in frames:
            ready = np.ascontiguousarray(batch)
            with timed("FFTs of the mel"):
                scipy.fft.rfft(ready)
    spent["levels, temporary file"] -= spent["loudness"]
    for part, seconds in spent.items():
        print(f"{part:24} {seconds:6.2f} CPU s")


def main(argv: list[str]) -> None:
    del argv
    if _CHILD.value:
        print(json.dumps(_measure(*_CHILD.value)))
        return
    for case in _CASES.value:
        with tempfile.TemporaryDirectory() as root:
            {"ratio": _ratio, "parts": _parts}[case](Path(root))


if __name__ == "__main__":
    app.run(main)
