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
        return
    for finder in sys.meta_path:
        if isinstance(finder, _Waiting) and finder.name == name:  # of several finders one alone finds a module
            finder.actions.append(action)
            return
    sys.meta_path.insert(0, _Waiting(name, action))


class _Waiting(MetaPathFinder):
    """Finds nothing: it lets the module be found as ever, and acts, in order, once its code has run."""

    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self.name, self.actions = name, [action]

    def find_spec(self, fullname, path, target=None):
        if fullname != self.name:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module):
                run(module)
                for action in self.actions:
                    action()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
