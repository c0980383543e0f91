"""Files that are broken, of another kind, or that need code: one sentence each, and nothing in them runs."""

from __future__ import annotations

import argparse
import pickle
import re
import shlex
import warnings

import numpy as np
import pytest
import torch

from fairline.errors import FairlineError
from fairline.weights import load_weights
from fairline.weights.files import read_file
from tests.weights.networks import small


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "wrapped", [lambda t: t, lambda t: {"state_dict": small(0).state_dict(), "args": t}, lambda t: [t]]
)
def test_code_in_a_file_is_never_run(tmp_path, legacy, wrapped):
    trap = wrapped(Trap(tmp_path / "sprung"))
    torch.save(trap, tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(FairlineError, match="holds more than weights"):
        read_file(tmp_path / "w.pt")
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "p.pkl").write_bytes(pickle.dumps(trap, protocol))
        with pytest.raises(FairlineError):
            read_file(tmp_path / "p.pkl")
    np.savez(tmp_path / "a.npz", masks=np.array([trap], dtype=object))
    with pytest.raises(FairlineError, match="not a whole archive of arrays of numbers"):
        read_file(tmp_path / "a.npz")
    assert not (tmp_path / "sprung").exists()
    # The trap works.
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung"))).close()
    assert (tmp_path / "sprung").exists()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "saved",
    [
        lambda m: m,
        lambda m: {"state_dict": m.state_dict(), "args": argparse.Namespace(lr=0.1)},
        lambda m: {"epoch": 3, "best": np.float64(0.5), "model_state_dict": m.state_dict()},
        lambda m: {"epoch": 3, "model": m, "optimizer": None},
        lambda m: {"net": dict(m.state_dict()), "args": argparse.Namespace(lr=0.1)},
    ],
)
def test_the_line_that_converts_a_file_works(tmp_path, saved, legacy):
    model = small(1)
    torch.save(saved(model), tmp_path / "net.pth.tar", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(FairlineError, match="if you trust it") as refused:
        load_weights(small(2), tmp_path / "net.pth.tar")
    assert "\n" not in str(refused.value)
    program, flag, line = shlex.split(re.search(r"python -c \".*\"", str(refused.value))[0])
    assert (program, flag) == ("python", "-c")
    exec(line, {})
    other = small(2)
    load_weights(other, tmp_path / "net.pth-weights.pt")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in other.state_dict().items())


def test_torchscript_is_refused_with_the_line_that_converts_it(tmp_path):
    model = small(1).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.trace(model, torch.zeros(1, 3, 8, 8)), tmp_path / "script.pt")
    with pytest.raises(FairlineError, match="TorchScript"):
        read_file(tmp_path / "script.pt")


def whole(path, kind):
    state = small(0).state_dict()
    if kind == "zip":
        torch.save(state, path)
    elif kind == "legacy":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    elif kind == "npz":
        with path.open("wb") as opened:
            np.savez(opened, **{name: value.numpy() for name, value in state.items()})
    else:
        from safetensors.torch import save_file

        save_file(state, path)
    return path.read_bytes()


@pytest.mark.parametrize("kind", ["zip", "legacy", "npz", "safetensors"])
@pytest.mark.parametrize("name", ["w.pt", "w.safetensors", "w"])
def test_a_file_is_known_by_its_content_and_a_cut_one_is_refused(tmp_path, kind, name):
    data = whole(tmp_path / "whole.bin", kind)
    if name == "w.safetensors" and kind != "safetensors":
        return
    path = tmp_path / name
    path.write_bytes(data)
    assert read_file(path).tensors.keys() == small(0).state_dict().keys()
    for part in (0.1, 0.5, 0.9, 0.99):
        path.write_bytes(data[: int(part * len(data))])
        with pytest.raises(FairlineError, match=r"whole|neither|of another|damaged"):
            load_weights(small(0), path)


@pytest.mark.parametrize(
    "content", [b"hello world, not weights", b"\x89HDF\r\n\x1a\n\0\0\0", b"\x80", b"PK", b"\x80\x02}"]
)
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(FairlineError, match=r"w\.pt"):
        load_weights(small(0), tmp_path / "w.pt")


def test_folders_empty_and_missing_files_are_refused(tmp_path):
    (tmp_path / "empty.pt").touch()
    for path, words in (
        (tmp_path, "is a folder"),
        (tmp_path / "empty.pt", "is empty"),
        (tmp_path / "none", "not exist"),
    ):
        with pytest.raises(FairlineError, match=words):
            load_weights(small(0), path)
