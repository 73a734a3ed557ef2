"""Launches every kind of kernel by Triton's public way and by the direct one, with compiler and driver stubbed, and
prints what differed, as JSON; run by test_host.py in a process of its own, because interpreted kernels are launched
otherwise.
"""

import json

import torch
import triton
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

import triton_conv
from bench.host import stubbed
from triton_conv import activation_plan, causal_ops, conv_calls, execute, fast, plan, separable
from triton_conv.devices import H200
from triton_conv.kernels.direct import Direct
from triton_conv.kernels.launch import Box

DENSE = ((2, 64, 16, 16), (64, 64, 3, 3), {"padding": 1})
DEPTHWISE = ((2, 64, 16, 16), (64, 1, 3, 3), {"padding": 1, "groups": 64})
LAYERS = (  # input, weight, options, channels-last
    (*DENSE, True),
    (*DENSE, False),
    (*DEPTHWISE, True),
    (*DEPTHWISE, False),
    ((8, 64, 64, 64), (64, 1, 31, 31), {"padding": 15, "groups": 64}, False),
    ((2, 64, 16, 16), (64, 64, 3, 3), {"padding": 1, "padding_mode": "circular"}, True),
    ((2, 64, 16, 16), (64, 4, 3, 3), {"padding": 1, "groups": 16}, True),
    ((2, 3, 32, 32), (32, 3, 3, 3), {"padding": 1, "stride": 2}, False),
    ((2, 32, 100), (32, 32, 3), {"padding": ((2, 0),)}, False),
    ((1, 16, 4, 8, 8), (16, 16, 3, 3, 3), {"padding": 1}, True),
)


def described(arguments):
    """What a kernel is launched with, such that equal means the same: tensors by address, descriptors by fields."""
    found = []
    for value in arguments:
        if isinstance(value, torch.Tensor):
            found.append(("tensor", value.data_ptr(), value.dtype))
        elif isinstance(value, TensorDescriptor):
            fields = {name: field for name, field in vars(value).items() if name != "base"}
            found.append(("descriptor", value.base.data_ptr(), value.base.dtype, fields))
        else:
            found.append((type(value), value))
    return found


def of_kernel(launched):
    """(what was compiled, grid, stream, function and packed metadata, arguments): all but hooks and their metadata."""
    return launched[0], launched[1:7], described(launched[10:])


def others():
    """Plans of what is not remembered as a `fast.Bound`, each with words for it."""
    x, w, b, before = torch.empty(2, 8, 64), torch.empty(8, 4), torch.empty(8), torch.empty(2, 8, 3)
    for state in (None, before):
        yield "causal", causal_ops.forward_plan(x, w, b, state, True, H200, torch.empty_like(x))
        dy, dx = torch.empty_like(x), torch.empty_like(x)
        yield "causal backward", causal_ops.backward_plan(dy, x, w, b, state, True, H200, dx)
    one = torch.empty(2, 8, 1)
    yield "causal update", causal_ops.update_plan(one, before, w, b, True, H200, torch.empty_like(one))
    x, depthwise, pointwise = torch.empty(2, 8, 9, 9), torch.empty(8, 1, 3, 3), torch.empty(16, 8, 1, 1)
    first, second = separable._calls(x, depthwise, pointwise, None, None, [1, 1], [0] * 4, [1, 1], "zeros", None)
    yield "separable", separable.plan_of(first, second, pointwise, None, separable._empty(x, second), H200)
    x, w = (torch.empty(s).to(torch.float8_e4m3fn) for s in ((2, 64, 9, 9), (64, 64, 3, 3)))
    one = torch.ones(())
    scaled = conv_calls.conv_scaled_call(x, w, None, [1, 1], [0] * 4, [1, 1], 1, "zeros", one, one, torch.bfloat16)
    yield "scaled", plan.make(execute.problem_of(scaled, H200))
    problem = activation_plan.ActivationProblem(2 * 64 * 9 * 9, "bfloat16", "silu", 0.0, False, H200)
    yield "activation", activation_plan.make(problem)


