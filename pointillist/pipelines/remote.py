"""Requests carried out by a server that speaks OpenAI's job API for videos, `/v1/videos`, as vLLM-Omni and SGLang do.

    with Engine(RemoteWork("http://gpu-box:8091")) as engine:
        job = engine.submit(GenerateRequest("a lake at sunrise", Path("lake.mp4")))

To whoever watches the job nothing differs from one of this machine: it tells the same events, ends with the same
result, and cancelling it deletes the job on the server. What the server does to be fast is its own business: a plan
cannot be sent.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from pointillist.pipelines.events import JobCancelled, Phase, Progress, Step, silent
from pointillist.pipelines.generate import ASKED, GenerateRequest, GenerateResult, rounded
from pointillist.pipelines.video import Clip, OutputError, check_output, read_clip, remember_settings, write_clips

KEY = "POINTILLIST_REMOTE_KEY"
"""The environment variable with the server's key, if it wants one. It is never a setting, which files would carry."""
POLL = 1.0
"""Seconds between two questions for the state of a job."""
TIMEOUT = 30.0
"""Seconds that an answer may take."""
PATIENCE = 30.0
"""Seconds that a server may be away before its job is given up."""
LARGEST = 2 * 2**30
"""Bytes of a clip."""


@dataclass(frozen=True)
class RemoteRequest:
    """What to make, and the server that is to make it: for engines that otherwise compute here."""

    url: str
    request: GenerateRequest


def generate_there(request: RemoteRequest, progress: Progress = silent, load: object = None) -> GenerateResult:
    """Carry out `request`; see `RemoteWork`. No pipeline is loaded."""
    result: GenerateResult = RemoteWork(request.url)(request.request, progress)
    return result


class RemoteError(OSError):
    """The server cannot be reached, refuses, or has failed: says which, and what to try."""


