"""A process of two that dies or hangs. Run as a script by `test_broken_jobs`."""

import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

import pointillist
from conftest import make_pipe, make_transformer
from pointillist.accel.parallel import agreement
from pointillist.accel.parallel.start import join, parallelize

agreement.WAIT = timedelta(seconds=8)


def main(how: str) -> None:
    torch.set_num_threads(1)
    join(torch.device("cpu"))
    bad = dist.get_rank() == 1
    torch.manual_seed(7)
    texts = torch.randn(2, 1, 12, 32)
    pipe = make_pipe(transformer=make_transformer())  # which draws from another seed in every process
    parallelize(pipe, ulysses=2)

    def after_step(pipe, step, timestep, tensors):
        if bad and step == 1 and how == "dies":
            os._exit(9)
        if bad and step == 1 and how == "hangs":
            time.sleep(600)
        return tensors

    with pointillist.accelerate(pipe, pointillist.Plan.uniform("window", 0.5, block=8)):
        pipe(
            prompt_embeds=texts[0], negative_prompt_embeds=texts[1], height=64, width=64, num_frames=9,
            num_inference_steps=4, output_type="latent", generator=torch.Generator().manual_seed(5),
            callback_on_step_end=after_step,
        )  # fmt: skip


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except Exception as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(1)
