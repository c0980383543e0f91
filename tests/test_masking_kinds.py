"""Kinds of networks that people have: masked without being changed, or refused in one true sentence."""

from __future__ import annotations

import copy
import functools
import random
import threading
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fairline.errors import FairlineError
from fairline.masking import copy_model, mask_relus, masked_relus, relu_count
from tests.reference.relus import everything

IMAGES = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Lines(nn.Module):
    """A forward in a few lines: ``run(self, x)`` gives features (B, 4, 6, 6)."""

    def __init__(self, run, **parts):
        super().__init__()
        self.conv, self.conv2, self.relu, self.fc = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Linear(4, 2)
        self.run = run
        for name, part in parts.items():
            if isinstance(part, torch.Tensor):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x, labels=None, **options):
        return self.fc(self.run(self, x).mean((2, 3)))


class Heir(nn.ReLU):
    """Changes nothing."""


class Twice(nn.ReLU):
    """Does more than its parent."""

    def forward(self, x):
        return 2 * super().forward(x)


class Floored(torch.autograd.Function):
    """A ReLU inside a function with a backward of its own."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (x > 0)


class FunctionalBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return F.relu(self.conv(x))


def another_line_in_each_mode(m, x):
    h = m.conv(x)
    if m.training:
        h = F.dropout(F.relu(h), 0.5)
    else:
        h = F.relu(h)
    return h


def auxiliary_module(m, x):
    h = m.relu(m.conv(x))
    if m.training:
        m.aux = m.relu(h.mean((2, 3)))
    return h


def auxiliary_helper(m, x):
    h = m.conv(x)
    if m.training:
        m.aux = activated(m.conv2(h))
    return activated(h)


def activated(x):
    return F.relu(x)


def two_views(m, x):
    h = m.block(x)
    return h + m.block(x.flip(3)).mean() if m.training else h


def early_exit(m, x):
    h = m.relu(m.conv(x))
    return h if h.mean() > 0.4 else m.relu2(m.conv2(h))


def moving_buffer(m, x):
    h = m.conv(x)
    if m.training:
        with torch.no_grad():
            m.mean.mul_(0.9).add_(0.1 * h.mean((0, 2, 3)).view(4, 1, 1))
    return F.relu(h - m.mean)


def own_generator(m, x):
    if m.training:
        x = x + torch.randn(x.shape, generator=m.generator)
    return m.relu(m.conv(x))


def other_randomness(m, x):
    if m.training:
        x = x * random.random() + np.random.rand()  # noqa: NPY002
    return F.relu(m.conv(x))


class HoldsItself(nn.Module):
    """A function and hooks that hold the network, as closures and defaults do."""

    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 1), nn.ReLU()
        self.step = lambda x: self.act(self.conv(x))
        self.act.register_forward_hook(lambda _, __, output: setattr(self, "kept", output))
        self.conv.register_forward_hook(lambda _, __, output, net=self: output + net.conv.bias.sum())

    def forward(self, x):
        self.step(x)
        return self.kept


def half_in_place(m, x):
    h = m.conv(x)
    h[:, :2].relu_()
    return h


#: What is masked, and its ReLUs an image.
MASKED = {
    "an heir of nn.ReLU": (lambda: Lines(lambda m, x: m.act(m.conv(x)), act=Heir()), 144),
    "an heir that does more": (lambda: Lines(lambda m, x: m.act(m.conv(x)), act=Twice()), 144),
    "nn.Threshold": (lambda: Lines(lambda m, x: m.act(m.conv(x)), act=nn.Threshold(0, 0)), 144),
    "a function as attribute": (lambda: Lines(lambda m, x: m.act(m.conv(x)), act=F.relu), 144),
    "a partial function": (
        lambda: Lines(lambda m, x: m.act(m.conv(x)), act=functools.partial(F.relu, inplace=True)),
        144,
    ),
    "an operator": (lambda: Lines(lambda m, x: torch.ops.aten.relu(m.conv(x))), 144),
    "clamps": (lambda: Lines(lambda m, x: m.conv(x).clamp_min(0) + torch.clamp(m.conv(x), min=0.0)), 288),
    "clamps that are no ReLU": (lambda: Lines(lambda m, x: F.relu(m.conv(x).clamp(min=-1).clamp(0, 6))), 144),
    "a backward of its own": (lambda: Lines(lambda m, x: Floored.apply(m.conv(x))), 144),
    "modules in a list": (
        lambda: Lines(lambda m, x: m.acts[1](m.acts[0](m.conv(x))), acts=[nn.ReLU(), nn.ReLU()]),
        288,
    ),
    "a loop": (lambda: Lines(lambda m, x: functools.reduce(lambda h, c: c(h).relu(), [m.conv2] * 3, m.conv(x))), 432),
    "another line in each mode": (lambda: Lines(another_line_in_each_mode), 144),
    "an auxiliary module while training": (lambda: Lines(auxiliary_module), 144),
    "an auxiliary function while training": (lambda: Lines(auxiliary_helper), 144),
    "two views of a module": (lambda: Lines(two_views, block=nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(True))), 144),
    "two views of a function": (lambda: Lines(two_views, block=FunctionalBlock()), 144),
    "an early exit": (lambda: Lines(early_exit, relu2=nn.ReLU()), 288),
    "a buffer that training moves": (lambda: Lines(moving_buffer, mean=torch.zeros(4, 1, 1)), 144),
    "a generator of its own": (lambda: Lines(own_generator, generator=torch.Generator().manual_seed(1)), 144),
    "Python's and NumPy's randomness": (lambda: Lines(other_randomness), 144),
    "a module of Python": (lambda: Lines(lambda m, x: m.F.relu(m.conv(x)), F=F), 144),
    "F.batch_norm": (
        lambda: Lines(
            lambda m, x: F.relu(F.batch_norm(m.conv(x), m.mean, m.var, training=m.training)),
            mean=torch.zeros(4),
            var=torch.ones(4),
        ),
        144,
    ),
    "alpha dropout": (lambda: Lines(lambda m, x: F.alpha_dropout(F.relu(m.conv(x)), 0.3, m.training)), 144),
    "dropout of channels": (lambda: Lines(lambda m, x: F.dropout2d(F.relu(m.conv(x)), 0.3, m.training)), 144),
    "random slopes": (lambda: Lines(lambda m, x: F.rrelu(m.conv2(m.relu(m.conv(x))), training=m.training)), 144),
    "detached": (lambda: Lines(lambda m, x: m.relu(m.conv(x)) + F.relu(m.conv(x)).detach()), 288),
    "a ReLU of a buffer": (
        lambda: Lines(lambda m, x: m.relu(m.conv(x)) * F.relu(m.scale), scale=torch.ones(4, 1, 1)),
        144,
    ),
    "forward without its hooks": (lambda: Lines(lambda m, x: m.relu.forward(m.conv(x))), 144),
    "functions that hold the network": (lambda: Lines(lambda m, x: m.inner(x), inner=HoldsItself()), 144),
    "half of a view in place": (lambda: Lines(half_in_place), 72),
    "double precision": (lambda: Lines(lambda m, x: m.relu(m.conv(x.double()))).double(), 144),
}


@pytest.mark.parametrize("name", MASKED)
def test_kinds_that_are_masked(name):
    make, count = MASKED[name]
    torch.manual_seed(0)
    model = make()
    masked = mask_relus(model, IMAGES)
    assert relu_count(masked) == count
    assert isinstance(masked, Lines)
    model = copy_model(model)
    for training in (True, False, True):
        for seed in range(2):
            found = []
            for network in (model, masked):
                random.seed(seed)
                np.random.seed(seed)  # noqa: NPY002
                found.append(everything(network, IMAGES, training=training, seed=seed))
            for key, value in found[0].items():
                assert (value is None) == (found[1][key] is None), key
                assert value is None or torch.equal(value, found[1][key]), key


class Unregistered(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = [nn.Sequential(nn.Linear(4, 4), nn.ReLU())]

    def forward(self, x):
        return self.blocks[0](F.relu(x))


class SequenceFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(4, 1, 8)

    def forward(self, x):
        return self.encoder(x[None]).squeeze(0)


class Skipping(nn.Module):
    """Stochastic depth in a loop: which call is which cannot be told from the line."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(6)])

    def forward(self, x):
        for layer in self.layers:
            if not self.training or random.random() < 0.5:
                x = torch.relu(layer(x))
        return x


