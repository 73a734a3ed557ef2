"""The GPUs that plans and predictions know, with their numbers and where each number comes from.

Data sheets quote most matrix rates "with sparsity": here they are halved. Documents, by the names used below:

    A100    NVIDIA A100 Tensor Core GPU Architecture, whitepaper (2020), tables 4 and 5; A100 80GB data sheet (2021)
    H100    NVIDIA H100 Tensor Core GPU Architecture, whitepaper (2022), tables 3 and 4; H100 data sheet (2023)
    H200    NVIDIA H200 data sheet (2024); the multiprocessors are H100's
    B200    NVIDIA HGX B200 specifications (2025), an eighth of each; Chips and Cheese, "Nvidia's B200" (2025)
    Ada     NVIDIA Ada GPU Architecture, whitepaper v2.1 (2023), appendix A
    RTX     NVIDIA RTX Blackwell GPU Architecture, whitepaper v1.1 (2025), appendix A
    CUDA    CUDA Programming Guide 13 (2025), memory information per compute capability
    Luo     Luo et al., Benchmarking and Dissecting the Nvidia Hopper GPU Architecture, arXiv 2402.13499 (2024)
"""

from __future__ import annotations

import re
from typing import NamedTuple

KB, MB = 2**10, 2**20


class Device(NamedTuple):
    """What plans and predictions need to know of a device.

    Rates are operations a second of the whole device, a multiplication and an addition counted apart; matrix rates
    are dense and accumulate in float32 (int8: int32), 0 where there is no such instruction. Sizes are in bytes,
    `registers` in 32-bit registers of a multiprocessor; bandwidths are bytes a second, reads and writes together.
    `measured_copy` and `measured_matrix` (of bfloat16) are what ideal loops reached; 0 where nobody measured.
    """

    name: str
    multiprocessors: int
    capability: int
    clock: float
    bandwidth: float
    l2_bytes: int
    l2_bandwidth: float
    shared_per_block: int
    shared_per_multiprocessor: int
    registers: int
    matrix_16: float
    matrix_tf32: float
    matrix_fp8: float
    matrix_int8: float
    matrix_64: float
    vector_32: float
    vector_64: float
    vector_int32: float
    source: str
    measured_copy: float = 0.0
    measured_matrix: float = 0.0


A100 = Device(
    name="NVIDIA A100",  # SXM, 80 GB
    multiprocessors=108,  # A100, table 4
    capability=80,  # A100, table 5
    clock=1.41e9,  # A100, table 4
    bandwidth=2.039e12,  # A100 80GB data sheet
    l2_bytes=40 * MB,  # A100, table 4
    l2_bandwidth=4.8e12,  # estimate: read on NVIDIA's developer forum (2021); A100 says 5120 bytes a clock, 7.2e12
    shared_per_block=163 * KB,  # CUDA
    shared_per_multiprocessor=164 * KB,  # CUDA
    registers=65536,  # A100, table 5
    matrix_16=312e12,  # A100, table 4
    matrix_tf32=156e12,  # A100, table 4
    matrix_fp8=0.0,  # A100, table 4: none
    matrix_int8=624e12,  # A100, table 4
    matrix_64=19.5e12,  # A100, table 4
    vector_32=19.5e12,  # A100, table 4
    vector_64=9.7e12,  # A100, table 4
    vector_int32=19.5e12,  # A100, table 4
    source="NVIDIA A100 whitepaper (2020), A100 80GB data sheet (2021), CUDA Programming Guide 13 (2025)",
)

