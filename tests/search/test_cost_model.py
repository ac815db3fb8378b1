"""The cost model: counts against what really happens, predictions against closed forms and published figures."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from pointillist.accel.patterns import PATTERNS
from pointillist.accel.plan import Rule
from pointillist.cli import run as cli
from pointillist.hardware.profile import load_profile, profile_names
from pointillist.kernels.layout import BlockLayout
from pointillist.search import calibrate, work
from pointillist.search.calibrate import Measured, blank, error_of, fitted, non_negative
from pointillist.search.cost_model import CostModel, RuleCost, idle, seconds_per, site_call
from pointillist.search.site_call import SiteCall, SiteShape, Way
from pointillist.search.work import Counter, Work, counted, rule_work, shortened

GRID = (5, 8, 9)
SHAPE = SiteShape(GRID, 1, 3, 16)
WAY = Way(block=16)
WAN = SiteShape((21, 45, 80), 1, 40, 128)
EMBEDDED = SiteShape((9, 22, 22), 1, 4, 64)


def random_attention(batch: int, heads: int, backend: str) -> tuple[Work, torch.Tensor]:
    """What is counted of a random layout, and its tokens' mask."""
    q_len, k_len, dim = random.randrange(20, 60), random.randrange(20, 60), 8
    mask = torch.rand(batch, heads, -(-q_len // 8), -(-k_len // 8)) < 0.4
    layout = BlockLayout.from_mask(mask, 8, 8, q_len, k_len)
    q, k = torch.randn(batch, heads, q_len, dim), torch.randn(batch, heads, k_len, dim)
    found = work.attention_work(
        backend, q, k, k, layout.query_bounds, layout.key_bounds, layout.indptr, layout.columns, 8, 8, True, None,
        None, None, None, None, None, None,
    )  # fmt: skip
    return found, layout.token_mask(batch, heads)


def test_attention_is_counted_as_its_token_mask_says():
    found, mask = random_attention(2, 3, "cpu")
    assert found.exps == mask.sum()
    assert found.sparse_flops == 4 * 8 * mask.sum()
    rows = sum(bool(each.any()) for b in mask for h in b for each in h.split(8))
    assert found.rows == rows


def test_triton_computes_whole_tiles():
    found, mask = random_attention(1, 2, "triton")
    pairs_of_blocks = sum(bool(block.any()) for h in mask[0] for row in h.split(8) for block in row.split(8, dim=1))
    assert found.exps == pairs_of_blocks * 128 * 64


def test_operators_are_counted_and_views_are_free():
    a, b = torch.randn(6, 5), torch.randn(5, 7)
    counter = Counter("cpu")
    with counter:
        _ = a @ b
        assert counter.work == Work(operators=1, bytes=4 * (30 + 35 + 42), flops=2 * 6 * 5 * 7)
        _ = a.T[2:].unflatten(0, (1, -1)).expand(4, -1, -1)
        assert counter.work.operators == 1
        _ = torch.zeros(1).expand(1000) + 1
    assert counter.work.operators == 3
    assert counter.work.bytes < 4 * (30 + 35 + 42) + 4 * 1100, "what is only repeated is read once"


def test_counting_runs_no_attention(monkeypatch):
    """The pairs come from the layout: the kernels are never reached once a call was made."""
    call, ran = SiteCall((Rule("pooled", 0.3),) * 3, SHAPE, WAY), []
    call()
    from pointillist.kernels.cpu import block_sparse

    original = block_sparse.attention
    monkeypatch.setattr(block_sparse, "attention", lambda *args: ran.append(1) or original(*args))
    with torch.no_grad():
        call(Counter("cpu"), Counter("cpu"))
    assert not ran
    call()
    assert ran


@pytest.mark.parametrize("pattern", [name for name in PATTERNS if name not in ("dense", "skip")])
def test_every_pattern_is_counted(pattern):
    rule = Rule(pattern, 0.3)
    plain, pooled = (rule_work(rule, GRID, 16, replace(WAY, tail=tail)) for tail in ("none", "pooled"))
    tokens = SHAPE.tokens
    assert 0.2 < plain.head.exps / tokens**2 < 0.45
    assert plain.head.rows * 16 >= tokens
    assert plain.head.biased == 0 < pooled.head.biased <= pooled.head.exps
    assert pooled.head.bytes > plain.head.bytes >= 4 * tokens * 16 * 4
    beside = rule_work(rule, GRID, 16, WAY, work.PARTNERS["thw"])
    assert beside.head.exps == pytest.approx(plain.head.exps, rel=0.1)


def test_counting_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    for pattern in ("random", "semantic", "pooled"):
        counted((Rule(pattern, 0.31),) * 2, SHAPE, WAY)
    assert torch.equal(torch.get_rng_state(), before)


def test_static_patterns_choose_once():
    assert rule_work(Rule("window", 0.3), GRID, 16, WAY).choosing == 0
    assert rule_work(Rule("pooled", 0.3), GRID, 16, WAY).choosing > 5


def test_a_mixed_site_is_the_sum_of_its_rules():
    """What the model adds up rule by rule, against counting that very mixture."""
    rules = (Rule("pooled", 0.3), Rule("diagonal", 0.2), Rule("sampled", 0.3))
    choosing, laying = counted(rules, SHAPE, WAY)
    true, model = choosing + laying, site_call(rules, SHAPE, WAY, 1)
    assert model.operators == pytest.approx(true.operators, rel=0.1)
    for name in ("sparse_flops", "exps", "rows", "bytes", "gathered", "flops"):
        assert getattr(model, name) == pytest.approx(getattr(true, name), rel=0.15), name


def test_heads_batch_and_head_dimension_scale_what_they_should():
    model = CostModel(load_profile("h100"), torch.bfloat16)
    rule = Rule("pooled", 0.3)
    one = model.rule(rule, SHAPE, block=16)
    assert isinstance(one, RuleCost) and one.per_head > 0 and one.fixed > 0
    two = model.rule(rule, replace(SHAPE, batch=2), block=16)
    assert two.per_head == pytest.approx(2 * one.per_head) and two.fixed == one.fixed
    assert model.rule(rule, replace(SHAPE, heads=9), block=16) == one
    single, double = (site_call((rule,), replace(SHAPE, batch=batch), WAY, 1) for batch in (1, 2))
    assert double.exps == 2 * single.exps and double.operators == single.operators
    assert model.rule(rule, replace(SHAPE, head_dim=64), block=16).per_head > one.per_head


def test_tail_and_residual_cost_more_and_density_less():
    model = CostModel(load_profile("epyc-genoa-2c"))

    def site(density: float, **way) -> float:
        return model.site([Rule("pooled", density)], EMBEDDED, **way)

    assert site(0.2) < site(0.4) < site(0.7)
    assert site(0.4) < site(0.4, residual=True)
    assert site(0.4) < site(0.4, tail="pooled")
    assert site(0.4) < site(0.4, tail="rescaled") and site(0.4) < site(0.4, tail="rectified")


def test_all_dense_is_the_dense_call():
    model = CostModel(load_profile("h100"), torch.bfloat16)
    assert model.site([Rule("dense", 1.0)], WAN) == model.dense(WAN)
    assert model.site([Rule("dense", 1.0)] * 2 + [Rule("skip", 0.5)], SHAPE, block=16) != model.dense(SHAPE)


def test_unequal_heads_leave_units_idle():
    assert idle([1.0] * 8, 4, True) == 1
    assert idle([1.0] * 5, 4, True) == pytest.approx(2 * 4 / 5)
    assert idle([4.0, 1.0, 1.0, 1.0, 1.0], 2, True) == 1
    assert idle([1.0, 1.0, 1.0, 1.0, 4.0], 2, False) == pytest.approx(6 * 2 / 8)
    assert idle([1.0, 1.0, 1.0, 1.0, 4.0], 2, True) == 1
    assert idle([3.0], 132, True) == 132
    assert idle([], 4, True) == 1


def test_long_sequences_are_continued_from_shorter_ones():
    """At a length that can also be counted, the continuation agrees."""
    rule, way, grid = Rule("pooled", 0.3), Way(tail="pooled"), (12, 24, 26)
    true = rule_work(rule, grid, 16, way).head
    short, long = (rule_work(rule, shortened(grid, tokens), 16, way).head for tokens in (1200, 3000))
    n, m = (np.prod(shortened(grid, tokens)) for tokens in (1200, 3000))
    for name in ("sparse_flops", "exps", "rows", "bytes"):
        continued = work._continued(n, getattr(short, name), m, getattr(long, name), int(np.prod(grid)))
        assert continued == pytest.approx(getattr(true, name), rel=0.1), name
    assert work._continued(10, 30.0, 20, 80.0, 40) == pytest.approx(2 * 40 + 0.1 * 40**2)
    assert shortened(WAN.grid, 6000) == pytest.approx((9, 19, 34), abs=1)


def test_wan_is_faster_on_every_gpu_the_sparser_it_is():
    for name in profile_names():
        profile = load_profile(name)
        if profile.kind == "cpu":
            continue
        model = CostModel(profile, torch.bfloat16)
        half, tenth = (model.site([Rule("window", density)], WAN, tail="pooled") for density in (0.5, 0.1))
        assert tenth < half and tenth < model.dense(WAN)
        assert model.dense(WAN) / tenth < 10 * profile.sparse_efficiency / profile.dense_efficiency * 1.3


@pytest.mark.parametrize(
    ("name", "head_dim", "dense", "sparse"),
    [
        ("h100", 128, (370, 650), (395, 487)),
        ("h100", 64, (324, 497), (350, 420)),
        ("h200", 128, (370, 650), (395, 487)),
        ("b200", 128, (1000, 1745), (540, 660)),
        ("a100", 128, (180, 240), (160, 230)),
    ],
)
def test_large_calls_run_at_published_rates(name, head_dim, dense, sparse):
    """TFLOP/s at 16k tokens between the figures published for dense attention: FlashAttention-2, cuDNN and
    FlashAttention-3 or 4 for `dense`; Triton, which our kernel is written in, for `sparse` at density 1."""
    shape = SiteShape((16, 32, 32), 1, 16, head_dim)
    flops = 4 * shape.heads * shape.tokens**2 * head_dim / 1e12
    model = CostModel(load_profile(name), torch.bfloat16)
    assert dense[0] <= flops / model.dense(shape) <= dense[1]
    head = Work(sparse_flops=flops * 1e12, exps=shape.heads * shape.tokens**2, rows=shape.heads * shape.tokens / 128)
    assert sparse[0] <= flops / model.seconds(head) <= sparse[1]


def test_what_is_not_allowed_is_said():
    with pytest.raises(ValueError, match="knows float32, bfloat16, float16, not float64"):
        CostModel(load_profile("h100"), torch.float64)
    model = CostModel(load_profile("epyc-genoa-2c"))
    with pytest.raises(ValueError, match="2 rules"):
        model.site([Rule("window", 0.5)] * 2, SHAPE)
    with pytest.raises(ValueError, match="tail is 'long'"):
        model.site([Rule("window", 0.5)], SHAPE, tail="long")
    with pytest.raises(ValueError, match="each at least 1"):
        SiteShape((0, 3, 3), 1, 1, 8)


def test_the_fit_finds_the_profile_that_made_the_times():
    """Times made by a known profile give its coefficients back, and another's do not."""
    truth = replace(load_profile("epyc-genoa-2c"), matmul_tflops={"float32": 0.2})
    per = seconds_per(truth, torch.float32)
    rows = []
    for _ in range(60):
        much = Work(*(random.random() / seconds for seconds in per.values()))
        rows.append(Measured((Rule("window", 0.5),), "none", much, CostModel(truth).seconds(much), 0.0))
    start = replace(blank(torch.device("cpu"), torch.float32), matmul_tflops={"float32": 0.2}, units=truth.units)
    found = fitted(rows, start, torch.float32)
    for name in ("exp_gps", "memory_gbs", "launch_us", "row_us", "dense_efficiency", "gather_ps"):
        assert getattr(found, name) == pytest.approx(getattr(truth, name), rel=1e-3), name
    assert error_of(rows, found, torch.float32) < 1e-4 < error_of(rows, load_profile("h100"), torch.float32)


def test_non_negative_least_squares():
    from scipy.optimize import nnls

    for _ in range(5):
        a, b = np.random.randn(30, 6), np.random.randn(30)
        a[:, 2] = 0
        assert non_negative(a, b) == pytest.approx(nnls(a, b)[0], abs=1e-6)


def test_bench_calibrate_writes_a_profile(tmp_path, monkeypatch, capsys):
    """The command, on shapes that take no time."""
    tiny = {"cpu": (SiteShape((3, 8, 8), 1, 2, 16), SiteShape((2, 8, 16), 1, 2, 32))}
    monkeypatch.setattr(calibrate, "SHAPES", tiny)
    monkeypatch.setattr(calibrate, "HELD_OUT_SHAPES", {"cpu": tiny["cpu"][:1]})
    monkeypatch.setattr(calibrate, "PATTERNS", ("window", "pooled"))
    monkeypatch.setattr(calibrate, "HELD_OUT_PATTERNS", ("diagonal",))
    path = tmp_path / "this.json"
    assert cli(["bench", "attention", "--device", "cpu", "--calibrate", str(path), "--json"]) == 0
    profile = load_profile(path)
    assert json.loads(capsys.readouterr().out)["error"] == profile.error is not None
    assert CostModel(profile).dense(EMBEDDED) > 0
    assert cli(["bench", "attention", "--calibrate", str(tmp_path / "none" / "x.json")]) != 0


def test_a_site_call_is_dense_attention_where_all_is_kept():
    call = SiteCall((Rule("dense", 1.0),) * 2, SiteShape((2, 5, 6), 2, 2, 8), WAY)
    assert (call() - call.dense()).abs().max() < 1e-5