class Recomputed(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def step(self, x):
        return F.relu(self.linear(x))

    def forward(self, x):
        return checkpoint(self.step, x, use_reentrant=False) if self.training else self.step(x)


class Locked(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.inner.lock = threading.Lock()

    def forward(self, x):
        return self.inner(x)


class Asks(nn.Module):
    """Its forward depends on what stands in the ReLU's place."""

    def __init__(self):
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(x) if isinstance(self.act, nn.ReLU) else x


class Sometimes(nn.Module):
    def forward(self, x):
        return F.relu(x) if len(x) == 2 else x


class OtherShapes(nn.Module):
    """Other ReLUs in each mode, of other shapes."""

    def forward(self, x):
        return F.relu(x[:, :2]) if self.training else F.relu(x)


class Global(nn.Module):
    """Its forward reads what a hook leaves on a network of that name."""

    def __init__(self):
        super().__init__()
        self.act = nn.ReLU()
        self.act.register_forward_hook(keep_on_global)

    def forward(self, x):
        self.act(x)
        return self.kept * 2


def keep_on_global(_, __, output):
    STORE[0].kept = output


STORE: list[nn.Module] = []


def held_outside():
    STORE[:] = [Global()]
    STORE[0](torch.ones(2, 4))
    return STORE[0]


class Compares(nn.Module):
    def forward(self, x):
        return x * (x > 0)


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))


