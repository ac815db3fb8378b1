"""Generations that one process and several must make alike. Imported by the processes of `jobs`."""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from diffusers import (
    AutoencoderKL,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    ContextParallelConfig,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)

import pointillist
from conftest import make_pipe, make_transformer
from pointillist.accel.parallel.errors import ParallelError
from pointillist.accel.parallel.start import parallelize
from pointillist.accel.plan import Plan, Rule
from pointillist.accel.schedule import Schedule


@dataclass
class Case:
    """One generation of tiny Wan, and how it is split."""

    plan: Plan | str = "none"
    ulysses: int = 2
    ring: int = 1
    heads: int = 4
    frames: int = 9
    size: int = 64
    steps: int = 3
    how: dict = field(default_factory=dict)
    """More arguments of `accelerate`."""
    family: str = "wan"
    text: int = 12
    """Tokens of the prompt."""
    theirs: bool = False
    """Whether it was Diffusers' own call that split it."""

    @property
    def exact(self) -> bool:
        """Whether every bit must be that of one process; in a ring sums are rounded in another order."""
        return self.ring == 1


def mixed(*rules: Rule, **changes) -> Plan:
    values = dict(name="mixed", table=(tuple(rules),), block=8, break_even=False, schedule=Schedule(dense_steps=1))
    return Plan(**{**values, **changes})


STATIC = (Rule("tile", 0.5), Rule("window", 0.3), Rule("radial", 0.6), Rule("diagonal", 0.4))
DYNAMIC = (Rule("pooled", 0.3), Rule("tile", 0.5), Rule("pooled", 0.6), Rule("grid", 0.4))

LOOKING = ("semantic", "masses", "vertical_slash", "reorder", "random", "moba", "pyramid", "sla")


def of(pattern: str, **changes) -> Case:
    return Case(Plan.uniform(pattern, 0.4, dense_steps=1, block=8), **changes)


CASES = {
    "dense": Case(),
    "split by Diffusers": Case(mixed(*STATIC, tail="pooled"), theirs=True),
    "split by Diffusers: dynamic": Case(mixed(*DYNAMIC, tail="pooled"), theirs=True),
    "static": Case(mixed(*STATIC)),
    "static with means": Case(mixed(*STATIC, tail="pooled")),
    "static with a residual": Case(mixed(*STATIC, tail="pooled", residual=True)),
    "rescaled": Case(mixed(*STATIC, tail="rescaled")),
    "dynamic": Case(mixed(*DYNAMIC, tail="pooled")),
    "dynamic, choices reused": Case(mixed(*DYNAMIC, reuse_layers=2, reuse_steps=2)),
    "uneven tokens": Case(mixed(*STATIC, tail="pooled"), frames=9, size=80),
    "uneven heads": Case(mixed(*STATIC[:3], tail="pooled"), heads=3),
    "uneven both": Case(mixed(*DYNAMIC[:3], tail="pooled"), heads=3, frames=9, size=80),
    "hoisted": Case(mixed(*STATIC[:3], Rule("tile", 0.2), hoist="tiles")),
    "balanced": Case(mixed(Rule("dense", 1.0), Rule("tile", 0.5), Rule("tile", 0.1), Rule("pooled", 0.2))),
    "skipping": Case(mixed(Rule("skip", 0.1), Rule("tile", 0.5), Rule("window", 0.4), Rule("skip", 0.1))),
    **{name: of(name) for name in LOOKING},
    "cache": Case(mixed(*STATIC), steps=10, how={"cache": "first_block:threshold=0.6"}),
    "cache of outputs": Case(mixed(*STATIC), steps=10, how={"cache": "rate:threshold=0.5,level=output"}),
    "regions": Case(mixed(*STATIC, tail="pooled"), steps=8, how={"regions": "change:share=0.4,every=3"}),
    "regions of dynamic": Case(mixed(*DYNAMIC, tail="pooled"), steps=8, how={"regions": "change:share=0.3,every=3"}),
    "regions, fewer layers": Case(mixed(*STATIC), steps=8, how={"regions": "change:share=0.4,every=3,layers=0.5"}),
    "everything": Case(
        mixed(*STATIC, tail="pooled"), steps=14, frames=9, size=80,
        how={"regions": "change:share=0.4,every=3,from=0.6", "cache": "first_block:threshold=100"},
    ),
}  # fmt: skip

