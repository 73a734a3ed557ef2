"""What a report says of the machine: versions, device, settings; no names of users, hosts or private places."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .. import backends, execute, invariance
from ..version import VERSION
from . import on_device

_PACKAGES = ("triton", "numpy", "filelock", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12")
_VARIABLES = re.compile(r"(TRITON|TORCH|PYTORCH|CUDA|CUDNN|CUBLAS|NVIDIA|NCCL|OMP|MKL)_\w+")
_WORTH_A_VALUE = re.compile(r"[\w.,:+=-]{1,60}")  # not what may be a path, a host or a key


def lines(device: torch.device) -> list[str]:
    """Of a report on computations on this device."""
    commit = on_device.commit()
    said = {
        "triton_conv": VERSION + (f", commit {commit}" if commit else ", installed"),
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}, cuDNN {_cudnn()}",
        **{name: found for name in _PACKAGES if (found := _installed(name))},
        "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "device": _device(device),
        "settings": ", ".join(f"{name} {value}" for name, value in _settings().items()),
        "environment": ", ".join(_environment()) or "nothing set",
    }
    return [f"{name:<18} {value}" for name, value in said.items()]


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _cudnn() -> str:
    return str(torch.backends.cudnn.version()) if torch.cuda.is_available() else "not in use"


def _device(device: torch.device) -> str:
    found = execute.device_of(device)
    if found is None:
        return f"CPU, plain torch, {torch.get_num_threads()} threads: no kernel runs"
    if device.type == "cpu":
        return "CPU, kernels in Triton's interpreter"
    memory = torch.cuda.get_device_properties(device).total_memory / 2**30
    where = f"sm_{found.capability}, {found.multiprocessors} multiprocessors, {memory:.0f} GiB"
    return f"{found.name}, {where}, driver {on_device.driver()}"


def _settings() -> dict[str, object]:
    cudnn = torch.backends.cudnn
    return {
        "float32 precision": execute.default_precision(),
        "cudnn.allow_tf32": getattr(cudnn, "allow_tf32", None),
        "cudnn.enabled": cudnn.enabled,
        "cudnn.benchmark": cudnn.benchmark,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "backend": backends.current(),
        "batch_invariant": invariance.batch(),
    }


def _environment() -> list[str]:
    """Variables that change what is computed, the value only where it can be nothing private."""
    names = [name for name in os.environ if _VARIABLES.fullmatch(name)]
    private = {Path.home().name, os.environ.get("USER"), os.environ.get("LOGNAME"), platform.node()} - {None, ""}
    found = []
    for name in sorted(names):
        value = os.environ[name]
        shown = bool(_WORTH_A_VALUE.fullmatch(value)) and not any(word in value for word in private if word)
        found.append(f"{name}={value}" if shown else f"{name} set")
    return found
