"""Attention without its matrix of scores in memory: the kernel that suits the device.

FlashAttention (Dao et al. 2022, arXiv:2205.14135): JAX's Pallas kernel "splash attention" on TPUs, cuDNN's on NVIDIA
GPUs, blocks that stay in the cache on CPUs.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.sharding import PartitionSpec

from subtractive_jax.errors import UserError
from subtractive_jax.models.cached_attention import RESIDUALS, attend_in_blocks

_LANES = 128  # what the kernel's lengths must be multiples of
_QUERY_BLOCKS = (256, 128)  # with 512, the compiler takes twice as long and the bytes stay the same
_KEY_BLOCKS = (512, 256, 128)  # keys whose scores are computed at once
_MAX_KEY_BYTES = 2**20  # of keys kept in VMEM at once: all of 4,096 in bfloat16, so that nothing is read twice
_MIN_FUSED_KEYS = 256  # with fewer, a TPU reads and writes no less
_MAX_CUDNN_FEATURES = 128  # a head; GPUs before Hopper take no more

_BATCH_AND_HEADS = PartitionSpec(("data", "fsdp"), None, "tensor")


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Softmax attention of q [B, N, heads, D] over k and v [B, M, heads, D]: [B, N, heads, D].

    The device is that of the mesh in whose context this is traced, so that programs for other machines can be compiled
    here; without a mesh, it is JAX's default. On GPUs, cuDNN takes over where it can: 16 bits, no mask, and D a
    multiple of 8 up to 128; XLA computes the rest, float32 above all.

    Args:
      mask: [B, M], true where keys may be looked at, of which every example needs one; None: everywhere.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.default_backend() if device is None else device.platform
    if platform == "cpu" and mask is None:
        return attend_in_blocks(q, k, v)
    if platform == "tpu" and k.shape[1] >= _MIN_FUSED_KEYS:
        return attend_on_tpu(q, k, v, mask)
    fits_cudnn = q.dtype.itemsize == 2 and mask is None and q.shape[-1] % 8 == 0 and q.shape[-1] <= _MAX_CUDNN_FEATURES
    y = jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=None if mask is None else mask[:, None, None, :],
        implementation="cudnn" if platform == "gpu" and fits_cudnn else None,
    )
    return checkpoint_name(y, RESIDUALS)


def attend_on_tpu(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None, *, interpret: bool = False
) -> jax.Array:
    """`attend` by the TPU's kernel, on each device of the visible mesh: rows of the batch, and heads over `tensor`.

    Args:
      interpret: whether Pallas interprets the kernel, which any device can do, slowly.

    Raises:
      UserError: the heads do not divide over the mesh's axis `tensor`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    mask = jnp.ones(k.shape[:2], bool) if mask is None and k.shape[1] % _LANES else mask
    attend_locally = functools.partial(_attend_on_one_tpu, interpret=interpret)
    if not mesh.auto_axes:  # none is visible, or each device is at its own part already
        return attend_locally(q, k, v, mask)
    if q.shape[2] % mesh.shape["tensor"]:
        raise UserError(
            f"mesh.tensor={mesh.shape['tensor']} does not divide the denoiser's {q.shape[2]} attention heads: "
            "set it to a divisor"
        )
    # XLA cannot partition a kernel by itself.
    return jax.shard_map(
        attend_locally,
        in_specs=(*(_BATCH_AND_HEADS,) * 3, None if mask is None else PartitionSpec(_BATCH_AND_HEADS[0])),
        out_specs=_BATCH_AND_HEADS,
        check_vma=False,
    )(q, k, v, mask)


def _attend_on_one_tpu(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, interpret: bool) -> jax.Array:
    _, length, heads, features = q.shape

    def pad(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, -x.shape[1] % _LANES), *((0, 0),) * (x.ndim - 2)))

    def heads_first(x: jax.Array) -> jax.Array:
        return pad(x).swapaxes(1, 2)

    q = (q.astype(jnp.float32) * features**-0.5).astype(q.dtype)
    q, k, v = map(heads_first, (q, k, v))
    segments = None
    if mask is not None:
        # Queries see the keys of their own segment, which is 1; what is hidden and what is padding is in segment 0.
        queries = jnp.ones((q.shape[0], q.shape[2]), jnp.int32)
        segments = splash_attention_kernel.SegmentIds(queries, pad(mask).astype(jnp.int32))
    y = jax.vmap(_kernel(heads, q.shape[2], k.shape[2], features, q.dtype.itemsize, interpret))(q, k, v, segments)
    return y.swapaxes(1, 2)[:, :length]


def _kernel(
    heads: int, length: int, keys: int, features: int, itemsize: int, interpret: bool
) -> Callable[..., jax.Array]:
    query_block, key_block = (
        next(size for size in sizes if count % size == 0)
        for sizes, count in ((_QUERY_BLOCKS, length), (_KEY_BLOCKS, keys))
    )
    fitting = _MAX_KEY_BYTES // (max(features, _LANES) * itemsize)
    keys_at_once = max(
        (size for size in range(key_block, min(keys, fitting) + 1, key_block) if keys % size == 0), default=key_block
    )
    # Features before positions: otherwise a head's 40 features would take the 128 lanes of a register, in memory too.
    layout = splash_attention_kernel.QKVLayout.SEQ_MINOR
    return splash_attention_kernel.make_splash_mha_single_device(
        splash_attention_mask.MultiHeadMask([splash_attention_mask.FullMask((length, keys))] * heads),
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=query_block,
            block_kv=keys_at_once,
            block_kv_compute=key_block,
            block_q_dkv=query_block,
            block_kv_dkv=keys_at_once,
            block_kv_dkv_compute=key_block,
            use_fused_bwd_kernel=True,
            q_layout=layout,
            k_layout=layout,
            v_layout=layout,
        ),
        residual_checkpoint_name=RESIDUALS,
        interpret=interpret,
    )
