"""The plug-in points, called as the engines' contracts say."""

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

from pointillist.integrations.attention import usable_patterns
from pointillist.integrations.comfyui import NODE_CLASS_MAPPINGS, PointillistAttention, make_override
from pointillist.integrations.vllm_omni import attn_fn

GRID = (3, 8, 8)
TOKENS = 192


def tensors(heads=2, tokens=TOKENS, dim=16):
    return (torch.randn(1, tokens, heads, dim) for _ in range(3))


def dense(q, k, v, scale=None):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def test_vllm_omni_finds_us_by_its_entry_point():
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    value = project["entry-points"]["vllm_omni.sparse_attn"]["pointillist"]
    assert EntryPoint("pointillist", value, "vllm_omni.sparse_attn").load() is attn_fn
    assert attn_fn.capabilities == {"supports_attention_mask": False, "supports_full_attn_spans": False}


@pytest.mark.parametrize("rows", [list, lambda x: torch.tensor([x, x])])
def test_vllm_omni_passes_the_geometry_in_two_forms(rows):
    q, k, v = tensors()
    params = {"latent_shape": rows([3, 16, 16]), "patch_size": rows([1, 2, 2]), "block": 16, "pattern": "window"}
    full = attn_fn(q, k, v, params | {"density": 1.0}, is_causal=False, softmax_scale=0.3)
    torch.testing.assert_close(full, dense(q, k, v, 0.3))
    part = attn_fn(q, k, v, params | {"density": 0.3, "tail": "none"}, is_causal=False, softmax_scale=0.3)
    assert part.shape == q.shape and not torch.allclose(part, full, atol=1e-2)
    poisoned = v.clone()
    poisoned[:, -16:] = 1e6  # the last block is far from the first one
    again = attn_fn(q, k, poisoned, params | {"density": 0.3, "tail": "none"}, is_causal=False, softmax_scale=0.3)
    assert torch.equal(again[:, :16], part[:, :16])


def test_vllm_omni_without_a_geometry_runs_densely_and_says_so(caplog):
    q, k, v = tensors(tokens=100)
    out = attn_fn(q, k, v, {"latent_shape": [3, 16, 16], "patch_size": [1, 2, 2]}, False, 0.25)
    torch.testing.assert_close(out, dense(q, k, v, 0.25))
    assert "100 tokens over 100 are not the grid (3, 8, 8)" in caplog.text


def test_vllm_omni_is_told_what_is_not_possible():
    q, k, v = tensors()
    params = {"latent_shape": [3, 16, 16], "patch_size": [1, 2, 2]}
    with pytest.raises(ValueError, match="causal"):
        attn_fn(q, k, v, params, is_causal=True)
    with pytest.raises(ValueError, match="masses remembers earlier steps"):
        attn_fn(q, k, v, params | {"pattern": "masses"})
    with pytest.raises(ValueError, match="density is 2"):
        attn_fn(q, k, v, params | {"density": 2})


@pytest.mark.parametrize("pattern", usable_patterns())
def test_every_pattern_that_is_offered_runs(pattern):
    q, k, v = tensors()
    params = {"latent_shape": [3, 16, 16], "patch_size": [1, 2, 2], "pattern": pattern, "block": 32}
    assert attn_fn(q, k, v, params).isfinite().all()


class Model:
    """What a node sees of ComfyUI's model patcher."""

    def __init__(self, options):
        self.model_options = options

    def clone(self):
        return Model(dict(self.model_options))


def own(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **kwargs):
    """As ComfyUI's attention over torch's."""
    if not skip_reshape:
        q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def test_the_node_patches_a_clone():
    node = NODE_CLASS_MAPPINGS["PointillistAttention"]()
    assert set(node.INPUT_TYPES()["required"]) == {"model", "pattern", "density", "tail", "dense_steps"}
    model = Model({"transformer_options": {"theirs": 1}})
    (patched,) = getattr(node, node.FUNCTION)(model, "pooled", 0.3, "pooled", 0.1)
    assert "optimized_attention_override" not in model.model_options["transformer_options"]
    assert patched.model_options["transformer_options"]["theirs"] == 1
    assert callable(patched.model_options["transformer_options"]["optimized_attention_override"])
    with pytest.raises(ValueError, match="unknown"):
        PointillistAttention().patch(model, "poled", 0.3, "pooled", 0.1)


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("out_by_head", [False, True])
def test_the_override_takes_and_gives_both_forms(by_head, out_by_head):
    q, k, v = tensors()
    given = [x.transpose(1, 2) if by_head else x.flatten(2) for x in (q, k, v)]
    how = {"skip_reshape": by_head, "skip_output_reshape": out_by_head, "transformer_options": {"grid_sizes": GRID}}
    found = make_override("window", 1.0, "none", 0.0)(own, *given, 2, **how)
    torch.testing.assert_close(found, own(*given, 2, **how))
    part = make_override("window", 0.1, "none", 0.0)(own, *given, 2, **how)
    assert part.shape == found.shape and not torch.allclose(part, found, atol=1e-2)


def test_the_override_leaves_to_comfyui_what_is_not_its_own():
    q, k, v = (x.flatten(2) for x in tensors())
    override = make_override("window", 0.1, "none", 0.5)
    sparse = {"transformer_options": {"grid_sizes": GRID}}
    sigmas = torch.tensor([1.0, 0.7, 0.4, 0.1, 0.0])

    def at(sigma):
        return {"transformer_options": {"grid_sizes": GRID, "sample_sigmas": sigmas, "sigmas": torch.tensor([sigma])}}

    for arguments, named in (
        ((q, k, v, 2), {}),  # no grid
        ((q, k[:, :77], v[:, :77], 2), sparse),  # cross-attention
        ((q, k, v, 2, torch.ones(TOKENS, TOKENS, dtype=torch.bool)), sparse),  # a mask
        ((q, k, v, 2), at(0.7)),  # an early step
    ):
        assert torch.equal(override(own, *arguments, **named), own(*arguments, **named))
    for named in (sparse, at(0.4)):
        assert not torch.allclose(override(own, q, k, v, 2, **named), own(q, k, v, 2), atol=1e-2)
