"""Recording a model's convolutions: what is found, and that nothing else happens."""

import copy
import threading

import pytest
import torch
from torch import nn

import triton_conv
from triton_conv import execute
from triton_conv.devices import H200
from triton_conv.tuning.record import calls_of


class Every(nn.Module):
    """Every way to a convolution: torch's modules and functions, ours, a border, a transposed one."""

    def __init__(self):
        super().__init__()
        self.circular = nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular")
        self.norm = nn.BatchNorm2d(8)
        self.ours = triton_conv.nn.Conv2d(8, 8, 3, padding=((2, 0), 1), padding_mode=("replicate", "zeros"))
        self.up = nn.ConvTranspose2d(8, 4, 4, stride=2, padding=1)
        self.weight = nn.Parameter(torch.randn(6, 4, 1, 1))
        self.scale = torch.tensor(2.0)  # neither parameter nor buffer
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = nn.functional.relu(self.ours(self.norm(self.circular(x)))) * self.scale
        x = nn.functional.conv2d(self.up(x), self.weight) + torch.zeros(())
        return self.head(nn.functional.dropout(x, 0.5, self.training).mean((2, 3)))


def images(*shape, **options):
    return torch.empty(shape or (2, 3, 16, 16), device="meta", **options)


def described(calls):
    return [(c.role.value, tuple(c.a.shape), c.geometry.modes[1:]) for c in calls]


def test_forward_and_backward_of_every_kind_of_convolution():
    calls = calls_of(Every(), images())
    assert described(calls[:4]) == [
        ("fprop", (2, 3, 16, 16), ("circular", "circular")),
        ("fprop", (2, 8, 16, 16), ("replicate", "zeros")),
        ("dgrad", (2, 8, 16, 16), ("zeros", "zeros")),  # the transposed one
        ("fprop", (2, 4, 32, 32), ("zeros", "zeros")),
    ]
    assert sorted(c.role.value for c in calls[4:]) == ["dgrad", "dgrad", "fprop", "wgrad", "wgrad", "wgrad", "wgrad"]
    assert all(t.is_meta for c in calls for t in (c.a, c.b))


def test_an_input_that_wants_a_gradient_gets_one():
    model = nn.Conv2d(3, 8, 3)
    assert [c.role.value for c in calls_of(model, images())] == ["fprop", "wgrad"]
    assert [c.role.value for c in calls_of(model, images(requires_grad=True))] == ["fprop", "dgrad", "wgrad"]
    assert [c.role.value for c in calls_of(model, images(), backward=False)] == ["fprop"]


def test_equal_layers_are_recorded_each_time():
    layer = nn.Conv2d(8, 8, 3, padding=1)
    for _ in range(2):
        assert len(calls_of(nn.Sequential(layer, layer, layer), images(2, 8, 9, 9))) == 3 + 3 + 2


def test_model_input_and_random_numbers_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(execute, "execute", lambda call: pytest.fail("a convolution was computed"))
    model, x = Every(), torch.randn(2, 3, 16, 16)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    calls_of(model, x, channels_last=True)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert type(model.circular) is nn.Conv2d
    assert model.training
    assert all(p.grad is None and type(p) is nn.Parameter for p in model.parameters())
    assert x.is_contiguous()
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_keeps_its_dtype(dtype):
    calls = calls_of(Every().to(dtype), images(dtype=dtype))
    assert {t.dtype for c in calls for t in (c.a, c.b)} == {dtype}
    assert {execute.problem_of(c, H200).dtype for c in calls} == {str(dtype).removeprefix("torch.")}


def test_autocast_casts_what_it_casts():
    calls = calls_of(Every(), images(), autocast=torch.bfloat16)
    assert len(calls) == 11
    assert {t.dtype for c in calls for t in (c.a, c.b)} == {torch.bfloat16}


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_memory_formats(rank):
    model = nn.Sequential(*(getattr(nn, f"Conv{rank}d")(8, 8, 3, padding=1) for _ in range(2)))
    for channels_last in (False, True):
        forward = calls_of(model, images(2, 8, *[9] * rank), channels_last=channels_last)[1]
        assert (forward.a.stride(1) == 1) == (channels_last and rank > 1)
        assert (forward.b.stride(1) == 1) == (channels_last and rank > 1)


def test_a_model_that_is_on_meta_itself():
    with torch.device("meta"):
        model = Every()
    assert len(calls_of(model, images(), autocast=torch.float16)) == 11


def test_several_inputs_and_outputs_of_any_structure():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Conv1d(4, 8, 3), nn.Conv1d(4, 8, 5)

        def forward(self, named, factor):
            return {"a": self.one(named["x"]) * factor, "b": [self.other(named["y"]), None]}

    calls = calls_of(Two(), {"x": images(1, 4, 20), "y": images(1, 4, 30)}, 2.0)
    assert [c.role.value for c in calls] == ["fprop"] * 2 + ["wgrad"] * 2
    assert {c.geometry.input[2] for c in calls} == {20, 30}


class Looks(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x) if x.sum() > 1e9 else self.conv(x[:, :, ::2])


def test_a_model_that_looks_at_values_is_named_and_can_run_for_real():
    with pytest.raises(RuntimeError, match=r"the forward of Looks cannot run on tensors without values.*give a device"):
        calls_of(Looks(), images())
    model, random = Looks(), torch.get_rng_state()
    calls = calls_of(model, images(), device="cpu")
    assert described(calls) == [("fprop", (2, 3, 8, 16), ("zeros",) * 2), ("wgrad", (2, 4, 6, 14), ("zeros",) * 2)]
    assert all(t.is_meta for c in calls for t in (c.a, c.b))
    assert torch.equal(random, torch.get_rng_state())


def test_a_model_that_names_a_device_is_told_so():
    class Names(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) + torch.ones(1, device="cuda")

    with pytest.raises(RuntimeError, match=r"the forward of Names cannot run on .*two devices.*give a device"):
        calls_of(Names(3, 4, 3), images())


def test_modes_around_do_not_matter():
    model = nn.Conv2d(3, 4, 3)
    with torch.no_grad():
        assert len(calls_of(model, images())) == 2
    with torch.inference_mode():
        assert len(calls_of(model, torch.zeros(1, 3, 9, 9))) == 2


def test_parameters_that_are_computed():
    for wrap in (nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm):
        assert [c.role.value for c in calls_of(wrap(nn.Conv2d(3, 4, 3)), images())] == ["fprop", "wgrad"]


def test_recording_for_real_finds_the_same():
    model, x = Every(), torch.randn(2, 3, 16, 16)
    before = copy.deepcopy(model.state_dict())
    assert described(calls_of(model, x, device="cpu")) == described(calls_of(model, x))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_mistakes_are_the_models_own():
    with pytest.raises(RuntimeError, match="expected input"):
        calls_of(Every(), images(2, 4, 16, 16))
    with pytest.raises(TypeError, match="'model' must be"):
        calls_of(lambda x: x, images())
    with pytest.raises(ValueError, match=r"no output of Conv2d has a gradient.*backward=False"):
        calls_of(nn.Conv2d(3, 4, 3).requires_grad_(False), images())
    with pytest.raises(RuntimeError, match="LazyConv2d has lazy modules without parameters yet"):
        calls_of(nn.LazyConv2d(8, 3), images())
    locked = nn.Conv2d(3, 4, 3)
    locked.lock = threading.Lock()
    with pytest.raises(RuntimeError, match="Conv2d cannot be copied"):
        calls_of(locked, images())
