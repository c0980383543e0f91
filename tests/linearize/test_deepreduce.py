from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fairline as fl
from fairline import DeepReDuce, FairlineError
from fairline.inference import predict
from fairline.linearize.structure import stages_of
from fairline.masking import mask_relus, masked_relus, relu_count
from fairline.models import build, rescaled
from fairline.runs import load_network
from tests.commands import fairline, ok
from tests.test_masking import ImageNetResNet

STAGES = "2,5,8"
TOTAL = 256 + 128 + 64
FAST = {"criticality_epochs": 1, "batch_size": 64, "reshape_epochs": 1}
WARM = {**FAST, "fresh": False}


def counts_of(model):
    return {name: layer.num_kept for name, layer in masked_relus(model).items()}


@pytest.fixture(scope="module")
def small(parts):
    torch.manual_seed(0)
    model = build("resnet18", 3, in_channels=1, image_size=8, width=2)
    fl.train(model, parts[0], epochs=1, batch_size=64)
    return model


def test_stages_are_found_by_name():
    found = stages_of(mask_relus(build("resnet18", 4, width=2, stem_relu=True), torch.zeros(2, 3, 32, 32)))
    assert list(found) == ["layer1", "layer2", "layer3", "layer4"]
    # The stem's ReLU goes with the stage that follows.
    assert found["layer1"] == ["relu", "layer1.0.relu1", "layer1.0.relu2", "layer1.1.relu1", "layer1.1.relu2"]
    wide = stages_of(mask_relus(build("wide_resnet22_8", 4, width=2, final_relu=True), torch.zeros(2, 3, 32, 32)))
    # And one behind all stages with the last.
    assert wide["layer3"][-1] == "relu"
    vgg = stages_of(mask_relus(build("vgg19", 4, width=2), torch.zeros(2, 3, 32, 32)))
    assert [len(own) for own in vgg.values()] == [2, 2, 4, 4, 4]
    imagenet = stages_of(mask_relus(ImageNetResNet(), torch.zeros(2, 3, 64, 64)))
    assert all(name.startswith("layer") for name in imagenet)
    assert sum(map(len, imagenet.values())) == len(
        masked_relus(mask_relus(ImageNetResNet(), torch.zeros(2, 3, 64, 64)))
    )


def test_stages_of_ones_own(trained):
    masked = mask_relus(trained, torch.zeros(2, 1, 8, 8))
    assert stages_of(masked, {"early": ["2", "5"], "late": "8"}) == {"early": ["2", "5"], "late": ["8"]}
    assert stages_of(masked, ["5"]) == {"5": ["2", "5", "8"]}
    with pytest.raises(FairlineError, match=r"no stage '7' with ReLUs in Sequential; its ReLUs are 2, 5, 8"):
        stages_of(masked, ["7"])
    with pytest.raises(FairlineError, match="'2' is in the stages 'a' and 'b'"):
        stages_of(masked, {"a": ["2"], "b": ["2", "5"]})
    with pytest.raises(FairlineError, match=r"None of the modules of Sequential is named like a stage"):
        stages_of(masked)


def test_the_ladder_of_resnet18_by_hand(parts):
    """Width 64, 32×32: stages of 262,144, 131,072, 65,536 and 32,768; thinning halves, α halves, ρ = ½ quarters."""
    model = build("resnet18", 4)
    data = fl.GroupedData(
        torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.arange(4), torch.arange(4), tuple("abcd"), tuple("abcd")
    )
    order = ["layer1", "layer4", "layer2", "layer3"]
    table = DeepReDuce(order=order, alphas=(1, 0.5), rhos=(1, 0.5)).ladder(model, data)
    rows = {(row.culled, row.thinned, row.alpha, row.rho): row.relus for row in table.itertuples()}
    assert rows[(), False, 1, 1] == 491_520
    assert rows[("layer1",), False, 1, 1] == 229_376
    assert rows[("layer1",), True, 1, 1] == 114_688
    assert rows[("layer1", "layer4"), False, 1, 1] == 196_608
    assert rows[("layer1", "layer4", "layer2"), True, 1, 1] == 32_768
    assert rows[("layer1", "layer4", "layer2"), True, 0.5, 1] == 16_384
    assert rows[("layer1", "layer4", "layer2"), True, 0.5, 0.5] == 4_096
    assert rows[(*order,), False, 1, 1] == 0
    assert len(table) == 4 * 9
    assert table["relus"].is_monotonic_decreasing
    assert table.loc[0, "configuration"] == "whole"
    assert "cull layer1 layer4 layer2, thin, α = 0.5, ρ = 0.5" in set(table["configuration"])
    assert table["share"].iloc[0] == 1


def test_thinning_drops_the_second_relu_of_each_block(parts, small):
    stages = ["layer1", "layer2", "layer3", "layer4"]
    method = DeepReDuce(order=stages, exact=False, fresh=False)
    thin = int(method.ladder(small, parts[0]).set_index("configuration").loc["cull layer1, thin", "relus"])
    cuts = list(method.linearize(small, parts[0], [thin]))
    assert cuts[0].info["configuration"] == "cull layer1, thin"
    for name, count in counts_of(cuts[0].model).items():
        assert (count > 0) == (name.endswith("relu1") and not name.startswith("layer1"))


