"""Clips for many: replicas that each hold a pipeline, and OpenAI's job API for videos in front of them.

    pip install "pointillist[serve]"
    serve run examples.ray_serve.server:app          # or: python examples/ray_serve/server.py
    curl -H "Content-Type: application/json" -d '{"prompt": "a red circle on black"}' localhost:8000/v1/videos

    POST   /v1/videos               a job: 200 and its state, 400 for what no clip can be made of, 429 if too many wait
    GET    /v1/videos               all jobs
    GET    /v1/videos/ID            one: queued, in_progress, completed or failed
    GET    /v1/videos/ID/content    the clip, an MP4
    DELETE /v1/videos/ID            stop it, and forget it

A replica that dies takes no job with it: the job is given to another one with the same seed, at most `ATTEMPTS` times
in all. Jobs lie in a folder, so a front that is started anew carries on. There is no key: put a proxy with one before
it.
"""

import asyncio
import json
import os
import secrets
import tempfile
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import FileResponse
from ray import serve
from ray.exceptions import RayActorError

from pointillist.pipelines.engine import Engine
from pointillist.pipelines.events import Step
from pointillist.pipelines.generate import GenerateRequest

REPLICAS = int(os.environ.get("REPLICAS", "2"))
WAITING = int(os.environ.get("WAITING", "8"))
"""Jobs that may wait for a replica; further ones are refused."""
ATTEMPTS = 3
MODEL = os.environ.get("MODEL", "embedded")
FOLDER = Path(os.environ.get("VIDEOS", Path(tempfile.gettempdir()) / "pointillist-videos"))
LARGEST = 64 * 2**10
"""Bytes of a request."""

api = FastAPI(title="Pointillist")  # Serve copies it with what its functions use when it meets the front's class


def request_of(fields: dict[str, Any], output: Path) -> GenerateRequest:
    """What is asked for. Raises ValueError or TypeError for what cannot be made."""
    known = {
        "prompt": "prompt", "negative_prompt": "negative_prompt", "num_frames": "frames", "fps": "fps",
        "num_inference_steps": "steps", "guidance_scale": "guidance", "flow_shift": "shift", "seed": "seed",
        "speed": "speed",
    }  # fmt: skip
    given = {known[name]: value for name, value in fields.items() if name in known and value is not None}
    if unknown := sorted(set(fields) - set(known) - {"size", "model"}):
        raise ValueError(f"{', '.join(unknown)} is unknown; a request has {', '.join(known)}, size and model")
    for name, value in given.items():
        kinds = (str,) if name in ("prompt", "negative_prompt", "speed") else (int, float)
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise ValueError(f"{name} is {value!r:.80}; it must be {'text' if str in kinds else 'a number'}")
    if fields.get("model", MODEL) != MODEL:
        raise ValueError(f"the model {fields['model']!r:.80} is not served here; {MODEL} is")
    if "size" in fields:
        width, cross, height = str(fields["size"]).partition("x")
        if not (cross and width.isdecimal() and height.isdecimal()):
            raise ValueError(f"size is {fields['size']!r:.80}; it must be like 176x176")
        given |= {"width": int(width), "height": int(height)}
    return GenerateRequest(**{"prompt": "", **given}, output=output, model=MODEL)


def told(job: dict[str, Any]) -> dict[str, Any]:
    """A job as the API tells it."""
    fields = job["fields"]
    return {name: value for name, value in job.items() if name != "fields"} | {
        "seed": fields["seed"], "size": fields.get("size"), "prompt": fields.get("prompt")
    }  # fmt: skip


