"""A run's log: scalars, pictures and sounds, read back with TensorBoard's own reader."""

import io
import json

import numpy as np
import pytest
import soundfile
from PIL import Image

from subtractive_jax.training import metrics

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def _png(width, height):
    buffer = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), 200, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def _events(run):
    reader = event_accumulator.EventAccumulator(str(run), size_guidance=dict(scalars=0, images=0, audio=0, tensors=0))
    reader.Reload()
    return reader


def _sine(seconds, sample_rate=16_000):
    return metrics.Sound(np.sin(2 * np.pi * 440 * np.arange(int(seconds * sample_rate)) / sample_rate) / 2, sample_rate)


def test_tensorboard_reads_scalars_pictures_and_sounds(tmp_path):
    sine, picture = _sine(0.5), _png(width=300, height=20)
    with metrics.open_log(tmp_path, 0) as log:
        log(7, dict(loss=0.25), {"preview_0/mel": picture}, {"preview_0/stem": sine})
        log(300, dict(loss=0.125))
    events = _events(tmp_path)
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(7, 0.25), (300, 0.125)]

    (image,) = events.Images("preview_0/mel")
    assert (image.step, image.width, image.height, image.encoded_image_string) == (7, 300, 20, picture)

    (audio,) = events.Audio("preview_0/stem")
    assert (audio.step, audio.sample_rate, audio.length_frames) == (7, 16_000, 8_000)
    assert audio.content_type == "audio/wav"
    samples, sample_rate = soundfile.read(io.BytesIO(audio.encoded_audio_string))
    assert sample_rate == 16_000
    np.testing.assert_allclose(samples, sine.samples, atol=2**-15)


def test_sounds_beyond_full_scale_are_clipped_and_do_not_wrap(tmp_path):
    loud = _sine(0.1)._replace(samples=3.0 * np.ones(1600, np.float32))
    with metrics.open_log(tmp_path, 0) as log:
        log(1, {}, sounds={"loud": loud})
    (audio,) = _events(tmp_path).Audio("loud")
    assert soundfile.read(io.BytesIO(audio.encoded_audio_string))[0].min() > 0.99


def test_lines_hold_the_scalars_and_a_torn_one_is_dropped(tmp_path):
    with metrics.open_log(tmp_path, 0) as log:
        for step in (1, 2, 3):
            log(step, dict(loss=float(step)), {"mel": _png(2, 2)})
    path = tmp_path / metrics.FILE_NAME
    with open(path, "a") as file:
        file.write('{"step": 4, "lo')
    with metrics.open_log(tmp_path, 2) as log:
        log(3, dict(loss=30.0))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [dict(step=1, loss=1.0), dict(step=2, loss=2.0), dict(step=3, loss=30.0)]
    events = _events(tmp_path)
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert [event.step for event in events.Images("mel")] == [1, 2]
