"""Files: what is written can be read, with its settings, and nothing is half-written."""

import errno

import numpy as np
import pytest
from PIL import Image, ImageSequence

from pointillist.pipelines import video
from pointillist.pipelines.video import (
    Clip,
    OutputError,
    check_format,
    check_output,
    read_clip,
    read_settings,
    write_clips,
)

SETTINGS = {
    "prompt": 'a "red" circle; 100 % = all\\of it, ünïcode',
    "seed": 7,
    "seconds": {"total": 1.5},
    "none": None,
}


def write_clip(path, frames, fps, settings):
    write_clips({path: Clip(frames, settings)}, fps)


def clip(frames=9, height=48, width=64):
    t, y, x = np.meshgrid(*(np.linspace(0, 1, n) for n in (frames, height, width)), indexing="ij")
    return np.stack([x, y, (x + t) / 2], axis=-1)


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.png"])
def test_round_trip(tmp_path, name):
    path = tmp_path / name
    write_clip(path, clip(), 16, SETTINGS)
    assert read_settings(path) == SETTINGS
    back = read_clip(path)
    if name.endswith("png"):
        assert back.shape == (1, 48, 64 * 8, 3)
    else:
        assert back.shape == (9, 48, 64, 3)
        assert np.abs(back - clip()).mean() < 0.03
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_odd_sizes_become_a_playable_file(tmp_path):
    write_clip(tmp_path / "a.mp4", clip(width=180, height=176), 16, {})
    assert read_clip(tmp_path / "a.mp4").shape == (9, 176, 180, 3)


def test_failure_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "a.gif"
    write_clip(path, clip(), 16, SETTINGS)
    before = path.read_bytes()

    def full(*args):
        args[0].write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setitem(video._WRITERS, ".gif", full)
    with pytest.raises(OutputError, match="cannot be written: No space left"):
        write_clip(path, clip(), 16, SETTINGS)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("changes", [(), (4,), (1, 2, 8)])
@pytest.mark.parametrize("fps", [16, 24, 50])
def test_a_gif_keeps_equal_frames_and_its_pace(tmp_path, changes, fps):
    frames = np.zeros((9, 32, 32, 3))
    for frame in changes:
        frames[frame:, :16] += 0.25
    write_clip(tmp_path / "a.gif", frames, fps, {"frames": 9})
    back = read_clip(tmp_path / "a.gif")
    assert back.shape == frames.shape and np.abs(back - frames).max() < 0.05
    with Image.open(tmp_path / "a.gif") as image:
        seconds = sum(frame.info["duration"] for frame in ImageSequence.Iterator(image)) / 1000
    assert seconds == pytest.approx(9 / fps, abs=0.0051)


def test_all_files_are_written_or_none(tmp_path):
    (tmp_path / "b.gif").mkdir()
    with pytest.raises(OutputError):
        write_clips({tmp_path / name: Clip(clip(), {}) for name in ("a.gif", "none/b.gif")}, 16)
    assert [p.name for p in tmp_path.iterdir()] == ["b.gif"]


def test_outputs_are_checked_first(tmp_path):
    with pytest.raises(ValueError, match=r"must end in one of \.mp4, \.gif, \.png"):
        check_format(tmp_path / "a.avi", 16)
    with pytest.raises(ValueError, match=r"60 frames per second are not possible; a \.gif file can have 1 to 50"):
        check_format(tmp_path / "a.gif", 60)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        check_output(tmp_path / "file" / "a.mp4")
    check_output(tmp_path / "new" / "a.mp4")
    assert not list((tmp_path / "new").iterdir())


def test_foreign_files_are_refused(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"not a video")
    with pytest.raises(OutputError, match="cannot be read as a clip"):
        read_clip(tmp_path / "a.mp4")
    write_clip(tmp_path / "a.gif", clip(), 16, {})
    whole = (tmp_path / "a.gif").read_bytes()
    for _ in range(40):
        broken = bytearray(whole)
        for place in np.random.default_rng().integers(0, len(broken), 20):
            broken[place] ^= 0x55
        (tmp_path / "a.gif").write_bytes(broken)
        try:
            read_clip(tmp_path / "a.gif")
        except OutputError:
            pass
    with pytest.raises(OutputError, match="there is no file"):
        read_clip(tmp_path / "b.mp4")
