"""Without Triton, as on macOS and Windows: everything works in plain torch, and kernels are refused in one sentence."""

import ast
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

import triton_conv
from triton_conv import installed

ROOT = Path(triton_conv.__file__).parents[1]
EVERYTHING = """
import contextlib, io, json, sys, warnings
sys.modules["triton"] = None  # import triton raises ModuleNotFoundError
import torch, triton_conv
from triton_conv import Branch, cli, execute, explain, nn
from triton_conv.installed import TritonMissingError

def draw(*shape):
    return torch.randn(*shape, requires_grad=True)

def differentiated(y, *tensors):
    for gradient, t in zip(torch.autograd.grad(y.square().sum(), tensors), tensors):
        assert gradient.shape == t.shape and gradient.isfinite().all() and gradient.any()

for rank in (1, 2, 3):
    x, w, dense = draw(2, 4, *(5,) * rank), draw(6, 4, *(3,) * rank), draw(6, 4, *(1,) * rank)
    y = getattr(triton_conv, f"conv{rank}d")(x, w, padding=1, activation="silu")
    want = torch.nn.functional.silu(getattr(torch.nn.functional, f"conv{rank}d")(x, w, padding=1))
    assert torch.allclose(y, want, atol=1e-4)
    differentiated(y, x, w)
    z = draw(2, 6, *(5,) * rank)
    differentiated(getattr(triton_conv, f"conv_transpose{rank}d")(z, w, stride=2), z, w)
    depthwise, mixing = draw(4, 1, *(3,) * rank), draw(6, 4, *(1,) * rank)
    separable = getattr(triton_conv, f"separable_conv{rank}d")
    differentiated(separable(x, depthwise, mixing), x, depthwise, mixing)
    whole = [t.detach().mul(4).to(torch.int8) for t in (x, w)]
    assert getattr(triton_conv, f"int_conv{rank}d")(*whole).dtype is torch.int32
    eights, one = [t.detach().to(torch.float8_e4m3fn) for t in (x, w)], torch.ones(())
    assert getattr(triton_conv, f"scaled_conv{rank}d")(*eights, one, one).dtype is torch.bfloat16
x, w, small, offset = draw(2, 4, 6, 6), draw(4, 4, 3, 3), draw(4, 4, 1, 1), draw(2, 18, 6, 6)
differentiated(triton_conv.multi_conv2d(x, [Branch(w, padding=1), Branch(small)]), x, w, small)
differentiated(triton_conv.deform_conv2d(x, offset, w, padding=1), x, offset, w)
sequence, taps = draw(2, 4, 9), draw(4, 3)
differentiated(triton_conv.causal_conv1d(sequence, taps, activation="silu"), sequence, taps)
state = torch.zeros(2, 4, 2)
triton_conv.causal_conv1d_update(sequence.detach()[:, :, 0], state, taps.detach())
video, filters = draw(1, 2, 4, 5, 5), draw(3, 2, 3, 3, 3)
differentiated(triton_conv.causal_conv3d(video, filters, padding=1), video, filters)

model = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
with triton_conv.override(), triton_conv.batch_invariant(), triton_conv.backend("auto"):
    model(x).sum().backward()
triton_conv.convert(model)
assert type(model[0]) is nn.Conv2d
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # there is nothing to tune without a GPU
    with triton_conv.autotune():
        model(x).sum().backward()
fused = triton_conv.fuse(model.eval()).model
assert torch.allclose(fused(x), model(x), atol=1e-4)
triton_conv.fold_batchnorm(model)
compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
differentiated(compiled(x), x)

said = {}
def command(line):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(line.split())
    said[line] = code, err.getvalue()
for line in (
    "explain 8x64x56x56 128x64x3x3 --padding 1 --dtype bfloat16 --activation silu", "explain 2x64x100 64x4 --causal",
    "explain 8x16x9x9 16x1x3x3 --groups 16 --pointwise 8", "explain 8x16x9x9 8x16x3x3 --deform",
    "explain 8x16x9x9 8x16x3x3 --padding 1 --branch 8x16x1x1", "explain 2x4x5x9x9 8x4x3x3x3 --context 2",
    "check --only 3", "demo --interpret", "audit", "tune --dry-run --suite resnet50", "configs show",
):
    command(line)

p = explain.plans((8, 64, 56, 56), (128, 64, 3, 3), dtype=torch.bfloat16)["forward"]  # what a CUDA tensor would run
try:
    p.launches
except TritonMissingError as error:
    said["kernel"] = isinstance(error, ImportError), str(error)
print(json.dumps([said, sorted(m for m in sys.modules if m.split(".")[0] == "triton")]))
"""
POSIX = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "posix", "syslog", "crypt"}
ONLY_POSIX = {"fork", "getuid", "geteuid", "killpg", "setsid", "getpgid", "O_DIRECTORY", "O_NOFOLLOW", "O_CLOEXEC"} | {
    "SIGKILL",
    "SIGALRM",
    "SIGHUP",
    "SIGUSR1",
}


