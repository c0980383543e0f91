"""Weights come back the same from any checkpoint, under any prefix, in any format."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file, save_model
from torch import nn

from fairline.errors import FairlineError
from fairline.masking import mask_relus, masked_relus
from fairline.weights import load_weights
from tests.weights.networks import EXAMPLE, published, small

KEYS = ["state_dict", "model_state_dict", "model", "net", "ema", "weights", "anything of one's own"]
WORDS = ["module", "_orig_mod", "model", "net", "_fsdp_wrapped_module"]


def equal(one: nn.Module, other: nn.Module, *, counters: bool = True) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) for name in left if counters or "num_batches" not in name
    )


@settings(max_examples=80)
@given(
    places=st.lists(st.sampled_from(KEYS), max_size=2),
    prefix=st.lists(st.sampled_from(WORDS), max_size=3),
    inner=st.lists(st.sampled_from(["module", "_orig_mod"]), max_size=2),
    counters=st.booleans(),
    extras=st.booleans(),
    kind=st.sampled_from(["zip", "legacy", "safetensors", "npz"]),
)
def test_any_checkpoint_gives_the_same_state(places, prefix, inner, counters, extras, kind):
    model = small(1)
    state = {}
    for name, value in model.state_dict().items():
        if counters or "num_batches_tracked" not in name:
            # A submodule may have been wrapped by itself.
            words = name.split(".")
            inside = inner if words[0] == "block" else []
            state[".".join([*prefix, words[0], *inside, *words[1:]])] = value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.any"
        if kind in ("zip", "legacy"):
            saved = state
            for key in places:
                saved = {"epoch": 3, "best_acc1": torch.tensor(0.5), key: saved} if extras else {key: saved}
                if extras:
                    saved["optimizer"] = torch.optim.Adam(model.parameters()).state_dict()
            torch.save(saved, path, _use_new_zipfile_serialization=kind == "zip")
        elif kind == "safetensors":
            save_file(state, path)
        else:
            with path.open("wb") as opened:
                np.savez(opened, **{name: value.numpy() for name, value in state.items()})
        other = small(2)
        load_weights(other, path)
    assert equal(other, model, counters=counters)
    assert counters or torch.equal(other.block[1].num_batches_tracked, small(2).block[1].num_batches_tracked)


def test_wrapped_networks_take_and_give(tmp_path):
    torch.save(small(1).state_dict(), tmp_path / "plain.pt")
    wrapped = nn.DataParallel(small(2))
    load_weights(wrapped, tmp_path / "plain.pt")
    assert equal(wrapped.module, small(1))
    torch.save(torch.optim.swa_utils.AveragedModel(small(1)).state_dict(), tmp_path / "averaged.pt")
    other = small(2)
    load_weights(other, tmp_path / "averaged.pt")
    assert equal(other, small(1))


def test_a_network_whose_names_only_a_wrappers_word_tells_apart(tmp_path):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 3)
            self.module = nn.ModuleDict({"fc": nn.Linear(2, 3)})

    one, other = Own(), Own()
    torch.save(one.state_dict(), tmp_path / "own.pt")
    load_weights(other, tmp_path / "own.pt")
    assert equal(one, other)


def test_types_are_cast(tmp_path):
    torch.save(small(1).half().state_dict(), tmp_path / "half.pt")
    other = small(2)
    load_weights(other, tmp_path / "half.pt")
    assert equal(other, small(1).half().float())


def test_shared_tensors_may_have_one_name(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.b.weight = self.a.weight

    one, other = Tied(), Tied()
    save_model(one, tmp_path / "tied.safetensors")
    load_weights(other, tmp_path / "tied.safetensors")
    assert equal(one, other)


def test_averages_are_taken_where_nothing_else_fits(tmp_path):
    torch.save({"model": small(1).state_dict(), "ema": small(3).state_dict()}, tmp_path / "both.pt")
    other = small(2)
    load_weights(other, tmp_path / "both.pt")
    assert equal(other, small(1))
    load_weights(other, tmp_path / "both.pt", place="ema")
    assert equal(other, small(3))
    torch.save({"epoch": 3, "model_ema": small(3).state_dict()}, tmp_path / "one.pt")
    load_weights(other := small(2), tmp_path / "one.pt")
    assert equal(other, small(3))


def test_several_networks_must_be_told_apart(tmp_path):
    state = {
        f"{who}.{name}": v for who, s in (("student", 1), ("teacher", 3)) for name, v in small(s).state_dict().items()
    }
    torch.save({"state_dict": state}, tmp_path / "two.ckpt")
    other = small(2)
    with pytest.raises(
        FairlineError, match=r"several networks that fit, under 'state_dict\.student', 'state_dict\.teacher'"
    ):
        load_weights(other, tmp_path / "two.ckpt")
    assert equal(other, small(2))
    load_weights(other, tmp_path / "two.ckpt", place="state_dict.teacher")
    assert equal(other, small(3))
    with pytest.raises(FairlineError, match="under 'pupil'"):
        load_weights(other, tmp_path / "two.ckpt", place="pupil")


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}}])
def test_a_refusal_names_what_is_missing_unexpected_and_of_another_shape(tmp_path, wrap):
    state = dict(small(1).state_dict())
    del state["head.bias"]
    state["extra.weight"] = torch.ones(2)
    state["stem.weight"] = torch.ones(4, 1, 3, 3)
    torch.save(wrap(state), tmp_path / "w.pt")
    other = small(2)
    with pytest.raises(FairlineError, match="another architecture") as refused:
        load_weights(other, tmp_path / "w.pt")
    for words in (
        "missing there: 'head.bias'",
        "not in the model: 'extra.weight'",
        "'stem.weight' has shape (4, 1, 3, 3) there and (4, 3, 3, 3) in the model",
    ):
        assert words in str(refused.value)
    assert equal(other, small(2))


def test_a_file_of_another_network_is_refused(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pt")
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    for name, words in (
        ("other.pt", r"missing there: 'stem.weight'.*not in the model: 'weight', 'bias'"),
        ("none.pt", "no tensors"),
    ):
        with pytest.raises(FairlineError, match=words):
            load_weights(small(0), tmp_path / name)


@pytest.mark.parametrize(
    "save", [torch.save, lambda state, path: save_file({k: v.contiguous() for k, v in state.items()}, path)]
)
def test_masks_beside_the_weights_are_taken(tmp_path, save):
    """Of a network linearized here, and of one that SNL's published code has linearized, with layers of other names."""
    expected = published(1)
    save(expected.state_dict(), tmp_path / "published.pt")
    ours = mask_relus(expected, EXAMPLE)
    save(ours.state_dict(), tmp_path / "ours.pt")
    for name in ("published.pt", "ours.pt"):
        other = mask_relus(small(2), EXAMPLE)
        load_weights(other, tmp_path / name)
        x = torch.randn(4, 3, 8, 8)
        torch.testing.assert_close(other.eval()(x), expected.eval()(x))
        kept = [layer.num_kept for layer in masked_relus(other).values()]
        assert kept == [int(expected.relu1.alphas.sum()), int(expected.block[2].alphas.sum())]


