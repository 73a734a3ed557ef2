"""Compiles plans for a target and prints what came out, as JSON; run by test_compile.py in processes of their own,
because kernels that are being interpreted cannot be compiled.

    python tests/compile_plans.py sizes        compiled variants over fifty image sizes
    python tests/compile_plans.py lengths      compiled variants over fifty lengths of causal convolutions
    python tests/compile_plans.py activations  the same of an activation's gradient, and which of them spill
    python tests/compile_plans.py streaming 90 what became of causal convolutions with a context
    python tests/compile_plans.py frames       compiled variants of these over sizes of chunks, contexts and images
    python tests/compile_plans.py classes 90   input gradients that forgot that a residue class may have no tap
"""

import itertools
import json
import re
import sys

import torch

from triton_conv import explain
from triton_conv.geometry import Axis
from triton_conv.tuning.code import TARGETS, compiled_kernels, compiling_for
from triton_conv.tuning.layers import BFLOAT16


def channels_last_plans(image):
    # runs of pixels know no border but zeros, which is what the weight gradient of a box wants
    return [*_plans_of(image, channels_last=True), explain.plans(*_dense(image), **BFLOAT16)["weight gradient"]]


def contiguous_plans(image):
    return _plans_of(image, channels_last=False)


def long_plans(image):
    options = BFLOAT16 | {"padding": 15, "channels_last": False}
    return explain.plans((8, 64, *image), (64, 1, 31, 31), groups=64, **options).values()


def _dense(image):
    return (8, 64, *image), (64, 64, 3, 3)


def _plans_of(image, channels_last: bool):
    options = BFLOAT16 | {"channels_last": channels_last}
    dense = explain.plans(*_dense(image), **options | {"padding_mode": "circular"})
    depthwise = explain.plans((8, 64, *image), (64, 1, 3, 3), groups=64, **options)
    return [*dense.values(), *depthwise.values()]


def sizes() -> dict[str, int]:
    """How often each kernel was compiled for fifty image sizes, per memory format and for long filters."""
    from triton_conv.kernels import (
        banded,
        banded_wgrad,
        box,
        box_wgrad,
        depthwise,
        depthwise_wgrad,
        fold,
        gather,
        wgrad,
    )

    counts = {}
    kernels = {
        "banded": banded.banded_kernel,
        "banded_wgrad": banded_wgrad.banded_wgrad_kernel,
        "box": box.box_kernel,
        "box_wgrad": box_wgrad.box_wgrad_kernel,
        "depthwise": depthwise.depthwise_kernel,
        "depthwise_wgrad": depthwise_wgrad.depthwise_wgrad_kernel,
        "gather": gather.gather_kernel,
        "wgrad": wgrad.wgrad_kernel,
        "fold": fold.fold_kernel,
    }
    with compiling_for(90):
        for layers in (channels_last_plans, contiguous_plans, long_plans):
            for kernel in kernels.values():
                kernel.device_caches.clear()
            for size in range(40, 90):
                for plan in layers((size, size + 3)):
                    list(compiled_kernels(plan))
            for name, kernel in kernels.items():
                counts[f"{name} {layers.__name__.removesuffix('_plans')}"] = sum(
                    len(cache[0]) for cache in kernel.device_caches.values()
                )
    return counts


