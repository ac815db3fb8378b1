"""`vsa`: every query cube sees the key cubes of the highest coarse attention, and the coarse output if trained (VSA).

Cubes of the video are mean-pooled, and the pooled ones attend to each other: the probabilities choose, row by row, the
cubes that are seen exactly (O_f), and the output, the same for all tokens of a cube (O_c), is added through a trained
gate: O = O_f + gate · O_c, gate = to_gate_compress(input of the attention module), for every token and channel.

Diffusers drops `to_gate_compress` when it loads a checkpoint. Give it back with `accelerate(weights=FILE)`, keys
`blocks.0.attn1.to_gate_compress.weight` [H·D, C] (and `.bias` [H·D]) and so on. Without it, as with one of zeros, the
method is top-k over pooled cubes. The own cube is kept here in any case. Cubes are tiles of at most `block` tokens:
the plan's `block=64` gives those of the paper. (Video Sparse Attention; FastVideo)
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from pointillist.accel.blocks import BLOCK_ORDERS, Blocks, block_means, blocks_in
from pointillist.accel.patterns.choose import select_blocks
from pointillist.accel.patterns.pattern import Call, Pattern, Selection, check_choice, index_of, video_of
from pointillist.accel.trained import added_to_video, check_shape, trained

GATE, BIAS = "to_gate_compress.weight", "to_gate_compress.bias"


@dataclass(frozen=True)
class Vsa(Pattern):
    HIDDEN_STATES: ClassVar[bool] = True
    TAIL: ClassVar[str] = "none"
    ADDS: ClassVar[bool] = True
    density: float
    order: str = "tiles"
    """Of the blocks; `tiles` are the cubes of the paper."""

    def __post_init__(self) -> None:
        check_choice("order", self.order, BLOCK_ORDERS)

    def select(self, call: Call) -> Selection:
        blocks = blocks_in(self.order, call.grid, call.block, call.device)
        return select_blocks(coarse_scores(call, blocks), blocks, self.density)

    def finish(self, call: Call, out: torch.Tensor) -> torch.Tensor:
        found = trained(call, "vsa", (GATE,), "top-k alone")
        if found is None:
            return out
        if call.hidden_states is None:
            call.notes["vsa: the input of the attention module is not known: top-k alone"] += 1
            return out
        blocks = blocks_in(self.order, call.grid, call.block, call.device)
        coarse = coarse_scores(call, blocks).softmax(-1) @ block_means(call.video_v, blocks)
        coarse = coarse.index_select(2, blocks.block_of_token()[0, 0])
        return added_to_video(call, out, gate_of(call, found[0], call.hidden_states) * coarse)


def coarse_scores(call: Call, blocks: Blocks) -> torch.Tensor:
    """Logits of the attention among cubes [B, H, n, n]; their softmax is of the same order."""
    return block_means(call.video_q, blocks) @ block_means(call.video_k, blocks).mT * call.scale


def gate_of(call: Call, weight: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
    """The gate [B, H, N, D] of the video's tokens for the heads of this call."""
    video, dim, bias = video_of(call.segments), call.q.shape[-1], call.weights.get(BIAS)
    heads = call.q.shape[1] if call.heads is None else weight.shape[0] // dim
    check_shape(GATE, weight, (heads * dim, hidden_states.shape[-1]))
    weight = weight.unflatten(0, (heads, dim))
    if bias is not None:
        check_shape(BIAS, bias, (heads * dim,))
        bias = bias.detach().to(hidden_states).unflatten(0, (heads, dim))
    if call.heads is not None:
        chosen = index_of(call.heads, weight.device)
        weight = weight.index_select(0, chosen)
        bias = None if bias is None else bias.index_select(0, chosen)
    inputs = hidden_states[:, video.start : video.stop]
    gate = torch.nn.functional.linear(inputs, weight.flatten(0, 1).to(inputs), None if bias is None else bias.flatten())
    return gate.unflatten(2, (-1, dim)).transpose(1, 2)


if __name__ == "__main__":
    from pointillist.accel.patterns.draw import draw

    draw(Vsa)