H100 = Device(
    name="NVIDIA H100",  # SXM5, 80 GB
    multiprocessors=132,  # H100, table 3
    capability=90,  # H100, table 4
    clock=1.98e9,  # from vector_32, 256 operations a clock and multiprocessor; matrix rates are quoted at 1.83e9
    bandwidth=3.35e12,  # H100 data sheet
    l2_bytes=50 * MB,  # H100, table 3
    l2_bandwidth=7.8e12,  # estimate: Luo, table V, 4472 bytes a clock on an H800 PCIe of the same chip, at 1.755e9
    shared_per_block=227 * KB,  # CUDA
    shared_per_multiprocessor=228 * KB,  # CUDA
    registers=65536,  # H100, table 4
    matrix_16=989.4e12,  # H100 data sheet, 1979e12 with sparsity
    matrix_tf32=494.7e12,  # H100 data sheet, 989e12 with sparsity
    matrix_fp8=1978.9e12,  # H100 data sheet, 3958e12 with sparsity
    matrix_int8=1978.9e12,  # H100 data sheet, 3958e12 with sparsity
    matrix_64=66.9e12,  # H100 data sheet, 67e12
    vector_32=66.9e12,  # H100 data sheet, 67e12
    vector_64=33.5e12,  # H100 data sheet, 34e12
    vector_int32=33.5e12,  # H100, table 3: half as many integer units as float32 units
    source="NVIDIA H100 whitepaper (2022) and data sheet (2023), CUDA Programming Guide 13 (2025)",
)

H200 = H100._replace(
    name="NVIDIA H200",
    bandwidth=4.8e12,  # H200
    l2_bytes=60 * MB,  # as PyTorch reports it
    source="NVIDIA H200 data sheet (2024) and H100's; two ceilings measured on one H200",
    measured_copy=4.3e12,  # a device-to-device copy
    measured_matrix=798e12,  # the best of products of two 8192 x 8192 bfloat16 matrices: 769e12 to 798e12
)

B200 = Device(
    name="NVIDIA B200",
    multiprocessors=148,  # Chips and Cheese
    capability=100,  # CUDA
    clock=1.98e9,  # from vector_32, 256 operations a clock and multiprocessor
    bandwidth=7.7e12,  # B200
    l2_bytes=126 * MB,  # Chips and Cheese
    l2_bandwidth=8.7e12,  # estimate: H100's of a multiprocessor; no measurement was found
    shared_per_block=227 * KB,  # CUDA
    shared_per_multiprocessor=228 * KB,  # CUDA
    registers=65536,  # CUDA
    matrix_16=2250e12,  # B200, 4500e12 with sparsity
    matrix_tf32=1125e12,  # B200, 2250e12 with sparsity
    matrix_fp8=4500e12,  # B200, 9000e12 with sparsity
    matrix_int8=4500e12,  # B200, 9000e12 with sparsity
    matrix_64=37e12,  # B200
    vector_32=75e12,  # B200
    vector_64=37e12,  # B200
    vector_int32=37.5e12,  # estimate: half of float32, as on H100
    source="NVIDIA HGX B200 specifications (2025), Chips and Cheese (2025), CUDA Programming Guide 13 (2025)",
)

RTX_4090 = Device(
    name="NVIDIA GeForce RTX 4090",
    multiprocessors=128,  # Ada
    capability=89,  # CUDA
    clock=2.52e9,  # Ada
    bandwidth=1.008e12,  # Ada
    l2_bytes=72 * MB,  # Ada
    l2_bandwidth=5.2e12,  # estimate: 16 bytes a clock and multiprocessor
    shared_per_block=99 * KB,  # CUDA
    shared_per_multiprocessor=100 * KB,  # CUDA
    registers=65536,  # CUDA
    matrix_16=165.2e12,  # Ada
    matrix_tf32=82.6e12,  # Ada
    matrix_fp8=330.3e12,  # Ada
    matrix_int8=660.6e12,  # Ada
    matrix_64=1.29e12,  # Ada: a 64th of float32
    vector_32=82.6e12,  # Ada
    vector_64=1.29e12,  # Ada: a 64th of float32
    vector_int32=41.3e12,  # Ada
    source="NVIDIA Ada whitepaper v2.1 (2023), CUDA Programming Guide 13 (2025)",
)

