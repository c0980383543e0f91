"""bfloat16 in training: what stays float32, the same bits again, and who decides."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest
import torch
from torch import nn

from fairline import SNL, DeepReDuce, FairlineError, audit, finetune, train
from fairline.audit.base import predictions
from fairline.audit.functional import Functional
from fairline.inference import predict
from fairline.jobs import finetune_job, linearize_job, train_job
from fairline.linearize import Random
from fairline.masking import MaskedReLU, masked_relus
from fairline.models import build
from fairline.objectives.erm import ERM
from fairline.precision import FLOAT32, Arithmetic, has_bf16
from fairline.runs import DataSpec
from fairline.training import choose, run_epochs, trial
from tests.commands import ENVIRONMENT, fairline, ok
from tests.conftest import make_data

BF16 = Arithmetic(bf16=True)
LAST = Arithmetic(bf16=True, channels_last=True)
#: Settings by which methods of several stages take a moment.
STAGES = {
    "snl": {"max_epochs": 1},
    "senet": {"sensitivity_epochs": 1, "mask_epochs": 1, "epochs": 1},
    "deepreduce": {"criticality_epochs": 1, "reshape_epochs": 1},
    "cryptonas": {"layers": 3, "search_epochs": 1, "controller_steps": 1, "samples": 1, "train_epochs": 1},
}
#: Measures that compute in all ways that an audit does: forward passes, gradients, products and searches.
EXPLAINS = {"accuracy": {}, "gradient_norm": {}, "curvature": {}, "margin": {}, "boundary_distance": {}}
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def network(width: int = 16, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build("resnet18", 3, in_channels=1, image_size=8, width=width)


def states(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def masked(shape: tuple[int, ...], kind: str) -> MaskedReLU:
    layer = MaskedReLU(shape)
    generator = torch.Generator().manual_seed(1)
    layer.set_mask(torch.rand(shape, generator=generator) < 0.5)
    if kind == "quadratic":
        layer.use_surrogate("quadratic")
    if kind != "fixed":
        weight = layer.learn()
        with torch.no_grad():
            weight.copy_(torch.rand(shape, generator=generator))
    return layer


@pytest.mark.parametrize("kind", ["fixed", "learned", "quadratic"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_memory_order_of_activations_changes_no_bit_of_a_masked_relu(kind, dtype):
    shape = (6, 5, 4)
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    grad = torch.randn(3, *shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    found = []
    for order in (torch.contiguous_format, torch.channels_last):
        layer = masked(shape, kind)
        own = x.clone(memory_format=order).requires_grad_()
        y = layer(own)
        y.backward(grad.contiguous(memory_format=order))
        assert y.is_contiguous(memory_format=order)
        found.append([y.detach(), own.grad, *(p.grad for p in layer.parameters())])
    for one, other in zip(*found, strict=True):
        # Sums over the batch may be taken in another order.
        torch.testing.assert_close(one, other, rtol=1e-12 if dtype == torch.float64 else 2e-2, atol=1e-12)


@pytest.mark.parametrize("value", [-torch.inf, -1.0, -0.0, 0.0, 1.0, torch.inf, torch.nan])
def test_the_slope_of_a_fixed_mask_is_that_of_the_relu_or_of_the_identity(value):
    layer = MaskedReLU((2,))
    layer.set_mask(torch.tensor([True, False]))
    x = torch.full((1, 2), value, requires_grad=True)
    (slope,) = torch.autograd.grad(layer(x).sum(), x)
    relu = torch.full((1,), value, requires_grad=True)
    (expected,) = torch.autograd.grad(relu.relu().sum(), relu)
    assert slope[0, 0] == expected
    assert slope[0, 1] == 1


def test_forward_mode_vmap_and_second_derivatives_agree_with_the_formula():
    layer = masked((4, 3, 3), "fixed").double()
    x, tangent = torch.randn(2, 5, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def formula(x):
        return torch.where(layer.kept, x.relu(), x)

    for function in (layer, formula):
        assert function(x).dtype == torch.float64
    ours = torch.func.jvp(layer, (x,), (tangent,))
    theirs = torch.func.jvp(formula, (x,), (tangent,))
    assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))
    many = x.expand(2, *x.shape)
    assert torch.equal(torch.func.vmap(layer)(many), formula(x).expand_as(many))

    def energy(function):
        return lambda x: (function(x) ** 3).sum()

    second = [
        torch.func.grad(lambda x, f=f: (torch.func.grad(energy(f))(x) * tangent).sum())(x) for f in (layer, formula)
    ]
    assert torch.equal(*second)


@pytest.mark.parametrize("arithmetic", [BF16, LAST], ids=["contiguous", "channels last"])
def test_all_that_is_kept_stays_float32_and_the_loss_is_nearly_the_same(arithmetic):
    data = make_data(96)
    losses = {}
    for name, precision in (("fp32", "fp32"), ("bf16", arithmetic)):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        (epoch,) = run_epochs(
            model, data, data, epochs=1, optimizer=optimizer, objective=ERM(), batch_size=32, precision=precision
        )
        losses[name] = epoch.loss
        kept = [*model.state_dict().values(), *(s["momentum_buffer"] for s in optimizer.state.values())]
        assert all(value.dtype == torch.float32 for value in kept if value.is_floating_point())
        assert all(value.is_contiguous() for value in model.parameters())
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.03)
    assert losses["bf16"] != losses["fp32"]


def test_learned_masks_stay_float32():
    data = make_data(64)
    rows: list[dict[str, float]] = []
    (cut,) = SNL(max_epochs=2, batch_size=32, lr=0.01, precision=BF16).linearize(network(), data, [0.5], history=rows)
    assert all(p.dtype == torch.float32 for p in cut.model.parameters())
    assert len(rows) == 2


@pytest.mark.parametrize("arithmetic", [BF16, LAST], ids=["contiguous", "channels last"])
def test_the_same_seed_gives_the_same_bits_and_so_does_a_resumed_run(arithmetic, tmp_path):
    data = make_data(96)
    settings = {"lr": 0.01, "batch_size": 32, "seed": 3}
    whole = network()
    train(whole, data, data, epochs=3, precision=arithmetic, **settings)
    again = network()
    train(again, data, data, epochs=3, precision=arithmetic, **settings)
    assert_same(states(whole), states(again))

    class Stop(Exception):
        pass

    def stop(update):
        if update.done > 4:
            raise Stop

    file = tmp_path / "train.safetensors"
    resumed = network()
    with pytest.raises(Stop):
        train(resumed, data, data, epochs=3, precision=arithmetic, checkpoint=file, progress=stop, **settings)
    assert file.exists()
    resumed = network()
    # A resumed run goes on in what it began in, whatever a new trial might say.
    train(resumed, data, data, epochs=3, precision="fp32", checkpoint=file, **settings)
    assert_same(states(whole), states(resumed))


def test_a_finetune_in_bf16_leaves_teacher_and_data_as_they_are():
    data, teacher = make_data(64), network()
    before = states(teacher)
    (cut,) = Random().linearize(teacher, data, [0.5])
    finetune(cut.model, teacher, data, epochs=1, batch_size=32, precision=LAST)
    assert_same(before, states(teacher))
    assert all(p.is_contiguous() for p in teacher.parameters())
    kept = [layer.num_kept for layer in masked_relus(cut.model).values()]
    assert sum(kept) == cut.relus


def test_predictions_are_float32_unless_the_training_asks():
    data, model = make_data(32), network().eval()
    exact = model(data.normalized(slice(None)))
    assert torch.equal(predict(model, data, batch_size=32), exact)
    rough = predict(model, data, batch_size=32, arithmetic=BF16)
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact)
    assert (rough - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("width", [8, 16])
def test_each_image_is_seen_once(width):
    """Whoever adds up what passes through a network (hooks) would count others twice."""
    data, model, seen = make_data(150), network(width).eval(), []
    model.register_forward_hook(lambda module, images, output: seen.append(len(output)))
    predict(model, data)
    assert sum(seen) == 150


def test_audits_of_a_network_that_cannot_lie_channels_last():
    class Viewed(nn.Module):
        """Its convolution suits; ``view`` needs the channels apart."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv2d(1, 16, 3), nn.Linear(16 * 36, 3)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.linear(self.conv(images).view(len(images), -1))

    torch.manual_seed(0)
    data, model = make_data(10), Viewed()
    assert trial.suits_channels_last(model)
    with torch.no_grad():
        exact = model(data.normalized(slice(None)))
    assert torch.equal(predictions(model, data, CPU).logits, exact)
    assert Functional(model, data).gradient(torch.arange(10)).isfinite().all()


