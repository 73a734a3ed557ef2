"""Compiles plans of deformable convolutions for a target and prints what came out, as JSON; run by
test_deform_compile.py in processes of their own, because kernels that are being interpreted cannot be compiled.

    python tests/compile_deform.py sizes               compiled variants over fifty image sizes
    python tests/compile_deform.py code 90 float16     what the kernels of a dtype became
"""

import json
import sys

import torch

from triton_conv import deform_run
from triton_conv.deform_config import DeformRole
from triton_conv.geometry import ConvGeometry
from triton_conv.tuning.code import TARGETS, compiled_kernels, compiling_for, read


def plans(arch, image, dtype, precision="tf32", channels_last=True, C=64, K=64, offset_groups=1):
    g = ConvGeometry.forward((8, C, *image), (K, C, 3, 3), padding=((1, 1), (1, 1)))
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def tensor(*shape):
        return torch.empty(shape, dtype=dtype, device="meta").to(memory_format=layout)

    x, w, y = tensor(8, C, *image), tensor(K, C, 3, 3), tensor(8, K, *image)
    offset, mask = (tensor(8, n * 9 * offset_groups, *image) for n in (2, 1))
    for role in DeformRole:
        yield deform_run.plan(role, x, w, y, offset, mask, g, offset_groups, precision, TARGETS[arch])


def sizes() -> dict[str, int]:
    """How often each kernel was compiled for fifty image sizes, in both memory formats."""
    kernels = {}
    with compiling_for(90):
        for channels_last in (True, False):
            for size in range(40, 90):
                for plan in plans(90, (size, size + 3), torch.float16, channels_last=channels_last):
                    for launch, _ in compiled_kernels(plan):
                        kernels[launch.name] = launch.kernel
    return {name: sum(len(cache[0]) for cache in kernel.device_caches.values()) for name, kernel in kernels.items()}


def code(arch: str, dtype: str, precision: str = "tf32") -> list:
    """(kernel, C, K, offset groups, spilled bytes, matrix instruction, atomic instructions)."""
    found = []
    with compiling_for(int(arch)):
        for C, K, offset_groups in ((256, 256, 1), (64, 64, 4), (20, 36, 1)):
            for plan in plans(
                int(arch), (56, 56), getattr(torch, dtype), precision, C=C, K=K, offset_groups=offset_groups
            ):
                for launch, kernel in compiled_kernels(plan):
                    c = read(kernel, int(arch))
                    found.append((launch.name, C, K, offset_groups, c.spill_bytes, c.matrix, c.atomics))
    return found


if __name__ == "__main__":
    print(json.dumps({"sizes": sizes, "code": code}[sys.argv[1]](*sys.argv[2:])))
