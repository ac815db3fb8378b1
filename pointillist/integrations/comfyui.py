"""A node of ComfyUI: sparse self-attention for a video model.

Put a file into `ComfyUI/custom_nodes/` that says

    from pointillist.integrations.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

The node clones the model and sets `optimized_attention_override`, which ComfyUI calls in place of its attention with
that function and its arguments. Wan's model tells the grid of tokens in `transformer_options["grid_sizes"]`; calls that
are not over this grid (cross-attention, masks, other models) go to ComfyUI's own attention.
"""

from collections.abc import Callable
from typing import Any

import torch

from pointillist.integrations.attention import USABLE_TAILS, check_choice, note_dense, sparse_attention, usable_patterns


class PointillistAttention:
    """Model in, model out."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "model_patches/attention"
    DESCRIPTION = "Sparse self-attention for video models."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL",),
                "pattern": (list(usable_patterns()), {"default": "pooled"}),
                "density": ("FLOAT", {"default": 0.25, "min": 0.01, "max": 1.0, "step": 0.01}),
                "tail": (list(USABLE_TAILS), {"default": "pooled"}),
                "dense_steps": ("FLOAT", {"default": 0.15, "min": 0.0, "max": 1.0, "step": 0.01}),
            }
        }

    def patch(self, model: Any, pattern: str, density: float, tail: str, dense_steps: float) -> tuple[Any]:
        """`dense_steps`: this share of the steps, the first ones, stays dense."""
        check_choice(pattern, density, tail)
        patched = model.clone()
        options = dict(patched.model_options.get("transformer_options", {}))
        options["optimized_attention_override"] = make_override(pattern, density, tail, dense_steps)
        patched.model_options["transformer_options"] = options
        return (patched,)


def make_override(pattern: str, density: float, tail: str, dense_steps: float) -> Callable[..., torch.Tensor]:
    """What ComfyUI calls: (its own attention, q, k, v, heads, mask, …), tensors [B, S, H·D] or, with `skip_reshape`,
    [B, H, S, D]; the output is [B, S, H·D] or, with `skip_output_reshape`, [B, H, S, D]."""

    def override(
        original: Callable[..., torch.Tensor],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        heads: int,
        mask: torch.Tensor | None = None,
        *others: Any,
        **named: Any,
    ) -> torch.Tensor:
        options = named.get("transformer_options") or {}
        by_head = bool(named.get("skip_reshape"))
        tokens, keys = (x.shape[2 if by_head else 1] for x in (q, k))
        grid = tuple(int(n) for n in options.get("grid_sizes") or ())
        fits = len(grid) == 3 and grid[0] * grid[1] * grid[2] == tokens == keys and mask is None
        if not fits or _is_early(options, dense_steps):
            if not fits and tokens == keys:
                note_dense("ComfyUI", f"{tokens} tokens are not the grid {'×'.join(map(str, grid)) or '(none told)'}")
            return original(q, k, v, heads, mask, *others, **named)
        q, k, v = (x.transpose(1, 2) if by_head else x.unflatten(2, (heads, -1)) for x in (q, k, v))
        t, h, w = grid
        out = sparse_attention(q, k, v, (t, h, w), pattern, density, tail)
        return out.transpose(1, 2) if named.get("skip_output_reshape") else out.flatten(2)

    return override


def _is_early(options: dict[str, Any], share: float) -> bool:
    """Whether the running step is among the first ones; false where the sampler does not tell its steps."""
    sigmas, now = options.get("sample_sigmas"), options.get("sigmas")
    if sigmas is None or now is None or len(sigmas) < 2:
        return False
    step = int((sigmas[:-1] - now.max()).abs().argmin())
    return step < share * (len(sigmas) - 1)


NODE_CLASS_MAPPINGS = {"PointillistAttention": PointillistAttention}
NODE_DISPLAY_NAME_MAPPINGS = {"PointillistAttention": "Pointillist: sparse attention"}
