"""Jobs run one at a time and tell what happens; whatever fails, the next one runs."""

import errno
import re
import shutil
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from pointillist.pipelines.engine import Engine, LocalWork, QueueFull
from pointillist.pipelines.events import Cancelled, Done, Failed, JobCancelled, Phase, Preview, Step
from pointillist.pipelines.generate import GenerateRequest
from pointillist.pipelines.video import read_settings

SMALL = {"width": 32, "height": 32, "frames": 5, "seed": 3, "warm_up": False}


def request(folder, output, steps=3, **changes):
    return GenerateRequest("a red circle", output=output, model=str(folder), steps=steps, **{**SMALL, **changes})


@pytest.fixture
def engine():
    with Engine() as engine:
        yield engine


def told(job):
    return list(job.events())


def test_a_generation_tells_its_phases_steps_previews_and_end(engine, tiny_folder, tmp_path):
    job = engine.submit(request(tiny_folder, tmp_path / "a.gif"), previews=True)
    events = told(job)
    assert [event.phase for event in events if isinstance(event, Phase)] == ["loading the model", "decoding", "writing"]
    assert [(e.step, e.steps) for e in events if isinstance(e, Step)] == [(0, 3), (1, 3), (2, 3), (3, 3)]
    previews = [event for event in events if isinstance(event, Preview)]
    assert len(previews) == 1 and previews[0].frames.shape == (2, 4, 4, 3) and previews[0].frames.dtype == "uint8"
    assert isinstance(events[-1], Done) and job.state == "done"
    assert job.result().facts == read_settings(tmp_path / "a.gif")
    assert told(job)[-1] is events[-1]  # who asks later hears of it too


def test_previews_are_made_only_if_asked_for(engine, tiny_folder, tmp_path):
    assert not [e for e in told(engine.submit(request(tiny_folder, tmp_path / "a.gif"))) if isinstance(e, Preview)]


def test_the_pipeline_is_kept_and_a_shift_does_not_stay(tiny_folder, tmp_path):
    work = LocalWork()
    with Engine(work) as engine:
        first = engine.submit(request(tiny_folder, tmp_path / "a.gif")).result()
        pipe = work.load(str(tiny_folder), dtype=None, device=None)
        engine.submit(request(tiny_folder, tmp_path / "b.gif", shift=9.0)).result()
        again = engine.submit(request(tiny_folder, tmp_path / "c.gif")).result()
    assert work.load(str(tiny_folder), dtype=None, device=None) is pipe
    assert first.output.read_bytes()[:-2000] != (tmp_path / "b.gif").read_bytes()[:-2000]
    from pointillist.pipelines.video import read_clip

    assert (read_clip(first.output) == read_clip(again.output)).all()


def test_cancel_stops_within_one_step_and_leaves_no_file(engine, tiny_folder, tmp_path):
    job = engine.submit(request(tiny_folder, tmp_path / "a.gif", steps=1000, keep=tmp_path / "a.safetensors"))
    steps = 0
    for event in job.events():
        if isinstance(event, Step) and event.step:
            steps = max(steps, event.step)
            if event.step == 2:
                job.cancel()
                seen_at_cancel = job.latest.step
    assert isinstance(job.ended_with, Cancelled) and steps <= seen_at_cancel + 1
    with pytest.raises(JobCancelled):
        job.result()
    assert not list(tmp_path.iterdir())
    assert engine.submit(request(tiny_folder, tmp_path / "b.gif")).result().output.is_file()


def test_one_at_a_time_first_come_first_served_and_so_many_may_wait():
    running, go, order = threading.Event(), threading.Event(), []

    def work(request, progress):
        running.set()
        go.wait(60)
        progress(Phase(request))
        order.append(request)
        return request

    with Engine(work, queue=3) as engine:
        first = engine.submit("first")
        running.wait(60)
        waiting = [engine.submit(name) for name in ("second", "third", "fourth")]
        with pytest.raises(QueueFull, match="3 jobs wait already"):
            engine.submit("fifth")
        assert [engine.place(job) for job in (first, *waiting)] == [0, 1, 2, 3]
        waiting[1].cancel()
        assert waiting[1].state == "cancelled" and engine.place(waiting[2]) == 2
        sixth = engine.submit("sixth")
        go.set()
        assert sixth.result() == "sixth"
        assert order == ["first", "second", "fourth", "sixth"]
        assert engine.job(first.id) is first and engine.job("no such") is None


def test_closing_cancels_everything():
    running = threading.Event()

    def work(request, progress):
        while True:
            running.set()
            progress(Phase("on and on"))

    engine = Engine(work)
    jobs = [engine.submit(n) for n in range(3)]
    running.wait(60)
    engine.close()
    assert [job.state for job in jobs] == ["cancelled"] * 3
    with pytest.raises(QueueFull, match="closed"):
        engine.submit(4)


def full_disk(progress):
    try:
        raise OSError(errno.ENOSPC, "No space left on device")
    except OSError as error:
        from pointillist.pipelines.video import OutputError

        raise OutputError("'a.mp4' cannot be written: No space left on device") from error


def no_memory(progress):
    torch.empty(2**60)


def bug(progress):
    {}["no such key"]


@pytest.mark.parametrize(
    ("failing", "said"),
    [
        (no_memory, "not enough memory; try a smaller size or fewer frames"),
        (full_disk, "cannot be written.*disk is full: delete some outputs"),
        (bug, "should not have happened.*KeyError"),
    ],
)
def test_failures_are_sentences_and_the_next_job_runs(failing, said):
    with Engine(lambda request, progress: request(progress)) as engine:
        job = engine.submit(failing)
        failed = told(job)[-1]
        assert isinstance(failed, Failed) and job.state == "failed"

        assert re.search(said, failed.sentence), failed.sentence
        with pytest.raises(type(failed.error)):
            job.result()
        assert engine.submit(lambda progress: 5).result() == 5


def test_what_is_not_finite_ends_at_its_step_and_a_vanished_model_is_told(engine, tiny_folder, tmp_path):
    broken, gone = tmp_path / "broken", tmp_path / "gone"
    shutil.copytree(tiny_folder, broken)
    shutil.copytree(tiny_folder, gone)
    weights = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["proj_out.bias"][:] = float("nan")
    save_file(tensors, weights, {"format": "pt"})
    job = engine.submit(request(broken, tmp_path / "a.gif"))
    failed = told(job)[-1]
    assert isinstance(failed, Failed) and "not finite in step 1 of 3" in failed.sentence
    assert "--dtype" in failed.sentence and not (tmp_path / "a.gif").exists()
    (gone / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    failed = told(engine.submit(request(gone, tmp_path / "a.gif")))[-1]
    assert isinstance(failed, Failed) and "cannot be loaded" in failed.sentence
    shutil.rmtree(gone)
    failed = told(engine.submit(request(gone, tmp_path / "a.gif")))[-1]
    assert isinstance(failed, Failed) and "there is no model" in failed.sentence
    assert engine.submit(request(tiny_folder, tmp_path / "a.gif")).result().output.is_file()
