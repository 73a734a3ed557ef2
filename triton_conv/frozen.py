"""Dataclasses that keep what they have worked out."""

from __future__ import annotations

from dataclasses import fields
from typing import Any


class Frozen:
    """A frozen dataclass whose cached properties stay behind when it is copied or pickled: kernels do not travel."""

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
