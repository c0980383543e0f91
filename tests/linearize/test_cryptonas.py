from __future__ import annotations

import copy
import json

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fairline as fl
from fairline import CryptoNAS, FairlineError
from fairline.inference import predict
from fairline.linearize import ForCost, Random
from fairline.linearize.macro_search import Architecture, Controller, Search, SharedNetwork, reinforce
from fairline.masking import mask_relus, masked_relus, relu_count
from fairline.models import build, rescaled
from fairline.models.cnet import rows_of
from fairline.private import to_graph
from fairline.runs import load_network
from fairline.training import run_epochs
from tests.commands import fairline, ok
from tests.reference.macro_search import architectures, expected_reward, relus

FAST = {
    "layers": 3,
    "search_epochs": 2,
    "search_width": 2,
    "controller_steps": 2,
    "samples": 2,
    "controller_lr": 0.01,
    "candidates": 3,
    "train_epochs": 2,
    "narrowest": 2,
    "batch_size": 64,
}
#: As published: the skips of each layer from the second on, and the kernels.
CNET_1 = ("0 / 0 0 / 0 0", "1, 11, 010, 1010, 00110", "3,3,3,5,3,3")


@st.composite
def networks(draw, most=6):
    """Options of a CNet, and an image for it."""
    layers = draw(st.integers(3, most))
    skips = draw(st.lists(st.booleans(), min_size=layers * (layers - 1) // 2, max_size=layers * (layers - 1) // 2))
    options = {
        "width": draw(st.integers(1, 2)),
        "layers": layers,
        "skips": skips,
        "kernels": draw(st.lists(st.sampled_from([1, 3]), min_size=layers, max_size=layers)),
        "balance": draw(st.sampled_from([1, 2, 4])),
        "stem_stride": draw(st.sampled_from([1, 1, 2])),
    }
    return options, (draw(st.integers(4, 13)), draw(st.integers(4, 13)))


def counts(model):
    return [layer.num_kept for layer in masked_relus(model).values()]


def states_equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("layers", "width", "count"), [(6, 14, 86_016), (12, 7, 344_064 // 4), (24, 2, 1_376_256 // 28)]
)
def test_relus_as_published(layers, width, count):
    """Whatever the skips. Of width 14, 28 and 56 there; the deep ones are built narrower here."""
    skips = (torch.rand(layers * (layers - 1) // 2, generator=torch.Generator().manual_seed(0)) < 0.4).tolist()
    for own in ((), skips)[layers > 6 :]:
        model = build("cnet", 10, width=width, layers=layers, skips=own)
        assert relu_count(model, torch.zeros(1, 3, 32, 32)) == count


@settings(max_examples=6)
@given(case=networks(), kind=st.sampled_from(["none", "once", "each"]))
def test_relu_counts_against_the_reference(case, kind):
    options, size = case
    masked = mask_relus(build("cnet", 3, image_size=size, **options, skip_relus=kind), torch.zeros(2, 3, *size))
    known = {key: options[key] for key in ("layers", "width", "balance", "stem_stride")}
    assert relu_count(masked) == relus(
        size, **known, rows=rows_of(options["skips"], options["layers"]), skip_relus=kind
    )


@settings(max_examples=6)
@given(layers=st.integers(3, 8), width=st.integers(1, 2), sides=st.tuples(st.integers(1, 4), st.integers(1, 4)))
def test_relus_are_balanced(layers, width, sides):
    """Four times the channels at a quarter of the pixels: all layers are alike, and there are layers·width·H·W."""
    size = (4 * sides[0], 4 * sides[1])
    example = torch.zeros(2, 3, *size)
    balanced = counts(mask_relus(build("cnet", 3, image_size=size, width=width, layers=layers), example))
    assert set(balanced) == {width * size[0] * size[1]}
    assert len(balanced) == layers
    # Twice as many channels balance the work in the clear instead.
    clear = counts(mask_relus(build("cnet", 3, image_size=size, width=width, layers=layers, balance=2), example))
    assert clear[0] == 2 * clear[layers // 3] == 4 * clear[-1]


@settings(max_examples=6)
@given(case=networks(), seed=st.integers(0, 99))
def test_shuffling_keeps_the_function_and_pruning_drops_what_is_left(case, seed):
    options, size = case
    torch.manual_seed(seed)
    images = torch.randn(2, 3, *size)
    by_kind = {}
    for kind in ("each", "once", "none"):
        by_kind[kind] = build("cnet", 3, image_size=size, **options, skip_relus=kind).eval()
        by_kind[kind].load_state_dict(by_kind["each"].state_dict())
    with torch.no_grad():
        assert torch.equal(by_kind["each"](images), by_kind["once"](images))
    each, once, none = (relu_count(by_kind[kind], images) for kind in ("each", "once", "none"))
    assert each >= once > none


@settings(max_examples=3)
@given(case=networks(4), kind=st.sampled_from(["none", "once", "each"]), seed=st.integers(0, 99))
def test_the_private_graph_computes_the_same(case, kind, seed):
    options, size = case
    torch.manual_seed(seed)
    images = torch.randn(2, 3, *size)
    model = mask_relus(build("cnet", 3, image_size=size, **options, skip_relus=kind), images).eval()
    for layer in masked_relus(model).values():
        layer.set_mask(torch.rand(layer.shape) < 0.5)
    graph = to_graph(model, images)
    with torch.no_grad():
        torch.testing.assert_close(graph(images), model(images), rtol=1e-4, atol=1e-4)
    assert graph.relus == relu_count(model)
    compiled = fl.compile(model, torch.zeros(1, 3, *size))
    torch.testing.assert_close(compiled(images), model(images).detach(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", [(4, 4), (1, 9)])
def test_no_weight_sees_nothing_but_padding(size):
    """So every gradient is one, also in bfloat16, in memory that was not zero before."""
    torch.manual_seed(0)
    model = build("cnet", 3, image_size=size, width=8, layers=3, kernels=7)
    for _ in range(5):
        images, junk = torch.randn(16, 3, *size), [torch.full((128, 128, 7, 7), torch.nan) for _ in range(2)]
        del junk
        with torch.autocast("cpu", torch.bfloat16):
            model(images).float().square().sum().backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert all(gradient.isfinite().all() for gradient in gradients.values())
    for name, gradient in gradients.items():
        if name.startswith("stage") and name.endswith(".conv.weight"):
            assert gradient.abs().sum((0, 1)).min() > 0, name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 2}, "3 layers at least, not 2"),
        ({"skips": "1 0"}, r"6 layers takes 15 skips, .* not 2"),
        ({"layers": 3, "skips": [1, 0, 2]}, "3 layers takes 3 skips"),
        ({"layers": 3, "skips": "12 0"}, "3 layers takes 3 skips"),
        ({"kernels": 4}, "one odd kernel, or 6 of them, not 4"),
        ({"kernels": "3,5"}, "or 6 of them, not 3,5"),
        ({"kernels": "three"}, "not three"),
        ({"balance": 0}, "balance ≥ 1"),
        ({"skip_relus": "some"}, "skip_relus none, once, each"),
    ],
)
def test_networks_that_cannot_be(options, message):
    with pytest.raises(FairlineError, match=message):
        build("cnet", 3, **options)


def test_a_cnet_is_rescaled_as_others_are():
    _, skips, kernels = CNET_1
    model = build("cnet", 3, width=4, skips=skips, kernels=kernels)
    smaller, options = rescaled(model, 0.5, 0.5)
    assert options == {"width": 2, "stem_stride": 2}
    assert relu_count(smaller, torch.zeros(1, 3, 32, 32)) == 6 * 2 * 256
    assert smaller.skips == model.skips


@settings(max_examples=20)
@given(case=networks())
def test_an_architecture_is_written_and_read(case):
    options, _ = case
    own = Architecture(tuple(options["kernels"]), tuple(options["skips"]))
    assert Architecture.parse(str(own)) == own


@pytest.mark.parametrize("text", ["", "3 / 3", "3 / 3 2", "3 1", "3 / 3 1 1", "k / 3 0", "3 0 / 3"])
def test_what_is_no_architecture(text):
    with pytest.raises(FairlineError, match=r"An architecture is written .* layer \d of"):
        Architecture.parse(text)


def test_a_controllers_probabilities_add_up():
    controller = Controller(3, (3, 5), seed=1)
    with torch.no_grad():
        for parameter in controller.parameters():
            parameter.mul_(10)
    everything = list(architectures(3, (3, 5)))
    log_probs = torch.stack([controller(given=each).log_prob for each in everything]).detach()
    assert float(log_probs.exp().sum()) == pytest.approx(1)
    assert float(log_probs.exp().max()) > 2 / len(everything)
    # Draws come as often as they should; what a draw says of itself is what following it says.
    generator = torch.Generator().manual_seed(0)
    found = dict.fromkeys(everything, 0)
    for _ in range(1000):
        with torch.no_grad():
            decision = controller(generator)
        found[decision.architecture] += 1
    assert float(decision.log_prob) == pytest.approx(float(log_probs[everything.index(decision.architecture)]))
    expected = 1000 * log_probs.exp()
    chi2 = ((torch.tensor(list(found.values())) - expected) ** 2 / expected).sum()
    assert float(chi2) < 120  # 63 degrees of freedom: above in one of 40,000 draws.


def test_the_distance_from_the_target_and_the_entropy_against_torch():
    controller = Controller(3, (3,), skip_target=0.3, bound=2.0, seed=2)
    logits: list[torch.Tensor] = []
    original = controller._kl
    controller._kl = lambda own: logits.append(own) or original(own)
    decision = controller(torch.Generator().manual_seed(0))
    skips = [torch.distributions.Bernoulli(logits=own) for own in logits]
    target = torch.distributions.Bernoulli(torch.tensor(0.3, dtype=torch.float64))
    distances = [torch.distributions.kl_divergence(own, target).sum() for own in skips]
    torch.testing.assert_close(decision.off_target, torch.stack(distances).mean())
    # With one kernel to choose from, the skips are all there is to choose.
    torch.testing.assert_close(decision.entropy, sum(own.entropy().sum() for own in skips))


def reward_of(architecture):
    """Something that depends on kernels and skips together."""
    return (
        0.2 * sum(architecture.kernels) - (architecture.skips[0] ^ architecture.skips[2]) + 0.5 * architecture.skips[1]
    )


def test_reinforce_is_unbiased():
    """Its mean over all architectures, as often as they are drawn, is −∇E[R] for any baseline; ∇E[R] by differences."""
    controller = Controller(3, (3, 5), size=5, seed=3)
    reward = expected_reward(controller, reward_of)
    parameters = dict(controller.named_parameters())
    exact = torch.autograd.grad(reward, list(parameters.values()))
    for baseline in (0.0, 1.7):
        totals = [torch.zeros_like(each) for each in exact]
        for own in architectures(3, (3, 5)):
            decision = controller(given=own)
            loss = reinforce([decision], [reward_of(own) - baseline], skip_weight=0.0)
            parts = torch.autograd.grad(loss, list(parameters.values()))
            weight = float(decision.log_prob.detach().exp())
            totals = [total + weight * part for total, part in zip(totals, parts, strict=True)]
        for total, gradient in zip(totals, exact, strict=True):
            torch.testing.assert_close(total, -gradient)
    for name, gradient in zip(parameters, exact, strict=True):
        flat = parameters[name].data.view(-1)
        position = int(gradient.abs().argmax())
        moved = []
        for sign in (1, -1):
            flat[position] += sign * 1e-5
            moved.append(float(expected_reward(controller, reward_of).detach()))
            flat[position] -= sign * 1e-5
        assert float(gradient.view(-1)[position]) == pytest.approx((moved[0] - moved[1]) / 2e-5, rel=1e-4, abs=1e-9)


class Judge(nn.Module):
    """Stands for a shared network: right as often as a function says."""

    def accuracy(self, architecture, data, index, batch_size):
        return 0.5 + 0.1 * reward_of(architecture)


def test_the_controller_finds_what_is_rewarded(data):
    controller = Controller(3, (3, 5), seed=0)
    before = float(expected_reward(controller, reward_of).detach())
    best = max(map(reward_of, architectures(3, (3, 5))))
    search = Search(controller, 0.05, seed=0)
    common = {"steps": 80, "samples": 4, "batch_size": 8, "entropy_weight": 0.0, "skip_weight": 0.0}
    search.train_controller(Judge(), data, 1, **common)
    after = float(expected_reward(controller, reward_of).detach())
    assert before < after
    assert best - after < 0.4 * (best - before)
    found, measured = search.best(Judge(), data, 10, 8)
    assert 0.5 + 0.1 * reward_of(found) == max(score for _, score in measured)
    # And the pull on the skips does what it says.
    for target in (0.1, 0.9):
        drawn = Search(Controller(4, (3,), skip_target=target, seed=0), 0.03, seed=0)
        flat = type("Flat", (nn.Module,), {"accuracy": lambda *_: 0.5})()
        drawn.train_controller(flat, data, 1, **{**common, "skip_weight": 1.0})
        rate = sum(drawn.draw().skip_rate for _ in range(50)) / 50
        assert abs(rate - target) < 0.15


def shared_network(own, size=(9, 8), seed=0):
    torch.manual_seed(seed)
    return SharedNetwork(lambda: own, 3, 1, size, len(own.kernels), (1, 3, 5), width=2)


def gathered(shared, own, size=(9, 8)):
    """A network of one architecture with the weights that it has in the shared one, normalising by the batch."""
    model = build("cnet", 3, 1, size, width=2, layers=len(own.kernels), skips=own.skips, kernels=own.kernels, balance=1)
    state = shared.state_dict()
    third, rows = len(own.kernels) // 3, own.rows
    filled = {}
    for name in model.state_dict():
        module, _, what = name.rpartition(".")
        stage, *rest = module.split(".")
        if "running" in name or "num_batches" in name:
            continue
        if stage.startswith("stage"):
            index = (int(stage[5:]) - 1) * third + int(rest[0])
            if rest[1] == "mix":
                read = [position for position, bit in enumerate(rows[index]) if bit]
                filled[name] = torch.cat([state[f"paths.{index}.{each}.weight"] for each in [*read, index]], 1)
                continue
            part = {"conv": "0", "bn": "1"}.get(rest[1])
            filled[name] = state[
                f"mix_bn.{index}.{what}" if part is None else f"convs.{index}.{own.kernels[index]}.{part}.{what}"
            ]
        elif stage.startswith("halve"):
            filled[name] = state[f"halves.{int(stage[5:]) - 2}.{rest[0]}.{rest[1]}.{what}"]
        else:
            filled[name] = state[name]
    model.load_state_dict(filled, strict=False)
    return model.train()


@settings(max_examples=20)
@given(data=st.data(), layers=st.integers(3, 7), seed=st.integers(0, 99))
def test_an_architecture_computes_in_the_shared_network_what_it_is(data, layers, seed):
    bits = layers * (layers - 1) // 2
    kernels = data.draw(st.lists(st.sampled_from([1, 3, 5]), min_size=layers, max_size=layers))
    own = Architecture(tuple(kernels), tuple(data.draw(st.lists(st.booleans(), min_size=bits, max_size=bits))))
    shared = shared_network(own, seed=seed).double()
    images = torch.randn(3, 1, 9, 8, dtype=torch.float64)
    expected = gathered(shared, own).double()(images)
    torch.testing.assert_close(shared(images), expected)
    torch.testing.assert_close(shared.eval()(images), expected)


def test_weights_are_shared():
    """A step for one architecture moves what another has in common with it, and nothing that it has alone."""
    first = Architecture((3, 3, 5), (True, False, True))
    second = Architecture((3, 5, 5), (False, False, True))
    shared = shared_network(first)
    images = torch.randn(8, 1, 9, 8)
    before = gathered(shared, second)(images).detach()
    state = copy.deepcopy(shared.state_dict())
    optimizer = torch.optim.SGD(shared.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    shared(images).square().sum().backward()
    optimizer.step()
    moved = {name for name, value in shared.state_dict().items() if not torch.equal(value, state[name])}
    assert {"conv.weight", "convs.0.3.0.weight", "convs.2.5.0.weight", "paths.2.1.weight", "linear.weight"} <= moved
    assert {"paths.1.0.weight", "convs.1.3.0.weight"} <= moved
    assert not {name for name in moved if name.startswith(("convs.1.5", "convs.0.5", "convs.2.3", "paths.2.0"))}
    assert not torch.allclose(gathered(shared, second)(images), before)
    # What is measured is the architecture asked for, and no weight moves for it.
    data = fl.GroupedData(
        torch.randint(0, 256, (6, 1, 9, 8), dtype=torch.uint8), torch.arange(6) % 3, torch.zeros(6).long(), "abc", "g"
    )
    state = copy.deepcopy(shared.state_dict())
    right = gathered(shared, second)(data.normalized()).argmax(1) == data.labels
    assert shared.accuracy(second, data, torch.arange(6), 100) == int(right.sum()) / 6
    assert all(torch.equal(value, state[name]) for name, value in shared.state_dict().items())
    assert shared.fixed is None


def test_budgets_are_exact_and_networks_are_rebuilt(parts, trained):
    before = copy.deepcopy(trained.state_dict())
    history: list[dict[str, float]] = []
    cuts = list(CryptoNAS(**FAST).linearize(trained, parts[0], [1.0, 0.9, 100, 20, 0], history=history))
    assert [cut.relus for cut in cuts] == [448, 403, 100, 20, 0]
    assert [cut.total for cut in cuts] == [448] * 5
    # 8×8 pixels, three layers: 192 ReLUs a channel, 48 behind a stem of stride 2.
    options = [cut.info["model"]["options"] for cut in cuts[1:]]
    assert [(each["width"], each["stem_stride"]) for each in options] == [(3, 1), (3, 2), (1, 2), (0 + 1, 2)]
    found = cuts[1].info["architecture"]
    for cut in cuts[1:]:
        assert cut.info["architecture"] == found
        again = build("cnet", 3, 1, 8, **cut.info["model"]["options"])
        masked = mask_relus(again, parts[0].normalized(slice(2)))
        masked.load_state_dict(cut.model.state_dict())
        assert torch.equal(predict(masked, parts[2]), predict(cut.model, parts[2]))
        per_layer = counts(cut.model)
        assert max(per_layer) - min(per_layer) <= 1
    assert all(torch.equal(before[name], value) for name, value in trained.state_dict().items())
    # All that was sampled is told, with its score, and what was chosen from.
    table = pd.DataFrame(history)
    sampled = table[table["score"].notna()]
    assert len(sampled) == 2 * 2 * 2
    assert sampled["score"].between(0, 1).all()
    assert all(str(Architecture.parse(text)) == text for text in sampled["architecture"])
    candidates = table[table["held_out_accuracy"].notna()]
    best = candidates.sort_values("held_out_accuracy", ascending=False, kind="stable").iloc[0]
    assert best["architecture"] == found
    assert table["reward"].notna().sum() == 2
    # As published: nothing is made linear, and the largest that fits is taken.
    published = {**FAST, "exact": False, "train_epochs": 0}
    cuts = list(CryptoNAS(**published, architecture=found).linearize(trained, parts[0], [0.9, 100]))
    assert [cut.relus for cut in cuts] == [2 * 192, 2 * 48]


def test_a_budget_below_the_smallest_network_is_told(parts, trained, caplog):
    method = CryptoNAS(architecture="3 / 3 0 / 3 0 0", exact=False, train_epochs=0)
    (cut,) = method.linearize(trained, parts[0], [10])
    assert cut.relus == 10
    assert "one channel has more than 10 ReLUs" in caplog.text


def test_networks_learn_from_the_teacher(parts, trained):
    """Against the same network trained by hand; ``train_epochs=0`` leaves that to the finetune."""
    own = {"architecture": "3 / 3 1 / 5 0 1", "batch_size": 64, "surrogate": "cubic"}
    (blank,) = CryptoNAS(**own, train_epochs=0).linearize(trained, parts[0], [200])
    (learned,) = CryptoNAS(**own, train_epochs=2).linearize(trained, parts[0], [200])
    student = blank.model
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, weight_decay=4e-4, nesterov=True)
    clip = nn.utils.clip_grad_norm_
    optimizer.register_step_pre_hook(lambda *_: clip(student.parameters(), 5.0) and None)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2)
    common = {"optimizer": optimizer, "scheduler": scheduler, "objective": fl.ERM(), "batch_size": 64}
    assert len(list(run_epochs(student, parts[0], epochs=2, teacher=trained, **common))) == 2
    assert states_equal(student, learned.model)
    assert learned.relus == 200
    right = (predict(learned.model, parts[2]).argmax(1) == parts[2].labels).float().mean()
    assert float(right) > 0.5


class OwnNetwork(nn.Module):
    """Without stages, skips or a description, and with more outputs than there are classes."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 32), nn.Linear(32, 5)

    def forward(self, x):
        return {"logits": self.second(torch.relu(self.first(x.flatten(1))))}


def test_any_network_is_a_teacher(parts):
    torch.manual_seed(0)
    (cut,) = CryptoNAS(**FAST).linearize(OwnNetwork(), parts[0], [20])
    assert (cut.relus, cut.total) == (20, 32)
    assert cut.info["model"]["num_classes"] == 5
    assert predict(cut.model, parts[2]).shape[1] == 5


def test_a_linearized_network_counts_against_what_it_had(parts, trained):
    (half,) = Random().linearize(trained, parts[0], [0.5])
    cuts = list(CryptoNAS(**FAST).linearize(half.model, parts[0], [0.6, 0.25]))
    assert [(cut.budget, cut.relus, cut.total) for cut in cuts] == [(269, 224, 448), (112, 112, 448)]


class KilledError(Exception):
    pass


@pytest.fixture(scope="module")
def unbroken(parts, _trained):
    history: list[dict[str, float]] = []
    return list(CryptoNAS(**FAST).linearize(_trained, parts[0], [200, 90], history=history)), history


@pytest.mark.parametrize(
    ("stage", "updates"),
    [("searching", 1), ("searching", 4), ("controller", 3), ("training 3 layers, 2 channels, stem of stride 2", 3)],
)
def test_a_killed_run_resumes_to_the_same_networks(parts, trained, unbroken, tmp_path, stage, updates):
    """Killed in the shared weights' training, in the controller's, and in that of the second network."""
    whole, expected = unbroken
    budgets, expected = [200, 90], copy.deepcopy(expected)
    left = [updates]

    def watch(progress):
        if progress.stage == stage:
            left[0] -= 1
            if left[0] < 0:
                raise KilledError

    with pytest.raises(KilledError):
        list(CryptoNAS(**FAST).linearize(trained, parts[0], budgets, progress=watch, checkpoint=tmp_path))
    history: list[dict[str, float]] = []
    resumed = list(CryptoNAS(**FAST).linearize(trained, parts[0], budgets, checkpoint=tmp_path, history=history))
    for a, b in zip(whole, resumed, strict=True):
        assert a.info == b.info
        assert states_equal(a.model, b.model)
    for row in (*history, *expected):
        row.pop("seconds", None)
    pd.testing.assert_frame_equal(pd.DataFrame(history), pd.DataFrame(expected))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 2}, "layers ≥ 3, not 2"),
        ({"samples": 0}, "samples ≥ 1"),
        ({"search_epochs": 0}, "search_epochs ≥ 1"),
        ({"train_epochs": -1}, "train_epochs ≥ 0"),
        ({"stem_stride": 0}, "stem_stride ≥ 1"),
        ({"kernels": "3,4"}, "kernels that are odd, each once, such as 3,5, not 3,4"),
        ({"kernels": "3,3"}, "each once"),
        ({"held_out": 1.0}, "held_out between 0 and 1"),
        ({"skip_target": 0.0}, "skip_target between 0 and 1"),
        ({"lr": 0.0}, "lr > 0"),
        ({"skip_relus": "all"}, "skip_relus none, once, each, not 'all'"),
        ({"architecture": "3 / 5"}, "An architecture is written"),
        ({"architecture": "3 / 5 1"}, "layers ≥ 3, not 2"),
        ({"architecture": "3 / 4 1 / 3 0 0"}, "kernels that are odd"),
        ({"for_cost": ForCost(lambda *_: None)}, "CryptoNAS builds networks of its own"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(FairlineError, match=message):
        CryptoNAS(**options)


@pytest.mark.slow
def test_on_the_command_line(tmp_path):
    """From training to the compiled network: run folders rebuild what was found."""
    model = ["--data", "digits", "--model", "resnet18", "--width", "2", "--epochs", "1", "--batch-size", "64"]
    ok("train", *model, "--out", tmp_path / "base")
    fast = [f"--option={key}={value}" for key, value in FAST.items()]
    cut = ["linearize", tmp_path / "base", "--method", "cryptonas", "--budgets", "0.5,20", *fast]
    ok(*cut, "--out", tmp_path / "cut")
    network, info = load_network(tmp_path / "cut" / "networks" / "budget-20")
    assert info.model.name == "cnet"
    assert relu_count(network) == 20
    ok("finetune", tmp_path / "cut", "--epochs", "1", "--batch-size", "64", "--out", tmp_path / "students")
    ok("audit", tmp_path / "students", "--resamples", "20", "--out", tmp_path / "audit")
    ok("compare", tmp_path / "students", "--resamples", "20", "--out", tmp_path / "compare")
    ok("compile", tmp_path / "students", "--out", tmp_path / "compiled")
    table = pd.read_parquet(tmp_path / "cut" / "metrics.parquet")
    assert table["score"].notna().any()
    assert json.loads((tmp_path / "cut" / "config.json").read_text())["method"] == "cryptonas"
    said = fairline(*cut, "--option", "kernels=4", "--out", tmp_path / "bad")
    assert said.returncode == 2
    assert "CryptoNAS needs kernels that are odd" in said.stderr
