"""A model with one part replaced by a published one."""

from ml_collections import ConfigDict

from subtractive_jax import rng
from subtractive_jax.models import unet
from subtractive_jax.weights import hifigan_layout, text_encoders
from subtractive_jax.weights.model_folder import ModelFiles
from subtractive_jax.weights.published import Published

_DENOISERS = ("base_denoiser", "denoiser")


def text_encoder(files: ModelFiles, source: Published, model_type: str) -> ModelFiles:
    """`files` with the text encoder and tokenizer of a transformers folder.

    The denoisers get a fresh adapter, the same for both, from the new encoder's states to their cross-attention; it has
    to be trained before texts mean anything.

    Raises:
      UserError: names everything that is missing, damaged, or of another architecture.
    """
    config, params = ConfigDict(files.config.to_dict()), dict(files.params)
    text = text_encoders.read(source, ".", ".", (model_type,))
    if text is not None:
        config.text_encoder = ConfigDict(text.config)
        if text.max_tokens is not None and config.max_text_tokens > text.max_tokens:
            needs = config.max_text_tokens
            source.note(
                "config.json", f"reads at most {text.max_tokens} tokens, but the model's max_text_tokens is {needs}"
            )
        if text.tensors is not None:
            params["text_encoder"] = source.params(".", "text_encoder", config, text.tensors)
    source.check()
    assert text is not None  # whatever cannot be read is noted
    config.update(text_padding="masked" if model_type == "t5" else "tokens", null_text="empty", init_from="")
    denoisers = [part for part in _DENOISERS if part in params]
    if denoisers:
        config.denoiser.condition_dim = text.features
        adapter = unet.condition_adapter(config.denoiser).init(rng.stream(config.seed, "condition_adapter"))
        params |= {part: {**params[part], "condition_adapter": adapter} for part in denoisers}
    return ModelFiles(config, params, text.tokenizer)


def vocoder(files: ModelFiles, source: Published) -> ModelFiles:
    """`files` with the HiFi-GAN generator of a published folder, which must read the model's representation.

    Raises:
      UserError: names everything that is missing, damaged, or does not fit.
    """
    config, params = ConfigDict(files.config.to_dict()), dict(files.params)
    content = source.config("config.json")
    fields = None if content is None else hifigan_layout.read_config(source, ".", content, config.representation)
    tensors = hifigan_layout.read_tensors(source, ".")
    if fields is not None and tensors is not None:
        config.vocoder, config.init_from = ConfigDict(fields), ""
        params["vocoder"] = source.params(".", "vocoder", config, tensors)
    source.check()
    return ModelFiles(config, params, files.tokenizer)
