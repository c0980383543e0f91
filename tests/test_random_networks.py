"""Random small networks: masked they are what they were, and no ReLU is missed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fairline.errors import FairlineError
from fairline.masking import mask_relus, masked_graph, masked_relus, relu_count
from tests.reference.relus import count_relus, everything

IMAGES = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Inner(nn.Module):
    """A block with a function and a module."""

    def __init__(self, in_place: bool):
        super().__init__()
        self.conv, self.act = nn.Conv2d(4, 4, 1), nn.ReLU(in_place)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.act(self.conv(F.relu(x)))


def modules(in_place: bool) -> dict[str, nn.Module]:
    """What a random forward may call; ``shared`` and ``block`` as often as it likes."""
    return {
        "stem": nn.Conv2d(3, 4, 3, padding=1),
        "conv1": nn.Conv2d(4, 4, 1),
        "conv2": nn.Conv2d(4, 4, 3, padding=1),
        "norm": nn.BatchNorm2d(4),
        "shared": nn.ReLU(in_place),
        "drop": nn.Dropout2d(0.3),
        "block": Inner(in_place),
        "chain": nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(in_place), nn.BatchNorm2d(4), nn.ReLU()),
        "head": nn.Linear(4, 3),
        "aux": nn.Linear(4, 3),
    }


#: Lines of a forward; each {relu} is a module of its own.
LINES = (
    "x = self.{relu}(x)",
    "x = self.shared(x)",
    "x = F.relu(x)",
    "x = torch.relu(x)",
    "x = x.relu()",
    "x = F.relu(self.conv2(x), inplace=True)",
    "x = self.conv1(x).relu_()",
    "x = x.clamp(min=0) - 0.1",
    "x = self.norm(x)",
    "x = self.conv1(x) + x",
    "x = self.block(x)",
    "x = self.chain(x)",
    "x = self.drop(x)",
    "x = F.dropout(x, 0.2, training=self.training)",
    "x = x + 0.1 * torch.randn_like(x) if self.training else x",
    "y = x",
    "x = x + y",
    "x = x * F.relu(self.scale)",
    "x = x.detach() + self.conv2(x)",
    "with torch.no_grad() if self.training else contextlib.nullcontext(): x = self.conv1(x)",
    "x = checkpoint(self.chain, x, use_reentrant=False) if self.training else self.chain(x)",
    "x = checkpoint(self.{relu}, x, use_reentrant=False)",
    "for _ in range(2): x = F.relu(x - 0.2)",
    "if self.training: self.kept = self.aux(F.relu(x).mean((2, 3)))",
    "if self.training: self.kept = self.aux(self.shared(x.clone()).mean((2, 3)))",
)


def network(lines: list[str], in_place: bool, seed: int) -> nn.Module:
    """A module whose forward is these lines."""
    torch.manual_seed(seed)
    own = modules(in_place)
    body = ["y = x = self.stem(x)"]
    for number, line in enumerate(lines):
        own[f"relu{number}_"] = nn.ReLU(in_place)
        body.append(line.format(relu=f"relu{number}_"))
    body.append("return self.head(x.mean((2, 3)))")
    source = "def forward(self, x, labels=None):\n" + "\n".join(f"    {line}" for line in body)
    names: dict[str, Any] = {"torch": torch, "F": F, "checkpoint": checkpoint, "contextlib": __import__("contextlib")}
    exec(source, names)
    made: nn.Module = type("Random", (nn.Module,), {"forward": names["forward"]})()
    for name, module in own.items():
        made.add_module(name, module)
    made.register_buffer("scale", torch.randn(4, 1, 1))
    return made


def masked_unless_lost(model: nn.Module, lines: list[str]) -> nn.Module:
    """Of several calls, the second pass of a checkpoint could not tell which it repeats: that alone is refused."""
    try:
        return mask_relus(model, IMAGES[:1])
    except FairlineError as error:
        assert "within a checkpoint" in str(error)  # noqa: PT017
        assert any("checkpoint" in line for line in lines)
        reject()


@settings(max_examples=60)
@given(
    lines=st.lists(st.sampled_from(LINES), min_size=1, max_size=7),
    in_place=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_a_random_network_keeps_its_function_and_no_relu_is_missed(lines, in_place, seed):
    model = network([*lines, "x = F.relu(x)"], in_place, seed)
    masked = masked_unless_lost(model, lines)
    of_buffers = sum(line == LINES[17] for line in lines) * 4
    assert relu_count(masked) * len(IMAGES) == count_relus(model, IMAGES) - of_buffers
    assert set(model.state_dict()) <= set(masked.state_dict())
    for training in (True, False, True):
        try:
            expected = everything(model, IMAGES, training=training, seed=seed)
        except RuntimeError as error:
            # In-place ReLUs may overwrite what the original's own backward pass needs.
            assert in_place or "inplace" in str(error)  # noqa: PT017
            continue
        found = everything(masked, IMAGES, training=training, seed=seed)
        for name, value in expected.items():
            assert (value is None) == (found[name] is None), name
            assert value is None or torch.equal(value, found[name]), name


@settings(max_examples=30)
@given(lines=st.lists(st.sampled_from(LINES), min_size=1, max_size=5), in_place=st.booleans(), seed=st.integers(0, 99))
def test_cut_masks_leave_the_lines_that_they_belong_to_linear(lines, in_place, seed):
    """With all masks cut, a network without ReLUs: compared with the same lines written without them."""
    masked = masked_unless_lost(network([*lines, "x = F.relu(x)"], in_place, seed), lines)
    for layer in masked_relus(masked).values():
        layer.set_mask(torch.tensor(False))
    assert relu_count(masked) == 0
    without = network([*[linear(line) for line in lines], "x = x"], in_place, seed)
    for module in without.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                module.add_module(name, nn.Identity())
    without.block.forward = lambda x: x + without.block.act(without.block.conv(x))
    assert torch.allclose(masked.eval()(IMAGES), without.eval()(IMAGES), rtol=1e-4, atol=1e-5)


def linear(line: str) -> str:
    """The line without its ReLUs of images."""
    replaced = {
        "F.relu(x)": "x",
        "torch.relu(x)": "x",
        "x.relu()": "x",
        "F.relu(self.conv2(x), inplace=True)": "self.conv2(x)",
        "self.conv1(x).relu_()": "self.conv1(x)",
        "x.clamp(min=0)": "x",
        "F.relu(x - 0.2)": "x - 0.2",
    }
    for relu, plain in replaced.items():
        line = line.replace(relu, plain)
    return line


@settings(max_examples=20)
@given(lines=st.lists(st.sampled_from(LINES[:14]), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_the_graph_of_a_masked_network_computes_what_it_computes(lines, seed):
    masked = mask_relus(network([*lines, "x = F.relu(x)"], False, seed), IMAGES).eval()
    for layer in masked_relus(masked).values():
        layer.set_mask(torch.rand(layer.shape, generator=torch.Generator().manual_seed(seed)) < 0.5)
    traced = masked_graph(masked, IMAGES)
    assert traced is not None
    assert torch.allclose(traced(IMAGES), masked(IMAGES), rtol=1e-5, atol=1e-6)
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert sorted(name for name in called if name in masked_relus(masked)) == sorted(masked_relus(masked))
