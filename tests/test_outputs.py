"""Logits in whatever a network returns, and networks inside wrappers: the same everywhere."""

from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
import torch.distributed
from torch import nn
from torch.optim.swa_utils import AveragedModel

import fairline as fl
from fairline.inference import logits_of
from fairline.masking import masked_relus, unwrap
from tests.architectures import FunctionalResNet, ModelOutput, SmallNet, small_data

DATA = small_data(30)
IMAGES = DATA.normalized(slice(4))
Named = namedtuple("Named", ["aux", "logits"])


class Returns(SmallNet):
    """Hands its logits to a function."""

    def __init__(self, pack):
        super().__init__()
        self.pack = pack

    def forward(self, x):
        h = self.features(x)
        return self.pack(self.fc(h), h)


TAKEN = {
    "tensor": lambda logits, h: logits,
    "tuple": lambda logits, h: (logits, h),
    "list after no tensor": lambda logits, h: [None, "text", logits, h],
    "dict": lambda logits, h: {"features": h, "logits": logits},
    "dict of segmentation": lambda logits, h: {"aux": h, "out": logits},
    "dict of anything": lambda logits, h: {"scores": logits, "features": h},
    "named tuple": lambda logits, h: Named(h, logits),
    "namespace": lambda logits, h: SimpleNamespace(logits=logits),
    "ModelOutput": lambda logits, h: ModelOutput(logits=logits, hidden_states=(h,)),
}

REFUSED = {
    "a number": (lambda logits, h: logits.sum(), r"\(\)"),
    "nothing": (lambda logits, h: None, "a NoneType"),
    "no tensor": (lambda logits, h: {"deeper": {"logits": logits}}, "a dict"),
    "a loss first": (lambda logits, h: (logits.sum(), logits), r"\(\)"),
    "an image": (lambda logits, h: logits[:, :, None], r"\(\d+, 5, 1\)"),
    "classes first": (lambda logits, h: logits.T, r"\(5, \d+\)"),
}


@pytest.mark.parametrize("name", TAKEN)
def test_logits_are_taken_the_same_everywhere(name):
    torch.manual_seed(0)
    model, plain = Returns(TAKEN[name]), Returns(TAKEN["tensor"])
    plain.load_state_dict(model.state_dict())
    assert torch.equal(fl.predict(model, DATA), fl.predict(plain, DATA))
    students = []
    for network in (model, plain):
        fl.train(network, DATA, epochs=1, batch_size=10)
        (cut,) = fl.SNL(lam=1e-2, max_epochs=1, batch_size=10).linearize(network, DATA, [0.5])
        students.append(fl.finetune(cut.model, network, DATA, epochs=1, batch_size=10))
    assert type(students[0]) is type(model)
    assert torch.equal(fl.predict(students[0], DATA), fl.predict(students[1], DATA))
    measures = ("accuracy", "gradient_norm", "curvature")
    frames = []
    for student, network in zip(students, (model, plain), strict=True):
        frames.append(fl.audit(student, DATA, network, measures=measures, resamples=20).frame)
    assert frames[0].equals(frames[1])
    graphs = [fl.private.to_graph(student, IMAGES) for student in students]
    assert torch.equal(graphs[0](IMAGES), graphs[1](IMAGES))


@pytest.mark.parametrize("name", REFUSED)
def test_anything_else_is_the_same_sentence_everywhere(name):
    pack, what = REFUSED[name]
    model = Returns(pack)
    masked = fl.mask_relus(model, IMAGES)
    steps = [
        lambda: fl.predict(model, DATA),
        lambda: fl.train(model, DATA, epochs=1),
        lambda: list(fl.SNL(max_epochs=1).linearize(model, DATA, [0.5])),
        lambda: fl.predict(next(fl.Random().linearize(model, DATA, [0.5])).model, DATA),
        lambda: list(fl.CoordinateDescent(batch_size=10).linearize(model, DATA, [0.5])),
        lambda: fl.finetune(masked, model, DATA, epochs=1),
        lambda: fl.finetune(masked, SmallNetWithLogits(), DATA, epochs=1),
        lambda: fl.audit(masked, DATA),
        lambda: fl.private.to_graph(masked, IMAGES),
    ]
    sentence = rf"^Returns returned {what} for \d+ images; logits of shape \(batch, classes\) are needed: .*$"
    for step in steps:
        with pytest.raises(fl.FairlineError, match=sentence):
            step()


class SmallNetWithLogits(SmallNet):
    def forward(self, x):
        return self.fc(self.features(x))


def test_logits_of_says_what_it_met():
    with pytest.raises(fl.FairlineError, match=r"Linear returned \(3, 5\) for 2 images"):
        logits_of(torch.zeros(3, 5), nn.Linear(1, 1), torch.zeros(2, 1))


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "AveragedModel": AveragedModel,
    "compile": lambda model: torch.compile(model, backend="eager"),
    "two": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_are_taken_off(name, process_group):
    torch.manual_seed(0)
    plain = FunctionalResNet()
    wrapped = WRAPPERS[name](plain)
    inside = unwrap(wrapped)
    masked = fl.mask_relus(wrapped, IMAGES)
    assert type(masked).__name__ == "FunctionalResNet"
    assert set(plain.state_dict()) <= set(masked.state_dict())
    assert torch.equal(masked.eval()(IMAGES), inside.eval()(IMAGES))
    fl.train(wrapped, DATA, epochs=1, batch_size=10)
    (cut,) = fl.Random().linearize(wrapped, DATA, [0.5])
    student = fl.finetune(cut.model, wrapped, DATA, epochs=1, batch_size=10)
    measures = ("accuracy", "gradient_norm", "parameter_distance", "excess_loss_bound")
    report = fl.audit(student, DATA, wrapped, measures=measures, resamples=20)
    assert report.overall["parameters_shared"] == 1
    expected = fl.audit(student, DATA, inside, measures=measures, resamples=20)
    assert report.frame.equals(expected.frame)
    assert list(masked_relus(student)) == list(masked_relus(masked))
    assert torch.equal(fl.private.to_graph(wrapped, IMAGES)(IMAGES), fl.private.to_graph(inside, IMAGES)(IMAGES))


@pytest.mark.filterwarnings("ignore")
def test_wrappers_inside_a_network_are_taken_off_in_the_copy():
    inner = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    model = nn.Sequential(nn.DataParallel(torch.compile(inner, backend="eager")), nn.Flatten(), nn.Linear(4 * 196, 5))
    masked = fl.mask_relus(model, IMAGES)
    assert list(masked_relus(masked)) == ["0.1"]
    assert isinstance(model[0], nn.DataParallel)
    assert torch.equal(masked.eval()(IMAGES), model.eval()(IMAGES))
