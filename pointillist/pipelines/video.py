"""Clips as files: MP4, GIF or a PNG strip, with the settings that made them inside."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

FORMATS = (".mp4", ".gif", ".png")
GIF_FPS = 50
"""The most that players show."""
STRIP_FRAMES = 8
"""Frames in a PNG strip, evenly spaced."""
MOST_SETTINGS = 2**20
"""Bytes of them that are read."""


class OutputError(OSError):
    """A clip cannot be written where it should go, or read from where it should be."""


def check_format(path: Path, fps: int) -> None:
    """Raise `ValueError` for a file name or a frame rate that no clip can have."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"the output {str(path)!r} must end in one of {', '.join(FORMATS)}")
    most = GIF_FPS if path.suffix.lower() == ".gif" else 120
    if not 1 <= fps <= most:
        raise ValueError(f"{fps} frames per second are not possible; a {path.suffix} file can have 1 to {most}")


def check_output(path: Path) -> None:
    """Raise `OutputError` if nothing can be written at `path`; makes its folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OutputError(f"the folder {str(path.parent)!r} cannot be written: {error.strerror}") from error
    if path.is_dir():
        raise OutputError(f"the output {str(path)!r} is a folder; give the name of a file")


@dataclass(frozen=True)
class Clip:
    """Float frames [F, H, W, 3] in [0, 1], and the settings that go into the file's metadata as JSON."""

    frames: np.ndarray
    settings: dict[str, Any]


def to_pixels(frames: np.ndarray) -> np.ndarray:
    """Float frames in [0, 1] as uint8, as they go into a file."""
    return (frames.clip(0, 1) * 255).round().astype(np.uint8)


def write_clips(clips: dict[Path, Clip], fps: int) -> None:
    """Write all of them whole, or none: to temporary files beside them first, which are then renamed."""
    temporaries: dict[Path, Path] = {}
    path = Path()
    try:
        for path, clip in clips.items():
            pixels = to_pixels(clip.frames)
            comment = json.dumps(clip.settings, allow_nan=False)
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix.lower())
            os.close(handle)
            temporaries[path] = Path(name)
            _WRITERS[path.suffix.lower()](temporaries[path], pixels, fps, comment)
            temporaries[path].chmod(0o666 & ~_umask())
        for path, temporary in temporaries.items():
            os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"{str(path)!r} cannot be written: {error.strerror or error}") from error
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)


