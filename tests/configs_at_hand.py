"""Entries, files and problems that tests of stored configs share."""

from functools import cache

import torch

from triton_conv import explain, key, plan, stored
from triton_conv.config import BoxConfig
from triton_conv.devices import H200
from triton_conv.stored import Candidate, Entry
from triton_conv.tuning.seed import filed

# Predicted to be as quick as the rule's, and none of them the rule's; the first ones are the simpler ones.
_BOXES = [(1, 1, 2, 64), (1, 1, 4, 32), (1, 1, 8, 16), (1, 1, 16, 8)]
CONFIGS = [BoxConfig(box, 64, K, num_stages=stages) for K, stages in ((64, 3), (32, 4)) for box in _BOXES]
TIME = "2026-03-01T12:00:00+00:00"


def problem(images=32, side=56, device=H200, title="forward", **options):
    """Of a layer whose kernel is box."""
    how = {"padding": 1, "dtype": torch.bfloat16, "channels_last": True, **options}
    return explain.problems((images, 64, side, side), (64, 64, 3, 3), device=device, **how)[title]


def stamp(of="box", time=TIME, **others):
    return {"kernel": key.source_hash(of), "triton": "3.7.1", "time": time, **others}


def entry(seconds, images=32, side=56, kernel="box", source="measured", **others):
    """Of the problem above; `seconds` by config, None for a config that was chosen and not measured."""
    what = _filed(images, side)
    candidates = [c if isinstance(c, Candidate) else Candidate(*c) for c in seconds]
    given = {"stamp": stamp(kernel), "baseline": {}, **others}
    return Entry(*what, source, given["stamp"], tuple(candidates), given["baseline"])


@cache
def _filed(images, side):
    with stored.hidden():
        return filed(plan.make(problem(images, side)))


def write(directory, entries, device="NVIDIA H200", kernel="box"):
    """Without the store, as an editor would."""
    path = stored.path_of(directory, device, kernel)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(entries if isinstance(entries, str) else stored.dumps(device, kernel, entries))
    stored.forget()
    return path
