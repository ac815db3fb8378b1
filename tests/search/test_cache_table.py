"""Learning a cache table on a tiny, real pipeline."""

from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pointillist import accelerate, load_pipeline
from pointillist.accel.step_cache.table import CacheTable, MadeFor
from pointillist.search.cache_table import (
    LEAST_WEIGHT,
    Learning,
    Router,
    _image_errors,
    _sensitivities,
    _Trajectory,
    computed_at,
    generated,
    guided,
    learn_table,
    targets_of,
)
from pointillist.search.errors import SearchError

CALL = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 6, "guidance_scale": 3.0}
LEARNING = Learning(
    ("a red circle", "circle on black"), CALL, start="noise", iterations=24, rate=0.4, renew=8, spread=0.3
)


@pytest.fixture(scope="module")
def pipe(tiny_folder):
    return load_pipeline(str(tiny_folder))


def error_of(pipe, table: CacheTable, seeds=range(101, 105)) -> float:
    """What is learned to be small: of every step along the table's own trajectories, against everything computed."""
    total = []
    for seed in seeds:
        learning = replace(LEARNING, share=None, beta=0.0, rate=0.0, seed=seed)
        router = Router.begin(learning, table.layers)
        for i, rows in enumerate((table.attention, table.mlp)):
            router.logits[:, i::2] = torch.tensor([[5.0 if each == "1" else -5.0 for each in row] for row in rows])
        trajectory = _Trajectory(learning, router, targets_of(pipe))
        learn = trajectory._learn

        def watched(step, trajectory=trajectory, learn=learn):
            if trajectory._differences:
                total.append(float(guided(trajectory._differences, 3.0).detach().square().mean()))
            learn(step)

        trajectory._learn = watched
        trajectory.run(pipe)
    return sum(total)


def shuffled(table: CacheTable) -> CacheTable:
    """A random table that reuses as many modules."""
    digits = "".join(table.attention[1:] + table.mlp[1:])
    mixed = "".join(digits[i] for i in torch.randperm(len(digits)))
    rows = [mixed[i : i + table.layers] for i in range(0, len(mixed), table.layers)]
    whole, half = "1" * table.layers, table.steps - 1
    return replace(table, attention=(whole, *rows[:half]), mlp=(whole, *rows[half:]))


def test_a_learned_table_is_better_than_random_ones(pipe):
    generated(pipe, LEARNING, "a red circle", 0)  # Diffusers leaves marks of its own
    before = {name: set(vars(module)) for name, module in pipe.transformer.named_modules()}
    table = learn_table(pipe, replace(LEARNING, iterations=40))
    assert {name: set(vars(module)) for name, module in pipe.transformer.named_modules()} == before
    assert table.share == 0.5 and table.made_for == MadeFor(
        table.made_for.model, "FlowMatchEulerDiscreteScheduler", 3.0, True
    )
    mine, others = error_of(pipe, table), sorted(error_of(pipe, shuffled(table)) for _ in range(6))
    assert mine < sum(others) / 6, (mine, others)


def test_beta_decides_how_much_is_reused(pipe):
    """What costs nothing is computed; what costs much is reused, and only the first step is computed then."""
    few = {"share": None, "iterations": 12, "rate": 1.0}
    free, dear = (learn_table(pipe, replace(LEARNING, beta=beta, **few)) for beta in (0.0, 1e6))
    assert free.share < 0.3 and dear.share == 5 / 6


def test_the_papers_proxy_counts_a_steps_error_twice(pipe):
    """By definition: squares of what the clip changes, and the same for each square of what the step's output does."""
    targets, table = targets_of(pipe), CacheTable.every(6, 2, 2)
    paper = _image_errors(pipe, LEARNING, table, torch.full((6,), 7.0), "a red circle", 3)
    ours = _sensitivities(pipe, LEARNING, table, "a red circle", 3)
    assert paper[[0, 2, 4]].tolist() == [7.0] * 3 and ours[0] == 0 and (ours[1:] > 0).all()  # what it cannot know
    clips, outputs = {}, {}
    for name, each in {"running": table, **{step: computed_at(table, step) for step in (1, 3, 5)}}.items():
        outputs[name] = []
        with accelerate(pipe, "none", cache=each) as handle:
            handle.watch_velocities(lambda velocity, name=name: outputs[name].append(velocity.clone()))
            clips[name] = generated(pipe, LEARNING, "a red circle", 3)
    moved = {step: float((clips[step] - clips["running"]).square().sum()) for step in (1, 3, 5)}
    changed = {step: float((outputs[step][step] - outputs["running"][step]).square().sum()) for step in (1, 3, 5)}
    assert len(targets) == 1
    for step in (1, 3, 5):
        expected = max(LEAST_WEIGHT, moved[step] / (sum(moved.values()) / 3))
        assert float(paper[step]) == pytest.approx(expected, rel=1e-3)
    for step in (3, 5):
        expected = moved[step] / changed[step] / (moved[1] / changed[1])
        assert float(ours[step] / ours[1]) == pytest.approx(expected, rel=1e-3)


def test_a_measured_start_is_the_table_without_iterations(pipe, tmp_path):
    measured = replace(LEARNING, start="measured", iterations=0, clips=1)
    table = learn_table(pipe, measured, tmp_path / "state.safetensors")
    assert table.share == 0.5 and table.attention[0] == table.mlp[0] == "11"
    assert learn_table(pipe, measured, tmp_path / "state.safetensors") == table  # from what was kept
    others = sorted(error_of(pipe, shuffled(table)) for _ in range(4))
    assert error_of(pipe, table) < sum(others) / 4
    further = learn_table(pipe, replace(measured, iterations=2), tmp_path / "state.safetensors")
    assert further.share == 0.5