def test_everything_but_kernels_works_without_triton():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", EVERYTHING], capture_output=True, text=True, check=False, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said, loaded = json.loads(done.stdout.splitlines()[-1])
    assert loaded == ["triton"]  # None, as it was planted
    raised, words = said.pop("kernel")
    assert raised
    assert "triton is not installed" in words
    assert "pip install 'triton>=3.6'" in words
    for line, (code, err) in said.items():
        if line.split()[0] in ("demo", "audit", "tune", "configs"):
            assert (code, err.count("\n")) == (2, 1), (line, err)
            assert words in err
        else:
            assert (code, err) == (0, ""), (line, err)


@pytest.fixture
def trouble(monkeypatch):
    """Installs something as the module triton, and asks afresh."""

    def plant(module):
        monkeypatch.setitem(sys.modules, "triton", module)
        installed._trouble.cache_clear()

    yield plant
    monkeypatch.undo()
    installed._trouble.cache_clear()


def fake(**attributes):
    module = types.ModuleType("triton")
    vars(module).update(attributes)
    return module


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (fake(__version__="3.5.1", jit=1), "triton 3.5.1 is too old: kernels need 3.6 or newer; pip install"),
        (fake(__version__="2.3", jit=1), "too old"),
        (fake(), "is not the compiler"),
        (None, "triton is not installed"),
    ],
)
def test_what_is_wrong_with_triton_is_said_and_plain_torch_goes_on(trouble, monkeypatch, module, words):
    trouble(module)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not installed.available()
    with pytest.raises(ImportError, match="triton") as raised:
        installed.require()
    assert words in str(raised.value)
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # who asks for kernels is told
    with pytest.raises(ImportError, match="triton"):
        installed.available()


def test_a_package_that_fails_to_import_is_named_with_its_reason(tmp_path, trouble, monkeypatch):
    (tmp_path / "triton.py").write_text("raise OSError('libtriton.so: undefined symbol')\n")
    trouble(None)
    monkeypatch.delitem(sys.modules, "triton")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"cannot be imported .*undefined symbol.*reinstall") as raised:
        installed.require()
    assert isinstance(raised.value.__cause__, OSError)


@pytest.mark.parametrize("version", ["3.6.0", "3.10.1+git123", "4.0"])
def test_supported_versions_are_accepted(trouble, version):
    trouble(fake(__version__=version, jit=1))
    installed.require()


def loaded_by_import():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, triton_conv; print(*[m for m in sys.modules if m.split('.')[0] == 'triton_conv'])",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    for name in done.stdout.split():
        path = ROOT.joinpath(*name.split("."))
        yield path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def uses_of_posix(source):
    """What a module asks for, as it is imported or anywhere else, that Windows has not."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in POSIX)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in POSIX and not node.level:
            yield node.module
        elif isinstance(node, ast.Attribute) and node.attr in ONLY_POSIX:
            yield node.attr


def test_nothing_that_is_imported_needs_posix():
    paths = list(loaded_by_import())
    assert len(paths) > 40
    paths += [ROOT / "triton_conv" / "cli.py", *(ROOT / "triton_conv" / "commands").glob("*.py")]
    found = {path.name: [*uses_of_posix(path.read_text())] for path in paths}
    assert {name: uses for name, uses in found.items() if uses} == {}


def test_uses_of_posix_are_found():
    source = "import os, fcntl\ndef f():\n    from resource import getrusage\n    os.fork()\nimport json\n"
    assert list(uses_of_posix(source)) == ["fcntl", "resource", "fork"]