def short_the_second_time() -> dict:
    """Whether public calls that are not remembered are launched directly from the second time on."""
    x, w, b = torch.empty(2, 8, 64), torch.empty(8, 4), torch.empty(8)
    eights = [torch.empty(s).to(torch.float8_e4m3fn) for s in ((2, 64, 9, 9), (64, 64, 3, 3))]
    one, state = torch.ones(()), torch.empty(2, 8, 3)
    image, filters = torch.empty(2, 8, 9, 9), (torch.empty(8, 1, 3, 3), torch.empty(16, 8, 1, 1))
    leaf, leaves = x.clone().requires_grad_(), image.clone().requires_grad_()
    dense, dy = torch.empty(8, 8, 3, 3), torch.empty(2, 8, 7, 7)
    calls = {
        "causal": lambda: triton_conv.causal_conv1d(x, w, b, "silu"),
        "causal backward": lambda: torch.autograd.grad(triton_conv.causal_conv1d(leaf, w, b), leaf, x),
        "causal update": lambda: triton_conv.causal_conv1d_update(x[..., 0], state, w, b),
        "separable": lambda: triton_conv.separable_conv2d(image, *filters, fused=True),
        "scaled": lambda: triton_conv.scaled_conv2d(*eights, one, one),
        "fused": lambda: triton_conv.conv2d(image, dense, activation="silu", residual=image[:, :, 2:, 2:]),
        "fused backward": lambda: torch.autograd.grad(triton_conv.conv2d(leaves, dense, activation="silu"), leaves, dy),
    }
    found = {}
    for name, call in calls.items():
        with stubbed(listed=True) as launched:
            call()
            first = [item[9] is None for item in launched]  # the chain of exit hooks, or else none
            del launched[:]
            call()
            found[name] = not any(first) and bool(launched) and all(item[9] is None for item in launched)
    return found


def differences() -> dict:
    wrong, kinds, boxes = [], set(), 0

    def look(plan, launched, where) -> None:
        nonlocal boxes
        tensors = {}
        for launch in plan.launches:
            for operand in filter(None, launch.operands):
                name = operand.operand if isinstance(operand, Box) else operand
                tensors.setdefault(name, torch.empty(64, dtype=getattr(torch, plan.dtypes[name])))
            launch.run(tensors)
            public = launched[-1]
            direct = Direct(launch)
            direct.run(tensors)
            moved = {name: torch.empty_like(t) for name, t in tensors.items()}
            before = len(launched)
            direct.run(moved)
            if len(launched) != min(before + 1, 100) or launched[-1][8:10] != (None, None):
                wrong.append(f"{launch.name} {where}: not launched directly")
            if of_kernel(launched[-1]) == of_kernel(public):
                wrong.append(f"{launch.name} {where}: other tensors, same arguments")
            direct.run(tensors)
            if of_kernel(launched[-1]) != of_kernel(public):
                wrong.append(f"{launch.name} {where}: {of_kernel(launched[-1])} is not {of_kernel(public)}")
            kinds.add(launch.name)
            boxes += any(isinstance(o, Box) for o in launch.operands)

    with stubbed(listed=True) as launched:
        for where, plan in others():
            look(plan, launched, where)
    for size, filters, options, channels_last in LAYERS:
        for dtype in (torch.bfloat16, torch.float32):
            last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(size), torch.contiguous_format)
            form = {"memory_format": last if channels_last else torch.contiguous_format}
            x = torch.empty(size, dtype=dtype).to(**form).requires_grad_()
            w = torch.empty(filters, dtype=dtype).to(**form).requires_grad_()
            bias = torch.empty(filters[0], dtype=dtype).requires_grad_()
            conv = getattr(triton_conv, f"conv{len(size) - 2}d")
            with stubbed(listed=True) as launched:
                y = conv(x, w, bias, **options)
                y.backward(torch.empty_like(y))
                for bound in list(fast._bound.values()):
                    look(bound.plan, launched, f"{bound.role.value} {dtype} {list(size)}")
    return {"wrong": wrong, "kinds": sorted(kinds), "boxes": boxes}


def public_where_it_must_be() -> dict:
    """Whether each of these makes a launch that was direct go the public way, where hooks are passed on."""
    x, w = torch.empty(2, 64, 16, 16), torch.empty(64, 64, 3, 3)
    calls, found = [], {}
    with stubbed(listed=True) as launched:
        triton_conv.conv2d(x, w)
        (bound,) = fast._bound.values()
        (direct,) = bound.launches
        tensors = {"x": x, "w": w, "y": torch.empty(2, 64, 14, 14)}

        def public() -> bool:
            direct.run(tensors)
            return launched[-1][9] is not None  # the chain of exit hooks, or else none

        direct.run(tensors)
        found["nothing"] = public()
        knobs.runtime.launch_enter_hook.add(calls.append)
        found["hook"] = public()
        knobs.runtime.launch_enter_hook.remove(calls.append)
        knobs.runtime.debug = True
        found["debug"] = public()
        knobs.runtime.debug = False
        direct.launch.kernel.add_pre_run_hook(lambda *args, **kwargs: None)
        found["pre-run hook"] = public()
        direct.launch.kernel.pre_run_hooks.clear()
        found["nothing again"] = public()
        aligned, tensors["x"] = launched[-1][0], torch.empty(2 * 64 * 16 * 16 + 1)[1:]
        found["unaligned"] = public()
        found["compiled for unaligned"] = launched[-1][0] != aligned
        tensors["x"] = x
        direct = Direct(direct.launch)
        direct._usable = False
        found["unknown Triton"] = public() and public()
    return found


if __name__ == "__main__":
    print(
        json.dumps(
            {
                "triton": triton.__version__,
                **differences(),
                "public": public_where_it_must_be(),
                "short": short_the_second_time(),
            }
        )
    )
