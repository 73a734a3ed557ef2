"""Which kernels plans pick for a case, whose numbers are checked on the way."""

import torch

from triton_conv import execute, plan
from triton_conv.cases import Case
from triton_conv.check import check_case


def kernels_of(case: Case, device: str) -> tuple[str, ...]:
    """What the plans of y, dx and dw run; the case is checked on the way."""
    with execute.recording() as calls:
        wrong = [r for r in check_case(case, 0, device) if not r.ok]
    assert not wrong, f"{case}: {wrong}"
    found = execute.device_of(torch.device(device))
    return tuple(plan.make(execute.problem_of(c, found)).kernel for c in calls)
