"""What this process holds of what runs out: memory, file handles, threads; and of what only grows: caches, warnings.

>>> now = holdings()
>>> now.threads >= 1
True
"""

from __future__ import annotations

import functools
import gc
import linecache
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.fx import graph_module

from triton_conv.fast import LIMIT, Remembered

_STATUS = Path("/proc/self/statm")
_HANDLES = Path("/proc/self/fd")


class Holdings(NamedTuple):
    """Bytes of memory of the host and of the device (allocated, reserved), and counts of the others."""

    resident: int
    handles: int
    threads: int
    objects: int  # that Python's collector knows
    warnings: int  # that were given once and are not to be again
    allocated: int
    reserved: int
    kernels: int  # compiled for this process


class Cache(NamedTuple):
    """A cache of the package: how many it has, and how many it may have at most, None where nobody says."""

    size: int
    most: int | None


def holdings() -> Holdings:
    """As it is now, after a collection of what nobody refers to."""
    gc.collect()
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    return Holdings(
        resident(),
        len(list(_HANDLES.iterdir())) if _HANDLES.is_dir() else 0,
        len(os.listdir("/proc/self/task")) if _STATUS.exists() else threading.active_count(),
        len(gc.get_objects()),
        sum(_warned()),
        torch.cuda.memory_allocated() if cuda else 0,
        torch.cuda.memory_reserved() if cuda else 0,
        sum(_kernels()),
    )


def resident() -> int:
    """Bytes of this process in memory; 0 where nobody tells."""
    if not _STATUS.exists():
        return 0
    return int(_STATUS.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def caches() -> dict[str, Cache]:
    """What the modules of the package remember, by name: functions that remember, dictionaries, lists and sets."""
    found = {}
    for module, name, value in _globals():
        if _remembers(value):
            info = value.cache_info()
            found[f"{module}.{name}"] = Cache(info.currsize, info.maxsize)
        elif isinstance(value, (dict, list, set)):
            found[f"{module}.{name}"] = Cache(len(value), LIMIT if isinstance(value, Remembered) else None)
    return found


def forget() -> None:
    """Empties the caches of the package that have a bound, and PyTorch's of the sources of traced graphs."""
    for _, _, value in _globals():
        if _remembers(value):
            value.cache_clear()
        elif isinstance(value, Remembered):
            value.clear()
    graph_module._loader.eval_cache.clear()
    for name in [name for name in linecache.cache if name.startswith("<eval_with_key>")]:
        del linecache.cache[name]


def _remembers(value: Any) -> bool:
    return isinstance(value, functools._lru_cache_wrapper)


def _globals() -> Iterator[tuple[str, str, Any]]:
    """(module, name, value) of the package, functions where they are defined."""
    for title, module in sorted(sys.modules.items()):
        if title.split(".")[0] == "triton_conv" and module is not None:
            for name, value in sorted(vars(module).items()):
                if not name.startswith("__") and not (_remembers(value) and value.__module__ != title):
                    yield title.removeprefix("triton_conv."), name, value


def _kernels() -> Iterator[int]:
    """Of each function that Triton compiles, how many specialisations it has compiled on all devices."""
    for title, module in list(sys.modules.items()):
        if title.startswith("triton_conv.kernels.") and module is not None:
            for value in vars(module).values():
                for cached in getattr(value, "device_caches", {}).values():
                    yield len(cached[0])


def _warned() -> Iterator[int]:
    for module in list(sys.modules.values()):
        yield len(getattr(module, "__dict__", {}).get("__warningregistry__", ()))