RING = {
    "ring: dense": Case(ring=2, ulysses=1),
    "ring: split by Diffusers": Case(mixed(*STATIC, tail="pooled"), ring=2, ulysses=1, theirs=True),
    "ring: static": Case(mixed(*STATIC), ring=2, ulysses=1),
    "ring: static with means": Case(mixed(*STATIC, tail="pooled"), ring=2, ulysses=1),
    "ring: uneven tokens": Case(mixed(*STATIC, tail="pooled"), ring=2, ulysses=1, size=80),
    "ring: hoisted": Case(
        mixed(*STATIC[:3], Rule("tile", 0.2), hoist="tiles"), ring=2, ulysses=1
    ),
    "ring: with a residual": Case(mixed(*STATIC, tail="pooled", residual=True), ring=2, ulysses=1),
    "ring: few pairs": Case(mixed(Rule("diagonal", 0.02), Rule("tile", 0.02), Rule("dense", 1.0), Rule("window", 0.1)),
                            ring=2, ulysses=1),
    "ring: cache": Case(mixed(*STATIC), steps=10, how={"cache": "first_block:threshold=0.6"}, ring=2, ulysses=1),
}  # fmt: skip
FOUR = {
    "four: static": Case(mixed(*STATIC, tail="pooled"), ulysses=4),
    "four: dynamic": Case(mixed(*DYNAMIC, tail="pooled"), ulysses=4),
    "four: uneven": Case(
        mixed(*DYNAMIC, *STATIC[:3], tail="pooled"), ulysses=4, heads=7, size=80,
        how={"regions": "change:share=0.4,every=3,from=0.6", "cache": "first_block:threshold=100"}, steps=14,
    ),
    "four: balanced": Case(
        mixed(*(Rule("tile", share) for share in (0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1))), ulysses=4, heads=8
    ),
}  # fmt: skip
FOUR_IN_RINGS = {
    "ring of four": Case(mixed(*STATIC, tail="pooled"), ulysses=1, ring=4),
    "two by two: dense": Case(ulysses=2, ring=2),
    "two by two: static": Case(mixed(*STATIC), ulysses=2, ring=2),
    "two by two: means": Case(
        mixed(*STATIC[::-1], tail="pooled"), ulysses=2, ring=2, steps=10, how={"cache": "first_block:threshold=0.5"}
    ),
}  # fmt: skip
REFUSED = {
    "ring: dynamic": (Case(mixed(*DYNAMIC), ring=2, ulysses=1), "look at queries and keys .grid, pooled. need all"),
    "ring: rescaled": (Case(mixed(*STATIC, tail="rescaled"), ring=2, ulysses=1), "tail 'rescaled' is of whole rows"),
    "ring: regions": (
        Case(mixed(*STATIC), ring=2, ulysses=1, how={"regions": "easy"}), "regions keep the keys of all tokens"
    ),
    "regions, keys anew": (
        Case(mixed(*STATIC), steps=8, how={"regions": "change:share=0.4,every=3,keys=input"}), "take keys=full"
    ),
    "heads": (Case(heads=1), "1 heads cannot be spread over 2"),
    "degrees": (Case(ulysses=4), "is 4, and this job has 2 processes"),
}  # fmt: skip
DISAGREEING = {
    "another prompt": "input encoder_hidden_states",
    "another seed": "input hidden_states",
    "another plan": "plan .rank 0: uniform window at 0.5",
    "more steps": "number of steps .rank 0: 2; rank 1: 3",
}
"""What the second process does in another way, and what both then say."""


