"""Songs to stems by Demucs, as a stream: only some seconds around the present place are in memory.

Models are those that Demucs publishes on the Hugging Face hub, or a folder of one's own, in either of Demucs' layouts:

  NAME.yaml           `models: [SIGNATURE, ...]`, and optionally `weights`, `segment`; not needed for a single model
  SIGNATURE.safetensors, or the older SIGNATURE.th or SIGNATURE-CHECKSUM.th

`.th` files are pickles, which Demucs itself would unpickle in full; here only plain values, tensors and Demucs' own
model classes are.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline import files
from data_pipeline.once import once
from data_pipeline.song import Tools
from subtractive_jax.errors import UserError, unknown_name
from subtractive_jax.representation.notes import STEMS

_HUB = "adefossez"  # Demucs' author
PUBLISHED = ("htdemucs", "htdemucs_ft", "htdemucs_6s", "hdemucs_mmi", "mdx", "mdx_extra")
UNITTEST = "demucs_unittest"  # Demucs' own small model with random weights
_STEM_NAMES = {"piano": "keys"} | {name: name for name in STEMS}
_MAX_SEGMENT_SECONDS = 10.0  # the convolutional models' own 44 s take several GB
_OVERLAP = 0.25  # of a segment, as Demucs has it


@dataclasses.dataclass(frozen=True)
class Separator:
    """A loaded Demucs model.

    Attributes:
      model: a `demucs.apply.BagOfModels` or one of its models.
      sample_rate: what it takes and gives, in Hz.
      stems: what it gives, `other` last.
      device: `cpu` or `cuda`.
    """

    model: Any
    sample_rate: int
    stems: tuple[str, ...]
    device: str

    def separate(self, mixture: Callable[[], Iterator[np.ndarray]]) -> Iterator[np.ndarray]:
        """Mono blocks `[stems, samples]` float32 at `sample_rate`, whose sum is the mixture.

        What the model calls other, and what it leaves out, is `other`. The result is that of `demucs.apply.apply_model`
        over the whole song without random shifts, with segments of at most 10 s. Same inputs give the same bytes on
        machines of one kind with as many cores: the order of PyTorch's sums depends on its number of threads.

        Args:
          mixture: opens the song, float32 blocks `[2, samples]` of any lengths at `sample_rate`. It is read twice,
            since Demucs' models expect the level of the whole song.

        Raises:
          UserError: what `mixture` raises.
        """
        mean, deviation = _level(mixture())
        rows = [row for row, source in enumerate(self.model.sources) if source != "other"]
        for segment, estimates in self._estimates((block - mean) / deviation for block in mixture()):
            mono = segment.mean(axis=0) * deviation + mean
            stems = estimates[rows].mean(axis=1) * deviation
            yield np.concatenate([stems, (mono - stems.sum(axis=0))[None]]).astype(np.float32)

    def extract(self, mixture: Callable[[], Iterator[np.ndarray]], stems: Sequence[str]) -> Iterator[np.ndarray]:
        """Stereo blocks `[stems, 2, samples]` float32 of the named stems alone; arguments as in `separate`.

        Raises:
          UserError: the model does not know a stem, and what `mixture` raises.
        """
        rows = {_STEM_NAMES[source]: row for row, source in enumerate(self.model.sources)}
        for stem in stems:
            if stem not in rows:
                raise unknown_name("stem of the separator", stem, rows)
        mean, deviation = _level(mixture())
        for _, estimates in self._estimates((block - mean) / deviation for block in mixture()):
            yield (estimates[[rows[stem] for stem in stems]] * deviation).astype(np.float32)

    def _estimates(self, mixture: Iterator[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Consecutive pieces of the mixture, `[2, samples]`, and their sources, `[sources, 2, samples]`.

        Segments overlap and are faded as `apply_model` does over a whole song.
        """
        import torch
        from demucs.apply import TensorChunk, apply_model

        length = int(self.sample_rate * _segment_seconds(self.model))
        stride = int((1 - _OVERLAP) * length)
        ramp = np.minimum(np.arange(1, length + 1), np.arange(length, 0, -1)).astype(np.float32)
        faded = np.zeros((len(self.model.sources), 2, length), np.float32)
        weights = np.zeros(length, np.float32)
        for buffer, start in _segments(mixture, length, stride):
            chunk = TensorChunk(torch.from_numpy(buffer[None]), start, length)
            output = apply_model(self.model, chunk, shifts=0, split=False, device=self.device)[0].cpu().numpy()
            size = output.shape[-1]
            faded[..., :size] += ramp[:size] * output
            weights[:size] += ramp[:size]
            done = min(stride, buffer.shape[-1] - start)
            yield buffer[:, start : start + done], faded[..., :done] / weights[:done]
            for sums in (faded, weights):
                sums[..., :-stride] = sums[..., stride:].copy()
                sums[..., -stride:] = 0.0


def _segments(mixture: Iterator[np.ndarray], length: int, stride: int) -> Iterator[tuple[np.ndarray, int]]:
    """For every multiple of `stride`: the segment there with up to `length` to both sides, and its place in this."""
    buffer, start = np.zeros((0, 0), np.float32), 0
    for block in mixture:
        buffer = np.concatenate([buffer, block], axis=-1) if buffer.size else block
        while start + 2 * length <= buffer.shape[-1]:
            yield buffer, start
            start += stride
        past = max(0, start - length)
        buffer, start = buffer[:, past:], start - past
    while start < buffer.shape[-1]:
        yield buffer, start
        start += stride


