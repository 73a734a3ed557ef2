"""How close is close enough."""

import torch


def assert_close(actual, expected, depth):
    """Shape and dtype as expected, values within 10 * eps * sqrt(depth) of the largest; integers exactly.

    `depth` is the number of products summed into one element; `expected` may be of a wider dtype than `actual`, whose
    eps counts.
    """
    assert actual.shape == expected.shape
    exact = not (actual.is_floating_point() or actual.is_complex())
    if exact or expected.numel() == 0:
        assert torch.equal(actual, expected.to(actual.dtype))
        return
    atol = 10 * torch.finfo(actual.dtype).eps * max(depth, 1) ** 0.5 * expected.detach().abs().max().item()
    wide = torch.complex128 if expected.is_complex() else torch.float64
    assert actual.is_complex() == expected.is_complex()
    torch.testing.assert_close(actual.to(wide), expected.to(wide), rtol=0, atol=atol)
