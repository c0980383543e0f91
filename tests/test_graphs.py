"""CUDA graphs behind their switch; on a CPU ``capture`` alone is a double, which does what torch's does."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.optim import SGD

from fairline import finetune, train
from fairline.errors import FairlineError
from fairline.linearize import Random
from fairline.masking import masked_relus
from fairline.models import build
from fairline.objectives import ERM, Lagrangian
from fairline.precision import Arithmetic
from fairline.training import graphs, run_epochs
from tests.conftest import make_data

SETTINGS = {"batch_size": 32, "lr": 0.02, "seed": 3}
#: Batches of 32 and one of 6 an epoch.
DATA = make_data(102)


class Capture:
    """Warms up, which statistics and random numbers notice; then reads what lies where weights and images lay."""

    def __init__(self) -> None:
        self.captured: list[torch.Size] = []
        self.replayed = 0

    def __call__(self, network: nn.Module, images: torch.Tensor) -> graphs.Compute:
        assert network.training
        self.captured.append(images.shape)
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        for _ in range(3):
            torch.autograd.grad(network(images).float().sum(), trained, allow_unused=True)
        memory = graphs._memory(network)

        def replay(batch: torch.Tensor) -> torch.Tensor:
            assert batch.shape == images.shape
            assert graphs._memory(network) == memory
            self.replayed += 1
            images.copy_(batch)
            return network(images)

        return replay


@pytest.fixture
def capture(monkeypatch) -> Capture:
    double = Capture()
    monkeypatch.setattr(graphs, "capture", double)
    monkeypatch.setattr(graphs, "can_capture", lambda _device: True)
    return double


def network() -> nn.Module:
    """With statistics, dropout and, first of all, its own random weights."""
    torch.manual_seed(0)
    return nn.Sequential(build("cnn", 8, 1, 8, width=4), nn.Dropout(0.3), nn.Linear(8, 3))


def states(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(first: nn.Module, second: nn.Module) -> None:
    first, second = states(first), states(second)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("precision", ["fp32", Arithmetic(bf16=True)], ids=["fp32", "bf16"])
def test_replayed_batches_give_the_bits_of_the_others(capture, precision):
    plain, replayed = network(), network()
    rows = [
        train(model, DATA, DATA, epochs=2, precision=precision, cuda_graphs=on, **SETTINGS)
        for model, on in ((plain, False), (replayed, True))
    ]
    assert_same(plain, replayed)
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]
    # The batch of 6 is computed as ever.
    assert capture.captured == [torch.Size([32, 1, 8, 8])]
    assert capture.replayed == 2 * 3
    # What was captured is no part of the user's network, which may be copied or saved.
    assert "forward" not in vars(replayed)


@pytest.mark.parametrize("augment", [False, True])
def test_an_objective_that_changes_its_mind_is_not_part_of_what_is_replayed(capture, augment):
    teacher = network()
    students = [next(iter(Random().linearize(teacher, DATA, [0.5]))).model for _ in range(2)]
    for student, on in zip(students, (False, True), strict=True):
        objective = Lagrangian(mu=0.1)
        finetune(student, teacher, DATA, epochs=3, objective=objective, augment=augment, cuda_graphs=on, **SETTINGS)
        assert objective.multipliers.max() > 0
    assert_same(*students)
    assert len(capture.captured) == 1
    assert capture.replayed == 3 * 3


def test_a_resumed_run_captures_again_and_gives_the_same_bits(capture, tmp_path):
    class Stop(Exception):
        pass

    def stop(update):
        if update.done > 6:
            raise Stop

    whole, broken, resumed = network(), network(), network()
    train(whole, DATA, epochs=3, cuda_graphs=True, **SETTINGS)
    file = tmp_path / "train.safetensors"
    with pytest.raises(Stop):
        train(broken, DATA, epochs=3, cuda_graphs=True, checkpoint=file, progress=stop, **SETTINGS)
    assert file.exists()
    train(resumed, DATA, epochs=3, cuda_graphs=True, checkpoint=file, **SETTINGS)
    assert len(capture.captured) == 3
    assert_same(whole, resumed)


def test_the_variable_decides_where_the_caller_does_not(capture, monkeypatch):
    for told, asked, expected in (("1", None, 1), ("1", False, 0), ("0", True, 1), ("0", None, 0)):
        monkeypatch.setenv(graphs.VARIABLE, told)
        capture.captured.clear()
        train(network(), DATA, epochs=1, cuda_graphs=asked, **SETTINGS)
        assert len(capture.captured) == expected
    monkeypatch.setenv(graphs.VARIABLE, "yes")
    with pytest.raises(FairlineError, match="FAIRLINE_CUDA_GRAPHS is 1 or 0, not 'yes'"):
        train(network(), DATA, epochs=1, **SETTINGS)


def test_by_default_only_networks_are_captured_whose_code_is_known(capture, monkeypatch):
    monkeypatch.delenv(graphs.VARIABLE, raising=False)

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.inner(images)

    hooked = network()
    hooked[2].register_forward_hook(lambda *_: None)
    for model, expected in ((network(), 1), (Own(), 0), (hooked, 0)):
        capture.captured.clear()
        train(model, DATA, epochs=1, **SETTINGS)
        assert len(capture.captured) == expected


def test_what_cannot_be_captured_is_computed_as_ever_after_one_warning(monkeypatch, capture, caplog):
    def refuse(network, images):
        capture(network, images)
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")

    monkeypatch.setattr(graphs, "capture", refuse)
    plain, refused = network(), network()
    train(plain, DATA, epochs=2, cuda_graphs=False, **SETTINGS)
    with caplog.at_level(logging.WARNING, "fairline"):
        train(refused, DATA, epochs=2, cuda_graphs=True, **SETTINGS)
    assert_same(plain, refused)
    assert capture.replayed == 0
    (record,) = caplog.records
    assert record.getMessage() == (
        "Sequential is trained without CUDA graphs: operation not permitted when stream is capturing"
    )


def test_a_network_that_is_changed_between_epochs_is_computed_as_it_is_now(capture, caplog):
    def run(on):
        (cut,) = Random().linearize(network(), DATA, [0.5])
        model = cut.model
        optimizer = SGD(model.parameters(), lr=0.02)
        for epoch in run_epochs(
            model, DATA, epochs=3, optimizer=optimizer, objective=ERM(), batch_size=32, cuda_graphs=on
        ):
            if epoch.epoch == 2:
                for layer in masked_relus(model).values():
                    layer.set_mask(torch.zeros(layer.shape, dtype=torch.bool))
        return model

    with caplog.at_level(logging.WARNING, "fairline"):
        assert_same(run(False), run(True))
    assert capture.replayed == 2 * 3
    (record,) = caplog.records
    assert "its weights or buffers were replaced" in record.getMessage()


def test_nothing_is_captured_on_a_cpu_or_against_the_callers_word(monkeypatch, capture):
    train(network(), DATA, epochs=1, cuda_graphs=False, **SETTINGS)
    monkeypatch.undo()
    monkeypatch.setattr(graphs, "capture", capture)
    plain, asked = network(), network()
    train(plain, DATA, epochs=1, device="cpu", **SETTINGS)
    train(asked, DATA, epochs=1, device="cpu", cuda_graphs=True, **SETTINGS)
    assert_same(plain, asked)
    assert capture.captured == []
    assert graphs.can_capture(torch.device("cuda", 0))


@pytest.mark.parametrize("on", [False, True])
def test_a_capture_keeps_autocast_but_not_what_it_has_converted(monkeypatch, on):
    seen = []

    def make(network, images, **options):
        kind = images[0].device.type
        seen.append((torch.is_autocast_enabled(kind), torch.is_autocast_cache_enabled(), options))
        return network

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make)
    model = nn.Linear(2, 2)
    with torch.autocast("cpu", torch.bfloat16, enabled=on):
        captured = graphs.capture(model, torch.zeros(1, 2))
        assert torch.is_autocast_cache_enabled()
        assert captured(torch.zeros(1, 2)).dtype == (torch.bfloat16 if on else torch.float32)
    assert seen == [(on, False, {"allow_unused_input": True})]


def test_a_network_with_hooks_is_never_captured(monkeypatch):
    """A replay runs none of them."""
    hooked = network()
    assert graphs.wanted(True, hooked)
    handle = hooked[2].register_forward_hook(lambda *_: None)
    monkeypatch.setenv(graphs.VARIABLE, "1")
    assert not graphs.wanted(True, hooked)
    assert not graphs.wanted(None, hooked)
    handle.remove()
    assert graphs.wanted(None, hooked)