def _level(mixture: Iterator[np.ndarray]) -> tuple[np.float32, np.float32]:
    """Mean and standard deviation of the mono mixture."""
    count, total, squares = 0, 0.0, 0.0
    for block in mixture:
        mono = block.mean(axis=0, dtype=np.float64)
        count, total, squares = count + len(mono), total + mono.sum(), squares + np.square(mono).sum()
    mean = total / max(count, 1)
    variance = max(squares / max(count, 1) - mean**2, 0.0)
    return np.float32(mean), np.float32(np.sqrt(variance) + 1e-8)


def _segment_seconds(model: Any) -> float:
    return min(_MAX_SEGMENT_SECONDS, *(float(part.segment) for part in getattr(model, "models", [model])))


@once
def separator(tools: Tools) -> Separator:
    """The model that `tools` names, on its device; loaded once a process.

    Raises:
      UserError: Demucs is not installed, there is no such model, it cannot be downloaded or read, or there is no GPU.
    """
    try:
        import demucs.api  # noqa: F401  (fails where torch or one of its kind is missing)
        import torch
    except ImportError as error:
        raise UserError(f"separation needs Demucs ({error}); pip install 'subtractive-jax[separate]'") from error
    if tools.separator_device not in ("cpu", "cuda"):
        raise unknown_name("separator device", tools.separator_device, ("cpu", "cuda"))
    if tools.separator_device == "cuda" and not torch.cuda.is_available():
        raise UserError("--separator_device=cuda: PyTorch sees no GPU here; install its CUDA build or use cpu")
    model = _model(tools.separator, tools.separator_repo)
    unknown = [source for source in model.sources if source not in _STEM_NAMES]
    if unknown:
        raise UserError(
            f'--separator={tools.separator}: gives "{unknown[0]}", which is none of {", ".join(_STEM_NAMES)}'
        )
    if model.audio_channels != 2:
        raise UserError(f"--separator={tools.separator}: takes {model.audio_channels} channels; use a stereo model")
    stems = (*(_STEM_NAMES[source] for source in model.sources if source != "other"), "other")
    model.to(tools.separator_device).eval()
    return Separator(model, model.samplerate, stems, tools.separator_device)


def _model(name: str, repo: str) -> Any:
    import torch
    from demucs.pretrained import demucs_unittest

    if name == UNITTEST:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return demucs_unittest()
    if repo:
        return _read_model(name, repo, Path(files.local_copy(repo)))
    if name not in PUBLISHED:
        raise unknown_name("Demucs model", name, PUBLISHED)
    return _read_model(name, f"Demucs' {name}", _download(name))


def _download(name: str) -> Path:
    """The folder of a published model, of which PyTorch's pickles are no part."""
    from demucs.hf import hf_repo_name
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(f"{_HUB}/{hf_repo_name(name)}", allow_patterns=["*.yaml", "*.safetensors"]))
    except Exception as error:  # the hub's client raises errors of several libraries
        raise UserError(
            f"--separator={name}: not downloaded ({type(error).__name__}); go online once, or give a folder that "
            "holds it as --separator_repo"
        ) from error


def _read_model(name: str, repo: str, folder: Path) -> Any:
    """A bag of models, or a single one, of a folder."""
    import yaml
    from demucs.apply import BagOfModels

    if not folder.is_dir():
        raise UserError(f"--separator_repo={repo}: no such folder")
    bags = {path.stem: path for path in folder.glob("*.yaml")}
    single = {path.stem.partition("-")[0]: path for path in folder.iterdir() if path.suffix in (".safetensors", ".th")}
    if name not in bags and name not in single:
        raise unknown_name(f"Demucs model in {repo}", name, {*bags, *single})
    try:
        bag: dict[str, Any] = yaml.safe_load(bags[name].read_bytes()) if name in bags else {"models": [name]}
        models = [_read_file(single[signature]) for signature in bag["models"]]
        return BagOfModels(models, bag.get("weights"), bag.get("segment")).eval()
    except UserError:
        raise
    except Exception as error:  # whatever damaged files lead to
        raise UserError(
            f"{repo}: {name} is not readable as a Demucs model ({type(error).__name__}: {error})"
        ) from error


def _read_file(path: Path) -> Any:
    """One model of a bag; no code that a file may hold is run, and no class but Demucs' own is called."""
    import torch
    from demucs.demucs import Demucs
    from demucs.hdemucs import HDemucs
    from demucs.hf import load_safetensors_model
    from demucs.htdemucs import HTDemucs
    from demucs.states import load_model
    from safetensors import safe_open

    classes = {f"{kind.__module__}.{kind.__name__}": kind for kind in (Demucs, HDemucs, HTDemucs)}
    if path.suffix == ".safetensors":
        with safe_open(str(path), framework="pt") as file:
            described = file.metadata() or {}
        if described.get("klass") not in classes or "structure" in described:
            raise UserError(f"{path.name}: of class {described.get('klass')}; only unquantised Demucs models are read")
        return load_safetensors_model(path)
    with torch.serialization.safe_globals([*classes.values(), Fraction]):
        package = torch.load(path, map_location="cpu", weights_only=True)
    if package["klass"] not in classes.values():
        raise UserError(f"{path.name}: of class {package['klass']}; only Demucs' own are called")
    return load_model(package)
