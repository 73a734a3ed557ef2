"""Settings of the process, which threads may change beside each other, from here on or for a while."""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

from .forks import Lock

T = TypeVar("T")


class _Layer(NamedTuple, Generic[T]):
    owner: object
    value: T
    ends: bool  # else it holds from here on


class Setting(Generic[T]):
    """The value that was set last, of those that still hold.

        >>> setting, one, other = Setting(0), object(), object()
        >>> setting.push(one, 1, ends=True)
        >>> setting.push(other, 2, ends=True)  # by another thread
        >>> setting.end(one)  # in whatever order they end
        >>> setting.value
        2
        >>> setting.end(other)
        >>> setting.value
        0

    What was set from here on, while another value was to end, ends with that.
    """

    def __init__(self, value: T):
        self._lock = Lock()
        self._layers: tuple[_Layer[T], ...] = (_Layer(None, value, False),)
        self.value = value

    def push(self, owner: object, value: T, ends: bool = False) -> None:
        """Sets a value, until the owner ends it or from here on."""
        with self._lock:
            kept = self._layers
            if not ends and len(kept) > 2 and not (kept[-1].ends or kept[-2].ends):
                kept = (*kept[:-2], kept[-1])  # nobody comes back to what was replaced twice
            self._put((*kept, _Layer(owner, value, ends)))

    def enter(self, owner: object, value: T) -> None:
        """The owner, which has just set this value from here on, will end it."""
        with self._lock:
            others = (layer for layer in self._layers if layer.owner is not owner or layer.ends)
            self._put((*others, _Layer(owner, value, True)))

    def end(self, owner: object) -> None:
        """Whatever else has been set before it, or since by others, holds again."""
        with self._lock:
            places = [i for i, layer in enumerate(self._layers) if layer.owner is owner]
            if places:
                last = places[-1]
                above = (layer for layer in self._layers[last + 1 :] if layer.ends)
                self._put((*self._layers[:last], *above))

    def _put(self, layers: tuple[_Layer[T], ...]) -> None:
        self._layers = layers
        self.value = layers[-1].value
