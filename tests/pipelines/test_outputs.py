"""Names that nobody chooses, and nothing else that could be asked for."""

import pytest

from pointillist.pipelines.outputs import NAME, NoRoom, Outputs


def test_names_are_random_and_are_listed_newest_first(tmp_path):
    outputs = Outputs(tmp_path / "made")
    first, second = outputs.new(), outputs.new(".gif")
    assert first != second and all(NAME.fullmatch(path.name) for path in (first, second))
    for name in ("20260101-000000-0000000a.mp4", "20260102-000000-0000000b.gif", "20260102-000000-0000000b_dense.gif"):
        (outputs.folder / name).write_bytes(b"x")
    (outputs.folder / "secret.mp4").write_bytes(b"x")
    assert [path.name[:8] for path in outputs.clips] == ["20260102", "20260101"]
    assert outputs.used == 4


@pytest.mark.parametrize(
    "name",
    [
        "../secret.mp4",
        "/etc/passwd",
        "secret.mp4",
        "",
        ".",
        "20260101-000000-0000000a.mp4/..",
        "20260101-000000-0000000c.mp4",
    ],
)
def test_nothing_else_can_be_named(tmp_path, name):
    outputs = Outputs(tmp_path / "made")
    outputs.folder.mkdir()
    (tmp_path / "secret.mp4").write_bytes(b"x")
    (outputs.folder / "secret.mp4").write_bytes(b"x")
    (outputs.folder / "20260101-000000-0000000c.mp4").symlink_to(tmp_path / "secret.mp4")
    assert outputs.path(name) is None
    outputs.delete(name)
    assert (tmp_path / "secret.mp4").exists() and (outputs.folder / "secret.mp4").exists()


def test_deleting_takes_what_is_beside_a_clip(tmp_path):
    outputs = Outputs(tmp_path)
    for ending in (".mp4", "_dense.mp4", ".safetensors"):
        (tmp_path / f"20260101-000000-0000000a{ending}").write_bytes(b"x")
    (tmp_path / "20260101-000000-0000000b.mp4").write_bytes(b"x")
    outputs.delete("20260101-000000-0000000a.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["20260101-000000-0000000b.mp4"]


def test_a_full_folder_takes_no_more(tmp_path):
    (tmp_path / "20260101-000000-0000000a.mp4").write_bytes(bytes(100))
    with pytest.raises(NoRoom, match="delete some in the gallery"):
        Outputs(tmp_path, most=50).new()
