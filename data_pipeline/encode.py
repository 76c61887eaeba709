"""Windows of audio and their texts to what training reads: posterior moments and text states, both float16."""

import bisect
from typing import Any

import numpy as np

import subtractive_jax
from data_pipeline import files
from data_pipeline.once import once
from subtractive_jax import fingerprint, records
from subtractive_jax.representation.audio import read_audio, to_mono

_SIGNALS = ("mix", "context", "stem")
_TEXT_BATCH = 32


@once
def encoders(model: str) -> "Encoders":
    """The encoders of a model, which may lie in a bucket; loaded once a process, however many threads ask."""
    return Encoders(files.local_copy(model))


class Encoders:
    """The frozen text encoder of a model, and its autoencoder where windows of audio are to be encoded.

    Args:
      model: a model folder, a run folder or the name of a shipped model.

    Raises:
      UserError: there is no such model, or it lacks a text encoder.
    """

    def __init__(self, model: str):
        self._model = subtractive_jax.load(model)
        self._model.params("text_encoder")

    @property
    def representation(self) -> dict[str, Any]:
        return self._model.config.representation.to_dict()

    def check_autoencoder(self) -> None:
        """Raises UserError where the model has no autoencoder."""
        self._model.params("autoencoder")

    def metadata(self, representation: dict[str, Any]) -> dict[str, Any]:
        """What a dataset says of its representation's encoders, so that a trainer can check that they are its own."""
        is_audio = representation["name"] == "mel"
        autoencoder = fingerprint.params_hash(self._model.params("autoencoder")) if is_audio else ""
        text_encoder = fingerprint.params_hash(self._model.params("text_encoder"))
        null_states = self.encode_texts([""])[0]
        return {
            "autoencoder_hash": autoencoder,
            "text_encoder_hash": text_encoder,
            "config_hash": fingerprint.dataset_hash(representation, autoencoder, text_encoder, records.SCHEMA_VERSION),
            "null_text_states": null_states.astype(np.float64).tolist(),
            "text_dim": null_states.shape[1],
            "max_text_tokens": self._model.config.max_text_tokens,
            "text_padding": self._model.config.text_padding,
        }

    def latent_shape(self) -> tuple[int, int, int]:
        """`[F, T, 2C]` of one window of audio."""
        return self._model.encode_audio(np.zeros((1, self._model.mel.window_samples), np.float32)).shape[1:]

    def encode_texts(self, texts: list[str], known: dict[str, np.ndarray] | None = None) -> list[np.ndarray]:
        """States `[L, D]` float16 of each text: of all positions that the denoiser may look at.

        Args:
          known: states of texts seen before; gets those of the new ones.

        Raises:
          UserError: a text has more tokens than the model reads.
        """
        known = {} if known is None else known
        fresh = list(dict.fromkeys(text for text in texts if text not in known))
        for start in range(0, len(fresh), _TEXT_BATCH):
            batch = fresh[start : start + _TEXT_BATCH]
            states, mask = self._model.encode_text(batch + [""] * (_TEXT_BATCH - len(batch)))  # one shape to compile
            known |= {text: s[m].astype(np.float16) for text, s, m in zip(batch, states, mask, strict=False)}
        return [known[text] for text in texts]

    def reads(self, text: str) -> bool:
        return self._model.reads(text)

    def shortened(self, text: str) -> str:
        """The text, or as many of its first words as the model reads."""
        if self._model.reads(text):
            return text
        words = text.split()
        count = bisect.bisect(range(len(words)), False, key=lambda last: not self._model.reads(" ".join(words[:last])))
        return " ".join(words[: count - 1])

    def encode_audio(self, examples: list[dict[str, Any]]) -> list[dict[str, np.ndarray]]:
        """`mix_latent`, `context_latent`, `stem_latent` `[F, T, 2C]` float16 of examples of `windows`, at their gains.

        The mix is encoded once for every missing stem, since each has a gain of its own.
        """
        audio = [
            to_mono(read_audio(example[signal])[0]) * example["gain"] for example in examples for signal in _SIGNALS
        ]
        moments = self._model.encode_audio(np.stack(audio)).astype(np.float16)
        triples = moments.reshape(len(examples), len(_SIGNALS), *moments.shape[1:])
        return [
            {f"{signal}_latent": latent for signal, latent in zip(_SIGNALS, triple, strict=True)} for triple in triples
        ]
