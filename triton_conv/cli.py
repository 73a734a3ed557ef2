"""The console script `triton-conv`: each subcommand is a function and an `_add_*` that describes its arguments.

Exit codes: 0 for success, 1 when something was found wrong, 2 for bad arguments or a missing optional dependency,
130 when interrupted, 141 when the reader of the output went away.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .devices import DEVICES
from .key import CONFIGS
from .version import VERSION


class CommandError(Exception):
    """What was asked for cannot be done here; the message says why, in one line."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand and returns the exit code of the process.

    >>> main(["check", "--only", "3"])
    0
    """
    try:
        try:
            return _run(argv)
        finally:
            print(end="", flush=True)  # here rather than at exit, where a closed pipe is not to be caught
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still buffered
        return 141


def _run(argv: Sequence[str] | None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        return arguments.command(arguments)
    except CommandError as error:
        print(f"triton-conv: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("triton-conv: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="triton-conv", description="Convolutions for NVIDIA GPUs in Triton.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {VERSION}", help="show the version and exit")
    parser.set_defaults(command=None)
    sub = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add_demo(sub)
    _add_check(sub)
    _add_explain(sub)
    _add_audit(sub)
    _add_configs(sub)
    _add_tune(sub)
    _add_bench(sub)
    return parser


# ---------------------------------------------------------------------------------------------------------------------
# demo


def _add_demo(sub: Any) -> None:
    parser = sub.add_parser(
        "demo",
        help="train a small network on real digits, beside the same network in torch.nn",
        description="Trains a small network of plain, depthwise-separable, grouped, dilated and transposed "
        "convolutions on scikit-learn's handwritten digits, beside the same network in torch.nn. Exit code 1 if an "
        "accuracy is below 95 % or the gradients disagree.",
    )
    parser.add_argument("--epochs", type=_positive, help="passes over the training images (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="initial weights, split and batches (default: 0)")
    parser.add_argument(
        "--output",
        default="demo_loss.png",
        metavar="PATH",
        help="picture, in the format of its extension (default: %(default)s)",
    )
    parser.add_argument(
        "--interpret",
        action="store_true",
        help="a few steps on the CPU through the Triton kernels themselves, in Triton's interpreter",
    )
    _add_device(parser)
    parser.set_defaults(command=demo)


def demo(arguments: argparse.Namespace) -> int:
    """`triton-conv demo`."""
    if arguments.interpret and arguments.device == "cuda":
        raise CommandError("argument --device: --interpret runs on the CPU")
    if arguments.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, at the first launch
    _require("demo", "demo", "sklearn", "matplotlib", "tqdm")
    from . import demo as digits

    device = "cpu" if arguments.interpret else _device(arguments.device)
    try:
        digits.check_output(arguments.output)
    except ValueError as error:
        raise CommandError(f"argument --output: {error}") from error
    with _one_thread(device):
        return digits.run(device, epochs=arguments.epochs, seed=arguments.seed, output=arguments.output)


# ---------------------------------------------------------------------------------------------------------------------
# check


def _add_check(sub: Any) -> None:
    parser = sub.add_parser(
        "check",
        help="compare convolutions of every shape with PyTorch in float64",
        description="Compares outputs and gradients with PyTorch in float64: a table of corner cases, then random "
        "ones. On a GPU the kernels run; on a CPU plain torch, or the kernels in Triton's interpreter if "
        "TRITON_INTERPRET=1 is set. Exit code 1 on any disagreement.",
    )
    parser.add_argument(
        "--cases", type=_count, default=300, help="random cases after the corner cases (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=7, help="random cases and operands (default: %(default)s)")
    parser.add_argument("--role", choices=("fprop", "dgrad", "wgrad"), help="only the tensors that this role computes")
    parser.add_argument("--dtype", type=_dtype, help=f"run every case in this dtype: {_dtype_names()}")
    parser.add_argument("--only", type=_count, metavar="N", help="one case, by the number in a failure's report")
    _add_device(parser)
    parser.set_defaults(command=check)


def check(arguments: argparse.Namespace) -> int:
    """`triton-conv check`."""
    from .check import CASES, Outcome, numbered_case, numbered_cases, sweep
    from .geometry import Role

    device = _device(arguments.device)
    role = None if arguments.role is None else Role(arguments.role)
    if arguments.only is None:
        cases = numbered_cases(arguments.cases, arguments.seed, arguments.dtype)
        total = len(CASES) + arguments.cases
    else:
        cases = iter([(arguments.only, numbered_case(arguments.only, arguments.seed, arguments.dtype))])
        total = 1

    print(f"{_counted(total, 'case')}, seed {arguments.seed}; {_what_runs(device)}")
    worst: dict[tuple[str, str], tuple[float, Outcome]] = {}
    failures: list[Outcome] = []
    compared = 0
    with _one_thread(device):
        for outcome in _progress(sweep(cases, arguments.seed, device, role), total):
            compared += len(outcome.results)
            if not outcome.ok:
                failures.append(outcome)
            for result in outcome.results:
                key = (str(outcome.case.dtype).removeprefix("torch."), result.name)
                if key not in worst or result.share > worst[key][0]:
                    worst[key] = (result.share, outcome)

    print("\nworst error of each tensor, as a share of its tolerance")
    print(f"{'dtype':<12}{'tensor':<8}{'share':>8}  {'case':>5}")
    for (dtype, name), (share, outcome) in sorted(worst.items()):
        print(f"{dtype:<12}{name:<8}{share:>8.3g}  {outcome.number:>5}  {outcome.case}")
    for outcome in failures:
        _print_failure(outcome, arguments, device)
    verdict = f"{_counted(total, 'case')} passed"
    if failures:
        verdict = f"{len(failures)} of {_counted(total, 'case')} failed"
    elif total > 1:
        verdict = f"all {verdict}"
    print(f"\n{verdict}, {_counted(compared, 'tensor')} compared; {_what_runs(device)}")
    return 1 if failures else 0


def _print_failure(outcome: Any, arguments: argparse.Namespace, device: str) -> None:
    again = f"triton-conv check --only {outcome.number} --seed {arguments.seed} --device {device}"
    if arguments.dtype is not None:
        again += f" --dtype {str(arguments.dtype).removeprefix('torch.')}"
    if arguments.role is not None:
        again += f" --role {arguments.role}"
    if os.environ.get("TRITON_INTERPRET"):
        again = f"TRITON_INTERPRET={os.environ['TRITON_INTERPRET']} {again}"
    print(f"\nFAILED {outcome.number}: {outcome.case}\n  {again}\n  {outcome.case!r}")
    for result in outcome.results:
        if not result.ok:
            print(f"  {result.name}: error {result.error:.3g}, tolerance {result.bound:.3g}; {result.note}")
    if outcome.exception is not None:
        print(f"  {type(outcome.exception).__name__}: {outcome.exception}")


def _what_runs(device: str) -> str:
    import torch

    from .execute import INTERPRETER, device_of

    found = device_of(torch.device(device))
    if found is None:
        return "plain torch on the CPU: no kernel was tested (set TRITON_INTERPRET=1 to interpret them)"
    if found is INTERPRETER:
        return "Triton's kernels in its interpreter, on the CPU"
    return f"Triton's kernels on {found.name}"


# ---------------------------------------------------------------------------------------------------------------------
# explain


def _add_explain(sub: Any) -> None:
    parser = sub.add_parser(
        "explain",
        help="show which kernel runs a convolution, with which config, and why; needs no GPU",
        description="Shows the plans of a convolution and its gradients: geometry, kernel, config, layout steps, "
        "workspace and reason. Shapes are written 8x64x56x56; one value per axis is written 2,1 and (lower, upper) "
        "padding 2:0,1,1.",
    )
    _add_convolution(parser)
    parser.add_argument(
        "--causal", action="store_true", help="causal_conv1d: an input B x C x L and a weight C x taps; its layout only"
    )
    parser.add_argument(
        "--pointwise", type=_positive, metavar="K", help="separable_conv: the weight is depthwise, then come K channels"
    )
    parser.add_argument("--activation", choices=("silu", "swish"), help="of --causal (default: none)")
    parser.add_argument("--initial-state", action="store_true", help="of --causal: with an initial state")
    parser.add_argument(
        "--dtype",
        type=_dtype_or_float8,
        default="float32",
        help=f"{_dtype_names()}, or float8_e4m3fn for a scaled convolution (default: float32)",
    )
    parser.add_argument("--channels-last", action="store_true", help="memory format of input and weight")
    parser.add_argument(
        "--device",
        type=_known_device,
        default="H200",
        help=f"{', '.join(DEVICES)}, or cuda for this GPU (default: H200)",
    )
    parser.set_defaults(command=explain)


def explain(arguments: argparse.Namespace) -> int:
    """`triton-conv explain`."""
    from . import explain as explaining

    names = ("stride", "padding", "dilation", "groups", "padding_mode", "precision", "out_dtype")
    parameters = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if arguments.transposed:
        parameters["output_padding"] = arguments.output_padding or 0
    elif arguments.output_padding is not None:
        raise CommandError("argument --output-padding: only a transposed convolution has one")
    if arguments.causal:
        given = {name: getattr(arguments, name) for name in names if _unlike_default(arguments, name)}
        if given or arguments.output_padding is not None:
            raise CommandError(f"argument --causal: does not go with {', '.join(given) or 'output_padding'}")
        parameters = {name: getattr(arguments, name) for name in ("causal", "activation", "initial_state")}
    elif arguments.activation or arguments.initial_state:
        raise CommandError("arguments --activation and --initial-state: only --causal has them")
    if arguments.pointwise is not None:
        if arguments.causal or arguments.transposed or arguments.out_dtype is not None:
            raise CommandError("argument --pointwise: does not go with --causal, --transposed or --out-dtype")
        parameters["pointwise"] = arguments.pointwise
    try:
        text = explaining.text(
            arguments.input,
            arguments.weight,
            transposed=arguments.transposed,
            dtype=arguments.dtype,
            channels_last=arguments.channels_last,
            bias=arguments.bias,
            device=arguments.device,
            **parameters,
        )
    except (RuntimeError, ValueError, TypeError) as error:
        raise CommandError(str(error)) from error
    print(text)
    return 0


def _unlike_default(arguments: argparse.Namespace, name: str) -> bool:
    defaults = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "padding_mode": ("zeros",)}
    return getattr(arguments, name) != defaults.get(name)


# ---------------------------------------------------------------------------------------------------------------------
# audit


_AUDITED_ROLES = ("fprop", "dgrad", "wgrad", "forward", "backward", "update")  # the last three are causal_conv1d's


def _add_audit(sub: Any) -> None:
    parser = sub.add_parser(
        "audit",
        help="compile what ships for a GPU that need not be there, and read the code",
        description="Compiles the kernels of a list of layers, in processes beside each other and without a GPU, and "
        "shows what became of them: registers of a thread, bytes that it spills, bytes of shared memory of a block, "
        "the matrix instruction and where it reads its operands, bulk tensor copies (TMA), asynchronous copies of 16 "
        "bytes a thread and of fewer, steps of the main loop that loads run ahead of their use, blocks that a "
        "multiprocessor has room for. Exit code 1 if a config spills, exceeds shared memory, or loses its matrix "
        "instruction or its pipelining.",
    )
    _add_compiling(parser)
    parser.add_argument("--layer", type=_layer, action="append", help="only this layer; may be repeated")
    parser.add_argument("--role", choices=_AUDITED_ROLES, help="only plans of this role")
    parser.add_argument("--kernel", action="append", help="only launches of this kernel, such as box; may be repeated")
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    parser.set_defaults(command=audit)


def _add_compiling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--arch",
        type=int,
        choices=(80, 90, 100, 120),
        action="append",
        help="compute capability to compile for, ten times the one of data sheets; may be repeated (default: 90)",
    )
    parser.add_argument("--jobs", type=_positive, help="compilers at a time (default: one for each processor)")


def audit(arguments: argparse.Namespace) -> int:
    """`triton-conv audit`."""
    _require("audit", "tuning", "rich")
    from rich.console import Console
    from rich.progress import Progress

    from .tuning import audit as auditing

    rows, stderr = [], Console(stderr=True)
    for arch in arguments.arch or [90]:
        subjects = [
            subject
            for subject in auditing.shipped(arch)
            if (not arguments.layer or subject.layer in arguments.layer)
            and arguments.role in (None, subject.plan.role.value)
        ]
        results = auditing.audit(subjects, arch, arguments.jobs, arguments.kernel or ())
        with closing(results), Progress(console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
            found = dict(progress.track(results, len(subjects), description=f"sm_{arch}"))
        rows += [row for number in sorted(found) for row in found[number]]
    if not rows:
        raise CommandError("no such layer has a plan of this role that launches such a kernel")
    if arguments.json:
        _print_json(rows)
    else:
        _print_table(rows)
    return 1 if any(map(auditing.faults, rows)) else 0


def _print_json(rows: list[Any]) -> None:
    import triton

    from .tuning.audit import faults

    print(json.dumps({"triton": triton.__version__, "rows": [{**asdict(r), "faults": faults(r)} for r in rows]}))


def _print_table(rows: list[Any]) -> None:
    import triton

    from .tuning import tables
    from .tuning.audit import faults

    table = tables.table(
        *("sm", "layer", "N", "role", "kernel", "config", ">registers", ">spilled", ">shared"),
        *("matrix", "operands", "TMA", "copies", "ahead", "blocks", "faults"),
    )
    table.columns[-1].style = "red"
    for row in rows:
        cells = [str(row.arch), row.layer, str(row.N), row.role, row.kernel, str(row.config or "")]
        if row.code is not None:
            c = row.code
            cells += [str(c.registers), str(c.spill_bytes), str(c.shared), c.matrix, c.operands]
            cells += [f"{c.tma_loads}+{c.tma_stores}", f"{c.copies}+{c.narrow_copies}", str(c.ahead), str(c.resident)]
        cells += [""] * (len(table.columns) - 1 - len(cells))
        tables.add(table, [*cells, "; ".join(faults(row))])
    tables.show(table)
    count = sum(bool(faults(row)) for row in rows)
    print(f"{_counted(len(rows), 'kernel')} compiled by Triton {triton.__version__}, {count or 'none'} with a fault")


# ---------------------------------------------------------------------------------------------------------------------
# configs


def _add_configs(sub: Any) -> None:
    parser = sub.add_parser(
        "configs",
        help="show, merge, check and compare tuned configs: your own and those that ship",
        description="Tuned configs are JSON files, one for each device and kernel: your own in $TRITON_CONV_CACHE or "
        "~/.cache/triton_conv, others in the package.",
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", dest="action", required=True)

    def action(name: str, words: str) -> argparse.ArgumentParser:
        made = actions.add_parser(name, help=words, description=f"{words[0].upper()}{words[1:]}.")
        made.set_defaults(command=configs)
        return made

    def selection(made: argparse.ArgumentParser) -> None:
        made.add_argument("--device", help=f"only of this one: {', '.join(DEVICES)}, or part of its name")
        made.add_argument("--kernel", choices=tuple(CONFIGS), help="only of this kernel")

    selection(action("show", "a table of what is stored and what ships: winner, time, source, whether it is stale"))
    merging = action("merge", "merge files, or all files of directories, into your own")
    merging.add_argument("paths", type=Path, nargs="+", metavar="FILE_OR_DIR")
    verifying = action("verify", "check that files may ship; exit code 1 if not, naming file and entry")
    verifying.add_argument("directory", type=Path, nargs="?", metavar="DIR", help="(default: what ships)")
    verifying.add_argument("--compile", action="store_true", help="compile each config too, as audit does")
    _add_compiling(verifying)
    comparing = action("diff", "compare the winners of two files or directories; exit code 1 if any differ")
    comparing.add_argument("a", type=Path, metavar="A")
    comparing.add_argument("b", type=Path, metavar="B")
    exporting = action("export", "write the winners that you have measured as files that ship")
    exporting.add_argument("directory", type=Path, metavar="DIR")
    exporting.add_argument("--as", dest="rename", choices=tuple(DEVICES), help="under the name of this known device")
    selection(exporting)
    seeding = action("seed", "write what rules and the cost model choose for common layers; what was measured stays")
    seeding.add_argument("directory", type=Path, metavar="DIR")
    seeding.add_argument("--device", choices=tuple(DEVICES), action="append", help="may be repeated (default: all)")


def configs(arguments: argparse.Namespace) -> int:
    """`triton-conv configs`."""
    _require("configs", "tuning", "rich")
    from .tuning.commands_configs import COMMANDS

    try:
        return COMMANDS[arguments.action](arguments)
    except (ValueError, OSError) as error:
        raise CommandError(str(error)) from error


# ---------------------------------------------------------------------------------------------------------------------
# tune


def _add_tune(sub: Any) -> None:
    parser = sub.add_parser(
        "tune",
        help="find the quickest configs on this GPU: of a shape, of a suite of layers or of a model",
        description="Measures configs of the kernels that can run a convolution and its gradients, likely winners "
        "first, compares their values with a float64 reference, and stores what it finds where later calls look it "
        "up. What is tuned is a shape, written as for explain, a suite or the convolutions that a model makes. Exit "
        "code 1 if values were wrong.",
    )
    _add_convolution(parser, nargs="?")
    parser.add_argument("--suite", type=_suite, action="append", help="layers of this suite; may be repeated")
    parser.add_argument("--list-suites", action="store_true", help="show the suites and exit")
    parser.add_argument("--batch", type=_positive, help="images of a suite's layers (default: the suite's own)")
    parser.add_argument(
        "--model",
        metavar="MODULE:CALLABLE",
        help="forward and backward of what this returns: torchvision:resnet50, or package.module:callable",
    )
    parser.add_argument(
        "--input",
        dest="inputs",
        type=_model_input,
        action="append",
        metavar="SHAPE[:DTYPE]",
        help="of --model: an argument of its forward, such as 256x3x224x224 or 8x77:int64; may be repeated",
    )
    parser.add_argument("--model-arguments", metavar="JSON", help='of --model: keywords, such as {"num_classes": 10}')
    parser.add_argument("--autocast", type=_dtype, help="of --model: dtype of an autocast, bfloat16 or float16")
    parser.add_argument("--forward-only", action="store_true", help="of --model: without its gradients")
    parser.add_argument(
        "--run-on", choices=("cpu", "cuda"), help="of --model: run it once for real, if its forward looks at values"
    )
    parser.add_argument(
        "--dtype",
        type=_dtype_or_float8,
        help=f"{_dtype_names()}, or float8_e4m3fn (default: of a shape float32, else its own)",
    )
    parser.add_argument(
        "--channels-last", action=argparse.BooleanOptionalAction, help="memory format (default: of a suite its own)"
    )
    parser.add_argument("--role", choices=("fprop", "dgrad", "wgrad"), help="only this one")
    parser.add_argument("--device", choices=(*DEVICES, "cuda"), help="of --dry-run and --simulate (default: this GPU)")
    parser.add_argument(
        "--arch", type=int, choices=(80, 90, 100, 120), help="the same, a device of this compute capability"
    )
    parser.add_argument("--dry-run", action="store_true", help="show what would be measured; needs no GPU")
    parser.add_argument("--simulate", action="store_true", help="with made-up times, to try the rest; needs no GPU")
    parser.add_argument("--seconds", type=_duration, help="to spend on each problem (default: no limit)")
    parser.add_argument("--total-seconds", type=_duration, help="to spend on everything (default: no limit)")
    parser.add_argument("--candidates", type=_positive, help="configs to try for each problem (default: all)")
    parser.add_argument("--again", action="store_true", help="measure anew what is stored already")
    parser.add_argument(
        "--store", type=Path, metavar="DIR", help="where configs are stored (default: your own, see configs show)"
    )
    parser.add_argument("--export", type=Path, metavar="DIR", help="also write the winners as files that ship")
    parser.set_defaults(command=tune)


def tune(arguments: argparse.Namespace) -> int:
    """`triton-conv tune`."""
    _require("tune", "tuning", "rich")
    from .tuning import commands_tune

    try:
        return commands_tune.tune(arguments)
    except (ValueError, OSError) as error:
        raise CommandError(str(error)) from error


# ---------------------------------------------------------------------------------------------------------------------
# bench


def _add_bench(sub: Any) -> None:
    parser = sub.add_parser(
        "bench",
        help="measure suites of layers against cuDNN on this GPU; a table, JSON, an HTML report and plots",
        description="Measures layers of published networks beside cuDNN and others, in one process on one device, and "
        "compares everybody's values with float64. Without a GPU it checks values of smaller layers on the CPU and "
        "prints predicted times. It needs a checkout. Exit code 1 if a value was wrong or something became slower.",
    )
    parser.add_argument("--suite", type=_suite, action="append", help="only this one, as in tune; may be repeated")
    parser.add_argument(
        "--op", choices=("fprop", "dgrad", "wgrad", "step"), action="append", help="only this one; may be repeated"
    )
    parser.add_argument("--dtype", type=_dtype, help=f"{_dtype_names()} (default: the suite's own)")
    parser.add_argument("--batch", type=_positive, help="images (default: the suite's own)")
    layout = parser.add_mutually_exclusive_group()
    layout.add_argument("--channels-last", action="store_true", default=None, help="memory format of our operands")
    layout.add_argument("--contiguous", action="store_false", dest="channels_last", help="the same")
    parser.add_argument("--quick", action="store_true", help="only the layers that take a network most of its time")
    parser.add_argument("--who", action="append", metavar="NAME", help="compare with this one only; may be repeated")
    parser.add_argument("--device", choices=(*DEVICES, "cuda"), help="predict times for this one, or measure (cuda)")
    parser.add_argument("--simulate", action="store_true", help="with made-up times, to try the rest; needs no GPU")
    parser.add_argument("--seconds", type=_duration, help="begin no layer after so many (default: no limit)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where files are written, and a run that was broken off is taken up (default: a new one in bench_results)",
    )
    parser.add_argument(
        "--compare", type=Path, nargs="+", metavar="FILE", help="with a bench.json; of two, the second with the first"
    )
    parser.set_defaults(command=bench)


def bench(arguments: argparse.Namespace) -> int:
    """`triton-conv bench`."""
    checkout = Path(__file__).parents[1]
    if not (checkout / "bench" / "commands.py").is_file():
        raise CommandError("bench needs a checkout of the repository: this package is installed without its benchmarks")
    _require("bench", "demo,tuning", "rich", "matplotlib", "jinja2")
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))  # processes that compile get the same
    from bench import commands

    try:
        return commands.bench(arguments)
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        raise CommandError(str(error)) from error


# ---------------------------------------------------------------------------------------------------------------------
# Shared


def _add_convolution(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    """A convolution by shapes and parameters."""
    for name, words, example in (
        ("input", "shape of the input, N x C x spatial", "8x64x56x56"),
        ("weight", "shape of the weight as PyTorch has it", "128x64x3x3"),
    ):
        parser.add_argument(name, type=_shape, nargs=nargs, help=f"{words}, for example {example}")
    parser.add_argument("--transposed", action="store_true", help="a transposed convolution")
    parser.add_argument("--stride", type=_ints, default=1, help="one value, or one per axis: 2,1 (default: 1)")
    parser.add_argument(
        "--padding",
        type=_padding,
        default=0,
        help='one value, one value or (lower, upper) pair per axis: 2:0,1, or "same" or "valid" (default: 0)',
    )
    parser.add_argument(
        "--output-padding", type=_ints, help="of a transposed convolution: one value, or one per axis (default: 0)"
    )
    parser.add_argument("--dilation", type=_ints, default=1, help="one value, or one per axis: 2,1 (default: 1)")
    parser.add_argument("--groups", type=_positive, default=1, help="groups of channels (default: 1)")
    parser.add_argument(
        "--padding-mode",
        type=_modes,
        default="zeros",
        help="zeros, reflect, replicate or circular, or one of them per axis: circular,zeros (default: zeros)",
    )
    parser.add_argument(
        "--out-dtype",
        type=_dtype,
        help="of float8_e4m3fn: bfloat16, float16 or float32 (default: bfloat16); int8 may be written as int32",
    )
    parser.add_argument(
        "--precision", choices=("ieee", "tf32", "tf32x3"), help="of float32 (default: as PyTorch is set)"
    )
    parser.add_argument("--bias", action="store_true", help="add a bias")


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto: a GPU if there is one and TRITON_INTERPRET is not set (default: %(default)s)",
    )


def _device(wanted: str) -> str:
    import torch

    from .execute import interpreting

    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() and not interpreting() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise CommandError("argument --device: PyTorch sees no CUDA device")
    return wanted


@contextmanager
def _one_thread(device: str) -> Iterator[None]:
    """On a CPU, inside, PyTorch computes in one thread.

    The tensors of these commands are too small for two: a training step of the demo was measured on two busy cores
    at 5 to 12 ms in one thread and 40 to 1500 ms in two, which spend it waiting for each other.
    """
    import torch

    threads = torch.get_num_threads()
    try:
        if device == "cpu":
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)


def _progress(items: Iterable[Any], total: int) -> Iterable[Any]:
    """A progress bar where tqdm is installed (and the output a terminal), else a line now and then."""
    try:
        from tqdm import tqdm
    except ImportError:
        for count, item in enumerate(items, start=1):
            yield item
            if count % 100 == 0:
                print(f"{count} of {total} cases")
    else:
        yield from tqdm(items, total=total, unit="case", disable=None, leave=False)


def _require(command: str, extra: str, *modules: str) -> None:
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise CommandError(
                f"{command} needs {error.name or module}: in a checkout, pip install -e '.[{extra}]'"
            ) from error


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def _positive(text: str) -> int:
    value = _whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def _count(text: str) -> int:
    value = _whole(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


def _dtypes() -> dict[str, Any]:
    from .check import DTYPES

    return {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


def _dtype_names() -> str:
    return ", ".join(_dtypes())


def _dtype(text: str) -> Any:
    dtypes = _dtypes()
    if text not in dtypes:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(dtypes)}")
    return dtypes[text]


def _dtype_or_float8(text: str) -> Any:
    import torch

    return torch.float8_e4m3fn if text == "float8_e4m3fn" else _dtype(text)


def _layer(text: str) -> str:
    from .tuning.layers import LAYERS

    if text not in LAYERS:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(LAYERS)}")
    return text


def _suite(text: str) -> str:
    from .tuning.suites import SUITES

    if text not in SUITES:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(SUITES)}")
    return text


def _duration(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds") from None
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def _model_input(text: str) -> tuple[tuple[int, ...], Any]:
    shape, _, dtype = text.partition(":")
    return _shape(shape), _dtype(dtype) if dtype else None


def _shape(text: str) -> tuple[int, ...]:
    sizes = text.split("x")
    if not all(size.isdecimal() for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape: write 8x64x56x56")
    return tuple(map(int, sizes))


def _ints(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not one value or one per axis: write 2 or 2,1") from None


def _padding(text: str) -> Any:
    if text in ("same", "valid"):
        return text
    try:
        axes = [tuple(int(side) for side in part.split(":")) for part in text.split(",")]
    except ValueError:
        axes = []
    if not axes or max(map(len, axes)) > 2:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a padding: write 1, or one value or (lower, upper) pair per axis as in 2:0,1, "
            "or same or valid"
        )
    return tuple(axis[0] if len(axis) == 1 else axis for axis in axes)


def _modes(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _known_device(text: str) -> Any:
    import torch

    from .execute import device_of

    if text == "cuda" and torch.cuda.is_available():
        return device_of(torch.device("cuda"))
    if text not in DEVICES:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not one of {', '.join(DEVICES)}, or cuda on a machine with a GPU"
        )
    return DEVICES[text]
