"""Audio files as streams: the samples of the whole file, in bounded memory, and what becomes of odd and bad files."""

import datetime
import io
import struct
import tracemalloc

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline import decode
from subtractive_jax.errors import UserError
from subtractive_jax.representation.audio import read_audio, resample, to_mono

ENCODINGS = {"wav": "PCM_16", "flac": "PCM_16", "ogg": "VORBIS", "mp3": "MPEG_LAYER_III"}


def music(seconds=1.0, rate=44_100, channels=2, seed=0):
    """Decaying noise bursts over a chord, `[samples, channels]`."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * rate)) / rate
    chord = sum(np.sin(2 * np.pi * frequency * time) for frequency in (220, 277, 330))
    bursts = rng.standard_normal((len(time), channels)) * np.exp(-8 * (time % 0.25))[:, None]
    return (0.1 * chord[:, None] + 0.1 * bursts).astype(np.float32)


def encoded(suffix="wav", encoding=None, samples=None, rate=44_100):
    buffer = io.BytesIO()
    samples = music(rate=rate) if samples is None else samples
    soundfile.write(buffer, samples, rate, format=suffix.upper(), subtype=encoding or ENCODINGS[suffix])
    return buffer.getvalue()


def read(path, rate=16_000, channels=1):
    """(all samples of the stream, notes)."""
    notes: list[str] = []
    blocks = list(decode.open_audio(str(path), rate, notes, channels))
    assert all(block.dtype == np.float32 for block in blocks)
    return np.concatenate(blocks, axis=-1), notes


@pytest.fixture
def write(tmp_path):
    def write(content, name="song.wav"):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


@pytest.mark.parametrize("suffix", ENCODINGS)
@pytest.mark.parametrize("rate", (16_000, 44_100, 48_000))
def test_a_stream_is_the_whole_file_read_and_resampled(write, suffix, rate):
    path = write(encoded(suffix, samples=music(7.1)), f"song.{suffix}")
    whole, own_rate = read_audio(path)
    expected = resample(to_mono(whole), own_rate, rate)
    stream, notes = read(path, rate)
    assert stream.shape == expected.shape and notes == []
    np.testing.assert_allclose(stream, expected, rtol=0, atol=1e-7)
    stereo, _ = read(path, rate, channels=2)
    np.testing.assert_allclose(stereo, resample(whole, own_rate, rate), rtol=0, atol=1e-7)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(frames=st.integers(1, 3_000), rate=st.integers(4_000, 192_000), to=st.sampled_from((8_000, 16_000, 44_100)))
def test_every_length_and_rate_gives_the_exact_length(write, frames, rate, to):
    path = write(encoded(samples=music()[:frames], rate=rate))
    if round(frames * to / rate) == 0:
        with pytest.raises(UserError, match="no audio samples"):
            read(path, to)
    else:
        expected = resample(to_mono(read_audio(path)[0]), rate, to)
        np.testing.assert_allclose(read(path, to)[0], expected, rtol=0, atol=1e-7)


def test_memory_does_not_grow_with_the_length(write):
    peaks = []
    for seconds in (20, 80):
        path = write(encoded(samples=np.tile(music(1.0), (seconds, 1))))
        tracemalloc.start()
        samples = sum(len(block) for block in decode.open_audio(str(path), 16_000, []))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert samples == seconds * 16_000
    assert peaks[1] < 1.1 * peaks[0] < 4e6


@pytest.mark.parametrize(
    ("rate", "channels", "note"),
    (
        (8_000, 1, "resampled from 8000 Hz"),
        (192_000, 2, "resampled from 192000 Hz"),
        (44_100, 6, "6 channels averaged"),
    ),
)
def test_unusual_files_are_converted_and_noted(write, rate, channels, note):
    samples = music(0.5, rate, channels)
    stream, notes = read(write(encoded(encoding="PCM_24", samples=samples, rate=rate), "süß [1] 'x'.wav"))
    assert notes == [f"süß [1] 'x'.wav: {note}"]
    expected = resample(samples.mean(axis=1), rate, 16_000)
    np.testing.assert_allclose(stream, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("channels", (1, 6))
def test_stereo_of_other_files_is_their_mean_twice(write, channels):
    path = write(encoded(samples=music(0.2, channels=channels)))
    stereo, mono = read(path, channels=2)[0], read(path)[0]
    assert stereo.shape == (2, 3_200)
    np.testing.assert_allclose(stereo, np.stack([mono, mono]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("length", (0x7FFFFFFF, 0xFFFFFFFF))
def test_wavs_written_to_a_pipe_are_read_whole(write, length):
    content = encoded()
    at = content.index(b"data") + 4
    assert len(read(write(content[:at] + struct.pack("<I", length) + content[at + 4 :]))[0]) == 16_000


def test_flacs_that_do_not_count_their_frames_are_read_whole(write):
    content = bytearray(encoded("flac"))
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    assert len(read(write(bytes(content)))[0]) == 16_000


def test_mp3s_without_xing_header_are_read_whole(write):
    """As old encoders wrote them, with a picture in front."""
    buffer = io.BytesIO()
    soundfile.write(buffer, music(), 44_100, format="MP3", bitrate_mode="CONSTANT", compression_level=0.5)
    content = buffer.getvalue()
    header = content.index(content[:2], 4)
    tag = b"ID3\x04\x00\x00" + bytes((0, 1, 0, 0)) + bytes(1 << 14)
    stream, _ = read(write(tag + content[header:], "song.mp3"))
    assert 16_000 <= len(stream) < 17_000


@pytest.mark.parametrize("frames", (1_000, 5_000, 44_100))
def test_oggs_of_any_length_are_whole(write, frames):
    content = encoded("ogg", samples=music()[:frames])
    assert len(read(write(content), 44_100)[0]) == frames
    assert len(read(write(content + b"TAG" + bytes(125)), 44_100)[0]) == frames


def test_big_wavs_are_read(write):
    buffer = io.BytesIO()
    soundfile.write(buffer, music(), 44_100, format="RF64", subtype="PCM_16")
    assert len(read(write(buffer.getvalue()))[0]) == 16_000


def lying(change, frames):
    """A wav whose header announces `frames` more frames than there are, or fewer."""
    content = encoded()
    at = content.index(change) + len(change)
    (size,) = struct.unpack("<I", content[at : at + 4])
    return content[:at] + struct.pack("<I", size + 4 * frames) + content[at + 4 :]


def not_finite(position, value):
    samples = music()
    samples[position, 1] = value
    return encoded(encoding="FLOAT", samples=samples)


def with_channels(channels):
    content = bytearray(encoded())
    content[22:24] = struct.pack("<H", channels)
    return bytes(content)


def with_rate(rate):
    content = bytearray(encoded())
    content[24:28] = struct.pack("<I", rate)
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "reason"),
    (
        (b"", "is empty"),
        (b"These are the drums, honestly.\n" * 50, "not readable as audio"),
        (bytes(4_096), "not readable as audio"),
        (encoded(samples=np.zeros((0, 2), np.float32)), "no audio samples"),
        (encoded()[:50_000], "cut short"),
        (encoded("flac")[:50_000], "not readable as audio|cut short"),
        (encoded("ogg")[:12_000], "cut short"),
        (encoded("ogg")[:-1], "cut short"),
        (encoded("mp3")[:12_000], "cut short"),
        (lying(b"data", 1_000), "cut short"),
        (not_finite(30_000, np.nan), "NaN or infinite"),
        (not_finite(0, np.inf), "NaN or infinite"),
        (not_finite(-1, -np.inf), "NaN or infinite"),
        (with_channels(0), "not readable as audio"),
        (with_rate(1), "not possible"),
        (with_rate(3_000_000), "not possible"),
    ),
)
def test_bad_files_are_refused_in_one_line_that_names_them(write, content, reason):
    path = write(content)
    with pytest.raises(UserError, match=reason) as error:
        read(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_missing_files_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.wav"):
        read(tmp_path / "nothing.wav")


def test_a_read_that_fails_is_not_taken_for_the_end(write, monkeypatch):
    class Broken(io.BytesIO):
        def read(self, size=-1):
            if self.tell() > 50_000:
                raise OSError("connection lost")
            return super().read(size)

    monkeypatch.setattr(decode.files, "open_file", lambda path: Broken(encoded()))
    with pytest.raises(OSError, match="connection lost"):
        read("song.wav")


@st.composite
def damaged(draw):
    """A real file with bytes overwritten, removed, repeated or cut off."""
    suffix = draw(st.sampled_from(sorted(REAL)))
    content = bytearray(REAL[suffix])
    for _ in range(draw(st.integers(1, 6))):
        # Headers are short, and most of what can go wrong is in them.
        at = draw(st.integers(0, 100) | st.integers(0, len(content)))
        length = draw(st.integers(1, 8) | st.integers(1, 2_000))
        what = draw(st.sampled_from(("overwrite", "remove", "repeat", "cut")))
        if what == "overwrite":
            content[at : at + length] = draw(st.binary(min_size=1, max_size=8))[:length]
        elif what == "remove":
            del content[at : at + length]
        elif what == "repeat":
            content[at:at] = content[at : at + length]
        else:
            del content[max(at, 50) :]
    return suffix, bytes(content)


REAL = {suffix: encoded(suffix, samples=music(0.3, 22_050), rate=22_050) for suffix in ENCODINGS} | {
    "float.wav": encoded(encoding="FLOAT", samples=music(0.1, 22_050), rate=22_050)
}


@settings(
    max_examples=400,
    deadline=datetime.timedelta(seconds=5),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(damaged())
def test_damaged_files_give_finite_samples_or_a_user_error(write, file):
    suffix, content = file
    try:
        stream, _ = read(write(content, f"song.{suffix}"))
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert np.isfinite(stream).all() and len(stream)


def stream(length, value=1.0, block=1_000):
    whole = np.full(length, value, np.float32)
    return (whole[start : start + block] for start in range(0, length, block))


def test_streams_of_one_stem_are_added_up_and_blocks_need_not_agree():
    streams = [("drums", stream(300_000, 1, 7)), ("bass", stream(300_000, 2, 250_000)), ("drums", stream(300_000, 4))]
    notes: list[str] = []
    blocks = list(decode.together(streams, 16_000, notes))
    assert all(block.shape[0] == 2 and block.dtype == np.float32 for block in blocks) and len(blocks) == 3
    np.testing.assert_array_equal(np.concatenate(blocks, axis=1), np.repeat([[5.0], [2.0]], 300_000, axis=1))
    assert notes == []


def test_small_differences_in_length_are_padded_and_noted():
    notes: list[str] = []
    blocks = decode.together([("drums", stream(16_000)), ("bass", stream(15_200))], 16_000, notes)
    whole = np.concatenate(list(blocks), axis=1)
    assert whole.shape == (2, 16_000) and not whole[1, 15_200:].any() and whole[1, :15_200].all()
    assert notes == ["bass lasts 0.95 s and drums 1.00 s: padded"]


def test_stems_of_different_lengths_are_refused():
    streams = [("drums", stream(16_000)), ("bass", stream(15_199)), ("keys", stream(20_000))]
    with pytest.raises(UserError, match=r"bass lasts 0\.95 s and keys 1\.25 s"):
        list(decode.together(streams, 16_000, []))