# Products of few rows (of a matrix with 256 columns or more, up to 12) are summed in another order by CPUs' libraries:
# prompts are so long that each process has more of them.
LTX = {
    "ltx: static": Case(mixed(*STATIC, tail="pooled"), family="ltx", size=128),
    "ltx: dynamic": Case(mixed(*DYNAMIC, tail="pooled"), family="ltx", size=128),
    "ltx: uneven": Case(mixed(*DYNAMIC[:3], tail="pooled"), family="ltx", heads=3, frames=17, size=160),
    "ltx: cache": Case(mixed(*STATIC), family="ltx", size=128, steps=10, how={"cache": "first_block:threshold=0.6"}),
    "ltx: regions": Case(mixed(*STATIC), family="ltx", size=128, steps=8, how={"regions": "change:share=0.4,every=3"}),
    "ltx: split by Diffusers": Case(mixed(*STATIC), family="ltx", size=128, theirs=True),
    "ltx: ring": Case(mixed(*STATIC), family="ltx", size=128, ulysses=1, ring=2),
    "ltx: ring with means": Case(mixed(*STATIC, tail="pooled"), family="ltx", frames=17, size=160, ulysses=1, ring=2),
}  # fmt: skip
JOINT = {
    "flux: dense": Case(family="flux", size=16, text=48),
    "flux: static": Case(mixed(*STATIC), family="flux", size=16, text=48),
    "flux: dynamic": Case(mixed(*DYNAMIC, tail="pooled"), family="flux", size=16, text=48),
    "flux: uneven": Case(mixed(*DYNAMIC[:3], tail="pooled"), family="flux", size=22, heads=3, text=49),
    "flux: cache": Case(
        mixed(*STATIC, tail="pooled"), family="flux", size=16, text=48, steps=10,
        how={"cache": "first_block:threshold=0.6"},
    ),
    "hunyuan: dense": Case(family="hunyuan", text=48),
    "hunyuan: static": Case(mixed(*STATIC), family="hunyuan", text=48),
    "hunyuan: dynamic": Case(mixed(*DYNAMIC, tail="pooled"), family="hunyuan", text=48),
    "hunyuan: uneven": Case(mixed(*DYNAMIC[:3], tail="pooled"), family="hunyuan", size=80, heads=3, text=49),
    "hunyuan: cache": Case(
        mixed(*STATIC, tail="pooled"), family="hunyuan", text=48, steps=10, how={"cache": "first_block:threshold=0.6"}
    ),
}  # fmt: skip
JOINT_RING = {
    f"{family}: {name}": Case(mixed(*STATIC, **changes), family=family, size=size, ulysses=1, ring=2)
    for family, size in (("flux", 16), ("hunyuan", 64))
    for name, changes in (("ring", {}), ("ring with means", {"tail": "pooled"}))
}
JOINT_FOUR = {
    f"{family}: four": Case(mixed(*DYNAMIC, tail="pooled"), family=family, size=size, text=128, ulysses=4)
    for family, size in (("flux", 24), ("hunyuan", 64))
}
JOINT_FOUR_IN_RINGS = {
    f"{family}: two by two": Case(mixed(*STATIC, tail="pooled"), family=family, size=size, ulysses=2, ring=2)
    for family, size in (("flux", 16), ("hunyuan", 64))
}
GROUPS: dict[str, tuple[int, dict[str, Case]]] = {
    "wan": (2, CASES | RING),
    "ltx": (2, LTX),
    "joint text": (2, JOINT | JOINT_RING),
    "four": (4, FOUR | FOUR_IN_RINGS | JOINT_FOUR | JOINT_FOUR_IN_RINGS),
}
"""Each is one job: its processes, and its cases."""
ALL = {name: case for _, cases in GROUPS.values() for name, case in cases.items()}
ALL |= {name: case for name, (case, _) in REFUSED.items()}


def run_case(name: str):
    """Latents, latents made after `restore` where Diffusers can make them itself, and the report's figures of one case,
    split if there are several processes."""
    if name in DISAGREEING:
        return disagree(name)
    case = ALL[name]
    torch.manual_seed(7)
    pipe, arguments = {"wan": wan, "flux": flux, "hunyuan": hunyuan, "ltx": ltx}[case.family](case)

    def clip():
        return pipe(
            height=case.size, width=case.size, num_inference_steps=case.steps,
            generator=torch.Generator().manual_seed(5), output_type="latent", return_dict=False, **arguments,
        )[0]  # fmt: skip

    if dist.is_initialized() and case.theirs:
        torch.accelerator.device_count = lambda: 1  # by which it divides
        pipe.transformer.enable_parallelism(
            config=ContextParallelConfig(ulysses_degree=case.ulysses, ring_degree=case.ring)
        )
    elif dist.is_initialized():
        parallelize(pipe, case.ulysses, case.ring)
    with pointillist.accelerate(pipe, case.plan, **{"cache": "none", "regions": "none"} | case.how) as handle:
        out = clip()
        report = handle.report()
    # Diffusers' ring needs a GPU, and its split of LTX does not take masks of text
    plain = clip() if case.theirs and case.exact and case.family == "wan" else None
    return out, plain, report.steps, report.density


