"""A server that speaks `/v1/videos` over HTTP as vLLM-Omni or SGLang do, but makes its clips of noise."""

import json
import re
import threading
import time
import uuid
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

from pointillist.pipelines.video import Clip, write_clips


class VideoServer:
    """With `style` "vllm" it takes forms and no JSON; with "sglang" JSON, and forms only with a picture."""

    def __init__(self, folder: Path, style="vllm", polls=3, fail="", key="", errors=(), seconds_a_poll=0.0):
        """
        Args:
            polls: so often a job is asked for before it is done.
            fail: why every job fails.
            key: what must be given.
            errors: HTTP statuses that the next requests for a job's state are answered with.
        """
        self.folder, self.style, self.polls, self.fail, self.key = folder, style, polls, fail, key
        self.errors, self.jobs, self.deleted, self.requests = list(errors), {}, [], []
        self.seconds_a_poll, self.garbage, self.elsewhere = seconds_a_poll, False, ""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def create(self, fields):
        job = {
            "id": f"video_gen_{uuid.uuid4().hex}", "object": "video", "model": fields.get("model", "stand-in"),
            "prompt": fields["prompt"], "status": "queued", "progress": 0, "created_at": int(time.time()),
            "size": fields.get("size"), "seconds": "1", "error": None,
        }  # fmt: skip
        self.jobs[job["id"]] = {"job": job, "fields": fields, "asked": 0}
        return job

    def state(self, name):
        entry = self.jobs[name]
        entry["asked"] += 1
        job, asked = entry["job"], entry["asked"]
        time.sleep(self.seconds_a_poll)
        if asked >= self.polls and self.fail:
            job |= {"status": "failed", "error": {"code": "server_error", "message": self.fail}}
        elif asked >= self.polls:
            job |= {"status": "completed", "progress": 100, "completed_at": int(time.time()), "inference_time_s": 1.5}
        elif asked > 1:
            job |= {"status": "in_progress", "progress": 100 * asked // self.polls}
        return job

    def clip(self, name):
        if self.garbage:
            return b"<html>no clip at all</html>" * 100
        fields = self.jobs[name]["fields"]
        width, height = map(int, (fields.get("size") or "64x48").split("x"))
        frames = np.random.default_rng(0).random((int(fields.get("num_frames", 9)), height, width, 3), np.float32)
        path = self.folder / f"{name}.mp4"
        write_clips({path: Clip(frames, {})}, int(fields.get("fps", 24)))
        return path.read_bytes()


def _handler(server):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            kind = self.headers["Content-Type"]
            server.requests.append((self.path, kind.partition(";")[0]))
            if not self._may():
                return
            form = kind.startswith("multipart/form-data")
            if server.style == "vllm" and not form:
                message = "[{'type': 'missing', 'loc': ('body', 'prompt'), 'msg': 'Field required'}]"
                return self._say(400, {"error": {"message": message, "type": "Bad Request", "code": 400}})
            if server.style == "sglang" and form:
                return self._say(400, {"detail": "input_reference file is required"})
            fields = _fields(kind, body) if form else json.loads(body)
            if int(fields.get("num_inference_steps", 1)) > 200:
                return self._say(422, {"detail": [{"msg": "Input should be less than or equal to 200"}]})
            self._say(200, server.create(fields))

        def do_GET(self):
            server.requests.append((self.path, ""))
            name, _, content = self.path.removeprefix("/v1/videos/").partition("/")
            if not self._may():
                return
            if name not in server.jobs:
                return self._say(404, {"detail": "Video not found"})
            if content == "content":
                if server.elsewhere:
                    self.send_response(302)
                    self.send_header("Location", server.elsewhere)
                    self.send_header("Content-Length", "0")
                    return self.end_headers()
                return self._say(200, server.clip(name), "video/mp4")
            if server.errors:
                return self._say(server.errors.pop(0), {"error": {"message": "Internal Server Error", "code": 500}})
            self._say(200, server.state(name))

        def do_DELETE(self):
            name = self.path.removeprefix("/v1/videos/")
            server.deleted.append(name)
            found = server.jobs.pop(name, None)
            self._say(200 if found else 404, {"id": name, "deleted": True, "object": "video.deleted"})

        def _may(self):
            if server.key and self.headers.get("Authorization") != f"Bearer {server.key}":
                self._say(401, {"error": "Unauthorized"})
                return False
            return True

        def _say(self, status, answer, kind="application/json"):
            body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    return Handler


def _fields(kind, body):
    message = BytesParser().parsebytes(b"Content-Type: " + kind.encode() + b"\r\n\r\n" + body)
    names = [re.search(r'name="([^"]*)"', part["Content-Disposition"])[1] for part in message.get_payload()]
    return {
        name: part.get_payload(decode=True).decode() for name, part in zip(names, message.get_payload(), strict=True)
    }
