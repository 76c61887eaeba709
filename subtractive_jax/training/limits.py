"""Settings of a training that cannot be, refused before anything is made."""

import math

import ml_collections

from subtractive_jax.errors import UserError, unknown_name

_COMPUTE_DTYPES = ("float32", "bfloat16")  # float16 would need its losses scaled
_TRAIN = {  # from least to most, in config.train
    "steps": (0, math.inf),
    "batch_size": (1, math.inf),
    "learning_rate": (0.0, math.inf),
    "warmup_steps": (0, math.inf),
    "weight_decay": (0.0, math.inf),
    "accumulation_steps": (1, math.inf),
    "ema_decay": (0.0, 1.0),
    "log_every": (1, math.inf),
    "eval_every": (1, math.inf),
    "eval_examples": (0, math.inf),
    "preview_examples": (0, math.inf),
    "checkpoint_every": (1, math.inf),
    "keep_checkpoints": (1, math.inf),
    "keep_every": (0, math.inf),
}


def check(config: ml_collections.ConfigDict) -> None:
    """Raises UserError, naming the field and its value, if a number is out of its range."""
    train, dropout = config.train, config.dropout
    for name, (least, most) in _TRAIN.items():
        if not least <= train[name] <= most:
            span = f"at least {least}" if most == math.inf else f"between {least} and {most}"
            never = "; for never, give more than train.steps" if name.endswith("_every") and least else ""
            raise UserError(f"config.train.{name}={train[name]} must be {span}{never}")
    if not train.clip_norm > 0.0:
        raise UserError(f"config.train.clip_norm={train.clip_norm} must be above 0; to clip nothing, give 1e9")
    if train.lora.rank < 0:
        raise UserError(f"config.train.lora.rank={train.lora.rank} must be at least 0, which is without adapters")
    if min(dropout.values()) < 0.0 or sum(dropout.values()) > 1.0:
        shares = ", ".join(f"{name}={share}" for name, share in dropout.items())
        raise UserError(f"config.dropout has the shares {shares}: each must be at least 0, and their sum at most 1")
    if config.compute_dtype not in _COMPUTE_DTYPES:
        raise unknown_name("compute_dtype", config.compute_dtype, _COMPUTE_DTYPES)
