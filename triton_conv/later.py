"""What is to be done when someone imports a module that would be slow, or too early, to import here."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder

_waiting: dict[str, list[Callable[[], None]]] = {}


def when_imported(name: str, action: Callable[[], None]) -> None:
    """Calls `action` right after the module of this name has been imported: at once if it has been."""
    if name in sys.modules:
        action()
    elif name in _waiting:
        _waiting[name].append(action)
    else:
        _waiting[name] = [action]
        sys.meta_path.insert(0, _Waiting(name))


class _Waiting(MetaPathFinder):
    """Finds nothing: it lets the module be found as ever, and acts once its code has run."""

    def __init__(self, name: str) -> None:
        self._name = name

    def find_spec(self, fullname, path, target=None):
        if fullname != self._name:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module):
                run(module)
                for action in _waiting[fullname]:
                    action()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
