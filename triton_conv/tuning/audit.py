"""Compiles what ships, for any NVIDIA target and without a GPU, and says what is wrong with it.

A config that spills, exceeds shared memory, or loses its matrix instruction or its pipelining is slow or does not run,
whatever a model or a rule says of it. `code` reads what a plan became; here stands what it should have become.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Collection, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from .. import causal_cost, explain, stored, tiles
from ..activation_plan import ActivationConfig, ActivationPlan
from ..branches_plan import BranchesPlan
from ..causal_config import CausalConfig
from ..causal_plan import CausalPlan
from ..config import ITEM_BYTES, BandedConfig, DepthwiseConfig, Device, KernelConfig
from ..deform_plan import DeformPlan
from ..explain import AnyPlan
from ..plan import Plan
from ..separable_plan import SeparablePlan
from .code import TARGETS, TENSOR_MEMORY, Code, compiled_kernels, compiling_for, stub
from .layers import LAYERS
from .remembered import read_once

# By what is multiplied: 16-bit floats and TF32, 8-bit floats, 8-bit integers, float64. Those left out have none; of
# two, older Tritons give the first.
MATRIX_INSTRUCTIONS = {
    80: {"half": "HMMA", "int8": "IMMA", "double": "DMMA"},
    90: {"half": "HGMMA", "float8": "QGMMA", "int8": "IGMMA", "double": "DMMA"},
    100: {"half": "UTCHMMA", "float8": "UTCQMMA", "int8": "IMMA UTCIMMA"},
    120: {"half": "HMMA", "float8": "QMMA", "int8": "IMMA"},
}
_FROM_SHARED_MEMORY = {"HGMMA", "QGMMA", "IGMMA", "UTCHMMA", "UTCQMMA"}  # the others read operands from registers
# What dots of fewer than 64 rows get where the instruction above takes 64 at least.
_OF_FEW_ROWS = {"half": "HMMA", "float8": "QMMA", "int8": "IMMA", "double": "DMMA"}
_LEAST_ROWS = 64
_KINDS = {"float16": "half", "bfloat16": "half", "float32": "half", "float64": "double"}
_KINDS |= {"float8_e4m3fn": "float8", "int8": "int8", "uint8": "int8"}
DIED = "the compiler died"  # an error of rows: it would take whoever compiles with it


@dataclass(frozen=True)
class Wanted:
    """What the code of a launch must have; by default nothing. `few_rows` is the matrix instruction of narrow dots."""

    matrix: str = ""
    few_rows: str = ""
    pipelined: bool = False
    shared_operands: bool = False
    whole_vectors: bool = False
    wide_loads: bool = False
    wide_stores: bool = False
    tma_loads: bool = False
    tma_stores: bool = False


class Subject(NamedTuple):
    """A plan to audit, and the layer it is for."""

    layer: str
    plan: AnyPlan


@dataclass(frozen=True)
class Row:
    """One launch of a plan: what is wanted of its code and what it is, or why there is none.

    `N` are the images of the layer; `config` is that of the plan's main kernel, None for the others.
    """

    arch: int
    layer: str
    N: int
    role: str
    kernel: str
    dtype: str
    config: KernelConfig | CausalConfig | ActivationConfig | None
    wanted: Wanted
    code: Code | None = None
    error: str = ""


def shipped(arch: int) -> list[Subject]:
    """Everything that runs unless the user says otherwise: the default plans of `LAYERS` on this architecture.

    What a user has stored is not asked. Layers are there with smaller batches as far as these get other configs: where
    few tiles are to fill a device.
    """
    found: dict[tuple, Subject] = {}
    for name, layer in LAYERS.items():
        for N in (layer.input[0], 4, 1) if arch >= layer.since else ():
            shapes = (N, *layer.input[1:]), layer.weight
            with stored.hidden("installed", "user store"):
                plans = explain.plans(*shapes, bias=True, device=TARGETS[arch], **layer.options)
            for plan in plans.values():
                config: Any = plan.config  # how many slabs there are is no part of the code, if there is more than one
                if hasattr(config, "splits"):
                    config = replace(config, splits=min(config.splits, 2))
                key = (name, plan.role, plan.kernel, config)
                found.setdefault(key, Subject(name, plan))
    return list(found.values())


def faults(row: Row) -> list[str]:
    """What is wrong with a config that ships, in words."""
    code, wanted = row.code, row.wanted
    if code is None:
        return [f"does not compile: {row.error}"]
    found = excesses(code, TARGETS[row.arch])
    if code.atomics:
        found.append(f"has {code.atomics} atomic instructions, whose order differs from run to run")
    wide = code.rows >= _LEAST_ROWS
    accepted = wanted.matrix.split() if wide else [*wanted.matrix.split(), wanted.few_rows]
    if wanted.matrix and not set(accepted) & set(code.matrix.split()):
        found.append(f"its dot became no {' or '.join(wanted.matrix.split())} instruction")
    if wanted.pipelined and not code.ahead:
        found.append("its loads are not pipelined")
    if wanted.pipelined and not code.tma_loads + code.copies + code.narrow_copies:
        found.append("loads no operand asynchronously")
    if wanted.shared_operands and wide and code.operands != "shared":
        found.append("an operand passes through registers")
    if wanted.whole_vectors and code.narrow_copies:
        found.append("copies fewer than 16 bytes at a time")
    if wanted.wide_loads and not code.wide_loads:
        found.append("loads fewer than 16 bytes at a time")
    if wanted.wide_stores and not code.wide_stores:
        found.append("stores fewer than 16 bytes at a time")
    if wanted.tma_loads and not code.tma_loads:
        found.append("loads no operand by the bulk copy engine")
    if wanted.tma_stores and not code.tma_stores:
        found.append("does not store by the bulk copy engine")
    return found


def excesses(code: Code, device: Device) -> list[str]:
    """What a kernel takes more of than there is, in words."""
    found = []
    if code.spill_bytes or code.spills:
        found.append(f"spills {code.spill_bytes} bytes in {code.spills} accesses")
    if code.shared > device.shared_per_block:
        found.append(f"needs {code.shared} bytes of shared memory, {device.shared_per_block} are there")
    if code.tensor_memory > TENSOR_MEMORY:
        found.append(f"needs {code.tensor_memory} columns of tensor memory, {TENSOR_MEMORY} are there")
    return found


def audit(
    subjects: Sequence[Subject], arch: int, jobs: int | None = None, kernels: Collection[str] = ()
) -> Generator[tuple[int, list[Row]], None, None]:
    """(number of the subject, its rows) in the order in which they are done, compiled by `jobs` processes at a time.

    `jobs` defaults to the processors at hand. `kernels` restricts the launches, by name. What does not compile is a
    row with an error.
    """
    tasks = [Compilation(number, subject, arch, tuple(kernels)) for number, subject in enumerate(subjects)]
    return _in_processes(tasks, jobs or len(os.sched_getaffinity(0)))


# ---------------------------------------------------------------------------------------------------------------------
# Processes: Triton decides for a whole process whether it interprets kernels, and a compiler may die


class Compilation(NamedTuple):
    """A subject to compile for an architecture, of all its kernels or of these; `stubs` with what launches them."""

    number: int
    subject: Subject
    arch: int
    kernels: tuple[str, ...]
    stubs: bool = False


def _in_processes(tasks: Sequence[Compilation], jobs: int) -> Generator[tuple[int, list[Row]], None, None]:
    """A compiler that dies takes the other processes with it: what they were at is compiled again, one at a time."""
    waiting = list(reversed(tasks))
    running: dict[Future, Compilation] = {}
    while waiting:
        try:
            with _processes(min(jobs, len(waiting))) as pool:
                while waiting or running:
                    while waiting and len(running) < jobs:
                        running[pool.submit(compiled, waiting[-1])] = waiting[-1]
                        waiting.pop()
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        rows = future.result()
                        yield running.pop(future).number, rows
        except BrokenProcessPool:
            suspects = list(running.values())
            running.clear()
            if len(suspects) == 1:
                yield suspects[0].number, [_failed(suspects[0], DIED)]
            else:
                yield from _in_processes(suspects, 1)


@contextmanager
def _processes(count: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that compile kernels rather than interpret them; none is left over, however the block is left."""
    others = set(multiprocessing.active_children())
    interpret = os.environ.pop("TRITON_INTERPRET", None)  # before they import Triton
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), initializer=heed_the_parent)
    try:
        yield pool
    except BaseException:
        for child in set(multiprocessing.active_children()) - others:
            child.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        if interpret is not None:
            os.environ["TRITON_INTERPRET"] = interpret


