"""Block-sparse attention in Triton: one program per tile of queries walks its kept keys with an online softmax.

FlashAttention-2's forward pass (Dao 2023, Algorithm 1) over a work list (`worklist.py`). One body serves exact
blocks, block means (a pooled tail, the levels of a pyramid) and both in one softmax (Sol-Attn), and takes INT8
queries and keys with a scale per group of places and values in FP8 (SageAttention).
"""

import torch
import triton
import triton.language as tl

from pointillist.kernels import quantization
from pointillist.kernels.layout import BlockLayout
from pointillist.kernels.pooling import Means, in_order, restore_order, valid_places
from pointillist.kernels.quantization import GROUP, Quantized
from pointillist.kernels.triton import on_device
from pointillist.kernels.triton.configs import Config, architecture_of, config_for, has_fp8, precision_of
from pointillist.kernels.triton.worklist import work_of

MAX_HEAD_DIM = 256
MAX_STRIDE = 2**24
"""Of tokens: 128 of them are then within 32 bits."""
LOG2_E = tl.constexpr(1.4426950408889634)
FP8_MAX = tl.constexpr(quantization.FP8_MAX)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def forward(
    Q, K, V, OUT, LSE, WORK, LIST, VALID, QUERY_SCALES, KEY_SCALES, VALUE_SCALES,
    MEAN_K, MEAN_V, LOG_COUNTS, PAIRS,
    scale_log2, programs, heads, q_len, k_len, means,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_ob, stride_oh, stride_os, stride_xb, stride_xh,
    stride_mb, stride_mh, stride_ms, stride_lb, stride_lh, stride_pb, stride_ph, stride_ps,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    KEY_BLOCK: tl.constexpr, RAGGED: tl.constexpr, HAS_VALID: tl.constexpr,
    HAS_MEANS: tl.constexpr, SCALE_GROUP: tl.constexpr, PRECISION: tl.constexpr, FP8_VALUES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head_of_batch = tl.load(WORK + program)
    first = tl.load(WORK + programs + program)
    last = tl.load(WORK + 2 * programs + program)
    begin = tl.load(WORK + 3 * programs + program)
    end = tl.load(WORK + 4 * programs + program)
    b = (head_of_batch // heads).to(tl.int64)
    h = (head_of_batch % heads).to(tl.int64)
    places = first + tl.arange(0, TILE_Q)
    row_ok = places < last
    dims = tl.arange(0, BLOCK_D)
    dim_ok = dims < HEAD_DIM
    q = tl.load(
        Q + b * stride_qb + h * stride_qh + places[:, None].to(tl.int64) * stride_qs + dims[None, :],
        mask=row_ok[:, None] & dim_ok[None, :],
        other=0,
    )
    q_scale = tl.full([TILE_Q], 1.0, tl.float32)
    if SCALE_GROUP > 0:
        groups = (q_len + SCALE_GROUP - 1) // SCALE_GROUP
        q_scale = tl.load(QUERY_SCALES + head_of_batch.to(tl.int64) * groups + places // SCALE_GROUP, mask=row_ok)
        KEY_SCALES += head_of_batch.to(tl.int64) * ((k_len + SCALE_GROUP - 1) // SCALE_GROUP)
    K += b * stride_kb + h * stride_kh
    V += b * stride_vb + h * stride_vh
    VALID += b * stride_xb + h * stride_xh
    highest = tl.full([TILE_Q], float("-inf"), tl.float32)
    total = tl.zeros([TILE_Q], tl.float32)
    acc = tl.zeros([TILE_Q, BLOCK_D], tl.float32)

    if KEY_BLOCK > 0:  # LIST holds key blocks, each of SPLIT tiles; only the very last block may be short
        SPLIT: tl.constexpr = KEY_BLOCK // TILE_K
        whole, rest = end, 0
        if RAGGED:
            is_last = tl.load(LIST + end // SPLIT - 1, mask=end > begin, other=-1) == k_len // KEY_BLOCK
            whole = tl.where(is_last, end - SPLIT, end)
            rest = tl.where(is_last, (k_len % KEY_BLOCK + TILE_K - 1) // TILE_K, 0)
        column = tl.load(LIST + begin // SPLIT, mask=begin < whole, other=0)
        for j in tl.range(begin, whole):
            start = column * KEY_BLOCK + (j % SPLIT) * TILE_K
            column = tl.load(LIST + (j + 1) // SPLIT, mask=j + 1 < whole, other=0)
            highest, total, acc = _attend(
                q, q_scale, K, V, KEY_SCALES, VALID, start, TILE_K, highest, total, acc, scale_log2, stride_ks,
                stride_vs, HEAD_DIM, BLOCK_D, TILE_K, HAS_VALID, HAS_VALID, SCALE_GROUP, PRECISION,
            )  # fmt: skip
        if RAGGED:
            for j in tl.range(0, rest):
                start = (k_len // KEY_BLOCK) * KEY_BLOCK + j * TILE_K
                highest, total, acc = _attend(
                    q, q_scale, K, V, KEY_SCALES, VALID, start, k_len - start, highest, total, acc, scale_log2,
                    stride_ks, stride_vs, HEAD_DIM, BLOCK_D, TILE_K, True, HAS_VALID, SCALE_GROUP, PRECISION,
                )  # fmt: skip
    else:  # LIST holds runs of keys: the first place and how many there are, less one
        word = tl.load(LIST + begin, mask=begin < end, other=0)
        for j in tl.range(begin, end):
            start = word >> 8
            length = (word & 255) + 1
            word = tl.load(LIST + j + 1, mask=j + 1 < end, other=0)
            highest, total, acc = _attend(
                q, q_scale, K, V, KEY_SCALES, VALID, start, length, highest, total, acc, scale_log2, stride_ks,
                stride_vs, HEAD_DIM, BLOCK_D, TILE_K, True, HAS_VALID, SCALE_GROUP, PRECISION,
            )  # fmt: skip

    if HAS_MEANS:
        block = tl.load(WORK + 5 * programs + program).to(tl.int64)
        MEAN_K += b * stride_mb + h * stride_mh
        MEAN_V += b * stride_mb + h * stride_mh
        LOG_COUNTS += b * stride_lb + h * stride_lh
        PAIRS += b * stride_pb + h * stride_ph + block * stride_ps
        lanes = tl.arange(0, TILE_K)
        at = lanes[:, None] * stride_ms + dims[None, :]
        for start in tl.range(0, means, TILE_K):
            ok = start + lanes < means
            seen = tl.load(PAIRS + start + lanes, mask=ok, other=0) != 0
            bias = tl.load(LOG_COUNTS + start + lanes, mask=ok, other=float("-inf")) * LOG2_E
            bias = tl.where(seen, bias, float("-inf"))
            mask = ok[:, None] & dim_ok[None, :]
            first_of_tile = tl.cast(start, tl.int64) * stride_ms
            mean_k = tl.load(MEAN_K + first_of_tile + at, mask=mask, other=0.0)
            mean_v = tl.load(MEAN_V + first_of_tile + at, mask=mask, other=0.0)
            scores = tl.dot(q, tl.trans(mean_k), input_precision=PRECISION)
            highest, total, acc = _accumulate(
                scores * scale_log2 + bias[None, :], 1.0, mean_v, highest, total, acc, True, PRECISION
            )

    if FP8_VALUES:
        v_scale = tl.load(VALUE_SCALES + head_of_batch.to(tl.int64) * HEAD_DIM + dims, mask=dim_ok)
        acc = acc * (v_scale / FP8_MAX)[None, :]
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    tl.store(
        OUT + b * stride_ob + h * stride_oh + places[:, None].to(tl.int64) * stride_os + dims[None, :],
        (acc / total[:, None]).to(OUT.dtype.element_ty),
        mask=row_ok[:, None] & dim_ok[None, :],
    )
    lse = tl.where(empty, float("-inf"), (highest + tl.math.log2(total)) * LN_2)
    tl.store(LSE + head_of_batch.to(tl.int64) * q_len + places, lse, mask=row_ok)


@triton.jit
def _attend(
    q, q_scale, K, V, KEY_SCALES, VALID, start, length, highest, total, acc, scale_log2, stride_ks, stride_vs,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TILE_K: tl.constexpr, MASKED: tl.constexpr,
    HAS_VALID: tl.constexpr, SCALE_GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys: the places from `start` on, `length` of them."""
    lanes = tl.arange(0, TILE_K)
    dims = tl.arange(0, BLOCK_D)
    dim_ok = dims < HEAD_DIM
    ok = lanes < length
    if HAS_VALID:
        ok = ok & (tl.load(VALID + start + lanes, mask=ok, other=0) != 0)
    # one 64-bit address for the tile; within it 32 bits suffice, and are the same for every tile
    k_at = K + start.to(tl.int64) * stride_ks + (lanes[None, :] * stride_ks + dims[:, None])
    v_at = V + start.to(tl.int64) * stride_vs + (lanes[:, None] * stride_vs + dims[None, :])
    if MASKED or BLOCK_D > HEAD_DIM:
        k = tl.load(k_at, mask=ok[None, :] & dim_ok[:, None], other=0)
        v = tl.load(v_at, mask=ok[:, None] & dim_ok[None, :], other=0.0)
    else:
        k = tl.load(k_at)
        v = tl.load(v_at)
    if SCALE_GROUP > 0:
        k_scale = tl.load(KEY_SCALES + (start + lanes) // SCALE_GROUP, mask=ok, other=0.0)
        scores = tl.dot(q, k, out_dtype=tl.int32).to(tl.float32) * (q_scale[:, None] * k_scale[None, :])
    else:
        scores = tl.dot(q, k, input_precision=PRECISION)
    if MASKED:
        scores = tl.where(ok[None, :], scores, float("-inf"))
    return _accumulate(scores, scale_log2, v, highest, total, acc, HAS_VALID, PRECISION)


@triton.jit
def _accumulate(scores, scale_log2, v, highest, total, acc, MAY_BE_EMPTY: tl.constexpr, PRECISION: tl.constexpr):
    """The online softmax over one more tile of scores, in base 2."""
    new_highest = tl.maximum(highest, tl.max(scores, 1) * scale_log2)
    anchor = new_highest
    if MAY_BE_EMPTY:  # then the maximum can still be −inf, and −inf − −inf is NaN
        anchor = tl.where(new_highest == float("-inf"), 0.0, new_highest)
    weights = tl.math.exp2(scores * scale_log2 - anchor[:, None])
    rescale = tl.math.exp2(highest - anchor)
    total = total * rescale + tl.sum(weights, 1)
    acc = acc * rescale[:, None]
    if v.dtype == tl.float8e4nv:  # weights lie in 0 to 1; FP8 is finest near its largest number
        weights = weights * FP8_MAX
        # Hopper sums FP8 products in 14 bits: no longer than over one tile
        acc = tl.dot(weights.to(v.dtype), v, acc, max_num_imprecise_acc=v.shape[0])
    else:
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
    return new_highest, total, acc


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: BlockLayout,
    scale: float,
    means: Means | None = None,
    query_blocks: torch.Tensor | None = None,
    quantized: Quantized | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.attention`; head dimensions up to 256; lse is float32.

    `quantized` holds q and k in INT8 and perhaps v in FP8, in place order; then the lse is that of the smoothed keys.

    Raises:
        ValueError: a dtype or head dimension that this kernel does not compute.
    """
    _batch, _heads, _q_len, head_dim = q.shape
    if head_dim > MAX_HEAD_DIM or q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(
            f"the triton backend computes float16, bfloat16 and float32 up to head dimension {MAX_HEAD_DIM}; "
            f'this is {q.dtype} with {head_dim}: use backend="reference"'
        )
    if quantized is not None and quantized.v is not None and not has_fp8(q.device):
        raise ValueError(
            f"quantized='int8_fp8' needs FP8 matrix instructions (sm_89 and later); this is "
            f"{architecture_of(q.device)}: use quantized='int8'"
        )
    kind = kind_of(layout, head_dim, means, quantized)
    config = config_for(q.device, head_dim, q.dtype, kind, layout.max_query_block, layout.max_key_block)
    return launch(q, k, v, layout, scale, config, means, query_blocks, quantized)


def kind_of(layout: BlockLayout, head_dim: int, means: Means | None, quantized: Quantized | None) -> str:
    """Which row of the table of configurations a call wants."""
    if layout.key_lengths is not None or head_dim != triton.next_power_of_2(head_dim):
        return "padded"
    if quantized is not None:
        return "int8"
    if means is not None:
        return "means"
    return "uniform" if layout.uniform else "runs"


def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: BlockLayout,
    scale: float,
    config: Config,
    means: Means | None = None,
    query_blocks: torch.Tensor | None = None,
    quantized: Quantized | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention` with a given configuration."""
    batch, heads, q_len, head_dim = q.shape
    out = torch.empty(batch, heads, q_len, head_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=q.device)
    if query_blocks is not None:
        out.zero_()
        lse.fill_(float("-inf"))
    value_scales = lse if quantized is None or quantized.v_scales is None else quantized.v_scales
    v = in_order(v, layout.key_order) if quantized is None or quantized.v is None else quantized.v
    if quantized is None:
        q, k, query_scales, key_scales = in_order(q, layout.query_order), in_order(k, layout.key_order), lse, lse
    else:
        q, k, query_scales, key_scales = quantized.q, quantized.k, quantized.q_scales, quantized.k_scales
    q, k, v = (x if x.stride(-1) == 1 and x.stride(2) <= MAX_STRIDE else x.contiguous() for x in (q, k, v))
    work = work_of(layout, batch, heads, config.tile_q, config.tile_k, query_blocks)
    valid = valid_places(layout.k_len, layout.key_lengths, layout.key_order, q.device)
    valid_strides = (0, 0) if valid is None else valid.expand(batch, heads, -1).stride()[:2]
    mean_k, mean_v, log_counts, pairs, mean_strides = _laid_out(means, batch, heads, lse)
    with on_device(out):
        forward[(work.programs,)](
            q, k, v, out, lse, work.table, work.keys, lse if valid is None else valid,
            query_scales, key_scales, value_scales, mean_k, mean_v, log_counts, pairs,
            scale * LOG2_E.value, work.programs, heads, q_len, layout.k_len, 0 if means is None else mean_k.shape[2],
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *valid_strides,
            *mean_strides,
            HEAD_DIM=head_dim, BLOCK_D=max(16 if quantized is None else 32, triton.next_power_of_2(head_dim)),
            TILE_Q=config.tile_q, TILE_K=config.tile_k, KEY_BLOCK=work.key_block,
            RAGGED=work.key_block > 0 and layout.k_len % work.key_block > 0,
            HAS_VALID=valid is not None, HAS_MEANS=means is not None,
            SCALE_GROUP=0 if quantized is None else GROUP, PRECISION=precision_of(q.device, head_dim),
            FP8_VALUES=v.dtype == torch.float8_e4m3fn,
            **config.options(),
        )  # fmt: skip
    return restore_order(out, layout.query_order), restore_order(lse[..., None], layout.query_order)[..., 0]


def _laid_out(means: Means | None, batch: int, heads: int, none: torch.Tensor) -> tuple:
    """Means as the kernel reads them: keys and values with equal strides; `none` stands for what is absent."""
    if means is None:
        return none, none, none, none, (0,) * 8
    keys, values = means.keys.contiguous(), means.values.contiguous()
    log_counts = means.log_counts.float().contiguous().expand(batch, heads, -1)
    pairs = means.pairs.contiguous().view(torch.int8).expand(batch, heads, -1, -1)
    strides = (*keys.stride()[:3], *log_counts.stride()[:2], *pairs.stride()[:3])
    return keys, values, log_counts, pairs, strides
