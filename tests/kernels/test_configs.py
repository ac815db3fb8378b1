"""Which configuration a call gets, and what a user's own file does."""

import json

import pytest
import torch

pytest.importorskip("triton", reason="triton has no build for this platform")

from pointillist.kernels.triton import configs
from pointillist.kernels.triton.configs import Config, config_for, fitted, save_tuned


@pytest.fixture(autouse=True)
def own_file(tmp_path, monkeypatch):
    path = tmp_path / "settings" / "kernels.json"
    monkeypatch.setenv("POINTILLIST_CONFIGS", str(path))
    for cache in (configs._tables, configs._row):
        cache.cache_clear()
    yield path
    for cache in (configs._tables, configs._row):
        cache.cache_clear()


def on(architecture, monkeypatch):
    monkeypatch.setattr(configs, "architecture_of", lambda device: architecture)


def test_every_architecture_has_every_kind():
    for rows in configs.shipped().values():
        assert set(rows) == {
            f"{dim}/{bits}/{kind}" for dim in (64, 128, 256) for bits in (16, 32) for kind in configs.KINDS
        }
        assert all(row.why for row in rows.values())


def test_tuned_rows_go_first_and_keep_the_others(own_file, monkeypatch):
    on("sm_90", monkeypatch)
    call = (torch.device("cpu"), 128, torch.bfloat16, "uniform", 128, 128)
    shipped = config_for(*call)
    save_tuned("sm_90", {"128/16/uniform": Config(64, 64, 4, 3, None, "measured")})
    save_tuned("sm_90", {"64/16/uniform": Config(128, 64, 8, 3, 128, "measured")})
    assert config_for(*call) == Config(64, 64, 4, 3, None, "measured") != shipped
    assert set(json.loads(own_file.read_text())["sm_90"]) == {"128/16/uniform", "64/16/uniform"}
    assert config_for(call[0], 64, torch.float16, "uniform", 128, 128).options()["maxnreg"] == 128


@pytest.mark.parametrize(
    ("name", "shared", "instead"),
    [("sm_86", 101376, "sm_89"), ("sm_87", 166912, "sm_80"), ("sm_103", 232448, "sm_80"), ("gfx950", 163840, "gfx942")],
)
def test_an_unknown_architecture_says_so_once(monkeypatch, recwarn, name, shared, instead):
    on(name, monkeypatch)
    monkeypatch.setattr(configs, "shared_memory_of", lambda device: shared)
    for _ in range(3):
        config = config_for(torch.device("cpu"), 100, torch.float16, "runs", 128, 128)
    assert config == configs.shipped()[instead]["128/16/runs"]
    assert [name in str(w.message) and instead in str(w.message) for w in recwarn] == [True]


def test_one_that_is_too_small_is_refused(monkeypatch):
    on("sm_75", monkeypatch)
    monkeypatch.setattr(configs, "shared_memory_of", lambda device: 65536)
    with pytest.raises(ValueError, match="serve no sm_75 with 65536 bytes"):
        config_for(torch.device("cpu"), 64, torch.float16, "runs", 128, 128)


def test_a_spoilt_file_is_named(own_file):
    own_file.parent.mkdir()
    own_file.write_text('{"sm_90": {"128/16/uniform": {"tile": 3}}}')
    with pytest.raises(ValueError, match=r"kernels\.json is not a table"):
        config_for(torch.device("cpu"), 64, torch.float32, "runs", 128, 128)


def test_tiles_are_no_larger_than_blocks():
    assert fitted(Config(128, 128, 8, 2), 64, 100) == Config(64, 128, 4, 2)
    assert fitted(Config(128, 64, 8, 2), 1, 1) == Config(16, 32, 4, 2)
    assert fitted(Config(128, 64, 8, 2), 5000, 5000) == Config(128, 64, 8, 2)
