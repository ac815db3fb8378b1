"""Tiny random-weight pipelines of every model family, from real Diffusers classes and configurations alone.

No text encoder is loaded: prompts are given as embeddings. `videos.py` and `images.py` have one function for each
variant; it makes the pipeline and says how it is called.
"""

import torch

from families.images import IMAGES, WITHOUT
from families.parts import TEXT, WIDTH, Make, Prompts
from families.videos import VIDEOS
from pointillist import Plan, accelerate
from pointillist.accel.parallel.start import parallelize

PIPELINES: dict[str, Make] = VIDEOS | IMAGES
"""With sparse attention, by variant."""


class Family:
    """A pipeline and how to call it: latents out."""

    def __init__(self, name: str, seed: int = 0) -> None:
        self.name = name
        torch.manual_seed(seed)
        self.pipe, self._call = (PIPELINES | WITHOUT)[name]()
        self.pipe.set_progress_bar_config(disable=True)
        self._texts = torch.randn(2, 1, TEXT, WIDTH)

    def run(
        self, size=64, steps=8, guidance=3.0, batch=1, seed=5, lengths=(), negative_lengths=(), padding=None, **extra
    ):
        """Latents of a run.

        Args:
            size: height and width in pixels; or both of them.
            lengths: of the prompts, the tokens that are no padding; all of them where it is not said.
            padding: the value of embeddings of padding.
        """
        texts = [text.expand(batch, -1, -1).clone() for text in self._texts]
        masks = [
            (torch.arange(TEXT) < torch.tensor(each or [TEXT] * batch)[:, None]).long()
            for each in (lengths, negative_lengths)
        ]
        if padding is not None:
            texts = [torch.where(mask[..., None] == 0, padding, text) for text, mask in zip(texts, masks, strict=True)]
        shared = dict(num_inference_steps=steps, generator=torch.Generator().manual_seed(seed), **extra)
        if self.name != "hunyuan-video-1.5":
            shared["output_type"] = "latent"
        size = (size, size) if isinstance(size, int) else size
        return self._call(self.pipe, Prompts(*texts, *masks), size, guidance, shared)


def run_case(name: str) -> torch.Tensor:
    """Latents of a sparse run; shared by all processes of a job."""
    family = Family(name)
    if torch.distributed.is_initialized():
        parallelize(family.pipe, ulysses=torch.distributed.get_world_size())
    with accelerate(family.pipe, Plan.uniform("window", 0.4, tail="none", block=16)):
        return family.run(steps=2)
