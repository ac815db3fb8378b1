"""Clips of a server, over real HTTP: the two servers' ways, and everything that goes wrong."""

import json
import socket
import threading
import time

import pytest

from pointillist.cli import run
from pointillist.pipelines.engine import Engine, LocalWork
from pointillist.pipelines.events import JobCancelled, Phase, Step
from pointillist.pipelines.generate import GenerateRequest
from pointillist.pipelines.remote import KEY, RemoteError, RemoteWork, Server, fields_of
from pointillist.pipelines.repaint import RepaintRequest, predict
from pointillist.pipelines.search import SearchRequest
from pointillist.pipelines.video import OutputError, read_clip, read_settings
from video_server import VideoServer


@pytest.fixture
def server(tmp_path):
    with VideoServer(tmp_path) as server:
        yield server


def request(folder, **changes):
    given = dict(prompt="a lake, “quoted”\nin two lines", output=folder / "lake.mp4", width=64, height=48, frames=9)
    return GenerateRequest(**{**given, "seed": 7, "steps": 12, "guidance": 4.5, "fps": 8, **changes})


def work(server, **changes):
    return RemoteWork(server.url, poll=0.01, **{"patience": 0.3, **changes})


@pytest.mark.parametrize("style", ["vllm", "sglang"])
def test_a_clip_of_either_server(tmp_path, style):
    with VideoServer(tmp_path, style) as server, Engine(work(server)) as engine:
        job = engine.submit(request(tmp_path))
        result = job.result()
        (entry,) = server.jobs.values()
        sent = {name: str(value) for name, value in entry["fields"].items()}
    assert sent == {
        "prompt": "a lake, “quoted”\nin two lines", "size": "64x48", "num_frames": "9", "fps": "8",
        "num_inference_steps": "12", "guidance_scale": "4.5", "seed": "7",
    }  # fmt: skip
    assert read_clip(result.output).shape == (9, 48, 64, 3) and read_settings(result.output) == result.facts
    assert result.facts["remote"]["seconds"] == 1.5 and result.facts["prompt"] == entry["fields"]["prompt"]
    told = [event for event in job.events() if isinstance(event, Step | Phase)]
    assert any(isinstance(event, Step) and event.step == 66 and event.steps == 100 for event in told)
    assert any("fetching" in event.phase for event in told)
    assert sorted(path.name for path in tmp_path.glob("*lake*")) == ["lake.mp4"]  # nothing temporary is left


def test_the_servers_encoding_is_kept_unless_another_format_is_asked_for(server, tmp_path):
    work(server)(request(tmp_path), lambda event: None)
    (name,) = server.jobs
    assert (read_clip(tmp_path / "lake.mp4") == read_clip(tmp_path / f"{name}.mp4")).all()
    gif = work(server)(request(tmp_path, output=tmp_path / "lake.gif"), lambda event: None)
    assert len(read_clip(gif.output)) == 9 and read_settings(gif.output)["remote"]["server"] in server.url


def test_what_is_not_given_is_the_servers_to_choose():
    assert fields_of(GenerateRequest("a lake")) == {"prompt": "a lake", "fps": 16}
    more = GenerateRequest("a lake", model="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", negative_prompt="blurry", shift=3.0)
    assert fields_of(more).items() >= {"model": more.model, "negative_prompt": "blurry", "flow_shift": 3.0}.items()


def test_the_command_line_asks_a_server_too(server, tmp_path, capsys):
    output = tmp_path / "lake.mp4"
    arguments = ["generate", "a lake", "--remote", server.url, "--output", str(output), "--seed", "3", "--json"]
    assert run(arguments) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts == read_settings(output) and facts["seed"] == 3
    server.fail = "CUDA out of memory"
    assert run(arguments) == 1 and "CUDA out of memory" in capsys.readouterr().err
    assert run([*arguments, "--compare"]) == 2 and "cannot be sent to a server" in capsys.readouterr().err
    assert run(["generate", "a lake", "--remote", "ftp://box", "--output", str(output)]) == 2


