"""The examples of a beginner's text, with their results written out."""

import pytest
import torch

import triton_conv


def image(*rows):
    return torch.tensor(rows).view(1, 1, len(rows), -1)


def test_a_5x5_image_of_zeros_and_ones_under_a_3x3_kernel():
    x = image([1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1], [0, 0, 1, 1, 0], [0, 1, 1, 0, 0])
    w = image([1, 0, 1], [0, 1, 0], [1, 0, 1])
    y = triton_conv.conv2d(x, w)
    assert y.dtype == torch.int64
    assert torch.equal(y, image([4, 3, 4], [2, 4, 3], [2, 3, 4]))


def test_a_vertical_edge_and_its_detector():
    x = image(*[[10, 10, 10, 0, 0, 0]] * 6)
    w = image(*[[1, 0, -1]] * 3)
    assert torch.equal(triton_conv.conv2d(x, w), image(*[[0, 30, 30, 0]] * 4))


def test_a_stride_of_two_takes_every_second_row_and_column():
    x = torch.arange(25).view(1, 1, 5, 5)
    w = image([0, 0, 0], [0, 1, 0], [0, 0, 0])
    assert torch.equal(triton_conv.conv2d(x, w, stride=2), image([6, 8], [16, 18]))


def test_a_dilation_of_two_looks_at_every_second_pixel():
    x = torch.arange(25).view(1, 1, 5, 5)
    assert torch.equal(triton_conv.conv2d(x, torch.ones(1, 1, 3, 3).long(), dilation=2), image([9 * 12]))


BORDERS = {
    "zeros": (
        [0, 0, 0, 0, 0, 0],
        [0, 1, 2, 3, 4, 0],
        [0, 5, 6, 7, 8, 0],
        [0, 9, 10, 11, 12, 0],
        [0, 13, 14, 15, 16, 0],
        [0, 0, 0, 0, 0, 0],
    ),
    "reflect": (
        [6, 5, 6, 7, 8, 7],
        [2, 1, 2, 3, 4, 3],
        [6, 5, 6, 7, 8, 7],
        [10, 9, 10, 11, 12, 11],
        [14, 13, 14, 15, 16, 15],
        [10, 9, 10, 11, 12, 11],
    ),
    "replicate": (
        [1, 1, 2, 3, 4, 4],
        [1, 1, 2, 3, 4, 4],
        [5, 5, 6, 7, 8, 8],
        [9, 9, 10, 11, 12, 12],
        [13, 13, 14, 15, 16, 16],
        [13, 13, 14, 15, 16, 16],
    ),
    "circular": (
        [16, 13, 14, 15, 16, 13],
        [4, 1, 2, 3, 4, 1],
        [8, 5, 6, 7, 8, 5],
        [12, 9, 10, 11, 12, 9],
        [16, 13, 14, 15, 16, 13],
        [4, 1, 2, 3, 4, 1],
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64], ids=str)
@pytest.mark.parametrize("mode", BORDERS)
def test_the_borders_of_a_4x4_image(mode, dtype):
    x = torch.arange(1, 17, dtype=dtype).view(1, 1, 4, 4)
    y = triton_conv.conv2d(x, torch.ones(1, 1, 1, 1, dtype=dtype), padding=1, padding_mode=mode)
    assert torch.equal(y, image(*BORDERS[mode]).to(dtype))


def test_one_border_for_rows_and_another_for_columns():
    x = torch.arange(1, 5).view(1, 1, 2, 2)
    w = torch.ones(1, 1, 1, 1).long()
    y = triton_conv.conv2d(x, w, padding=((1, 0), (0, 2)), padding_mode=("replicate", "circular"))
    assert torch.equal(y, image([1, 2, 1, 2], [1, 2, 1, 2], [3, 4, 3, 4]))


def test_same_padding_keeps_the_image_size():
    x = torch.arange(1, 10).view(1, 1, 3, 3)
    w = torch.ones(1, 1, 3, 3).long()
    assert torch.equal(triton_conv.conv2d(x, w, padding="same"), image([12, 21, 16], [27, 45, 33], [24, 39, 28]))
    even = torch.ones(1, 1, 2, 2).long()
    assert torch.equal(triton_conv.conv2d(x, even, padding="same"), image([12, 16, 9], [24, 28, 15], [15, 17, 9]))


def test_a_moving_sum_of_a_signal_that_knows_no_future():
    x = torch.tensor([[[1, 2, 3, 4, 5]]])
    w = torch.ones(1, 1, 3).long()
    assert torch.equal(triton_conv.conv1d(x, w, padding=((2, 0),)), torch.tensor([[[1, 3, 6, 9, 12]]]))


def test_two_channels_become_three():
    x = torch.stack([torch.ones(3, 3), 10 * torch.ones(3, 3)]).unsqueeze(0)
    w = torch.stack([torch.ones(2, 2, 2), torch.zeros(2, 2, 2), -torch.ones(2, 2, 2)])
    y = triton_conv.conv2d(x, w, torch.tensor([0.0, 1.0, 2.0]))
    assert y.shape == (1, 3, 2, 2)
    assert y[0, :, 0, 0].tolist() == [44, 1, -42]


def test_a_depthwise_separable_convolution():
    """Each channel under its own filter, then a 1x1 convolution over the channels."""
    x = torch.stack([torch.arange(1, 10).view(3, 3), torch.ones(3, 3).long()]).unsqueeze(0)
    depthwise = torch.stack([torch.eye(2).long(), torch.ones(2, 2).long()]).unsqueeze(1)
    y = triton_conv.conv2d(x, depthwise, groups=2)
    assert torch.equal(y, torch.tensor([[[[6, 8], [12, 14]], [[4, 4], [4, 4]]]]))
    pointwise = torch.tensor([[1, 1], [1, -1], [0, 2]]).view(3, 2, 1, 1)
    z = triton_conv.conv2d(y, pointwise)
    assert torch.equal(z[0], torch.tensor([[[10, 12], [16, 18]], [[2, 4], [8, 10]], [[8, 8], [8, 8]]]))


def test_a_transposed_convolution_spreads_each_pixel():
    x = image([1, 2], [3, 4])
    w = torch.ones(1, 1, 2, 2).long()
    spread = image([1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4])
    assert torch.equal(triton_conv.conv_transpose2d(x, w, stride=2), spread)
    overlapping = image([1, 3, 2], [4, 10, 6], [3, 7, 4])
    assert torch.equal(triton_conv.conv_transpose2d(x, w), overlapping)


def test_what_leaves_a_transposed_circular_convolution_comes_back_on_the_other_side():
    x = torch.tensor([[[1, 0, 0, 10]]])
    w = torch.ones(1, 1, 3).long()
    y = triton_conv.conv_transpose1d(x, w, padding=1, padding_mode="circular")
    assert torch.equal(y, torch.tensor([[[11, 1, 10, 11]]]))


def test_a_cube_of_ones():
    y = triton_conv.conv3d(torch.ones(1, 1, 3, 3, 3).long(), torch.ones(1, 1, 2, 2, 2).long())
    assert torch.equal(y, torch.full((1, 1, 2, 2, 2), 8))
