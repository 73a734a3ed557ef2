"""Lazy modules: torch's constructors, channels from the first input, and a plain module of ours from then on."""

import copy
import pickle

import pytest
import torch
from heard import convolutions

import triton_conv
from triton_conv import nn

PLAIN = [f"{kind}{rank}d" for kind in ("Conv", "ConvTranspose") for rank in (1, 2, 3)]
every_class = pytest.mark.parametrize("name", PLAIN)


def sample(name, channels=4):
    return torch.randn(2, channels, *(6, 5, 4)[: int(name[-2])])


def ours(name):
    return getattr(nn, f"Lazy{name}")


@every_class
def test_the_first_input_makes_it_the_module_torch_would_make(name):
    arguments = (6, 3, 2, 1) if "Transpose" not in name else (6, 3, 2, 1, 1)
    lazy, theirs = ours(name)(*arguments), getattr(torch.nn, f"Lazy{name}")(*arguments)
    assert repr(lazy) == repr(theirs)
    assert isinstance(lazy, type(theirs))
    assert lazy.has_uninitialized_params()
    x = sample(name)
    torch.manual_seed(0)
    expected = theirs(x)
    torch.manual_seed(0)
    torch.testing.assert_close(lazy(x), expected)
    assert type(lazy) is getattr(nn, name)
    assert repr(lazy) == repr(theirs)
    assert set(convolutions(lazy, x)) == {"triton_conv::conv_transpose" if "Transpose" in name else "triton_conv::conv"}
    torch.testing.assert_close(dict(lazy.state_dict()), dict(theirs.state_dict()), rtol=0, atol=0)


@every_class
def test_what_ours_add_is_kept(name):
    pairs = ((2, 0),) * int(name[-2])
    lazy = ours(name)(6, 3, padding=pairs, precision="tf32x3", bias=False, dtype=torch.float64)
    x = sample(name).double()
    y = lazy(x)
    plain = getattr(nn, name)(4, 6, 3, padding=pairs, precision="tf32x3", bias=False, dtype=torch.float64)
    assert repr(lazy) == repr(plain)
    plain.load_state_dict(lazy.state_dict())
    assert torch.equal(plain(x), y)


def test_a_padding_mode_for_each_axis():
    lazy = nn.LazyConv2d(6, 3, padding=1, padding_mode=("replicate", "circular"))
    x = sample("Conv2d")
    y = lazy(x)
    modes = {"padding": 1, "padding_mode": ("replicate", "circular")}
    assert torch.equal(y, triton_conv.conv2d(x, lazy.weight, lazy.bias, **modes))


@every_class
def test_what_does_not_fit_raises(name):
    with pytest.raises(ValueError, match="precision"):
        ours(name)(6, 3, precision="exact")
    with pytest.raises(TypeError, match=rf"^Lazy{name}\.__init__\(\) "):
        ours(name)(6, 3, kernels=3)
    with pytest.raises(RuntimeError, match=f"to Lazy{name}"):
        ours(name)(6, 3)(torch.randn(3, 3, 3, 3, 3, 3))
    with pytest.raises(ValueError, match="divisible by groups"):
        ours(name)(6, 3, groups=3)(sample(name))


@every_class
def test_convert_makes_torchs_lazy_modules_ours(name):
    lazy, x = getattr(torch.nn, f"Lazy{name}")(6, 3), sample(name)
    assert len(triton_conv.convert(lazy)) == 1
    assert type(lazy) is ours(name)
    lazy(x)
    assert type(lazy) is getattr(nn, name)
    assert all("triton_conv" in op for op in convolutions(lazy, x))


def test_copied_pickled_and_loaded_before_and_after_the_first_input(tmp_path):
    model, x = torch.nn.Sequential(nn.LazyConv2d(6, 3), torch.nn.ReLU(), nn.LazyConvTranspose2d(2, 2)), sample("Conv2d")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(m) for m in twin] == [type(m) for m in model]
        twin(x)
        assert [type(m) for m in twin] == [nn.Conv2d, torch.nn.ReLU, nn.ConvTranspose2d]
    torch.save(twin.state_dict(), tmp_path / "state.pt")
    model.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(model(x), twin(x))


def test_the_first_input_may_have_no_memory():
    with torch.device("meta"):
        lazy = nn.LazyConv2d(6, 3)
        lazy(sample("Conv2d"))
    assert lazy.weight.device.type == "meta"
    assert lazy.to_empty(device="cpu").weight.shape == (6, 4, 3, 3)