def test_nobody_is_there(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with Engine(RemoteWork(url)) as engine:
        job = engine.submit(request(tmp_path))
        with pytest.raises(RemoteError, match=r"does not answer .*is it running"):
            job.result()
    assert "does not answer" in job.ended_with.sentence and not list(tmp_path.iterdir())


@pytest.mark.parametrize("style", ["vllm", "sglang"])
def test_a_refusal_is_told_in_the_servers_words(tmp_path, style):
    with VideoServer(tmp_path, style) as server:
        with pytest.raises(RemoteError, match=r"refuses the request .422.*less than or equal to 200"):
            work(server)(request(tmp_path, steps=201), lambda event: None)
        assert not server.jobs


def test_a_key(server, tmp_path, monkeypatch):
    server.key = "secret"
    with pytest.raises(RemoteError, match=f"wants a key .401.; give it in {KEY}"):
        work(server)(request(tmp_path), lambda event: None)
    monkeypatch.setenv(KEY, "secret")
    result = work(server)(request(tmp_path), lambda event: None)
    assert "secret" not in str(result.facts)


def test_the_key_is_sent_to_no_other_host(server, tmp_path, monkeypatch):
    monkeypatch.setenv(KEY, "secret")
    with VideoServer(tmp_path) as other:
        server.elsewhere = f"{other.url}/v1/videos/stolen"
        with pytest.raises(RemoteError, match="sends us on to"):
            work(server)(request(tmp_path), lambda event: None)
        assert not other.requests


def test_a_job_that_fails_there(tmp_path):
    with VideoServer(tmp_path, fail="CUDA out of memory") as server, Engine(work(server)) as engine:
        job = engine.submit(request(tmp_path))
        with pytest.raises(RemoteError, match="could not make the clip: CUDA out of memory"):
            job.result()
        server.fail = ""
        assert engine.submit(request(tmp_path)).result().output.exists()  # the next job runs


def test_a_server_that_is_away_for_a_moment(server, tmp_path):
    server.errors, told = [500, 503], []
    assert work(server)(request(tmp_path), told.append).output.exists()
    assert sum("does not answer; asking again" in event.phase for event in told) == 2


def test_a_server_that_vanishes(server, tmp_path):
    def told(event):
        if isinstance(event, Step):
            server.close()

    with pytest.raises(RemoteError, match=r"away for 0.3 s. Its job video_gen_.* may still run"):
        work(server)(request(tmp_path), told)
    assert not (tmp_path / "lake.mp4").exists()


def test_a_server_that_was_started_anew(server, tmp_path):
    with pytest.raises(RemoteError, match=r"does not know that .404.*may have been started anew"):
        work(server)(request(tmp_path), lambda event: server.jobs.clear() if isinstance(event, Step) else None)


def test_what_is_no_clip(server, tmp_path):
    server.garbage = True
    with pytest.raises(RemoteError, match="is no clip"):
        work(server)(request(tmp_path), lambda event: None)
    assert not list(tmp_path.iterdir())


def test_cancelling_deletes_the_job_there(tmp_path):
    with VideoServer(tmp_path, polls=2000) as server, Engine(work(server)) as engine:
        job = engine.submit(request(tmp_path))
        while not any(isinstance(job.latest, Step) for _ in [0]):
            time.sleep(0.01)
        job.cancel()
        with pytest.raises(JobCancelled):
            job.result()
        assert len(server.deleted) == 1 and not server.jobs and not (tmp_path / "lake.mp4").exists()
        server.polls = 2
        assert engine.submit(request(tmp_path)).result().output.exists()


def test_cancelling_while_the_server_is_away(server, tmp_path):
    with Engine(work(server, patience=60)) as engine:
        server.polls = 2000
        job = engine.submit(request(tmp_path))
        while not isinstance(job.latest, Step):
            time.sleep(0.01)
        server.close()
        threading.Timer(0.1, job.cancel).start()
        with pytest.raises(JobCancelled):
            job.result()


def test_what_cannot_be_sent(server, tmp_path):
    for changes in ({"plan": "mine.safetensors"}, {"pattern": "pooled"}, {"compare": True}, {"cache": "easy"}):
        with pytest.raises(ValueError, match=f"{next(iter(changes))} cannot be sent to a server"):
            work(server)(request(tmp_path, **changes), lambda event: None)
    with pytest.raises(ValueError, match="both, or neither"):
        work(server)(request(tmp_path, height=None), lambda event: None)
    with pytest.raises(ValueError, match="not do what a SearchRequest asks"):
        work(server)(SearchRequest(tmp_path / "a.safetensors", tmp_path / "a"), lambda event: None)
    assert not server.requests


def test_other_requests_are_computed_here(server, tmp_path):
    result = work(server)(request(tmp_path), lambda event: None)
    mask = RepaintRequest(result.output, "0,0,8,8", "another", tmp_path / "new.mp4")
    with pytest.raises(OutputError, match="was made by the server"):
        work(server, elsewise=LocalWork())(mask, lambda event: None)
    with pytest.raises(OutputError, match="was made by the server"):
        predict(mask)


@pytest.mark.parametrize("url", ["ftp://box", "http://", "file:///etc/passwd", "http://box/?a=1"])
def test_what_is_no_server(url):
    with pytest.raises(ValueError, match="is no URL"):
        Server(url)


def test_servers_by_their_names():
    assert Server("gpu-box:8091")._base == Server("http://gpu-box:8091/v1/")._base == "http://gpu-box:8091/v1/videos"
    with pytest.raises(ValueError, match="must not hold a password"):
        Server("http://me:secret@box")