class RemoteWork:
    """An engine's work that sends clips to be generated to a server, and computes whatever else is asked for here."""

    def __init__(
        self, url: str, elsewise: Callable[[Any, Progress], Any] | None = None, poll: float = POLL,
        patience: float = PATIENCE,
    ) -> None:  # fmt: skip
        """
        Args:
            url: of the server, like `http://gpu-box:8091`.
            elsewise: the work for other requests than those to generate; None refuses them.
            poll, patience: see the constants.

        Raises:
            ValueError: the URL is none of a server.
        """
        self._server = Server(url)
        self._elsewise, self._poll, self._patience = elsewise, poll, patience

    @property
    def name(self) -> str:
        """The server's host and port."""
        return self._server.name

    def __call__(self, request: Any, progress: Progress) -> Any:
        """See `Work`.

        Raises:
            RemoteError, OutputError, ValueError: one sentence on what happened and what to try.
        """
        if isinstance(request, GenerateRequest):
            return self._generate(request, progress)
        if self._elsewise is None:
            raise ValueError(f"the server {self.name} can generate clips, not do what a {type(request).__name__} asks")
        return self._elsewise(request, progress)

    def _generate(self, request: GenerateRequest, progress: Progress) -> GenerateResult:
        check_can_be_sent(request)
        check_output(request.output)
        progress(Phase(f"asking {self.name}"))
        started = time.perf_counter()
        job = self._server.create(fields_of(request))
        try:
            done = self._wait(job, progress)
            seconds = time.perf_counter() - started
            progress(Phase(f"fetching the clip from {self.name}"))
            return self._fetch(request, done, seconds)
        except (JobCancelled, KeyboardInterrupt):
            with suppress(RemoteError):  # a server that is away cannot be told
                self._server.delete(job["id"])
            raise

    def _wait(self, job: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
        """The job's last state: it is completed."""
        began: float | None = None
        while True:
            job = self._state(job["id"], progress)
            status, share = str(job.get("status")), job.get("progress")
            if status == "completed":
                return dict(job)
            if status not in ("queued", "in_progress"):
                raise RemoteError(f"the server {self.name} could not make the clip: {_reason(job) or status}")
            if status == "queued":
                progress(Phase(f"waiting at {self.name}"))
            else:
                began = time.perf_counter() if began is None else began
                percent = int(share) if isinstance(share, int | float) and 0 < share <= 100 else 0
                pace = (time.perf_counter() - began) / percent if percent else None
                told = Step(f"generating at {self.name}, percent", percent, 100, pace)
                progress(told if percent else Phase(f"generating at {self.name}"))
            time.sleep(self._poll)

    def _state(self, name: str, progress: Progress) -> dict[str, Any]:
        """The job as the server tells it; a server that is away for a while is waited for."""
        gone_since: float | None = None
        while True:
            try:
                return self._server.retrieve(name)
            except Unanswered as error:
                gone_since = time.perf_counter() if gone_since is None else gone_since
                if time.perf_counter() - gone_since > self._patience:
                    raise RemoteError(
                        f"{error}; it has been away for {self._patience:g} s. Its job {name} may still run: see to the "
                        "server, then generate again"
                    ) from error
            progress(Phase(f"{self.name} does not answer; asking again"))
            time.sleep(self._poll)

    def _fetch(self, request: GenerateRequest, job: dict[str, Any], seconds: float) -> GenerateResult:
        """Download the clip, and write it where it was asked for with its settings inside."""
        handle, name = tempfile.mkstemp(dir=request.output.parent, prefix=f".{request.output.stem}.", suffix=".mp4")
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                self._server.download(job["id"], file)
            try:
                frames = read_clip(temporary)
            except OutputError as error:
                raise RemoteError(f"what the server {self.name} sent is no clip: {error}") from error
            facts = rounded(self._facts(request, job, frames.shape, seconds))
            if request.output.suffix.lower() == ".mp4":
                remember_settings(temporary, request.output, facts)  # the server's own encoding
            else:
                write_clips({request.output: Clip(frames, facts)}, request.fps)
        finally:
            temporary.unlink(missing_ok=True)
        return GenerateResult(request.output, facts, {"output": request.output})

    def _facts(
        self, request: GenerateRequest, job: Mapping[str, Any], shape: tuple[int, ...], seconds: float
    ) -> dict[str, Any]:
        return {
            "output": str(request.output), "prompt": request.prompt, "negative_prompt": request.negative_prompt,
            "model": str(job.get("model") or request.model), "seed": request.seed, "steps": request.steps,
            "frames": shape[0], "width": shape[2], "height": shape[1], "fps": request.fps,
            "guidance": request.guidance, "seconds": {"total": seconds}, "plan": "the server's own",
            "remote": {
                "server": self.name, "id": str(job["id"]), "seconds": _number(job.get("inference_time_s")),
                "peak_memory_mb": _number(job.get("peak_memory_mb")),
            },
            "fallbacks": [f"made by {self.name}, which does not tell how; seed and steps are those asked for"],
            "request": {name: getattr(request, name) for name in ASKED},
        }  # fmt: skip


class Unanswered(RemoteError):
    """The server cannot be reached, or has trouble of its own; it may have none in a while."""


class Refused(RemoteError):
    """The server does not accept a request."""

    def __init__(self, sentence: str, status: int) -> None:
        super().__init__(sentence)
        self.status = status


class Server:
    """The five calls of the API."""

    def __init__(self, url: str) -> None:
        """Raises ValueError for what is no URL of a server."""
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError(f"the server {url!r} is no URL; give one like http://gpu-box:8091")
        if parts.username or parts.password:
            raise ValueError(f"the server's URL must not hold a password; give its key in {KEY}")
        self.name = parts.netloc
        self._base = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}/v1/videos"
        self._opener = build_opener(_SameHost(parts.netloc))

    def create(self, fields: dict[str, Any]) -> dict[str, Any]:
        """A new job. SGLang takes JSON, vLLM-Omni the fields of a form, and each refuses the other.

        Raises:
            RemoteError: it cannot be reached, or refuses.
        """
        try:
            return self._job(self._answer("POST", "", *_as_json(fields)))
        except Refused as error:
            if error.status not in (400, 415, 422):
                raise
            refused = error
        try:
            return self._job(self._answer("POST", "", *_as_form(fields)))
        except Refused as error:
            raise (refused if "input_reference" in str(error) else error) from None  # SGLang's forms are for pictures

    def retrieve(self, name: str) -> dict[str, Any]:
        """The state of a job. Raises RemoteError."""
        return self._job(self._answer("GET", f"/{quote(name, safe='')}"))

    def delete(self, name: str) -> None:
        """Stop it, and forget it. Raises RemoteError."""
        self._answer("DELETE", f"/{quote(name, safe='')}")

    def download(self, name: str, file: IO[bytes]) -> None:
        """The clip of a completed job. Raises RemoteError; OSError if the disk is full."""
        with self._open("GET", f"/{quote(name, safe='')}/content") as answer:
            while piece := self._read(answer, 2**20):
                file.write(piece)
                if file.tell() > LARGEST:
                    raise RemoteError(f"the clip of the server {self.name} is larger than {LARGEST / 2**30:g} GiB")

    def _job(self, answer: bytes) -> dict[str, Any]:
        try:
            job = json.loads(answer)
        except ValueError:
            job = None
        if not isinstance(job, dict) or not isinstance(job.get("id"), str):
            raise RemoteError(f"the server {self.name} does not speak /v1/videos: it answered {answer[:80]!r}")
        return job

    def _answer(self, method: str, path: str, body: bytes | None = None, kind: str = "") -> bytes:
        with self._open(method, path, body, kind) as answer:
            return self._read(answer, 2**20)

    def _open(self, method: str, path: str, body: bytes | None = None, kind: str = "") -> Any:
        headers = {"Accept": "application/json, video/mp4", **({"Content-Type": kind} if kind else {})}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        try:
            return self._opener.open(Request(self._base + path, body, headers, method=method), timeout=TIMEOUT)
        except HTTPError as error:
            raise self._failure(error) from error
        except (URLError, HTTPException, OSError) as error:
            raise self._silence(error) from error

    def _read(self, answer: Any, count: int) -> bytes:
        try:
            return answer.read(count)
        except (HTTPException, OSError) as error:
            raise self._silence(error) from error

    def _silence(self, error: Exception) -> Unanswered:
        why = getattr(error, "reason", None) or error
        return Unanswered(f"the server {self.name} does not answer ({why}); is it running, and is the address right?")

    def _failure(self, error: HTTPError) -> RemoteError:
        said = ""
        with error, suppress(OSError, HTTPException):
            said = _message(error.read(2**14))
        said = f": {said}" if said else ""
        if error.code in (401, 403):
            return Refused(f"the server {self.name} wants a key ({error.code}); give it in {KEY}{said}", error.code)
        if error.code == 404:
            return Refused(
                f"the server {self.name} does not know that (404){said}; it may have been started anew, or not speak "
                "/v1/videos",
                404,
            )
        if error.code >= 500 or error.code == 429:
            return Unanswered(f"the server {self.name} has trouble ({error.code}){said}")
        return Refused(f"the server {self.name} refuses the request ({error.code}){said}", error.code)