def test_criticality_against_its_definition(parts, trained):
    method = DeepReDuce(stages=STAGES, **FAST)
    table = method.criticality(trained, parts[0])
    assert list(table.index) == ["2", "5", "8"]
    assert list(table["relus"]) == [256, 128, 64]
    shuffled = torch.randperm(len(parts[0]), generator=torch.Generator().manual_seed(0))
    aside = int(0.1 * len(parts[0]))
    measuring, training = parts[0].select(shuffled[:aside]), parts[0].select(shuffled[aside:])
    accuracy = {}
    for stage in table.index:
        student = mask_relus(trained, parts[0].normalized(slice(2)))
        for name, layer in masked_relus(student).items():
            layer.set_mask(torch.full(layer.shape, name == stage))
        fl.finetune(student, copy.deepcopy(trained), training, epochs=1, lr=0.01, batch_size=64, seed=0)
        accuracy[stage] = float((predict(student, measuring).argmax(1) == measuring.labels).double().mean())
    assert dict(table["accuracy"]) == pytest.approx(accuracy)
    for stage, row in table.iterrows():
        expected = (accuracy[stage] - min(accuracy.values())) / row["relus"] ** 0.07
        assert row["criticality"] == pytest.approx(expected)


def test_budgets_are_exact_and_the_network_is_untouched(parts, trained):
    before = copy.deepcopy(trained.state_dict())
    method = DeepReDuce(stages=STAGES, order=["8", "2", "5"], **FAST)
    cuts = list(method.linearize(trained, parts[0], [1.0, 0.7, 200, 50, 0]))
    assert [cut.relus for cut in cuts] == [TOTAL, round(0.7 * TOTAL), 200, 50, 0]
    assert counts_of(cuts[0].model) == {"2": 256, "5": 128, "8": 64}
    # 314 ReLUs: 8 and 2 culled leaves 128, and the rest of 2, which the next rung has, gets 186.
    assert cuts[1].info["configuration"] == "cull 8 2"
    assert counts_of(cuts[1].model) == {"2": 186, "5": 128, "8": 0}
    assert counts_of(cuts[3].model) == {"2": 0, "5": 50, "8": 0}
    assert all(torch.equal(before[name], value) for name, value in trained.state_dict().items())
    published = list(
        DeepReDuce(stages=STAGES, order="8,2,5", exact=False, fresh=False).linearize(trained, parts[0], [0.7, 50])
    )
    assert [cut.relus for cut in published] == [128, 0]


def test_students_start_untrained_and_learn_from_the_teacher(parts, trained, small):
    """Against the same network built anew, culled, and trained by hand."""
    order = ["layer1", "layer2", "layer3", "layer4"]
    settings = {"order": order, "exact": False, "batch_size": 64, "reshape_lr": 0.05}
    (blank,) = DeepReDuce(**settings, reshape_epochs=0).linearize(small, parts[0], [0.5])
    (learned,) = DeepReDuce(**settings, reshape_epochs=2).linearize(small, parts[0], [0.5])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        anew = build("resnet18", 3, in_channels=1, image_size=8, width=2)
    student = mask_relus(anew, parts[0].normalized(slice(2)))
    for layer, like in zip(masked_relus(student).values(), masked_relus(blank.model).values(), strict=True):
        layer.set_mask(like.kept)
    state = blank.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in student.state_dict().items())
    fl.finetune(student, copy.deepcopy(small), parts[0], epochs=2, lr=0.05, batch_size=64, seed=0)
    for name, value in student.state_dict().items():
        torch.testing.assert_close(learned.model.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    (warm,) = DeepReDuce(**settings, fresh=False).linearize(small, parts[0], [0.5])
    assert torch.equal(warm.model.state_dict()["conv1.weight"], small.state_dict()["conv1.weight"])
    # A network that does not say how it was built is drawn anew module by module.
    other = DeepReDuce(stages=STAGES, order="8,2,5", reshape_epochs=0)
    (drawn,) = other.linearize(trained, parts[0], [100])
    (again,) = other.linearize(trained, parts[0], [100])
    before = trained.state_dict()
    for name, value in drawn.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name])
        if name.endswith("weight") and value.ndim > 1:
            assert not torch.equal(value, before[name])
        elif name.endswith("running_mean"):
            assert not value.any()


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor, self.linear, self.stage1 = nn.Parameter(torch.ones(1)), nn.Linear(64, 8), nn.ReLU()
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.stage1(self.linear(x.flatten(1)) * self.factor))


def test_a_network_that_cannot_be_drawn_anew(parts):
    with pytest.raises(FairlineError, match=r"its module '' \(Scaled\) has no reset_parameters.*fresh=False"):
        list(DeepReDuce(order="stage1").linearize(Scaled(), parts[0], [4]))
    (cut,) = DeepReDuce(order="stage1", fresh=False).linearize(Scaled(), parts[0], [4])
    assert cut.relus == 4


