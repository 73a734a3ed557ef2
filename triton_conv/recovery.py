"""What happens when a plan cannot run: the next one does, from then on, and a warning says so once.

Three faults have a remedy. A config may not compile, or may ask for more of a device than it has: then the problem's
other configs are tried, and its other kernels. There may be no memory for a plan's workspace: then plans with less of
it are tried, which may add up in another order, so that "the same bits on every run" is said of runs with the same
memory. And Triton's cache may take no files: then they go to a temporary directory.

What was found out holds for the process, for every call and thread, until `forget`. Where nothing helps, the first
error is raised. Under CUDA graph capture nothing is tried: what was captured until then would stay in the graph. Every
other error is the caller's, above all those of a device that has failed.
"""

from __future__ import annotations

import errno
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, Protocol, TypeVar

import torch

from . import stored
from .devices import Device
from .forks import Lock


class Plan(Protocol):
    """What is asked of the plans of every kind."""

    @property
    def kernel(self) -> str: ...
    @property
    def config(self) -> Any: ...
    @property
    def device(self) -> Device: ...
    @property
    def role(self) -> Any: ...
    @property
    def asked(self) -> Any: ...
    @property
    def reason(self) -> str: ...
    @property
    def workspace_bytes(self) -> int: ...
    @property
    def compiled_for(self) -> Hashable:
        """All that its kernels' code depends on beside their config; may be less than a whole problem."""


P = TypeVar("P", bound=Plan)
T = TypeVar("T")

LIMIT = 4096  # configs and problems that are remembered

_lock = Lock()
_failed: dict[Hashable, None] = {}  # configs, by kernel, device and what they were compiled for
_room: dict[Hashable, int] = {}  # bytes of workspace that could not be had, by problem

# What drivers and compilers say, in a RuntimeError, of a kernel that is too much for the device, or that no pass could
# translate; and cuDNN where it has nothing for a problem.
_TOO_MUCH = (
    "out of resource",
    "too many resources requested for launch",
    "PassManager::run failed",
    "CUDNN_STATUS_NOT_SUPPORTED",
    "unable to find an engine",
)


_moved: dict[str, str] = {}  # where Triton's cache was, and where it is instead


def is_memory(error: BaseException) -> bool:
    """Whether a device has no memory left: for tensors, or for what a kernel itself needs of it."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "Triton Error [CUDA]: out of memory" in str(error)
    )


def is_config(error: BaseException) -> bool:
    """Whether a kernel could not be compiled, or not be launched for want of something that is the device's."""
    try:
        from triton.compiler.errors import CompilationError
        from triton.runtime.errors import OutOfResources, PTXASError
    except ImportError:
        return False
    if isinstance(error, (CompilationError, OutOfResources, PTXASError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _TOO_MUCH)


def is_cache(error: BaseException) -> bool:
    """Whether Triton's cache of compiled kernels took no file: its directory is read-only or full, or no directory."""
    if not isinstance(error, OSError):
        return False
    if error.filename is None:  # of a write to an open file
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO) and not _moved
    from triton import knobs

    place, cache = (os.path.abspath(path) for path in (error.filename, next(iter(_moved), knobs.cache.dir)))
    return os.path.commonpath((place, cache)) in (place, cache)


def check(error: Exception) -> None:
    """Raises an error again that another plan would not help against; of others, frees the tensors that they hold."""
    if not (is_memory(error) or is_config(error) or is_cache(error)) or _capturing():
        raise error
    traceback.clear_frames(error.__traceback__)


