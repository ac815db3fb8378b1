"""Z-Image: latents are lists, one for each image; its tokens are filled up to multiples of 32, then the text."""

from typing import Any

import torch

from pointillist.accel.models.family import Family, Named, Tokens


class ZImage(Family):
    NAME = "Z-Image"
    CLASSES = ("ZImageTransformer2DModel",)
    SITES = (("layers", "attention"),)
    PROCESSORS = ("ZSingleStreamAttnProcessor",)
    TEXT = "after"
    MASKED = True

    def tokens(self, transformer: Any, call: Named) -> Tokens:
        """Of the first latents [C, F, H, W]; all images of a call have one size."""
        patch, patch_t = call.get("patch_size", 2), call.get("f_patch_size", 1)
        frames, height, width = self.latents(call).shape[-3:]
        return Tokens((frames // patch_t, height // patch, width // patch))

    def latents(self, call: Named) -> torch.Tensor:
        """[B, C, F, H, W]; of edited images, the last of each list is the one to be made."""
        x = call["x"]
        if isinstance(x, torch.Tensor):
            return x
        return torch.stack([each[-1] if isinstance(each, list) else each for each in x])

    def heads(self, transformer: Any) -> int:
        return int(transformer.config.n_heads)
