"""torch.export and AOTInductor of converted models: exported, saved, packaged, loaded elsewhere, run at other sizes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import triton_conv

quiet = pytest.mark.filterwarnings("ignore:.*LeafSpec")


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"),
            torch.nn.BatchNorm2d(8),
            torch.nn.ReLU(),
            torch.nn.Conv2d(8, 8, 3, stride=2, padding=2, dilation=2, groups=2),
            torch.nn.ConvTranspose2d(8, 4, 2, stride=2),
        )

    def forward(self, x):
        return self.body(x).relu()


def converted():
    torch.manual_seed(0)
    net = Net().eval().requires_grad_(False)
    assert len(triton_conv.convert(net)) == 3
    return net


def exported(net, strict=False):
    free = {0: torch.export.Dim("batch"), **{i: torch.export.Dim(f"size{i}", min=4, max=512) for i in (2, 3)}}
    return torch.export.export(net, (torch.randn(2, 3, 16, 20),), dynamic_shapes=(free,), strict=strict)


def targets(program):
    return [node.target.name() for node in program.graph.nodes if "triton_conv" in str(node.target)]


OPERATORS = ["triton_conv::conv", "triton_conv::conv_dilated", "triton_conv::conv_transpose"]
SIZES = [(1, 3, 9, 12), (5, 3, 33, 40)]


@quiet
@pytest.mark.parametrize("strict", [False, True])
def test_one_program_serves_every_size(strict):
    net = converted()
    program = exported(net, strict)
    assert targets(program) == OPERATORS
    for size in SIZES:
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(size).to(memory_format=memory_format)
            assert torch.equal(program.module()(x), net(x))


@quiet
def test_saved_and_loaded(tmp_path):
    net = converted()
    torch.export.save(exported(net), tmp_path / "net.pt2")
    program = torch.export.load(tmp_path / "net.pt2")
    assert targets(program) == OPERATORS
    for size in SIZES:
        x = torch.randn(size)
        assert torch.equal(program.module()(x), net(x))


@quiet
def test_decompositions_leave_the_operators():
    assert targets(exported(converted()).run_decompositions()) == OPERATORS


@quiet
def test_a_training_step_is_exported():
    net, x = converted().train().requires_grad_(True), torch.randn(2, 3, 16, 20)
    program = torch.export.export(net, (x,))
    net.load_state_dict(program.state_dict)
    y = program.module()(x)
    gradients = torch.autograd.grad(y.square().sum(), program.parameters())
    wanted = torch.autograd.grad(net(x).square().sum(), net.parameters())
    torch.testing.assert_close(gradients, wanted)


@quiet
def test_causal_and_separable_convolutions_are_exported():
    class Mixer(torch.nn.Module):
        def forward(self, x, w, depthwise, pointwise):
            y = triton_conv.causal_conv1d(x, w, activation="silu")
            return triton_conv.separable_conv1d(y, depthwise, pointwise)

    x, *weights = torch.randn(2, 8, 20), torch.randn(8, 4), torch.randn(8, 1, 3), torch.randn(6, 8, 1)
    free = {2: torch.export.Dim("length", min=4, max=4096)}
    program = torch.export.export(Mixer(), (x, *weights), dynamic_shapes=(free, None, None, None))
    longer = torch.randn(2, 8, 33)
    assert torch.equal(program.module()(longer, *weights), Mixer()(longer, *weights))


RUN = """
import sys, torch
{first}
x, expected = torch.load(sys.argv[2])
y = torch._inductor.aoti_load_package(sys.argv[1])(x)
torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
assert y.stride() == expected.stride()
print("equal")
"""


def elsewhere(first, *arguments):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])}
    command = [sys.executable, "-c", RUN.format(first=first), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@quiet
@pytest.mark.slow
def test_packaged_by_aotinductor_and_run_in_another_process(tmp_path):
    """The package holds the calls, not the operators: they run in Python, in a process that has imported us."""
    net, x = converted(), torch.randn(SIZES[1]).to(memory_format=torch.channels_last)
    torch.save((x, net(x)), tmp_path / "numbers.pt")
    package = torch._inductor.aoti_compile_and_package(exported(net), package_path=str(tmp_path / "net.pt2"))
    done = elsewhere("import triton_conv", package, tmp_path / "numbers.pt")
    assert done.stdout.strip() == "equal", done.stderr
    done = elsewhere("", package, tmp_path / "numbers.pt")
    assert done.returncode
    assert "Could not find schema for triton_conv::conv" in done.stderr
