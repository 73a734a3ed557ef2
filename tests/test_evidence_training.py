"""The training stage: its rules, its data, and a training in the interpreter."""

import json

import pytest
import torch

from bench.evidence import support, tasks, training
from bench.evidence.networks import DeepLab, Mixed, ResNet
from bench.evidence.units import Context
from triton_conv import convert, execute
from triton_conv.geometry import Role

CPU = torch.device("cpu")


@pytest.fixture
def context(tmp_path):
    return Context(tmp_path, CPU, True, lambda: 1000.0)


def curve(offset=0.0, steps=200):
    return [2.0 * 0.98**step + offset for step in range(steps)]


def test_curves_within_the_noise_of_others_agree():
    theirs = [curve(), curve(0.02), curve(-0.02)]
    found = training.agreement(curve(0.05), theirs)
    assert found["noise"] == pytest.approx(0.04)
    assert found["distance"] == pytest.approx(0.05)
    assert found["within_noise"]
    assert not training.agreement(curve(0.2), theirs)["within_noise"]


def test_a_curve_that_is_not_finite_does_not_agree():
    assert not training.agreement([float("nan")] * 200, [curve(), curve()])["within_noise"]


def test_noise_of_single_steps_is_smoothed_away():
    jagged = [loss + (0.1 if step % 2 else -0.1) for step, loss in enumerate(curve())]
    assert training.agreement(jagged, [curve(), curve()])["distance"] < 1e-9


def test_a_task_is_compared_and_repeats_its_bits(context):
    unit = next(iter(training.units(context)))
    facts = unit.run()
    assert facts["ok"], facts["words"]
    assert facts["same_bits"]
    assert len(facts["losses"]) == 4  # ours, and three of cuDNN's place
    json.dumps(facts, allow_nan=False)


def test_a_task_runs_through_kernels(context, kernels):
    task = tasks.tasks(CPU, tiny=True)[0]._replace(
        network=lambda: ResNet(8, (4,), 1), batch=lambda seed: tasks.textures(2, 8, CPU, seed)
    )
    with execute.problems() as problems:
        facts = training.compared(task, context)
    assert facts["ok"], facts["words"]
    assert {problem.role for problem in problems} == set(Role)


def test_a_wrong_gradient_fails(context, monkeypatch):
    made = training.network_of

    def broken(task, device, ours, nudge=0):
        model = made(task, device, ours, nudge)
        if ours:
            model.backbone.stem[0].weight.register_hook(lambda g: 1.1 * g)
        return model

    monkeypatch.setattr(training, "network_of", broken)
    facts = training.compared(tasks.tasks(CPU, tiny=True)[0], context)
    assert not facts["ok"]
    assert facts["gradient_errors"]["worst"][0] == "backbone.stem.0.weight"


def test_an_operator_that_varies_is_named(monkeypatch):
    class Noisy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = ResNet(8, (4,), 1)

        def forward(self, x):
            return self.inner(x) + 0 * changing(x).sum()

    calls = iter(range(100))
    library = torch.library.Library("evidence_test", "DEF")
    library.define("changing(Tensor x) -> Tensor")
    library.impl("changing", lambda x: x + next(calls), "CompositeExplicitAutograd")
    changing = torch.ops.evidence_test.changing.default
    task = tasks.tasks(CPU, tiny=True)[0]._replace(network=Noisy)
    assert training.unrepeated(task, CPU) == ["evidence_test::changing"]


def test_without_scikit_learn_the_digits_are_left_out(context, monkeypatch):
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    *_, digits = training.units(context)
    assert digits.name == "digits"
    assert digits.run()["left_out"]


@pytest.mark.parametrize("make", [tasks.textures, tasks.shapes])
def test_images_depend_on_the_seed_alone(make):
    first, again, other = (make(2, 16, CPU, seed) for seed in (1, 1, 2))
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.shares, again.shares)
    assert not torch.equal(first.images, other.images)
    assert torch.equal(first.shares.sum(1), torch.ones_like(first.shares.sum(1)))
    assert first.images.is_contiguous(memory_format=torch.channels_last)


def test_textures_are_learned():
    """In a second, on the CPU, by a small network: what 200 steps of a large one are built on."""
    torch.manual_seed(0)
    model = ResNet(8, (16,), 1)
    task = tasks.tasks(CPU, tiny=True)[0]._replace(
        network=lambda: model, batch=lambda seed: tasks.textures(32, 24, CPU, seed), rate=1e-2, steps=60
    )
    run = training.trained(task, CPU, ours=False)
    assert training._learned(run.losses)
    assert training._score(task, model, CPU) > 0.4


def test_shapes_hold_every_class():
    shares = tasks.shapes(16, 32, CPU, 0).shares
    assert (shares.sum((0, 2, 3)) > 50).all()


@pytest.mark.parametrize("make", [lambda: ResNet(8), lambda: DeepLab(4), lambda: Mixed(8)])
def test_every_convolution_is_converted(make):
    with torch.device("meta"):
        assert not convert(make()).skipped


def test_bits_and_norms():
    a = {"x": torch.tensor([1.0]), "y": torch.tensor([float("nan")])}
    assert support.different(a, a) == ["y"]
    assert support.apart(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.2)