def lengths() -> dict[str, int]:
    """How often each causal kernel was compiled for fifty lengths of sequence, per layout."""
    from triton_conv.kernels import causal, causal_backward

    def count(kernel) -> int:
        return sum(len(cache[0]) for cache in kernel.device_caches.values())

    counts, forward, backward = {}, causal.forward_kernel, causal_backward.backward_kernel
    with compiling_for(90):
        for layout in ("channels_last", "contiguous"):
            forward.device_caches.clear()
            backward.device_caches.clear()
            for length in range(300, 1300, 20):
                options = {"causal": True, "dtype": torch.bfloat16, "channels_last": layout == "channels_last"}
                for plan in explain.plans((2, 64, length + length // 20 % 5), (64, 4), **options).values():
                    list(compiled_kernels(plan))
            counts |= {f"forward {layout}": count(forward), f"backward {layout}": count(backward)}
        return counts | {"update": count(causal.update_kernel)}


def activations() -> dict:
    """How often an activation's gradient was compiled for fifty image sizes; which spill or move less than 16 bytes."""
    from triton_conv import activation_plan
    from triton_conv.kernels.activation import activation_backward_kernel as kernel
    from triton_conv.tuning.code import read

    def made(*problem):
        return activation_plan.make(activation_plan.ActivationProblem(*problem, TARGETS[90]))

    spills, narrow = [], []
    with compiling_for(90):
        for size in range(40, 90):
            list(compiled_kernels(made(8 * 64 * size * (size + 3), "bfloat16", "silu", 0.0, False)))
        variants = sum(len(cache[0]) for cache in kernel.device_caches.values())
        for dtype, activation in (("bfloat16", "gelu"), ("float32", "gelu_tanh"), ("float64", "leaky_relu")):
            ((_, compiled),) = compiled_kernels(made(2**20, dtype, activation, 0.1, False))
            code = read(compiled, 90)
            spills += [activation] if code.spills or code.spill_bytes else []
            narrow += [activation] if not (code.wide_loads and code.wide_stores) else []
    return {"variants": variants, "spills": spills, "narrow": narrow}


def classes(arch: int) -> list[str]:
    """Input gradients of strided and dilated convolutions in whose code nobody asks whether a class has a tap.

    That question is a division by `Axis.common`, an argument that is otherwise unused. The compiler may drop it when
    the main loop divides by the class's number of taps, which it would then take to be positive.
    """
    forgot = []
    for rank, K, dtype in itertools.product((1, 2, 3), (8, 64), (torch.float32, torch.bfloat16)):
        options = {"dtype": dtype, "channels_last": rank > 1, "padding": 2, "dilation": 2, "stride": 2}
        shapes = ((8, 64, *(21,) * rank), (K, 64, *(3,) * rank))
        plan = explain.plans(*shapes, device=TARGETS[arch], **options)["input gradient"]
        with compiling_for(arch):
            ((launch, kernel),) = compiled_kernels(plan)
        signature = re.search(
            rf"tt.func public @{launch.name}_kernel\((.*?)\) attributes", kernel.asm["ttgir"], re.DOTALL
        )[1]
        body = kernel.asm["ttgir"].split(signature, 1)[1]
        for axis in "dhw"[3 - rank :]:
            fields = re.findall(rf"(%axis_{axis}[\w.]*): i32", signature)
            common = fields[list(Axis._fields).index("common")]
            in_llvm = _argument_used(kernel.asm["llir"], signature, common)
            if not in_llvm or len(re.findall(rf"{re.escape(common)}\b", body)) == 0:
                forgot.append(f"rank {rank} K {K} {dtype} axis {axis}")
    return forgot


def _argument_used(llir: str, signature: str, argument: str) -> bool:
    """Whether the body of the kernel mentions an argument, by its number among the kernel's arguments."""
    number = list(re.findall(r"(%[\w.]+): ", signature)).index(argument)
    return re.search(rf"%{number}\b", llir.split("{\n", 1)[1]) is not None


def streaming(arch: int) -> dict[str, list]:
    """[kernel, steps that the loads of each loop with a dot run ahead, what is wrong] of plans with a context."""
    from triton_conv import streaming
    from triton_conv.tuning import audit, code

    options = {"padding": 1, "dtype": torch.bfloat16, "channels_last": True, "bias": True, "device": TARGETS[arch]}
    layers = {
        "zeros": options,
        "reflect": options | {"padding_mode": "reflect"},
        "contiguous": options | {"channels_last": False},
        "fused": options | {"activation": "silu", "residual": "after", "scale": True},
    }
    found = {}
    for name, layer in layers.items():
        plan = streaming.plans((1, 256, 4, 60, 104), (256, 256, 3, 3, 3), context=2, **layer)["forward"]
        with compiling_for(arch):
            ((launch, kernel),) = compiled_kernels(plan)
        wanted = audit._wanted(plan, launch, arch)
        row = audit.Row(arch, name, 1, "fprop", launch.name, plan.dtype, plan.config, wanted, code.read(kernel, arch))
        found[name] = [launch.name, code.steps_ahead(kernel.asm["ttgir"]), audit.faults(row)]
    return found


def frames() -> dict[str, int]:
    """How often kernels with a context are compiled for twenty-five sizes of chunks, contexts and images."""
    from triton_conv import streaming
    from triton_conv.kernels import box, gather

    counts = {}
    options = {"padding": 1, "dtype": torch.bfloat16, "channels_last": True}
    for name, kernel, arch in (("gather", gather.gather_kernel, 80), ("box", box.box_kernel, 90)):
        kernel.device_caches.clear()
        for size in range(3, 28):
            shapes = (1, 64, size, 64, 8 * size), (64, 64, 3, 3, 3)
            plan = streaming.plans(*shapes, context=2 + size // 9, device=TARGETS[arch], **options)["forward"]
            with compiling_for(arch):
                list(compiled_kernels(plan))
        counts[name] = sum(len(cache[0]) for cache in kernel.device_caches.values())
    return counts


if __name__ == "__main__":
    what, *arch = sys.argv[1:]
    print(
        json.dumps(
            {f.__name__: f for f in (sizes, lengths, activations, classes, streaming, frames)}[what](*map(int, arch))
        )
    )
