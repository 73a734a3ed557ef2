"""Which config runs what nobody has tuned: the rule's, unless another is predicted to take a good deal less time.

Rules are `config.default` and `config.default_box`, whose tiles are as large as compilers keep in registers: the
others are smaller, and so are the only ones worth a look where the rule's tiles are too few for the device.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any, TypeVar

from . import config as configs
from . import cost, tiles
from .config import ITEM_BYTES, BoxConfig, Config, DepthwiseConfig, KernelConfig
from .cost import Prediction
from .devices import Device
from .epilogue import PLAIN, Epilogue
from .geometry import ConvGeometry, Role

# Other tiles are another compilation, and predictions no measurements: they have to promise this much.
WORTH_LEAVING = 0.8

AnyConfig = TypeVar("AnyConfig", Config, BoxConfig)
SplitConfig = TypeVar("SplitConfig", bound=KernelConfig)


def quickest(
    kernel: str,
    rule: AnyConfig,
    geometry: ConvGeometry,
    role: Role,
    dtype: str,
    precision: str,
    device: Device,
    channels_last: bool,
    out_dtype: str | None = None,
    epilogue: Epilogue = PLAIN,
) -> AnyConfig:
    """The config of least predicted time around the rule's; of equals the first, which is the rule's.

    Smaller tiles are for problems that leave multiprocessors without a tile, and for devices on which the rule's do not
    fit: that many image sizes share few compiled kernels is worth more than a fuller last wave.
    """

    @cache
    def predicted(config: AnyConfig) -> Prediction:
        how = (dtype, precision, device, channels_last, out_dtype, epilogue)
        return cost.predict(geometry, role, kernel, config, *how)

    others: list[Any] = _other_splits(kernel, rule, geometry) if role is Role.WGRAD else []
    if predicted(rule).tiles < device.multiprocessors or not predicted(rule).resident:
        if isinstance(rule, Config):
            others += _smaller(rule, role, ITEM_BYTES[dtype], device)
        else:
            others += _smaller_boxes(rule, role, geometry)
    best = min(others, key=lambda config: predicted(config).seconds, default=rule)
    return best if predicted(best).seconds < WORTH_LEAVING * predicted(rule).seconds else rule


def fewer_slabs(config: SplitConfig) -> list[SplitConfig]:
    """The same config over half as many slabs, a quarter, down to one."""
    found: list[Any] = []
    splits = config.splits
    while splits > 1:
        splits //= 2
        found.append(replace(config, splits=splits))
    return found


def smallest(config: SplitConfig, dtype: str) -> SplitConfig:
    """A config of the same kind that asks for little of a device: small tiles, no or few stages, four warps.

    Kernels without stages keep theirs but for the lanes.
    """
    if isinstance(config, BoxConfig):
        n, k = min(config.BLOCK_N, 64), min(config.BLOCK_K, 64)
        return replace(config, BLOCK_N=n, BLOCK_K=k, num_warps=4, num_stages=2, programs=1)
    if isinstance(config, Config):
        most = 32 if config.dot else 16
        m, n, k = (min(side, most) for side in (config.BLOCK_M, config.BLOCK_N, config.BLOCK_K))
        k = max(k, configs.least_reduction(dtype)) if config.dot else k
        return replace(config, BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, num_warps=4, num_stages=1, filters_first=False)
    if isinstance(config, DepthwiseConfig):
        return replace(config, lanes=max(config.lanes // 4, 1), num_warps=4)
    return config


def _smaller(rule: Config, role: Role, item_bytes: int, device: Device) -> list[Config]:
    """Tiles of which one or both sides are halved or quartered, down to a copy of 16 bytes for each thread.

    Filters come first where they fill the 64 rows of a warp group's dot. Below sm_90, which has none, the compiler then
    copies only one operand asynchronously, and spills in input gradients of 32 pixels x 64 channels.
    """
    names = ("BLOCK_N", "BLOCK_K") if role is Role.WGRAD else ("BLOCK_M", "BLOCK_N")
    depth = rule.BLOCK_M if role is Role.WGRAD else rule.BLOCK_K
    least = max(16, 32 * rule.num_warps * 16 // (depth * item_bytes)) if rule.dot else 1
    found = []
    for parts in product((1, 2, 4), repeat=2):
        sides = {name: getattr(rule, name) // part for name, part in zip(names, parts, strict=True)}
        if parts != (1, 1) and min(sides.values()) >= least:
            first = rule.filters_first and sides["BLOCK_N"] >= 64 and device.capability >= 90
            found.append(replace(rule, **sides, filters_first=first))
    return found


def _smaller_boxes(rule: BoxConfig, role: Role, geometry: ConvGeometry) -> list[BoxConfig]:
    """Half the pixels or channels of an activation's tile, half of either side of a weight gradient's; a stage less."""
    stages, channels = (rule.num_stages, rule.num_stages - 1), sorted({rule.BLOCK_N, 64}, reverse=True)
    if role is Role.WGRAD:
        boxes, columns = [rule.box], sorted({rule.BLOCK_K, max(rule.BLOCK_K // 2, 16)}, reverse=True)
    else:
        half = configs.little_waste(tiles.positions(role, geometry), rule.BLOCK_M // 2)
        boxes, columns = [rule.box, half], [rule.BLOCK_K]
    options = product(stages, boxes, channels, columns)
    return [replace(rule, num_stages=s, box=box, BLOCK_N=n, BLOCK_K=k) for s, box, n, k in options][1:]


def _other_splits(kernel: str, rule: Any, geometry: ConvGeometry) -> list[Any]:
    """The rule's tiles over fewer slabs, or twice as many."""
    steps = cost.TILES[kernel](Role.WGRAD, geometry, replace(rule, splits=1)).longest
    most = configs.most_splits(geometry, steps)
    splits = {1, rule.splits // 4, rule.splits // 2, min(2 * rule.splits, most)} - {0, rule.splits}
    return [replace(rule, splits=s) for s in sorted(splits)]
