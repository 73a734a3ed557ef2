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
from triton_conv import fast
from triton_conv.kernels import launch as launches

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


def differences() -> dict:
    wrong, kinds, boxes = [], set(), 0
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
                for bound in fast._bound.values():
                    tensors = {}
                    for launch in bound.plan.launches:
                        for operand in filter(None, launch.operands):
                            name = operand.operand if isinstance(operand, launches.Box) else operand
                            kind = getattr(torch, bound.plan.dtypes[name])
                            tensors.setdefault(name, torch.empty(64, dtype=kind))
                        where = f"{launch.name} {bound.role.value} {dtype} {list(size)}"
                        launch.run(tensors)
                        public = launched[-1]
                        direct = launches.Direct(launch)
                        direct.run(tensors)
                        moved = {name: torch.empty_like(t) for name, t in tensors.items()}
                        before = len(launched)
                        direct.run(moved)
                        if len(launched) != min(before + 1, 100) or launched[-1][8:10] != (None, None):
                            wrong.append(f"{where}: not launched directly")
                        if of_kernel(launched[-1]) == of_kernel(public):
                            wrong.append(f"{where}: other tensors, same arguments")
                        direct.run(tensors)
                        if of_kernel(launched[-1]) != of_kernel(public):
                            wrong.append(f"{where}: {of_kernel(launched[-1])} is not {of_kernel(public)}")
                        kinds.add(launch.name)
                        boxes += any(isinstance(o, launches.Box) for o in launch.operands)
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
        direct = launches.Direct(direct.launch)
        direct._usable = False
        found["unknown Triton"] = public() and public()
    return found


if __name__ == "__main__":
    print(json.dumps({"triton": triton.__version__, **differences(), "public": public_where_it_must_be()}))