def test_a_smaller_network_where_culling_cannot_reach(parts, small):
    """cut.info says how to build it; its ReLUs are culled and thinned as its configuration says."""
    order = ["layer1", "layer4", "layer2", "layer3"]
    method = DeepReDuce(order=order, alphas="1,0.5", rhos=1, **FAST)
    ladder = method.ladder(small, parts[0])
    smallest = int(ladder.loc[(ladder["relus"] > 0) & (ladder["alpha"] == 1), "relus"].min())
    (cut,) = method.linearize(small, parts[0], [smallest - 1])
    assert cut.info["model_options"] == {"width": 1, "stem_stride": 1}
    assert "α = 0.5" in cut.info["configuration"]
    assert cut.relus == smallest - 1
    assert predict(cut.model, parts[2]).isfinite().all()


def test_rescaled_networks():
    for name, before, after in (
        ("resnet18", 30_720, 3_840),
        ("vgg19", 18_944, 2_368),
        ("wide_resnet22_8", 46_080, 5_760),
    ):
        model = build(name, 4, width=4)
        assert relu_count(model, torch.zeros(2, 3, 32, 32)) == before
        smaller, options = rescaled(model, 0.5, 0.5)
        assert options == {"width": 2, "stem_stride": 2}
        assert relu_count(smaller, torch.zeros(2, 3, 32, 32)) == after
        assert relu_count(build(name, 4, **options), torch.zeros(2, 3, 32, 32)) == after
    with pytest.raises(FairlineError, match="one channel must be left"):
        rescaled(build("resnet18", 4, width=1), 0.5, 1)
    with pytest.raises(FairlineError, match="Sequential cannot be rescaled"):
        rescaled(nn.Sequential(), 0.5, 1)


def test_a_broken_run_resumes_to_the_same_networks(parts, small, tmp_path):
    def method():
        return DeepReDuce(alphas="1,0.5", **FAST)

    budgets = [0.5, 5]
    whole = list(method().linearize(small, parts[0], budgets))
    broken = method().linearize(small, parts[0], budgets, checkpoint=tmp_path)
    next(broken)
    broken.close()
    resumed = list(method().linearize(small, parts[0], budgets, checkpoint=tmp_path))
    for a, b in zip(whole, resumed, strict=True):
        assert a.info == b.info
        for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True):
            assert torch.equal(x, y)


def test_on_the_command_line(tmp_path):
    """From training to the comparison, with a network that is reshaped on the way, and a published finetune."""
    model = ["--data", "digits", "--model", "resnet18", "--width", "2", "--epochs", "1", "--batch-size", "64"]
    ok("train", *model, "--out", tmp_path / "base")
    fast = [f"--option={key}={value}" for key, value in FAST.items() if key != "batch_size"]
    options = ["--method", "deepreduce", "--budgets", "0.5,20", "--option", "alphas=1,0.5", *fast]
    # Thinned, layer4 alone has 2·16·1² ReLUs.
    options += ["--option", "order=layer1,layer2,layer3,layer4"]
    ok("linearize", tmp_path / "base", *options, "--out", tmp_path / "cut")
    smaller, info = load_network(tmp_path / "cut" / "networks" / "budget-20")
    assert info.model.options["width"] == 1
    assert relu_count(smaller) == 20
    finetune = ["finetune", tmp_path / "cut", "--preset", "deepreduce_fairness", "--epochs", "1"]
    ok(*finetune, "--out", tmp_path / "students")
    config = (tmp_path / "students" / "config.json").read_text()
    assert '"batch_size": 512' in config
    assert '"nesterov": true' in config
    assert '"temperature": 1.0' in config
    ok("audit", tmp_path / "students", "--resamples", "20", "--out", tmp_path / "audit")
    ok("compare", tmp_path / "students", "--resamples", "20", "--out", tmp_path / "compare")
    said = fairline("linearize", tmp_path / "base", *options, "--option", "stages=layer9", "--out", tmp_path / "bad")
    assert said.returncode == 2
    assert "There is no stage 'layer9'" in said.stderr.replace("\n", " ")
    said = fairline("finetune", tmp_path / "cut", "--preset", "nobody", "--out", tmp_path / "bad")
    assert said.returncode == 2
    assert "no preset 'nobody'; choose one of snl, deepreduce, deepreduce_fairness" in said.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alphas": "1,2"}, r"alphas in \(0, 1\]"),
        ({"rhos": "half"}, r"rhos in \(0, 1\]"),
        ({"held_out": 0.0}, "held_out between 0 and 1"),
        ({"criticality_epochs": 0}, "≥ 1"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(FairlineError, match=message):
        DeepReDuce(**options)


def test_an_order_of_other_stages(parts, trained):
    with pytest.raises(FairlineError, match="names 2, 5; the network's stages are 2, 5, 8"):
        list(DeepReDuce(stages=STAGES, order="2,5").linearize(trained, parts[0], [1]))