def heed_the_parent() -> None:
    """Ctrl-C is the parent's to answer, which terminates us: as an exception, so that a running assembler ends too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))


def compiled(task: Compilation) -> list[Row]:
    """The rows of a subject, in a process that does not interpret kernels."""
    try:
        with compiling_for(task.arch):
            found = list(compiled_kernels(task.subject.plan, task.kernels))
            for _, kernel in found if task.stubs else ():
                stub(kernel)
            return [replace(_row(task, launch), code=read_once(kernel, task.arch)) for launch, kernel in found]
    except Exception as error:  # whatever a compiler raises is a finding
        return [_failed(task, words(error))]


def words(error: BaseException) -> str:
    """One line of an exception's first cause."""
    while error.__cause__:
        error = error.__cause__
    lines = str(error).strip().splitlines() or ["no message"]
    # Triton's own errors quote the source down to what is wrong with it
    return f"{type(error).__name__}: {lines[-1 if lines[0].startswith('at ') else 0]}"


def _row(task: Compilation, launch: Any) -> Row:
    layer, plan = task.subject
    main = launch.name == plan.kernel
    wanted = _wanted(plan, launch, task.arch) if main else Wanted()
    config = plan.config if main else None
    return Row(task.arch, layer, getattr(plan, "N", 1), plan.role.value, launch.name, plan.dtype, config, wanted)


