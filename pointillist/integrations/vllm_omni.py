"""vLLM-Omni's slot for sparse attention: `SPARSE_ATTN` with the kernel `pointillist`.

    vllm serve MODEL --omni --diffusion-attention-config \\
      '{"per_role": {"self": {"backend": "SPARSE_ATTN", "extra": {"backend": "pointillist", "density": 0.25}}}}'

Further parameters: `pattern`, `tail`, `block`, and the pattern's options under `options`. The contract is that of the
entry-point group `vllm_omni.sparse_attn`: [batch, sequence, heads, dim] in and out, the video's geometry in
`latent_shape` and `patch_size`, each (t, h, w) or a row for each sample. Where these are not the sequence (padding of
sequence parallelism, text beside the video), the call runs densely, and the log says why once.
"""

from collections.abc import Mapping
from typing import Any

import torch

from pointillist.integrations.attention import note_dense, sparse_attention


def attn_fn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    params: Mapping[str, Any],
    is_causal: bool = False,
    softmax_scale: float | None = None,
) -> torch.Tensor:
    """Self-attention [B, S, H, D]. Raises ValueError for parameters that are not possible, and for causal attention."""
    if is_causal:
        raise ValueError("causal attention is not supported; the role that asks for it needs another backend")
    if query.shape[2] != key.shape[2]:
        key, value = (x.repeat_interleave(query.shape[2] // x.shape[2], dim=2) for x in (key, value))
    grid = _grid(params)
    tokens = query.shape[1]
    if grid is None or grid[0] * grid[1] * grid[2] != tokens or key.shape[1] != tokens:
        note_dense("vLLM-Omni", f"{tokens} tokens over {key.shape[1]} are not the grid {grid}")
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=softmax_scale).transpose(1, 2)
    wished = {name: params[name] for name in ("pattern", "density", "tail", "block") if name in params}
    return sparse_attention(query, key, value, grid, scale=softmax_scale, **wished, **params.get("options", {}))


attn_fn.capabilities = {"supports_attention_mask": False, "supports_full_attn_spans": False}  # type: ignore[attr-defined]


def _grid(params: Mapping[str, Any]) -> tuple[int, int, int] | None:
    shape, patch = (_first(params.get(name)) for name in ("latent_shape", "patch_size"))
    if shape is None or patch is None:
        return None
    t, h, w = (length // size for length, size in zip(shape, patch, strict=True))
    return t, h, w


def _first(value: Any) -> tuple[int, int, int] | None:
    """(t, h, w) of the first sample; they are alike in a batch."""
    if value is None:
        return None
    rows = value.tolist() if isinstance(value, torch.Tensor) else list(value)
    t, h, w = rows[0] if isinstance(rows[0], list | tuple) else rows
    return int(t), int(h), int(w)