def test_a_teacher_of_the_published_code_is_a_plain_network(tmp_path):
    model = published(1)
    for layer in (model.relu1, model.block[2]):
        layer.alphas.data.fill_(1)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "teacher.pth.tar")
    load_weights(other := small(2), tmp_path / "teacher.pth.tar")
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(other.eval()(x), model.eval()(x))


def test_masks_for_a_network_without_any_are_refused(tmp_path):
    torch.save(published(1).state_dict(), tmp_path / "published.pt")
    with pytest.raises(FairlineError, match="looks like masks: mask the model first"):
        load_weights(small(2), tmp_path / "published.pt")


def test_masks_that_are_still_learned_are_refused(tmp_path):
    model = published(1)
    model.relu1.alphas.data.fill_(0.3)
    torch.save(model.state_dict(), tmp_path / "published.pt")
    other = mask_relus(small(2), EXAMPLE)
    with pytest.raises(FairlineError, match=r"'relu1' holds 0\.3, not zeros and ones"):
        load_weights(other, tmp_path / "published.pt")
    assert equal(other, mask_relus(small(2), EXAMPLE))


def test_case_15(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(784, 5))
    save_file({k: v for k, v in model.state_dict().items() if "num_batches" not in k}, tmp_path / "old.safetensors")
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(784, 5))
    load_weights(other, tmp_path / "old.safetensors")
    assert equal(other, model)
