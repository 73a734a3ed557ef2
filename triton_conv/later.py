"""What is to be done when someone imports a module that would be slow, or too early, to import here."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder


def when_imported(name: str, action: Callable[[], None]) -> None:
    """Calls `action` right after the module of this name has been imported: at once if it has been."""
    if name in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _Waiting(name, action))


class _Waiting(MetaPathFinder):
    """Finds nothing: it lets the module be found as ever, and acts once its code has run."""

    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self._name, self._action = name, action

    def find_spec(self, fullname, path, target=None):
        if fullname != self._name:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module):
                run(module)
                self._action()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
