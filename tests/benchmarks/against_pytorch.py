"""UNet, training and sampling step and vocoder against diffusers and transformers on PyTorch: same shapes and batch.

python -m tests.benchmarks.against_pytorch [--cases=unet,step,sample,vocoder] [--rounds=3]

Float32 on a CPU; bfloat16, and PyTorch compiled, where there is a GPU. Each measurement is a process of its own, ours
and PyTorch's in turn, so that a busy machine slows both. Printed are medians over the rounds and their ratio, PyTorch's
time over ours: above 1 we are faster. CPU seconds count all threads, and other processes disturb them less.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from absl import app, flags

_UNET = dict(  # Stable Diffusion 1.5 at three tenths of its width, with heads as wide as there
    block_out_channels=(96, 192, 384, 384),
    down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    layers_per_block=2,
    attention_head_dim=2,
    cross_attention_dim=768,
    norm_num_groups=32,
    norm_eps=1e-5,
    transformer_layers_per_block=1,
    use_linear_projection=False,
    flip_sin_to_cos=True,
    freq_shift=0,
)
_LATENT = (4, 32, 128)  # channels, frequency, time: 10.24 s of Auffusion
_TEXT = (77, 768)
_BATCH = 2
_VOCODER = dict(  # Auffusion's
    upsample_initial_channel=512,
    upsample_rates=(5, 4, 4, 2),
    upsample_kernel_sizes=(11, 8, 8, 4),
    resblock_kernel_sizes=(3, 7, 11),
    resblock_dilation_sizes=((1, 3, 5),) * 3,
)
_MELS, _FRAMES = 256, 256
CASES = ("unet", "step", "sample", "vocoder")
_GUIDANCE = (1.5, 3.0)  # of context and text
_WARM_UP, _CALLS = 2, 3


def _schedule() -> dict[str, Any]:
    """Stable Diffusion's, in the words of both."""
    return dict(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        timestep_spacing="leading",
        steps_offset=1,
    )


def _ours(case: str) -> Callable[[], Any]:
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from ml_collections import ConfigDict

    from subtractive_jax.models import unet
    from subtractive_jax.vocoder import hifigan

    on_gpu = jax.default_backend() == "gpu"
    dtype = np.dtype("bfloat16" if on_gpu else "float32")
    draw = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jax.device_put(draw.standard_normal(shape, np.float32))

    if case == "vocoder":
        network = hifigan.generator(ConfigDict(dict(_VOCODER, num_mels=_MELS, resblock="1")), dtype)
        params, mel = jax.jit(network.init)(jax.random.key(0)), normal(1, _FRAMES, _MELS)
        vocode = jax.jit(network.apply)
        return lambda: vocode(params, mel).block_until_ready()

    channels, *space = _LATENT
    sampling = case == "sample"
    network = unet.denoiser(ConfigDict(dict(_UNET, condition_dim=0)), (1 + sampling) * channels, channels, 0, dtype)
    params = jax.jit(network.init)(jax.random.key(0))
    x, text = normal(_BATCH, *space, channels), normal(_BATCH, *_TEXT)
    timestep, mask = np.full(_BATCH, 500), np.ones((_BATCH, _TEXT[0]), bool)
    if case == "unet":
        forward = jax.jit(network.apply)
        return lambda: forward(params, x, timestep, text, mask).block_until_ready()

    if sampling:
        from subtractive_jax.diffusion import guidance, solvers

        schedule = ConfigDict(dict(_schedule(), rescale_betas_zero_snr=False, set_alpha_to_one=False))
        plan = solvers.plan(schedule, "ddim", 50)

        def guided(params: Any, state: solvers.State) -> solvers.State:
            """As `Model.denoise` asks: nothing, context, context and text."""
            contexts = jnp.stack([jnp.zeros_like(x), x, x], axis=1)
            inputs = jnp.concatenate([jnp.repeat(state.x[:, None], 3, axis=1), contexts], axis=-1)
            inputs = inputs.reshape(3 * _BATCH, *inputs.shape[2:])
            asked = np.full(3 * _BATCH, 500), jnp.repeat(text, 3, axis=0), np.ones((3 * _BATCH, _TEXT[0]), bool)
            outputs = network.apply(params, inputs, *asked).reshape(_BATCH, 3, *x.shape[1:])
            output = guidance.context_and_text(*(outputs[:, branch] for branch in range(3)), *_GUIDANCE)
            return solvers.step(plan, 25, state, output)

        jitted_step, state = jax.jit(guided), solvers.start(plan, x)
        return lambda: jax.block_until_ready(jitted_step(params, state))

    noise, optimizer = normal(_BATCH, *space, channels), optax.adamw(1e-4)
    state = params, jax.jit(optimizer.init)(params)

    def loss(params: Any) -> jax.Array:
        return ((network.apply(params, x, timestep, text, mask) - noise) ** 2).mean()

    def step(params: Any, moments: Any) -> tuple[Any, Any]:
        updates, moments = optimizer.update(jax.grad(loss)(params), moments, params)
        return optax.apply_updates(params, updates), moments

    jitted = jax.jit(step, donate_argnums=(0, 1))

    def call() -> None:
        nonlocal state
        state = jax.block_until_ready(jitted(*state))

    return call