def test_audits_in_either_order_agree():
    data, model = make_data(150), network(16).eval()
    before = states(model)
    found = predictions(model, data, CPU).logits
    torch.testing.assert_close(found, predict(model, data), rtol=1e-5, atol=1e-5)
    # The caller's network lies as it lay.
    assert all(value.stride() == before[name].stride() for name, value in model.state_dict().items())


@pytest.mark.parametrize(("width", "suits"), [(8, False), (16, True), (24, True)])
def test_narrow_convolutions_never_lie_channels_last(width, suits):
    assert trial.suits_channels_last(network(width)) is suits


def test_grouped_convolutions_never_lie_channels_last():
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3, groups=32))
    assert not trial.suits_channels_last(model)


@pytest.mark.slow
def test_auto_on_two_threads_with_eight_channels_comes_to_an_end():
    code = """
import torch
from tests.test_precision import network
from tests.conftest import make_data
from fairline import train
from fairline.training import trial
torch.set_num_threads(2)
trial.has_bf16 = lambda device: True
trial.WORTHWHILE = 0
train(network(8), make_data(128), epochs=1, batch_size=64, precision="auto")
assert not trial.choose("auto", network(8), torch.randn(64, 1, 8, 8), torch.device("cpu")).channels_last
print("done")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("done\n")


@pytest.fixture
def seconds(monkeypatch):
    """Trials that take what the test says: seconds of float32 and of bf16, step by step."""

    def take(plain, bf16, native=True):
        times = {False: plain, True: bf16}
        asked = []

        def stepper(arithmetic, *_):
            left = iter(times[arithmetic.bf16] if isinstance(times[arithmetic.bf16], list) else [])

            def step():
                asked.append(arithmetic)
                return next(left, times[arithmetic.bf16])

            return step

        monkeypatch.setattr(trial, "_stepper", stepper)
        monkeypatch.setattr(trial, "has_bf16", lambda _device: native)
        monkeypatch.setattr(trial, "_warned_of", set())
        return asked

    return take


def chosen(precision, width=16, device=CPU):
    return choose(precision, network(width), torch.randn(4, 1, 8, 8), device)


def test_auto_takes_bf16_where_a_trial_says_that_it_is_faster(seconds):
    seconds(2.0, 1.0)
    assert chosen("auto") == Arithmetic(True, True, 2.0)
    assert chosen("auto", width=8) == Arithmetic(True, False, 2.0)
    seconds(1.05, 1.0)
    assert chosen("auto") == Arithmetic(False, True, 1.05)
    assert chosen("auto", width=8) == Arithmetic(False, False, 1.05)


def test_a_trial_goes_on_while_its_outcome_is_in_doubt(seconds):
    for plain, bf16, ratio, taken in (
        ([2.0], [1.0], 2.0, 2),
        ([1.0], [2.0], 0.5, 2),
        ([1.2, 1.1, 1.0], [1.0, 1.0, 1.0], 1.0, 1 + trial.TRIAL_STEPS),
        ([1.2, 1.2], [1.0, 0.5], 2.4, 3),
    ):
        asked = seconds([9.0, *plain], [9.0, *bf16])
        assert chosen("auto", width=8).ratio == pytest.approx(ratio)
        assert sum(each.bf16 for each in asked) == taken


def test_auto_takes_fp32_without_units_and_bf16_warns_with_the_ratio(seconds, caplog):
    seconds(1.0, 2.0, native=False)
    assert chosen("auto") == Arithmetic(channels_last=True)
    with caplog.at_level(logging.WARNING, "fairline"):
        assert chosen("bf16") == Arithmetic(True, True, 0.5)
    (record,) = caplog.records
    assert "0.50 times the speed" in record.getMessage()


@pytest.mark.parametrize("native", [False, True])
def test_a_gpu_takes_bf16_without_a_trial_where_it_has_units_and_fp32_where_it_has_none(monkeypatch, native):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: asked.append(options) or native)
    monkeypatch.setattr(trial, "_trial", lambda *_: pytest.fail("tried"))
    # 8 channels, too: the order that corrupts memory does so on CPUs.
    for precision in (None, "auto"):
        assert chosen(precision, width=8, device=GPU) == (LAST if native else FLOAT32)
    assert chosen("fp32", device=GPU) == FLOAT32
    assert chosen(BF16, device=GPU) is BF16
    # What emulates bfloat16 does not count.
    assert asked[0] == {"including_emulation": False}
    if native:
        assert chosen("bf16", device=GPU) == LAST


@pytest.mark.parametrize("arithmetic", [FLOAT32, BF16, LAST], ids=["fp32", "bf16", "channels last"])
def test_on_a_gpu_forward_passes_run_under_its_autocast_and_no_other(arithmetic, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    with arithmetic.autocast(GPU):
        assert torch.is_autocast_enabled("cuda") is arithmetic.bf16
        assert not torch.is_autocast_enabled("cpu")
        if arithmetic.bf16:
            assert torch.get_autocast_dtype("cuda") == torch.bfloat16


def test_a_trial_leaves_random_numbers_and_the_network_as_they_are():
    model = nn.Sequential(network(), nn.Dropout(0.5))
    before, state = states(model), torch.get_rng_state()
    assert trial._stepper(BF16, model, torch.randn(4, 1, 8, 8, generator=torch.Generator()), CPU)() > 0
    assert_same(before, states(model))
    assert torch.equal(state, torch.get_rng_state())


def test_an_audit_computes_in_float32_whatever_the_training_did():
    data, model = make_data(48), network(4)
    train(model, data, epochs=1, batch_size=24, lr=0.01, precision=BF16)
    seen = set()
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output: seen.add(output.dtype))
        for module in model.modules()
    ]
    report = audit(model, data, network(4), measures=list(EXPLAINS), resamples=50, options=EXPLAINS)
    assert seen == {torch.float32}
    for hook in hooks:
        hook.remove()
    right = (predict(model, data).argmax(1) == data.labels).double()
    for group, name in enumerate(data.group_names):
        assert report.by_group["accuracy"][name] == pytest.approx(float(right[data.groups == group].mean()))


def several_stages(tmp_path, method):
    """Mask learning, or a method of several finetunes, then finetunes of two budgets, in run folders."""
    common = {"batch_size": 256, "precision": "bf16"}
    train_job(tmp_path / "base", DataSpec("digits"), "resnet18", {"width": 4}, epochs=1, **common)
    linearize_job(tmp_path / "base", tmp_path / "cuts", [0.5, 0.2], method, **common, **STAGES[method])
    finetune_job(tmp_path / "cuts", tmp_path / "students", epochs=1, **common)
    return 3


def criticality(_tmp_path, _method):
    DeepReDuce(criticality_epochs=1, precision="bf16").criticality(network(4), make_data(64))
    return 1


@pytest.mark.parametrize(
    ("run", "method"),
    [
        (several_stages, "snl"),
        (several_stages, "senet"),
        (several_stages, "deepreduce"),
        (several_stages, "cryptonas"),
        (criticality, "deepreduce"),
    ],
)
def test_a_processor_without_units_is_warned_of_once_and_tried_once_a_run(
    seconds, monkeypatch, caplog, tmp_path, run, method
):
    seconds(1.0, 2.0, native=False)
    tried = []
    timed = trial._trial
    monkeypatch.setattr(trial, "_trial", lambda plain, *rest: tried.append(plain) or timed(plain, *rest))
    with caplog.at_level(logging.WARNING, "fairline.training"):
        runs = run(tmp_path, method)
    (record,) = (record for record in caplog.records if "bfloat16" in record.getMessage())
    assert "0.50 times the speed" in record.getMessage()
    assert tried == [FLOAT32] * runs


def test_what_is_settled_stays(seconds):
    seconds(1.0, 9.0)
    assert chosen(LAST) is LAST
    assert chosen(FLOAT32) is FLOAT32


@pytest.mark.parametrize("precision", ["fp32", None])
def test_float32_lies_channels_last_where_that_is_safe(precision):
    assert chosen(precision) == Arithmetic(channels_last=True)
    assert chosen(precision, width=8) == FLOAT32


class Viewing(nn.Module):
    """Cuts its activations in another way than their channels allow where these lie side by side."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3)
        self.linear = nn.Linear(16 * 36, 3)

    def forward(self, x):
        return self.linear(self.conv(x).view(len(x), -1))


