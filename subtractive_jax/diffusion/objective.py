"""What the denoiser predicts, and how it is read: epsilon (Ho et al. 2020) or v (Salimans & Ho 2022, appendix D)."""

from subtractive_jax.diffusion.schedule import Array, signal_and_noise_rate
from subtractive_jax.errors import unknown_name

PREDICTION_TYPES = ("epsilon", "v_prediction")


def target(prediction_type: str, x: Array, noise: Array, t: Array, abar: Array) -> Array:
    """The regression target for clean data `x` [B, ...], `noise` of the same shape and timesteps `t` [B].

    Raises:
      UserError: unknown `prediction_type`.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        signal, noise_rate = signal_and_noise_rate(abar, t, x)
        return signal * noise - noise_rate * x
    raise unknown_name("prediction type", prediction_type, PREDICTION_TYPES)


def to_x0_eps(prediction_type: str, output: Array, x_t: Array, t: Array, abar: Array) -> tuple[Array, Array]:
    """The clean data and the noise which the denoiser's `output` at `x_t` [B, ...] and `t` ([B] or scalar) stands for.

    Raises:
      UserError: unknown `prediction_type`.
    """
    signal, noise_rate = signal_and_noise_rate(abar, t, x_t)
    if prediction_type == "epsilon":
        return (x_t - noise_rate * output) / signal, output
    if prediction_type == "v_prediction":
        return signal * x_t - noise_rate * output, signal * output + noise_rate * x_t
    raise unknown_name("prediction type", prediction_type, PREDICTION_TYPES)