def disagree(how: str) -> str:
    """What this process raises, with what the other one raises behind it."""
    other = dist.get_rank() == 1
    torch.manual_seed(7)
    pipe, arguments = wan(Case())
    parallelize(pipe, 2)
    if other and how == "another prompt":
        arguments["prompt_embeds"] = arguments["prompt_embeds"] + 1
    plan = Plan.uniform("window", 0.3 if other and how == "another plan" else 0.5, block=8)
    seed = 6 if other and how == "another seed" else 5
    said = ""
    try:
        with pointillist.accelerate(pipe, plan):
            pipe(
                height=64, width=64, num_inference_steps=3 if other and how == "more steps" else 2,
                generator=torch.Generator().manual_seed(seed), output_type="latent", **arguments,
            )  # fmt: skip
    except ParallelError as error:
        said = str(error)
    all_said = ["", ""]
    dist.all_gather_object(all_said, said)
    return "\n".join(all_said)


def wan(case: Case):
    texts = torch.randn(2, 1, case.text, 32)
    pipe = make_pipe(transformer=make_transformer(num_attention_heads=case.heads, layers=3))
    return pipe, dict(
        prompt_embeds=texts[0], negative_prompt_embeds=texts[1], num_frames=case.frames, guidance_scale=3.0
    )


def flux(case: Case):
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=case.heads, joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=False,
        axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip
    vae = AutoencoderKL(latent_channels=4, block_out_channels=(4,), norm_num_groups=1, use_quant_conv=False).eval()
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, text_encoder=None, tokenizer=None, text_encoder_2=None,
        tokenizer_2=None, transformer=transformer,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    texts, pooled = torch.randn(2, 1, case.text, 32), torch.randn(1, 32)
    return pipe, dict(
        prompt_embeds=texts[0], pooled_prompt_embeds=pooled, negative_prompt_embeds=texts[1],
        negative_pooled_prompt_embeds=pooled, true_cfg_scale=3.0,
    )  # fmt: skip


def hunyuan(case: Case):
    """The last three tokens of its prompt are padding."""
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=case.heads, attention_head_dim=16, num_layers=2,
        num_single_layers=2, num_refiner_layers=1, patch_size=2, patch_size_t=1, guidance_embeds=True,
        text_embed_dim=32, pooled_projection_dim=32, rope_axes_dim=(4, 6, 6),
    ).eval()  # fmt: skip
    vae = AutoencoderKLHunyuanVideo(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1,
        norm_num_groups=4, mid_block_add_attention=False,
    ).eval()  # fmt: skip
    pipe = HunyuanVideoPipeline(
        text_encoder=None, tokenizer=None, transformer=transformer, vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(), text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    mask = torch.ones(1, case.text, dtype=torch.int64)
    mask[:, -3:] = 0
    return pipe, dict(
        prompt_embeds=torch.randn(1, case.text, 32), pooled_prompt_embeds=torch.randn(1, 32),
        prompt_attention_mask=mask, num_frames=case.frames, guidance_scale=3.0,
    )  # fmt: skip


def ltx(case: Case):
    """The last three tokens of its prompt are padding."""
    transformer = LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=case.heads, attention_head_dim=16,
        cross_attention_dim=16 * case.heads, num_layers=2, caption_channels=32,
    ).eval()  # fmt: skip
    vae = AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, True, False), decoder_spatio_temporal_scaling=(True, True, True, False),
        decoder_inject_noise=(False,) * 5, upsample_residual=(False,) * 4, upsample_factor=(1,) * 4,
        timestep_conditioning=False, patch_size=1, patch_size_t=1, encoder_causal=True, decoder_causal=False,
    ).eval()  # fmt: skip
    pipe = LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, text_encoder=None, tokenizer=None, transformer=transformer
    )
    pipe.set_progress_bar_config(disable=True)
    texts = torch.randn(2, 1, case.text, 32)
    mask = torch.ones(1, case.text, dtype=torch.int64)
    mask[:, -3:] = 0
    return pipe, dict(
        prompt_embeds=texts[0], prompt_attention_mask=mask, negative_prompt_embeds=texts[1],
        negative_prompt_attention_mask=mask, num_frames=case.frames, guidance_scale=3.0,
    )  # fmt: skip