def test_a_network_that_cannot_run_channels_last_trains_as_it_is():
    data = make_data(32)
    assert choose(None, Viewing(), data.normalized(slice(4)), CPU) == FLOAT32
    (row,) = train(Viewing(), data, epochs=1)
    assert row["loss"] > 0


def test_both_memory_orders_give_the_same_float32_numbers():
    data, losses, ends = make_data(64), [], []
    for precision in (FLOAT32, Arithmetic(channels_last=True)):
        model = network()
        (row,) = train(model, data, epochs=1, batch_size=32, lr=0.01, precision=precision)
        losses.append(row["loss"])
        ends.append(states(model))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("call", [lambda: chosen("fp16"), lambda: SNL(precision="half")])
def test_an_unknown_precision_is_a_sentence(call):
    with pytest.raises(FairlineError, match="Precision is auto, fp32, bf16, not"):
        call()


def test_the_choice_stands_in_the_run_folder_and_is_taken_over(tmp_path):
    common = ["--batch-size", "64"]
    train_base = ["train", "--data", "digits", "--model", "cnn", "--width", "4", "--epochs", "1", *common]
    base, cuts, students = tmp_path / "base", tmp_path / "cuts", tmp_path / "students"
    ok(*train_base, "--precision", "bf16", "--out", base)
    kept = json.loads((base / "precision.json").read_text())
    assert kept["bf16"] is True
    assert kept["ratio"] > 0
    assert kept["processor"]
    ok("linearize", base, "--method", "snl", "--budgets", "0.5", "--max-epochs", "1", *common, "--out", cuts)
    ok("finetune", cuts, "--epochs", "1", *common, "--out", students)
    for folder in (cuts, students):
        assert json.loads((folder / "precision.json").read_text()) == kept
    done = fairline(*train_base, "--precision", "half", "--out", tmp_path / "other")
    assert done.returncode == 2
    assert "Precision is auto, fp32, bf16, not 'half'" in done.stderr


