"""Plans of deformable convolutions: what they say, need and are predicted to take."""

import pickle
from dataclasses import replace
from math import prod

import pytest
import torch

from triton_conv import deform_plan, deform_run
from triton_conv.deform_config import DeformRole
from triton_conv.devices import A100, B200, H200
from triton_conv.geometry import ConvGeometry

X, W = (8, 256, 56, 56), (256, 256, 3, 3)


def plan(role=DeformRole.FORWARD, dtype=torch.float16, device=H200, last=True, x=X, w=W, offset_groups=1, mask=True):
    g = ConvGeometry.forward(x, w, padding=((1, 1), (1, 1)), groups=x[1] // w[1])
    layout = torch.channels_last if last else torch.contiguous_format

    def tensor(shape):
        return torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)

    N, _, H, W = x
    y, offset, masks = (tensor((N, n, H, W)) for n in (w[0], 18 * offset_groups, 9 * offset_groups))
    what = (tensor(x), tensor(w), y, offset, masks if mask else None)
    return deform_run.plan(role, *what, g, offset_groups, "tf32", device)


@pytest.mark.parametrize("device", [A100, H200, B200], ids=lambda d: d.name)
@pytest.mark.parametrize("role", DeformRole)
def test_no_prediction_beats_the_roofline(role, device):
    for dtype in (torch.float16, torch.float32, torch.float64):
        p = plan(role, dtype, device)
        assert p.seconds > p.roofline.seconds
        assert p.prediction.useful <= 1
        assert p.limit in ("main loop", "L2", "memory")


def test_a_roofline_counts_every_tensor_and_every_product():
    forward, offset = plan(), plan(DeformRole.OFFSET)
    x, pixels = prod(X), 8 * 56 * 56
    assert forward.roofline.flops == 2 * pixels * 256 * 256 * 9
    assert forward.roofline.bytes == 2 * (2 * x + prod(W) + pixels * 27)
    assert offset.roofline.bytes - forward.roofline.bytes == 2 * pixels * 27
    assert forward.roofline.bytes - plan(mask=False).roofline.bytes == 2 * pixels * 9


def test_columns_would_take_more_than_any_workspace():
    columns = 9 * prod(X) * 2
    for role in DeformRole:
        assert plan(role).workspace_bytes < columns / 4
    assert plan().workspace_bytes == plan(DeformRole.OFFSET).workspace_bytes == 0


def test_tensors_apart_in_memory_are_copied():
    assert plan().packs == ()
    p = plan(last=False)
    assert p.packs == ("x", "w")
    assert p.workspace_bytes == 2 * (prod(X) + prod(W))
    assert p.seconds > p.prediction.seconds
    assert plan(DeformRole.INPUT, last=False).packs == ("w", "y")
    assert plan(DeformRole.WEIGHT, last=False).packs == ("x", "w", "y")
    assert plan(last=False, x=(8, 3, 56, 56), w=(64, 3, 3, 3)).packs == ()  # three channels are no vector


def test_what_a_plan_says():
    p = plan(DeformRole.INPUT, last=False, offset_groups=4)
    for words in (
        "kernel     deform_dgrad (input gradient)",
        "offset groups 4, mask",
        "float16 products, float32 accumulator, 32-bit offsets",
        "copy w to channels_last; copy y to channels_last",
        "output pixels sorted by where they sample",
        "no atomics",
    ):
        assert words in str(p)
    assert "copy dw from channels_last" in str(plan(DeformRole.WEIGHT, last=False))


def test_offsets_are_wide_where_extents_need_it():
    assert plan(x=(8, 256, 1024, 1024)).numerics.index_bits == 64
    assert plan().numerics.index_bits == 32


def test_plans_travel_and_are_found_again():
    p = plan()
    assert pickle.loads(pickle.dumps(p)) == p
    assert deform_plan.make(p.asked) is p
    assert deform_plan.with_config(p.asked, p, replace(p.config, num_stages=3)).config.num_stages == 3


def test_a_dtype_without_kernels():
    with pytest.raises(NotImplementedError, match="no kernel for x of int32"):
        plan(dtype=torch.int32)


def test_images_of_more_cells_than_are_sorted():
    huge = (1, 256, 46340, 46341)
    assert plan(x=huge).numerics.index_bits == 64
    with pytest.raises(NotImplementedError, match="sorted as 32-bit numbers"):
        plan(DeformRole.INPUT, x=huge)
