"""The folder of finished clips: names that nobody chooses, and nothing else in it that could be asked for."""

from __future__ import annotations

import re
import shutil
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from pointillist.pipelines.kept import SUFFIX as KEPT

NAME = re.compile(r"\d{8}-\d{6}-[0-9a-f]{8}(_dense|_compare)?\.(mp4|gif|png)")
"""Day, time, eight random digits, and what the file is beside its clip."""
LEAST_FREE = 200 * 2**20
"""Bytes of the disk that stay free."""


class NoRoom(OSError):
    """No other clip may be written."""


@dataclass(frozen=True)
class Outputs:
    """Clips in a folder."""

    folder: Path
    most: int = 20 * 2**30
    """Bytes that may be in it."""

    def new(self, suffix: str = ".mp4") -> Path:
        """A path for a new clip.

        Raises:
            NoRoom: the folder holds too much, or the disk is nearly full.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        used, free = self.used, shutil.disk_usage(self.folder).free
        if used > self.most:
            raise NoRoom(f"the outputs take {_size(used)}, more than {_size(self.most)}; delete some in the gallery")
        if free < LEAST_FREE:
            raise NoRoom(f"only {_size(free)} of the disk are free; delete some outputs in the gallery, or free space")
        return self.folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:8]}{suffix}"

    @property
    def clips(self) -> list[Path]:
        """All of them but the dense ones and the comparisons beside them, newest first."""
        files = self.folder.iterdir() if self.folder.is_dir() else ()
        found = (path for path in files if NAME.fullmatch(path.name) and "_" not in path.name)
        return sorted(found, key=lambda path: path.name, reverse=True)

    @property
    def plans(self) -> list[Path]:
        """Plan files that searches from the page have left, in `plans/`."""
        return sorted((self.folder / "plans").glob("*.safetensors"))

    @property
    def used(self) -> int:
        """Bytes."""
        files = self.folder.iterdir() if self.folder.is_dir() else ()
        return sum(path.stat().st_size for path in files if path.is_file())

    def path(self, name: str) -> Path | None:
        """The file of this name; None if there is none here. Nothing outside of the folder can be named."""
        path = self.folder / name
        return path if NAME.fullmatch(name) and path.is_file() and not path.is_symlink() else None

    def kept(self, clip: Path) -> Path:
        """Where a clip's `generate --keep` goes."""
        return clip.with_suffix(KEPT)

    def delete(self, name: str) -> None:
        """A clip and everything beside it."""
        if self.path(name) is not None:
            for path in self.folder.glob(f"{Path(name).stem.partition('_')[0]}*"):
                path.unlink(missing_ok=True)


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