class _SameHost(HTTPRedirectHandler):
    """Follows no redirection to another host, which would be sent the key too."""

    def __init__(self, netloc: str) -> None:
        self._netloc = netloc

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: str) -> Any:
        if urlsplit(newurl).netloc != self._netloc:
            raise URLError(f"it sends us on to {urlsplit(newurl).netloc}, which was not asked for")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def check_can_be_sent(request: GenerateRequest) -> None:
    """Raises ValueError for what a server cannot be asked for."""
    wished = {
        "plan": request.plan not in (None, "auto", "none"), "pattern": request.pattern is not None,
        "cache": request.cache not in ("auto", "none"), "regions": request.regions not in ("auto", "none"),
        "dense": request.dense != "auto", "compare": request.compare, "keep": request.keep is not None,
    }  # fmt: skip
    if asked := [name for name, is_wished in wished.items() if is_wished]:
        raise ValueError(
            f"{', '.join(asked)} cannot be sent to a server: how it computes is set where it is started; leave that out"
        )
    if (request.width is None) != (request.height is None):
        raise ValueError("a server takes width and height together; give both, or neither for its own size")


def fields_of(request: GenerateRequest) -> dict[str, Any]:
    """What is sent, by the names that both servers use; what is not given is left to the server."""
    size = None if request.width is None else f"{request.width}x{request.height}"
    fields = {
        "prompt": request.prompt, "negative_prompt": request.negative_prompt or None, "size": size,
        "model": None if request.model == "embedded" else request.model, "num_frames": request.frames,
        "fps": request.fps, "num_inference_steps": request.steps, "guidance_scale": request.guidance,
        "flow_shift": request.shift, "seed": request.seed,
    }  # fmt: skip
    return {name: value for name, value in fields.items() if value is not None}


def _as_json(fields: dict[str, Any]) -> tuple[bytes, str]:
    return json.dumps(fields, allow_nan=False).encode(), "application/json"


def _as_form(fields: dict[str, Any]) -> tuple[bytes, str]:
    boundary = uuid.uuid4().hex
    parts = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        for name, value in fields.items()
    )
    return ("".join(parts) + f"--{boundary}--\r\n").encode(), f"multipart/form-data; boundary={boundary}"


def _reason(job: Mapping[str, Any]) -> str:
    """Why a job has failed, as far as the server says."""
    error = job.get("error")
    return str(error.get("message", "") if isinstance(error, dict) else error or "")[:300]


def _message(body: bytes) -> str:
    """What an error's body says, in the forms of OpenAI and of FastAPI."""
    try:
        said = json.loads(body)
    except ValueError:
        return body.decode(errors="replace").strip()[:200]
    if isinstance(said, dict):
        said = said.get("error") or said.get("detail") or said
    if isinstance(said, dict):
        said = said.get("message") or said
    if isinstance(said, list):
        said = "; ".join(str(each.get("msg", each)) if isinstance(each, dict) else str(each) for each in said)
    return str(said)[:300]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