def test_going_on_gives_what_no_break_would(pipe, tmp_path):
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    whole = learn_table(pipe, replace(LEARNING, iterations=5, renew=2), one)
    learn_table(pipe, replace(LEARNING, iterations=3, renew=2), two)
    resumed = learn_table(pipe, replace(LEARNING, iterations=5, renew=2), two)
    assert resumed == whole
    with safe_open(one, "pt") as a, safe_open(two, "pt") as b:
        assert a.metadata() == b.metadata()
        assert all(torch.equal(a.get_tensor(name), b.get_tensor(name)) for name in a.keys())
        logits = a.get_tensor("logits")
    learn_table(pipe, replace(LEARNING, iterations=2, renew=2, seed=1), three := tmp_path / "three.safetensors")
    with safe_open(three, "pt") as file:
        assert not torch.equal(file.get_tensor("logits"), logits)


def test_a_checkpoint_of_something_else_is_refused(pipe, tmp_path):
    path = tmp_path / "state.safetensors"
    learn_table(pipe, replace(LEARNING, iterations=1), path)
    with pytest.raises(SearchError, match="other options"):
        learn_table(pipe, replace(LEARNING, iterations=2, share=0.3), path)
    with safe_open(path, "pt") as file:
        facts, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    save_file({**tensors, "logits": torch.zeros(3, 3)}, path, facts)
    with pytest.raises(SearchError, match="no checkpoint of this model"):
        learn_table(pipe, replace(LEARNING, iterations=2), path)
    path.write_bytes(b"nothing")
    with pytest.raises(SearchError, match="is no checkpoint"):
        learn_table(pipe, replace(LEARNING, iterations=2), path)


def test_slopes_are_those_of_the_error(pipe):
    """λ · ∂ error / ∂ r of a step by finite differences: the same trajectory, with one logit changed."""
    learning, step, column, small = replace(LEARNING, share=None, beta=0.0), 1, 2, 1e-2

    def slope_and_error(change: float) -> tuple[float, float]:
        router = Router.begin(learning, 2)
        router.logits[step, column] += change
        trajectory, errors = _Trajectory(learning, router, targets_of(pipe)), []
        learn = trajectory._learn

        def watched(at):
            if trajectory._differences and at == step:
                errors.append(float(guided(trajectory._differences, 3.0).detach().double().square().mean()))
            learn(at)

        trajectory._learn = watched
        r = torch.sigmoid(router.logits[step, column].clone())
        return float(trajectory.run(pipe)[step, column] * r * (1 - r)), errors[0]

    slope, _ = slope_and_error(0.0)
    expected = (slope_and_error(small)[1] - slope_and_error(-small)[1]) / (2 * small)
    assert slope == pytest.approx(abs(expected), rel=0.05) and slope > 0


def test_guided_is_what_pipelines_do():
    cond, uncond = torch.randn(2, 1, 3)
    expected = uncond + 5 * (cond - uncond)
    for outputs in (
        [("cond", cond), ("uncond", uncond)],
        [("uncond", uncond), ("cond", cond)],
        [("call 0", cond), ("call 1", uncond)],
        [("cond_uncond", torch.cat([uncond, cond]))],
    ):
        torch.testing.assert_close(guided(outputs, 5.0), expected)
    assert guided([("cond", cond)], 1.0) is cond


def test_tables_of_a_router():
    router = Router.begin(replace(LEARNING, share=None, beta=0.0), 3)
    router.logits[1:] = torch.randn(5, 6)
    router.logits[3, 1] = -4.0
    made_for = MadeFor("a", "b")
    assert router.table(None, made_for, "x").mlp[3][0] == "0"
    exact = router.table(0.25, made_for, "x")
    assert exact.share == 0.25 and exact.mlp[3][0] == "0" and exact.attention[0] == exact.mlp[0] == "111"
    computed = torch.tensor([[int(x) for x in a + m] for a, m in zip(exact.attention, exact.mlp, strict=True)]).bool()
    logits = torch.cat([router.logits[:, ::2], router.logits[:, 1::2]], 1)
    assert logits[1:][computed[1:]].min() > logits[1:][~computed[1:]].max()
    whole = computed_at(exact, 3)
    assert whole.attention[3] == whole.mlp[3] == "111" and whole.attention[2] == exact.attention[2]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"share": 1.0}, "share of reused modules is 1.0"),
        ({"share": None}, "give one of them"),
        ({"beta": 1.0}, "give one of them"),
        ({"share": None, "beta": -1.0}, "beta is -1.0"),
        ({"share": None, "beta": 1.0, "start": "measured"}, "a measured start needs a share"),
        ({"start": "guess"}, "the start is 'guess'; allowed are measured, noise"),
        ({"proxy": "guess"}, "the proxy is 'guess'; allowed are sensitivity, paper"),
        ({"start": "measured", "iterations": -1}, "-1 iterations"),
        ({"iterations": 0}, "0 iterations"),
        ({"prompts": ()}, "no prompt"),
    ],
)
def test_what_cannot_be_learned_is_told(wrong, message):
    with pytest.raises(SearchError, match=message):
        replace(LEARNING, **wrong)