def remember_settings(source: Path, target: Path, settings: dict[str, Any]) -> None:
    """Write an MP4 as it is, with settings in its metadata, whole or not at all. Raises OutputError."""
    import imageio_ffmpeg

    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.stem}.", suffix=".mp4")
    os.close(handle)
    temporary = Path(name)
    command = [
        imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", "-i", str(source), "-map", "0:v", "-c", "copy",
        "-metadata", f"comment={json.dumps(settings, allow_nan=False)}", "-movflags", "+faststart", str(temporary),
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(done.stderr.strip()[:200])
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, target)
    except OSError as error:
        raise OutputError(f"{str(target)!r} cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_clip(path: Path) -> np.ndarray:
    """Frames of a file as float64 [F, H, W, 3] in [0, 1]."""
    import imageio.v3 as iio

    if not path.is_file():
        raise OutputError(f"there is no file {str(path)!r}")
    try:
        if path.suffix.lower() == ".mp4":
            pixels = iio.imread(path, plugin="FFMPEG")
        else:
            pixels = iio.imread(path, plugin="pillow", mode="RGB")
            if path.suffix.lower() == ".gif":
                pixels = np.repeat(np.atleast_3d(pixels).reshape(-1, *pixels.shape[-3:]), _repeats(path), axis=0)
    except (OSError, ValueError, RuntimeError, IndexError, EOFError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise OutputError(f"{str(path)!r} cannot be read as a clip: {reason}") from error
    return np.atleast_3d(pixels).reshape(-1, *pixels.shape[-3:]) / 255


def read_frames(path: Path, numbers: Sequence[int]) -> np.ndarray:
    """Some frames of a file, ascending, as uint8 [n, H, W, 3]; others take no memory. Raises OutputError."""
    import imageio.v3 as iio

    if path.suffix.lower() != ".mp4":
        return to_pixels(read_clip(path)[list(numbers)])
    wanted = set(numbers)
    try:
        found = [frame for number, frame in enumerate(iio.imiter(path, plugin="FFMPEG")) if number in wanted]
    except (OSError, ValueError, RuntimeError) as error:
        raise OutputError(f"{str(path)!r} cannot be read as a clip: {str(error).partition(chr(10))[0]}") from error
    if len(found) != len(wanted):
        raise OutputError(f"{str(path)!r} has fewer frames than {max(wanted) + 1}")
    return np.stack(found)


def read_settings(path: Path) -> dict[str, Any]:
    """The settings that `write_clip` put into a file."""
    import imageio.v3 as iio

    if path.suffix.lower() == ".mp4":
        comment = _mp4_comment(path)
    else:
        metadata = iio.immeta(path, plugin="pillow")
        comment = metadata.get("comment", metadata.get("pointillist", ""))
    text = comment.decode() if isinstance(comment, bytes) else comment
    try:
        return json.loads(text)
    except ValueError:
        raise OutputError(f"{str(path)!r} carries no settings of pointillist") from None


def _repeats(path: Path) -> list[int]:
    """How often each image of a GIF was shown: equal frames in a row are one image with a longer duration."""
    from PIL import Image, ImageSequence

    with Image.open(path) as image:
        comment = image.info.get("comment", b"")
        durations = [frame.info.get("duration", 0) for frame in ImageSequence.Iterator(image)]
    try:
        frames = int(json.loads(comment)["frames"])
    except (ValueError, KeyError, TypeError):
        return [1] * len(durations)  # not a file of ours
    ends = np.cumsum([0, *durations]) * frames / max(sum(durations), 1)
    return np.diff(ends.round().astype(int)).tolist()


def _write_mp4(path: Path, pixels: np.ndarray, fps: int, comment: str) -> None:
    import imageio.v3 as iio

    try:
        iio.imwrite(
            path, pixels, plugin="FFMPEG", fps=fps, codec="libx264", quality=9, macro_block_size=1,
            ffmpeg_log_level="quiet", output_params=["-metadata", f"comment={comment}", "-movflags", "+faststart"],
        )  # fmt: skip
        written = iio.improps(path, plugin="FFMPEG").shape
    except OSError:  # with all that the encoder printed; it does not say more than this
        written = ()
    if written[1:3] != pixels.shape[1:3]:  # the encoder does not always fail when the disk is full
        free = shutil.disk_usage(path.parent).free
        raise OSError(f"the video encoder left an incomplete file; {free / 2**20:.1f} MiB of the disk are free")


def _write_gif(path: Path, pixels: np.ndarray, fps: int, comment: str) -> None:
    import imageio.v3 as iio

    ends = (np.arange(len(pixels) + 1) * 100 / fps).round()  # a GIF counts hundredths of a second
    durations = (np.diff(ends) * 10).astype(int).tolist()
    options: dict[str, Any] = {"duration": durations, "loop": 0, "comment": comment.encode()}
    path.write_bytes(iio.imwrite("<bytes>", pixels, plugin="pillow", extension=".gif", **options))


def _write_strip(path: Path, pixels: np.ndarray, fps: int, comment: str) -> None:
    import imageio.v3 as iio
    from PIL.PngImagePlugin import PngInfo

    chosen = pixels[np.linspace(0, len(pixels) - 1, min(STRIP_FRAMES, len(pixels))).round().astype(int)]
    information = PngInfo()
    information.add_text("pointillist", comment)
    strip = np.concatenate(list(chosen), axis=1)
    path.write_bytes(iio.imwrite("<bytes>", strip, plugin="pillow", extension=".png", pnginfo=information))


def _mp4_comment(path: Path) -> str:
    """The comment among the file's tags, or "". Nothing is decoded, and no other program reads the file."""
    with path.open("rb") as file:
        begin, end = 0, path.stat().st_size
        for name in (b"moov", b"udta", b"meta", b"ilst", b"\xa9cmt", b"data"):
            found = _box(file, name, begin, end)
            if found is None:
                return ""
            begin, end = found
            begin += 4 if name == b"meta" else 0  # its version and flags
        if end - begin > MOST_SETTINGS:
            return ""
        file.seek(begin + 8)  # behind the kind and the locale
        return file.read(max(0, end - begin - 8)).decode("utf-8", "replace")


def _box(file: BinaryIO, name: bytes, begin: int, end: int) -> tuple[int, int] | None:
    """Where the contents of the first box of this name begin and end, between two places of a file."""
    while begin + 8 <= end:
        file.seek(begin)
        size, kind = struct.unpack(">I4s", file.read(8))
        header = 8
        if size == 1:
            size, header = struct.unpack(">Q", file.read(8))[0], 16
        size = end - begin if size == 0 else size
        if size < header or begin + size > end:
            return None
        if kind == name:
            return begin + header, begin + size
        begin += size
    return None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_WRITERS = {".mp4": _write_mp4, ".gif": _write_gif, ".png": _write_strip}