RTX_5090 = Device(
    name="NVIDIA GeForce RTX 5090",
    multiprocessors=170,  # RTX
    capability=120,  # CUDA
    clock=2.407e9,  # RTX
    bandwidth=1.792e12,  # RTX
    l2_bytes=96 * MB,  # RTX
    l2_bandwidth=6.5e12,  # estimate: 16 bytes a clock and multiprocessor
    shared_per_block=99 * KB,  # CUDA
    shared_per_multiprocessor=100 * KB,  # CUDA
    registers=65536,  # CUDA
    matrix_16=209.5e12,  # RTX
    matrix_tf32=104.8e12,  # RTX
    matrix_fp8=419e12,  # RTX
    matrix_int8=838e12,  # RTX
    matrix_64=1.64e12,  # RTX: a 64th of float32
    vector_32=104.8e12,  # RTX
    vector_64=1.64e12,  # RTX: a 64th of float32
    vector_int32=104.8e12,  # RTX: as many integer units as float32 units
    source="NVIDIA RTX Blackwell whitepaper v1.1 (2025), CUDA Programming Guide 13 (2025)",
)

DEVICES = {"A100": A100, "H100": H100, "H200": H200, "B200": B200, "RTX4090": RTX_4090, "RTX5090": RTX_5090}


def of(
    name: str, multiprocessors: int, capability: int, clock: float = 0.0, bandwidth: float = 0.0, l2_bytes: int = 0
) -> Device:
    """The device of a GPU that calls itself `name`: a known one, or one scaled from the nearest of its capability.

        >>> of("NVIDIA H100 80GB HBM3", 132, 90).bandwidth
        3350000000000.0
        >>> of("NVIDIA H100 PCIe", 114, 90, bandwidth=2.0e12).source
        'scaled from NVIDIA H100'

    A known GPU has its own name in its name and all its multiprocessors. Numbers of another one scale with its
    multiprocessors and clock, except for those given; 0 says that one is unknown.
    """
    same = known(name, multiprocessors)
    if same is not None:
        return same._replace(name=name)
    nearest = max((d.capability for d in DEVICES.values() if d.capability <= capability), default=A100.capability)
    kin = min(
        (device for device in DEVICES.values() if device.capability == nearest),
        key=lambda device: abs(device.multiprocessors - multiprocessors),
    )
    scaled = _scaled(kin, name, multiprocessors, clock or kin.clock)
    return scaled._replace(
        capability=capability, bandwidth=bandwidth or scaled.bandwidth, l2_bytes=l2_bytes or scaled.l2_bytes
    )


def known(name: str, multiprocessors: int) -> Device | None:
    """The known GPU that calls itself `name`, None if it is none of them.

    >>> known("NVIDIA H100 80GB HBM3", 132).name
    'NVIDIA H100'
    """
    for device in DEVICES.values():
        product = device.name.removeprefix("NVIDIA ")
        if re.search(rf"\b{product}\b", name) and device.multiprocessors == multiprocessors:
            return device
    return None


def _scaled(device: Device, name: str, multiprocessors: int, clock: float) -> Device:
    """A device with other multiprocessors and clock; ceilings measured on this one do not hold for it."""
    share = multiprocessors / device.multiprocessors
    rates = [field for field in Device._fields if field.startswith(("matrix_", "vector_"))]
    return device._replace(
        name=name,
        multiprocessors=multiprocessors,
        clock=clock,
        bandwidth=device.bandwidth * share,
        l2_bytes=int(device.l2_bytes * share),
        l2_bandwidth=device.l2_bandwidth * share * clock / device.clock,
        source=f"scaled from {device.name}",
        measured_copy=0.0,
        measured_matrix=0.0,
        **{field: getattr(device, field) * share * clock / device.clock for field in rates},
    )


INTERPRETER = _scaled(H200, "Triton interpreter on the CPU", 4, H200.clock)