@serve.deployment(num_replicas=REPLICAS, max_ongoing_requests=1, ray_actor_options={"num_cpus": 1})
class Generator:
    """One pipeline. With GPUs, give `ray_actor_options={"num_gpus": 1}`."""

    def __init__(self) -> None:
        self._engine = Engine()

    async def generate(self, fields: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """How far it is, after every step; at last the clip and what is known of it."""
        with tempfile.TemporaryDirectory() as folder:
            job = self._engine.submit(request_of(fields, Path(folder) / "clip.mp4"))
            try:
                events = job.events()
                while (event := await asyncio.to_thread(next, events, None)) is not None:
                    if isinstance(event, Step):
                        yield {"step": event.step, "steps": event.steps, "process": os.getpid()}
                result = job.result()
                yield {"clip": result.output.read_bytes(), "facts": result.facts}
            finally:
                job.cancel()  # whoever asked has gone; what has ended stays as it is


@serve.deployment(num_replicas=1, max_ongoing_requests=256)
@serve.ingress(api)
class Videos:
    """The front: jobs, and which of them run."""

    def __init__(self, generator: Any) -> None:
        self._generator = generator
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._turn = asyncio.Semaphore(REPLICAS)
        FOLDER.mkdir(parents=True, exist_ok=True)
        self._jobs = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("video_*.json"))}
        for job in self._jobs.values():
            if job["status"] in ("queued", "in_progress"):
                self._start(job)

    @api.post("/v1/videos")
    async def create(self, request: Request) -> dict[str, Any]:
        body = await request.body()
        if len(body) > LARGEST:
            raise HTTPException(413, f"the request has {len(body)} bytes; {LARGEST} are allowed")
        try:
            fields = json.loads(body)
            if not isinstance(fields, dict):
                raise ValueError(f"the request is a JSON {type(fields).__name__}; it must be an object")
            request_of(fields, Path("clip.mp4"))
        except (ValueError, TypeError) as error:
            raise HTTPException(400, str(error)) from error
        unfinished = sum(job["status"] in ("queued", "in_progress") for job in self._jobs.values())
        if unfinished >= REPLICAS + WAITING:
            raise HTTPException(429, f"{unfinished} jobs run or wait, which is the limit; ask again later")
        job = {
            "id": f"video_{uuid.uuid4().hex}", "object": "video", "status": "queued", "progress": 0,
            "created_at": int(time.time()), "model": MODEL, "attempts": 0,
            "fields": {"seed": secrets.randbelow(2**31), **fields},
        }  # fmt: skip
        self._jobs[job["id"]] = job
        self._start(job)
        return told(job)

    @api.get("/v1/videos")
    async def every(self) -> dict[str, Any]:
        return {"object": "list", "data": [told(job) for job in self._jobs.values()]}

    @api.get("/v1/videos/{name}")
    async def one(self, name: str) -> dict[str, Any]:
        return told(self._job(name))

    @api.get("/v1/videos/{name}/content")
    async def content(self, name: str) -> FileResponse:
        job = self._job(name)
        if job["status"] != "completed":
            raise HTTPException(409, f"the job is {job['status']}; there is no clip")
        return FileResponse(FOLDER / f"{name}.mp4", media_type="video/mp4")

    @api.delete("/v1/videos/{name}")
    async def delete(self, name: str) -> dict[str, Any]:
        del self._jobs[self._job(name)["id"]]
        if (task := self._tasks.pop(name, None)) is not None:
            task.cancel()
        for ending in (".json", ".mp4"):
            (FOLDER / f"{name}{ending}").unlink(missing_ok=True)
        return {"id": name, "object": "video.deleted", "deleted": True}

    def _job(self, name: str) -> dict[str, Any]:
        if name not in self._jobs:
            raise HTTPException(404, f"there is no job {name[:80]}")
        return self._jobs[name]

    def _start(self, job: dict[str, Any]) -> None:
        self._keep(job, status="queued", progress=0)
        self._tasks[job["id"]] = asyncio.get_running_loop().create_task(self._carry_out(job))

    async def _carry_out(self, job: dict[str, Any]) -> None:
        """Until there is a clip, or it is known that there will be none."""
        async with self._turn:
            for attempt in range(1, ATTEMPTS + 1):
                self._keep(job, attempts=attempt, progress=0)
                try:
                    await self._once(job)
                    return
                except RayActorError as error:
                    self._keep(job, status="queued", error={"message": f"a replica has died: {type(error).__name__}"})
                except Exception as error:  # whatever it is, whoever asks must hear of it
                    cause = getattr(error, "cause", None) or error
                    self._keep(job, status="failed", error={"message": str(cause)[:300]})
                    return
            self._keep(job, status="failed")

    async def _once(self, job: dict[str, Any]) -> None:
        answers = self._generator.options(stream=True).generate.remote(job["fields"])
        try:
            async for told in answers:
                if "clip" in told:
                    (FOLDER / f"{job['id']}.mp4").write_bytes(told["clip"])
                    self._keep(job, status="completed", progress=100, completed_at=int(time.time()), error=None)
                else:
                    share = round(100 * told["step"] / max(1, told["steps"]))
                    self._keep(job, status="in_progress", progress=share, process=told["process"])
        except asyncio.CancelledError:
            with suppress(RayActorError):
                answers.cancel()
            raise

    def _keep(self, job: dict[str, Any], **changes: Any) -> None:
        """In the folder, whole or not at all, unless it was deleted."""
        job.update(changes)
        if job["id"] in self._jobs:
            temporary = FOLDER / f".{job['id']}"
            temporary.write_text(json.dumps(job))
            temporary.replace(FOLDER / f"{job['id']}.json")


app = Videos.bind(Generator.bind())

if __name__ == "__main__":
    serve.run(app, blocking=True)
