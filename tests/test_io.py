from __future__ import annotations

import errno

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from fairline._io import (
    atomic_path,
    load_state,
    load_tensors,
    read_json,
    read_table,
    resolve_device,
    save_state,
    save_tensors,
    write_json,
    write_table,
    write_text,
)
from fairline.errors import FairlineError


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b and type(a) is type(b)


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
states = st.recursive(
    scalars | st.integers(0, 4).map(torch.arange),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.integers() | st.text(max_size=4), inner, max_size=3),
    max_leaves=12,
)


@given(state=states)
def test_any_nested_state_survives(tmp_path_factory, state):
    path = tmp_path_factory.mktemp("state") / "s.safetensors"
    save_state(path, state)
    assert same(load_state(path), state)


def test_shared_memory_is_saved(tmp_path):
    x = torch.arange(6)
    save_tensors(tmp_path / "x", {"whole": x, "view": x[2:].view(2, 2)}, {"a": 1})
    tensors, metadata = load_tensors(tmp_path / "x")
    assert torch.equal(tensors["view"], x[2:].view(2, 2))
    assert metadata == {"a": 1}


def test_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    target = tmp_path / "f"
    target.write_text("old")

    def write() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"x": torch.ones(3)})

    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("fairline._io.save_file", full)
    with pytest.raises(FairlineError, match=r"x.safetensors cannot be written .*No space left"):
        save_tensors(path, {"x": torch.zeros(3)})
    assert torch.equal(load_tensors(path)[0]["x"], torch.ones(3))
    assert list(tmp_path.iterdir()) == [path]


def test_what_the_system_says_of_a_path_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for write in (lambda path: write_text(path, "x"), lambda path: write_table(path, pd.DataFrame({"a": [1]}))):
        with pytest.raises(FairlineError, match="file is a file, not a folder"):
            write(tmp_path / "file" / "x")
        with pytest.raises(FairlineError, match=r"cannot be written \(File name too long\)"):
            write(tmp_path / ("x" * 250))
        with pytest.raises(FairlineError, match=r"folder cannot be written \(Is a directory\)"):
            write(tmp_path / "folder")
    with pytest.raises(FairlineError, match=r"folder cannot be read \(Is a directory\)"):
        read_json(tmp_path / "folder")
    with pytest.raises(FairlineError, match=r"file/x cannot be read \(Not a directory\)"):
        read_json(tmp_path / "file" / "x")
    with pytest.raises(FairlineError, match=r"x.parquet is missing or broken"):
        read_table(tmp_path / "x.parquet")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder"}


def test_a_full_disk_is_one_sentence_for_every_kind_of_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    for write in (write_json, write_text):
        with pytest.raises(FairlineError, match=r"x cannot be written \(No space left on device\)"):
            write(tmp_path / "x", "content")
    assert not list(tmp_path.iterdir())


def test_cut_short_file_is_one_sentence(tmp_path):
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"x": torch.ones(1000)})
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(FairlineError, match="not a whole safetensors file"):
        load_tensors(path)
    with pytest.raises(FairlineError, match="does not exist"):
        load_tensors(tmp_path / "missing")
    (tmp_path / "j").write_text("{")
    with pytest.raises(FairlineError, match="not valid JSON"):
        read_json(tmp_path / "j")


@pytest.mark.parametrize("name", ["nonsense", "cuda:99"])
def test_unusable_device(name):
    with pytest.raises(FairlineError, match=name):
        resolve_device(name)
