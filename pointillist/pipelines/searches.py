"""The searches of a folder: each has a folder of its own, named by nobody, in which it can go on where it stopped."""

from __future__ import annotations

import json
import re
import time
import uuid
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pointillist.pipelines.search import SearchRequest
from pointillist.search.errors import SearchError

NAME = re.compile(r"\d{8}-\d{6}-[0-9a-f]{8}")
"""Day, time and eight random digits."""
PLAN = "plan.safetensors"
ASKED = "asked.json"


@dataclass(frozen=True)
class Searches:
    """In a folder."""

    folder: Path

    def new(self, **asked: Any) -> SearchRequest:
        """A search that has not begun. Raises OSError; what is asked for is checked by the search itself."""
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:8]}"
        request = SearchRequest(self.folder / name / PLAN, self.folder / name, **asked)
        request.folder.mkdir(parents=True)
        (request.folder / ASKED).write_text(json.dumps(request.asked), encoding="utf-8")
        return request

    @property
    def names(self) -> list[str]:
        """All of them, newest first."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted((path.name for path in found if NAME.fullmatch(path.name) and path.is_dir()), reverse=True)

    def folder_of(self, name: str) -> Path | None:
        """Of a search; None if there is none of this name. Nothing outside of the folder can be named."""
        path = self.folder / name
        return path if NAME.fullmatch(name) and path.is_dir() and not path.is_symlink() else None

    def request(self, name: str) -> SearchRequest:
        """What was asked for, so that it can go on. Raises SearchError."""
        folder = self.folder_of(name)
        if folder is None:
            raise SearchError(f"there is no search {name!r:.60}")
        try:
            asked = json.loads((folder / ASKED).read_text(encoding="utf-8"))
            known = {each.name for each in fields(SearchRequest)}
            return SearchRequest(folder / PLAN, folder, **{k: v for k, v in asked.items() if k in known})
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise SearchError(f"the search {name} cannot be read: {error}") from error

    def title(self, name: str) -> str:
        """When it was begun, what was wished, and whether it is done."""
        when = time.strptime(name[:15], "%Y%m%d-%H%M%S")
        try:
            request = self.request(name)
        except SearchError:
            return name
        wish = f"{request.target_speedup:g}×" if request.target_speedup else request.speed
        wish = f"at least {request.min_psnr:g} dB" if request.min_psnr else wish
        size = f", {request.width}×{request.height}" if request.width else ""
        state = "" if request.output.is_file() else " (not finished)"
        return f"{time.strftime('%d %b %H:%M', when)}: {request.model}{size}, {wish}{state}"
