"""What the doctor tells is what there is."""

import importlib.metadata

import torch

from fairline.jobs import doctor


def test_it_tells_what_is_there_and_what_is_wrong(tmp_path, monkeypatch, run_here):
    (tmp_path / "faces.parquet").touch()
    found = {each.what: each for each in doctor.examine(str(tmp_path))}
    assert found["torch"].good
    assert found["torch"].found == importlib.metadata.version("torch")
    assert "faces.parquet" in found["data"].found
    told = torch.cpu.get_capabilities()
    named, _, instructions = found["processor"].found.partition(": ")
    assert named == told.get("cpu_name", named)
    for each in ("avx2", "avx512_bf16", "amx_tile", "amx_bf16", "neon", "sve"):
        assert (each in instructions.split(", ")) == bool(told.get(each))
    assert found["cores"].found.endswith(f"torch takes {torch.get_num_threads()}")
    assert ("none" in found["GPU"].found) == (not torch.cuda.is_available())
    done = run_here("doctor", "--root", tmp_path)
    assert done.returncode == 0
    assert "torch" in done.stdout
    done = run_here("doctor", "--root", tmp_path / "gone")
    assert done.returncode == 1
    assert "does not exist" in done.stdout
    monkeypatch.delenv("FAIRLINE_DATA", raising=False)
    assert {each.what: each for each in doctor.examine()}["data"].good is None


def test_a_package_that_is_missing_or_old_is_wrong(monkeypatch):
    real = importlib.metadata.version
    versions = {"pandas": "1.0", "spu": "0.1"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: versions.get(name) or real(name))
    found = {each.what: each for each in doctor.examine()}
    assert found["pandas"].good is False
    assert "1.0, but >=" in found["pandas"].found
    lines = [*importlib.metadata.requires("fairline"), "no-such-package>=3", "no-such-extra; extra == 'onnx'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: lines)
    found = {each.what: each for each in doctor.examine()}
    assert found["no-such-package"].found == "not installed; >=3 is needed"
    assert found["no-such-package"].good is False
    # What is optional is told, not wrong.
    assert found["extra onnx"].good is None
    assert "pip install 'fairline[onnx]'" in found["extra onnx"].found
