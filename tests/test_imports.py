"""Which module may import which, and what importing the package must not do."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import triton_conv

PACKAGE = Path(triton_conv.__file__).parent

# A module may import those of earlier lines, not of its own: `tuning` and the commands see everything.
LAYERS = [
    {"forks"},
    {"settings"},
    {"version", "geometry", "devices", "epilogue", "unsupported", "invariance", "later", "files", "installed"},
    {"tiles", "reference", "branches_problem", "arguments"},
    {"config", "deform_reference", "causal_reference"},
    {"causal_config", "deform_config"},
    {"key"},
    {"kernels", "entry"},
    {"cost", "stored"},
    {"recovery", "frozen"},
    {"choose", "causal_cost", "deform_cost", "branches_cost"},
    {"ways"},
    {"backends", "branches_ways"},
    {"conv_plan", "causal_plan", "activation_plan"},
    {"plan"},
    {"separable_plan", "deform_plan", "branches_plan", "streaming_plan"},
    {"execute"},
    {"fast", "deform_run"},
    {"conv_calls", "schemas"},
    {"derivatives", "batching"},
    {"ops"},
    {"activation", "low_precision"},
    {"fused_ops"},
    {"fused"},
    {"functional", "deform_ops", "causal_ops"},
    {"streaming_ops"},
    {"streaming"},
    {"causal"},
    {"branches_run"},
    {"branches_ops"},
    {"separable", "deform", "branches"},
    {"branch_modules"},
    {"sharding", "factored", "deform_nn"},
    {"fused_nn", "causal_nn", "explain_words"},
    {"nn", "override", "explain", "cases"},
    {"oracle", "case_table"},
    {"check"},
    {"convert", "layers", "tracing", "residual"},
    {"patterns"},
    {"fold"},
    {"fusion"},
    {"demo", "tuning"},
    {"fuzz"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
NARROW = {
    "kernels": {"geometry", "tiles", "epilogue", "causal_config", "deform_config", "branches_problem", "kernels"}
    | {"installed"},
    "causal_config": {"config", "tiles", "devices"},
    "reference": {"geometry", "epilogue"},
    "config": {"geometry", "tiles", "devices", "epilogue", "forks"},
    "tiles": {"geometry", "epilogue"},
    "branches_problem": {"geometry", "devices"},
    "geometry": set(),
    "devices": set(),
    "installed": set(),
}


def room(path):
    """The module or subpackage of the package that a file belongs to."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def imports(path):
    """Rooms of the package imported by a file, wherever in it, with the line."""
    package = ["triton_conv", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *(node.module or "").split(".")] if node.module else base
            names = [[*module, alias.name] for alias in node.names]
        else:
            continue
        for name in names:
            if name[0] == "triton_conv":
                yield (name[1] if len(name) > 1 else "__init__"), node.lineno


def exists(name):
    return (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").exists()


def test_every_module_has_its_place():
    assert {room(path) for path in FILES} <= set(RANK)
    assert [name for name in RANK if not exists(name)] == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_point_one_way(path):
    mine = room(path)
    for name, line in imports(path):
        if not exists(name) or name == "version":
            continue  # a public name of the package, and what everyone may know
        where = f"{path.name}:{line}: {mine} imports {name}"
        assert RANK[name] < RANK[mine] or name == mine, where
        assert mine not in NARROW or name in NARROW[mine], where
        assert name != "tuning" or mine in ("tuning", "fuzz", "commands"), where
        assert name != "kernels" or mine in ("kernels", "frozen", "plan", "fast") or mine.endswith("_plan"), where


def test_the_parser_sees_every_form_of_import(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    (tmp_path / "kernels").mkdir()
    file = tmp_path / "kernels" / "a.py"
    file.write_text(
        "from .. import plan\nfrom ..ops import conv\nfrom . import b\nimport triton_conv.nn\n"
        "def f():\n    from triton_conv import cli\nfrom triton_conv.config import x\nimport torch\n"
    )
    assert sorted(imports(file)) == [("cli", 6), ("config", 7), ("kernels", 3), ("nn", 4), ("ops", 2), ("plan", 1)]


def in_a_fresh_process(code):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def fresh():
    """What a process looks like after `import triton_conv`; PyTorch and Triton may do as they like before it."""
    return in_a_fresh_process(
        """
import json, os, sys, torch, torch._dynamo, triton
before, modules, environment = dict(os.environ), set(sys.modules), []

class Environment(type(os.environ)):
    def __getitem__(self, key):
        environment.append(key)
        return super().__getitem__(key)
    def __setitem__(self, key, value):
        environment.append(key)
        return super().__setitem__(key, value)

os.environ.__class__ = Environment
files = []
sys.addaudithook(lambda event, args: event == "open" and files.append(str(args[0])))
import triton_conv
touched, opened = list(environment), list(files)
print(json.dumps({
    "new": sorted(set(sys.modules) - modules),
    "all": sorted(sys.modules),
    "environment": touched,
    "changed": dict(os.environ) != before,
    "cuda": torch.cuda.is_initialized(),
    "files": [f for f in opened if not f.endswith((".py", ".pyc", ".so")) and ".pyc." not in f],
}))
"""
    )


def test_importing_loads_no_kernel_and_nothing_optional(fresh):
    assert "triton_conv.functional" in fresh["new"]
    assert not [m for m in fresh["new"] if m.startswith(("triton_conv.kernels.", "triton_conv.tuning"))]
    assert not [m for m in fresh["new"] if m.startswith("torch.distributed.tensor")]
    optional = ("matplotlib", "sklearn", "tqdm", "hypothesis", "pytest", "pandas")
    assert not [m for m in fresh["new"] if m.split(".")[0] in optional]


def test_importing_touches_no_environment_variable_file_or_device(fresh):
    assert not fresh["changed"]
    assert fresh["environment"] == []
    assert fresh["files"] == []
    assert not fresh["cuda"]


def test_kernels_can_be_interpreted_although_the_package_was_imported_first():
    """TRITON_INTERPRET is read when kernels are imported: that is at the first launch."""
    assert in_a_fresh_process(
        """
import json, os, sys, triton_conv
os.environ["TRITON_INTERPRET"] = "1"
import torch
x, w = torch.randn(1, 1, 3, 3), torch.ones(1, 1, 3, 3)
y = triton_conv.conv2d(x, w)
assert "triton_conv.kernels.gather" in sys.modules
print(json.dumps(bool(torch.allclose(y.flatten(), x.sum(), atol=1e-5))))
"""
    )


def test_plain_cpu_calls_import_no_kernel():
    loaded = in_a_fresh_process(
        """
import json, sys, torch, triton_conv
x, w = torch.randn(1, 1, 3, 3), torch.ones(1, 1, 3, 3, requires_grad=True)
triton_conv.conv2d(x, w).sum().backward()
print(json.dumps([m for m in sys.modules if m.startswith("triton_conv.kernels.")]))
"""
    )
    assert loaded == []


def test_every_public_name_is_there():
    assert set(triton_conv.__all__) <= set(dir(triton_conv))
    assert len(set(triton_conv.__all__)) == len(triton_conv.__all__)
