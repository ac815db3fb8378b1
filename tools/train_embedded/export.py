"""Put the trained parts together as an ordinary Diffusers folder, in half precision.

PYTHONPATH=.:tools python -m train_embedded.export --vae runs/vae --transformer runs/dit --out runs/model
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from train_embedded.checkpoint import load_checkpoint
from train_embedded.transformer import SHIFT, Generator
from train_embedded.vae import load_vae


def build_pipeline(vae_run: Path, transformer_run: Path) -> WanPipeline:
    """The pipeline with the averaged weights of both runs, in float32."""
    generator = Generator()
    generator.load_state_dict(load_checkpoint(transformer_run / "last.safetensors")[0]["average"])
    for block in generator.transformer.blocks:
        block.attn2.set_processor(WanAttnProcessor())
    return WanPipeline(
        tokenizer=generator.tokenizer,
        text_encoder=generator.text_encoder.eval(),
        transformer=generator.transformer.eval(),
        vae=load_vae(vae_run),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--transformer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    build_pipeline(args.vae, args.transformer).to(torch.float16).save_pretrained(args.out)
    weights = sum(path.stat().st_size for path in args.out.rglob("*.safetensors"))
    print(json.dumps({"out": str(args.out), "megabytes": round(weights / 1e6, 2)}))


if __name__ == "__main__":
    main()