def _pytorch(case: str) -> Callable[[], Any]:
    import diffusers
    import torch
    import transformers

    on_gpu = torch.cuda.is_available()
    torch.set_default_device("cuda" if on_gpu else "cpu")
    autocast = torch.autocast("cuda", torch.bfloat16, enabled=on_gpu)

    def ready(model: Any) -> Any:
        return torch.compile(model.to(memory_format=torch.channels_last)) if on_gpu else model

    def wait() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    if case == "vocoder":
        config = transformers.SpeechT5HifiGanConfig(**_VOCODER, model_in_dim=_MELS, normalize_before=False)
        vocoder = transformers.SpeechT5HifiGan(config).eval()
        vocoder = torch.compile(vocoder) if on_gpu else vocoder
        mel = torch.randn(1, _FRAMES, _MELS)

        def vocode() -> None:
            with torch.no_grad(), autocast:
                vocoder(mel)
            wait()

        return vocode

    inputs = (1 + (case == "sample")) * _LATENT[0]
    model = ready(diffusers.UNet2DConditionModel(in_channels=inputs, out_channels=_LATENT[0], **_UNET))
    x, text, timestep = torch.randn(_BATCH, *_LATENT), torch.randn(_BATCH, *_TEXT), torch.full((_BATCH,), 500)
    if case == "unet":
        model.eval()

        def forward() -> None:
            with torch.no_grad(), autocast:
                model(x, timestep, text)
            wait()

        return forward

    if case == "sample":
        scheduler = diffusers.DDIMScheduler(**_schedule(), set_alpha_to_one=False)
        scheduler.set_timesteps(50)
        model.eval()

        def sample() -> None:
            """As diffusers' InstructPix2Pix pipeline asks."""
            contexts = torch.cat([x, x, torch.zeros_like(x)])
            with torch.no_grad(), autocast:
                latents = torch.cat([torch.cat([x] * 3), contexts], dim=1)
                outputs = model(latents, scheduler.timesteps[25], torch.cat([text] * 3)).sample
            both, music, null = outputs.chunk(3)
            output = null + _GUIDANCE[1] * (both - music) + _GUIDANCE[0] * (music - null)
            scheduler.step(output, scheduler.timesteps[25], x)
            wait()

        return sample

    noise, optimizer = torch.randn(_BATCH, *_LATENT), torch.optim.AdamW(model.parameters(), 1e-4)

    def step() -> None:
        optimizer.zero_grad()
        with autocast:
            loss = ((model(x, timestep, text).sample - noise) ** 2).mean()
        loss.backward()
        optimizer.step()
        wait()

    return step


def _measure(side: str, case: str) -> dict[str, float]:
    """Seconds a call, in this process."""
    call = {"ours": _ours, "pytorch": _pytorch}[side](case)
    for _ in range(_WARM_UP):
        call()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(_CALLS):
        call()
    return dict(wall=(time.perf_counter() - wall) / _CALLS, cpu=(time.process_time() - cpu) / _CALLS)


def _in_turn(case: str, rounds: int) -> dict[str, list[dict[str, float]]]:
    measured: dict[str, list[dict[str, float]]] = {"ours": [], "pytorch": []}
    for _ in range(rounds):
        for side, figures in measured.items():
            command = [sys.executable, "-m", "tests.benchmarks.against_pytorch", f"--measure={side}", f"--cases={case}"]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            figures.append(json.loads(done.stdout.splitlines()[-1]))
    return measured


_CASES = flags.DEFINE_list("cases", list(CASES), "What to measure.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Measurements of each side.")
_MEASURE = flags.DEFINE_enum("measure", None, ("ours", "pytorch"), "Measure one side in this process, print JSON.")


def main(_: list[str]) -> None:
    if _MEASURE.value:
        print(json.dumps(_measure(_MEASURE.value, _CASES.value[0])))
        return
    print(f"{'':8}  {'seconds a call':>20}  {'':>6}  {'CPU seconds a call':>20}")
    print(f"{'case':8}  {'ours':>9}  {'PyTorch':>9}  {'ratio':>6}  {'ours':>9}  {'PyTorch':>9}  {'ratio':>6}")
    for case in _CASES.value:
        measured, line = _in_turn(case, _ROUNDS.value), f"{case:8}"
        for clock in ("wall", "cpu"):
            ours, theirs = (statistics.median(run[clock] for run in measured[side]) for side in ("ours", "pytorch"))
            line += f"  {ours:9.3f}  {theirs:9.3f}  {theirs / ours:6.2f}"
        print(line, flush=True)


if __name__ == "__main__":
    app.run(main)