def heed(problem: Hashable, p: Plan, error: Exception, explicit: Any = None) -> None:
    """Remembers what an error says of a plan, and warns; raises where another plan would not help.

    A config that was given explicitly, `explicit`, is not replaced: RuntimeError says what is wrong with it.
    """
    check(error)
    memory = is_memory(error)
    if isinstance(error, OSError):
        _move_cache(error)
        return
    if explicit is not None and p.config == explicit:
        if memory:
            raise error
        why = f"{type(error).__name__}: {error}"
        raise RuntimeError(f"the config {p.config} was given explicitly for {_words(p)}, but failed: {why}") from error
    with _lock:
        news = not known_against(problem, p)
        if memory and not getattr(p, "rival_runs", False):
            _remember(_room, problem, min(p.workspace_bytes, _room.get(problem, p.workspace_bytes)))
        else:
            _remember(_failed, _code(p), None)
    if news:
        stored.renew()
        message = _out_of_memory(p) if memory else f"{_failure(p)}: {type(error).__name__}: {_first_line(error)}"
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def _move_cache(error: OSError) -> None:
    """Lets Triton keep compiled kernels in a temporary directory, for this process; raises where there is none."""
    from triton import knobs

    with _lock:
        if _moved:
            return
        before = knobs.cache.dir
        try:
            place = tempfile.mkdtemp(prefix="triton_conv-")
        except OSError:
            raise error from None
        knobs.cache.dir = place
        _moved[before] = place
    warnings.warn(
        f"triton_conv: Triton's cache {before} takes no files ({error.strerror}): kernels are kept in {place} for "
        "this process; TRITON_CACHE_DIR names another place",
        RuntimeWarning,
        stacklevel=4,
    )


def _remember(known: dict[Hashable, Any], what: Hashable, value: Any) -> None:
    """Forgets the oldest for it when there are LIMIT of them: it may fail again, and is then known again."""
    while len(known) >= LIMIT:
        del known[next(iter(known))]
    known[what] = value


def known_against(problem: Hashable, p: Plan) -> bool:
    """Whether a plan has failed, or takes as much workspace as could not be had."""
    if not (_failed or _room):
        return False
    return _code(p) in _failed or p.workspace_bytes >= _room.get(problem, p.workspace_bytes + 1)


def first(problem: Hashable, plans: Iterable[P]) -> P:
    """Of plans in the order of preference the first that nothing is known against; else the first of all."""
    best = None
    for p in plans:
        if not known_against(problem, p):
            return p
        best = p if best is None else best
    assert best is not None
    return best


def run(make: Callable[[], P], attempt: Callable[[P], T], problem: Hashable | None = None, explicit: Any = None) -> T:
    """What `attempt` makes of the first plan that can run; `make` asks `first` for it each time.

    `problem` is what `first` is given, by default what the plan calls `asked`.
    Raises what the first one raised where none can. Of memory that could not be had it says how much, and for what.
    """
    original: Exception | None = None
    while True:
        p = make()
        problem = p.asked if problem is None else problem
        if original is not None and known_against(problem, p):
            raise original
        try:
            return attempt(p)
        except Exception as error:
            if is_memory(error) and original is None:
                _say_what_for(error, p)
            heed(problem, p, error, explicit)
            original = original or error


def sources(find: Callable[[], T]) -> Iterator[T]:
    """What `find` makes of all stored configs, then without the process's, also without the user's, and by rule."""
    yield find()
    for last in range(1, len(stored.PLACES) + 1):
        with stored.hidden(*stored.PLACES[:last]):
            found = find()
        yield found


def forget() -> None:
    """Forgets what has failed, for instance when memory is free again."""
    with _lock:
        _failed.clear()
        _room.clear()
    stored.renew()


def _code(p: Plan) -> Hashable:
    """What is compiled alike; how many slabs a kernel writes is no part of it."""
    config = p.config
    fields = tuple((name, value) for name, value in vars(config).items() if name != "splits")
    return p.kernel, p.device.name, type(config).__name__, fields, p.compiled_for


def _capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _words(p: Plan) -> str:
    return f"{p.kernel} ({p.role.value}) of {getattr(p, 'geometry', p.asked)}"


def _failure(p: Plan) -> str:
    if getattr(p, "rival_runs", False):
        return f"triton_conv: {p.reason}; it failed for {_words(p)}, another runs from now on"
    return f"triton_conv: the config {p.config} of {_words(p)} ({p.reason}) failed, another runs from now on"


def _out_of_memory(p: Plan) -> str:
    return (
        f"triton_conv: out of memory, with {p.workspace_bytes} bytes of workspace wanted for {_words(p)}; a plan with "
        "less runs from now on, which may take longer, and may add up in another order: other bits than before"
    )


def _say_what_for(error: BaseException, p: Plan) -> None:
    error.args = (f"{error}\ntriton_conv wanted {p.workspace_bytes} bytes of workspace for {_words(p)}",)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else "no reason given"