class HoldsScript(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = scripted()

    def forward(self, x):
        return self.inner(F.relu(x))


REFUSED = {
    "no ReLU": (lambda: nn.Linear(4, 2), r"Linear has no ReLU to mask\."),
    "ReLU6": (lambda: nn.Sequential(nn.ReLU6()), r"no ReLU to mask; other nonlinear functions .*: ReLU6 \('0'\)\."),
    "several": (
        lambda: nn.Sequential(nn.LeakyReLU(), nn.PReLU(), nn.GELU(), nn.SiLU(), nn.Hardswish(), nn.GELU()),
        r"LeakyReLU \('0'\), PReLU \('1'\), GELU \('2' and 1 more\), SiLU \('3'\), Hardswish \('4'\)\.",
    ),
    "a comparison": (lambda: nn.Sequential(Compares()), r"no ReLU to mask; .* gt \('0'\)"),
    "another shape": (lambda: nn.Sequential(nn.Linear(5, 3), nn.ReLU()), "Sequential fails on an example of shape"),
    "a recurrence": (lambda: nn.Sequential(nn.ReLU(), nn.RNN(4, 3, nonlinearity="relu")), r"inside '1' \(RNN\)"),
    "a cell": (lambda: nn.Sequential(nn.RNNCell(4, 3, nonlinearity="relu")), r"inside '0' \(RNNCell\)"),
    "TorchScript": (scripted, r"inside itself \(RecursiveScriptModule\)"),
    "TorchScript inside": (HoldsScript, r"inside 'inner' \(RecursiveScriptModule\)"),
    "no batch axis": (
        SequenceFirst,
        r"the ReLU in 'encoder' in SequenceFirst has no batch axis in front: .* \(1, 2, 8\)",
    ),
    "unregistered": (Unregistered, "A Sequential with a ReLU is no part of the model"),
    "stochastic depth": (Skipping, r"at line \d+ of forward 6 times in evaluation and \d times in training mode"),
    "other shapes": (OtherShapes, r"at line \d+ of forward in evaluation mode only, and .* in training mode only"),
    "a checkpoint": (Recomputed, r"the ReLU at line \d+ of step within a checkpoint"),
    "a lock": (Locked, "attribute 'lock' of 'inner' is a lock"),
    "asks for its ReLU": (Asks, "Asks returns something else in evaluation mode once it is masked"),
    "sometimes": (Sometimes, r"line \d+ of forward for some images only"),
    "held outside": (held_outside, "cannot be copied: the copy gives other outputs"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_kinds_that_are_refused_in_a_sentence(name):
    make, message = REFUSED[name]
    with pytest.raises(FairlineError, match=rf"^[^\n]*{message}[^\n]*$"):
        mask_relus(make(), torch.zeros(1, 4))


@pytest.mark.parametrize("example", [torch.zeros(()), torch.zeros(0, 4), [[0.0] * 4]])
def test_an_example_is_a_batch(example):
    with pytest.raises(FairlineError, match="An example input is a batch of images"):
        mask_relus(nn.Sequential(nn.ReLU()), example)


@pytest.mark.parametrize("activation", ["relu", nn.ReLU(), F.relu])
def test_relus_inside_torchs_layers_are_counted_and_act(activation):
    """Also with their own fast way in evaluation."""
    encoder = nn.TransformerEncoderLayer(8, 2, 32, batch_first=True, activation=activation)
    model = nn.Sequential(nn.Unflatten(1, (4, 8)), nn.TransformerEncoder(encoder, 2, enable_nested_tensor=False))
    masked = mask_relus(model, torch.zeros(1, 32)).eval()
    assert relu_count(masked) == 2 * 4 * 32
    images = torch.randn(3, 32)
    with torch.inference_mode():
        torch.testing.assert_close(masked(images), model.eval()(images), rtol=1e-4, atol=1e-5)
        for layer in masked_relus(masked).values():
            layer.set_mask(torch.tensor(False))
        cut = masked(images)
        for layer in model[1].layers:
            layer.activation, layer.activation_relu_or_gelu = nn.Identity(), 0
        torch.testing.assert_close(cut, model(images), rtol=1e-4, atol=1e-5)


def test_a_run_that_calls_more_relus_is_one_sentence():
    class Growing(nn.Module):
        times = 1

        def forward(self, x):
            for _ in range(self.times):
                x = F.relu(x)
            return x

    masked = mask_relus(Growing(), torch.zeros(1, 4))
    masked.times = 0
    assert torch.equal(masked(-torch.ones(2, 4)), -torch.ones(2, 4))
    masked.times = 2
    with pytest.raises(FairlineError, match=r"Growing evaluates other ReLUs at line \d+ of forward"):
        masked(torch.ones(2, 4))


def test_a_forward_that_breaks_off_does_not_shift_the_turns():
    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(nn.Linear(2, 2), nn.ReLU())

        def forward(self, x):
            first = self.block(x[:, :2])
            if x.isnan().any():
                raise ValueError("broken image")
            return first - self.block(x[:, 2:])

    masked = mask_relus(Siamese(), torch.zeros(1, 4))
    second = list(masked_relus(masked))[1]
    masked_relus(masked)[second].set_mask(torch.tensor(False))
    images = torch.randn(3, 4)
    before = masked(images)
    left, right = (masked.block[0](half) for half in images.chunk(2, 1))
    assert torch.equal(before, left.relu() - right)
    with pytest.raises(ValueError, match="broken"):
        masked(torch.full((3, 4), float("nan")))
    assert torch.equal(masked(images), before)


def test_checks_leave_the_model_and_the_randomness_alone():
    model = Lines(moving_buffer, mean=torch.zeros(4, 1, 1))
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    before = copy.deepcopy(model.state_dict())
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    mask_relus(model.train(), IMAGES)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(model.fc.weight.grad, torch.ones_like(model.fc.weight))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]  # noqa: NPY002


def test_a_masked_copy_survives_copies_and_transforms():
    model = mask_relus(nn.Sequential(FunctionalBlock(), nn.Flatten(), nn.Linear(144, 2)), IMAGES).eval()
    for layer in masked_relus(model).values():
        layer.set_mask(torch.rand(layer.shape) < 0.5)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(IMAGES), model(IMAGES))
    for layer in masked_relus(copied).values():
        layer.set_mask(torch.tensor(True))
    assert not torch.equal(copied(IMAGES), model(IMAGES))
    parameters = {name: each.detach() for name, each in model.named_parameters()}

    def loss(parameters, image):
        return torch.func.functional_call(model, parameters, (image[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, IMAGES)
    model(IMAGES[:1]).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(each[name][0], parameter.grad, rtol=1e-4, atol=1e-5)


def test_functions_of_a_copy_hold_the_copy():
    model = HoldsItself()
    copied = copy_model(model)
    with torch.no_grad():
        copied.conv.weight.zero_()
        copied.conv.bias.fill_(1)
    assert torch.equal(copied(IMAGES), torch.full((4, 4, 6, 6), 5.0))
    assert not hasattr(model, "kept")
    model(IMAGES).sum().backward()
    assert model.conv.weight.grad is not None
    assert copied.conv.weight.grad is None


@pytest.mark.filterwarnings("ignore")
def test_compiling_a_masked_network_works_where_its_relus_are_modules():
    modules = mask_relus(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), IMAGES)
    assert torch.equal(torch.compile(modules, backend="eager")(IMAGES), modules(IMAGES))
    functions = torch.compile(mask_relus(FunctionalBlock(), IMAGES), backend="eager")
    with pytest.raises(FairlineError, match=r"torch\.compile does too"):
        functions(IMAGES)