def test_seeds_agree_on_one_arithmetic(tmp_path, seconds):
    def run(name, seed):
        out = tmp_path / name
        settings = {"epochs": 1, "batch_size": 256, "precision": "auto", "agreed": tmp_path / "precision.json"}
        train_job(out, DataSpec("digits", None, {}, seed), "cnn", {"width": 4}, seed=seed, **settings)
        return json.loads((out / "precision.json").read_text())

    seconds(2.0, 1.0)
    first = run("first", 0)
    seconds(1.0, 2.0)
    assert run("second", 1) == first
    assert first["bf16"] is True


def test_a_run_takes_the_variables_default_and_else_asks_for_a_trial(tmp_path, seconds, monkeypatch):
    seconds(2.0, 1.0)
    for default, bf16 in (("fp32", False), (None, True)):
        monkeypatch.delenv("FAIRLINE_PRECISION") if default is None else monkeypatch.setenv(
            "FAIRLINE_PRECISION", default
        )
        base = tmp_path / f"base {default}"
        train_job(base, DataSpec("digits"), "cnn", {"width": 4}, epochs=1, batch_size=256)
        assert json.loads((base / "precision.json").read_text())["bf16"] is bf16
        assert json.loads((base / "environment.json").read_text())["device"].endswith(", bf16") is bf16
        for name, more, tried in (("asked", {"precision": "auto"}, True), ("not asked", {}, bf16)):
            out = tmp_path / f"{name} {default}"
            linearize_job(base, out, [0.5], max_epochs=1, batch_size=256, **more)
            assert json.loads((out / "precision.json").read_text())["bf16"] is tried
    monkeypatch.setenv("FAIRLINE_PRECISION", "half")
    with pytest.raises(FairlineError, match="not 'half'"):
        train_job(tmp_path / "half", DataSpec("digits"), "cnn", {"width": 4}, epochs=1, batch_size=256)


def test_this_processor_is_asked():
    capabilities = torch.cpu.get_capabilities()
    assert has_bf16(CPU) == bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    assert not has_bf16(torch.device("meta"))