def _failed(task: Compilation, error: str) -> Row:
    layer, plan = task.subject
    what = (getattr(plan, "N", 1), plan.role.value, plan.kernel, plan.dtype, plan.config)
    return Row(task.arch, layer, *what, Wanted(), error=error)


def _kind(dtype: str, precision: str) -> str:
    return "ieee" if (dtype, precision) == ("float32", "ieee") else _KINDS[dtype]


def _wanted(plan: AnyPlan, launch: Any, arch: int) -> Wanted:
    """What the main kernel of a plan is chosen for; sums of products without a dot have little to lose."""
    config: Any = plan.config
    if isinstance(plan, CausalPlan):
        # backward, five taps and more leave registers for 8 bytes of a row, and an update goes where strides lead
        whole = causal_cost.vector(plan.asked, config) * plan.asked.item_bytes == 16
        return Wanted(wide_loads=whole, wide_stores=whole)
    if isinstance(plan, SeparablePlan):
        kind, vector = _kind(plan.dtype, plan.numerics.precision), 16 // ITEM_BYTES[plan.dtype]
        along_c = plan.problem.x[1] == 1 and plan.asked.C == plan.asked.K and plan.asked.C % vector == 0
        return Wanted(MATRIX_INSTRUCTIONS[arch].get(kind, ""), _OF_FEW_ROWS.get(kind, ""), wide_loads=along_c)
    if isinstance(plan, ActivationPlan):
        whole = launch.arguments["VEC"] * ITEM_BYTES[plan.dtype] >= 16
        return Wanted(wide_loads=whole, wide_stores=whole)
    if isinstance(plan, Plan) and isinstance(config, DepthwiseConfig):
        g, channels_last = plan.geometry, plan.strides.x[1] == plan.strides.y[1] == 1
        along_c = channels_last and g.C == g.K and g.C % config.vector == 0
        vector = config.vector if along_c else launch.arguments["VECTOR"] * launch.arguments["WHOLE"]
        return Wanted(wide_loads=vector * ITEM_BYTES[plan.dtype] == 16)
    boxed, item = plan.kernel.startswith("box"), ITEM_BYTES[plan.dtype]
    if not getattr(config, "dot", True):
        return Wanted()
    kind = _kind(plan.dtype, plan.numerics.precision)
    matrix = MATRIX_INSTRUCTIONS[arch].get(kind, "")
    if isinstance(plan, DeformPlan):  # what it samples passes through registers
        return Wanted(matrix=matrix, few_rows=_OF_FEW_ROWS[kind] if matrix else "")
    channels_last = plan.strides.x[1] == plan.strides.y[1] == 1
    flatten = getattr(config, "flatten", False)
    geometries = [term.geometry for term in plan.order] if isinstance(plan, BranchesPlan) else [plan.geometry]
    whole_vectors = boxed or (channels_last and all(map(tiles.whole_vectors, geometries)) and not flatten)
    if isinstance(plan, Plan) and isinstance(config, BandedConfig):
        # filters always are whole vectors, the rows of a weight gradient's operands
        vectors = [launch.arguments["X_VEC"], launch.arguments.get("FLT_VEC", launch.arguments["Y_VEC"])]
        whole_vectors = min(vectors) * item >= 16 and plan.geometry.modes[2] == "zeros"
    return Wanted(
        matrix=matrix,
        few_rows=_OF_FEW_ROWS[kind] if matrix else "",
        pipelined=whole_vectors and config.num_stages > 1,
        whole_vectors=whole_vectors and item <= 2,  # wider types are transposed as they are copied
        shared_operands=boxed and matrix in _FROM_SHARED_MEMORY,
        tma_loads=boxed,
        tma_stores=launch.arguments.get("STORE_BOX", False),
    )
