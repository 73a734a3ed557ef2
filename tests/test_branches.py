"""Several convolutions in one launch: values, gradients, operators, plans, modules, errors, code."""

from itertools import product

import pytest
import torch
from torch import nn
from torch.nn import functional

import triton_conv
from triton_conv import Branch, branches, branches_cost, branches_plan, config, multi_conv2d
from triton_conv.branches_ops import multi_conv, multi_conv_dgrad
from triton_conv.check import tolerance
from triton_conv.tuning import audit
from triton_conv.tuning.code import TARGETS

H200 = config.DEVICES["H200"]


# Weight shapes and arguments of branches, and the input. All with bias but every third.
CASES = {
    "pyramid": (
        (1, 16, 7, 6),
        [
            ((16, 16, 1, 1), {}),
            ((8, 16, 3, 3), {"padding": 3, "dilation": 3}),
            ((16, 16, 3, 3), {"padding": 6, "dilation": 6}),
        ],
    ),
    "slices": (
        (1, 48, 5, 6),
        [
            ((16, 16, 3, 3), {"padding": "same", "channels": (32, 16)}),
            ((16, 32, 1, 3), {"padding": (0, (2, 0)), "channels": (0, 32)}),
        ],
    ),
    "stride": (
        (1, 16, 6, 8),
        [
            ((16, 16, 3, 3), {"padding": 1, "stride": 2}),
            ((16, 16, 1, 1), {"stride": 2}),
            ((16, 16, 5, 5), {"padding": 2, "stride": 2}),
        ],
    ),
    "groups": (
        (1, 32, 4, 5),
        [((32, 16, 3, 3), {"padding": 1, "groups": 2}), ((32, 16, 1, 1), {"groups": 2})],
    ),
    "odd": (
        (2, 5, 6, 5),
        [((7, 5, 2, 3), {"padding": ((1, 0), 1)}), ((3, 4, 1, 1), {"channels": (1, 4)})],
    ),
}


def of_one_width(case):
    """The same branches with as many output channels each, for sums."""
    shape, given = CASES[case]
    width = given[0][0][0]
    return shape, [((width, *weight[1:]), how) for weight, how in given]


def operands(shape, given, dtype, channels_last=False, bias=True, device="cpu"):
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(shape).to(device, dtype).contiguous(memory_format=layout)
    weights = [torch.randn(w).to(device, dtype).contiguous(memory_format=layout) for w, _ in given]
    biases = [torch.randn(w[0]).to(device, dtype) if bias and i % 3 != 2 else None for i, (w, _) in enumerate(given)]
    return x, weights, biases


def made(given, weights, biases):
    return [Branch(w, b, **how) for (_, how), w, b in zip(given, weights, biases, strict=True)]


def plainly(x, given, weights, biases, combine):
    """The composition, by torch.nn.functional."""
    parts = []
    for (_, how), w, b in zip(given, weights, biases, strict=True):
        options = dict(how)
        first, count = options.pop("channels", (0, x.shape[1]))
        pads = options.pop("padding", 0)
        source = x[:, first : first + count]
        if isinstance(pads, tuple):
            pairs = [p if isinstance(p, tuple) else (p, p) for p in pads]
            source, pads = functional.pad(source, [n for pair in reversed(pairs) for n in pair]), 0
        parts.append(functional.conv2d(source, w, b, padding=pads, **options))
    return torch.cat(parts, 1) if combine == "concatenate" else sum(parts[1:], parts[0])


def wide(tensors):
    return [None if t is None else t.detach().cpu().double().requires_grad_() for t in tensors]


def check(case, combine, dtype, channels_last, kernels, launched):
    shape, given = CASES[case] if combine == "concatenate" else of_one_width(case)
    x, weights, biases = operands(shape, given, dtype, channels_last, device=kernels)
    leaves = [x.requires_grad_()]
    if case in ("slices", "odd"):  # the others' weight gradients are the same operator
        leaves += [t.requires_grad_() for t in (*weights, *(b for b in biases if b is not None))]
    y = multi_conv2d(x, made(given, weights, biases), combine=combine, one_launch=True)
    (kernel,) = launched
    wx, *ws = wide([x, *weights])
    bs = wide(biases)
    wanted = plainly(wx, given, ws, bs, combine)
    depth = sum(w[0].numel() for w in weights) if combine == "sum" else max(w[0].numel() for w in weights)
    bound = tolerance(wanted, depth, dtype, "ieee", torch.device("cpu"))
    assert y.shape == wanted.shape
    assert y.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    assert ((y.cpu().double() - wanted).abs() <= bound).all()
    dy = torch.randn(y.shape).to(dtype)
    gradients = torch.autograd.grad(y, leaves, dy.to(kernels))
    every = [wx, *ws, *(b for b in bs if b is not None)]
    expected = torch.autograd.grad(wanted, every[: len(leaves)], dy.double())
    pixels = y.shape[0] * y.shape[2] * y.shape[3]
    for got, want, leaf in zip(gradients, expected, leaves, strict=True):
        depth = sum(w[:, 0].numel() for w in weights) if leaf is x else pixels
        bound = tolerance(want, depth, dtype, "ieee", torch.device("cpu"))
        assert got.shape == want.shape
        if leaf is x and case == "odd":  # slices that overlap: what each branch adds is rounded by itself
            bound = bound + torch.finfo(dtype).eps * want.abs().max()
        assert ((got.cpu().double() - want).abs() <= bound).all()
    return kernel


FAST = [
    ("pyramid", "concatenate", torch.bfloat16, True),
    ("pyramid", "sum", torch.float16, True),
    ("pyramid", "concatenate", torch.float32, False),
    ("slices", "concatenate", torch.float16, True),
    ("slices", "sum", torch.float64, True),
    ("stride", "concatenate", torch.bfloat16, True),
    ("stride", "sum", torch.bfloat16, False),
    ("groups", "concatenate", torch.float16, True),
    ("odd", "concatenate", torch.float64, True),
    ("odd", "sum", torch.float32, False),
]
SLOW = product(CASES, ("concatenate", "sum"), ((torch.float16, True), (torch.bfloat16, False), (torch.float64, True)))
EVERY = dict.fromkeys(FAST, ()) | {
    (*way[:2], *way[2]): pytest.mark.slow for way in SLOW if (*way[:2], *way[2]) not in FAST
}


@pytest.mark.parametrize(
    ("case", "combine", "dtype", "channels_last"), [pytest.param(*way, marks=marks) for way, marks in EVERY.items()]
)
def test_values_and_gradients(case, combine, dtype, channels_last, kernels, poisoned, launched):
    """Against float64; boxes where they can be, or what gathers."""
    kernel = check(case, combine, dtype, channels_last, kernels, launched)
    boxed = dtype in (torch.float16, torch.bfloat16) and channels_last and case != "odd"
    if not torch.cuda.is_available():
        assert kernel == ("box_branches" if boxed else "gather_branches")


def test_contiguous_activations_are_copied_for_boxes(kernels, poisoned, launched, monkeypatch):
    """Where it is predicted to pay, which it is not for tensors as small as these."""
    monkeypatch.setattr(branches_plan, "_make", branches_plan._make.__wrapped__)
    monkeypatch.setattr(branches_plan.choose, "WORTH_LEAVING", float("inf"))
    kernel = check("slices", "concatenate", torch.float16, False, kernels, launched)
    assert kernel == "box_branches" or torch.cuda.is_available()
    x = torch.empty(1, 16, 6, 5, device="meta", dtype=torch.float16)
    weight = torch.empty(16, 16, 1, 1, device="meta", dtype=torch.float16)
    calls = branches.branches_ops._forward(x, [weight], [None], flat([((16, 16, 1, 1), {})], 16))
    (plan,) = branches._of(calls, branches.branches_run.empty_output(calls), H200, True).values()
    assert plan.steps == ("copy the input to channels-last", "copy the output from channels-last")
    assert plan.workspace_bytes == 2 * 16 * 30 * 2


def test_nine_branches_are_two_launches(kernels, poisoned, launched):
    given = [((3, 4, 1, 1), {})] * 9
    x, weights, biases = operands((1, 4, 3, 2), given, torch.float32, device=kernels)
    y = multi_conv2d(x, made(given, weights, biases), one_launch=True)
    assert launched == ["gather_branches"] * 2
    torch.testing.assert_close(y, plainly(x, given, weights, biases, "concatenate"))
    other = torch.randn_like(x)  # a call like one made before
    again = multi_conv2d(other, made(given, weights, biases), one_launch=True)
    torch.testing.assert_close(again, plainly(other, given, weights, biases, "concatenate"))


@pytest.mark.parametrize("combine", ["concatenate", "sum"])
def test_one_by_one_computes_the_same(combine, kernels, poisoned, launched):
    shape, given = of_one_width("slices")
    x, weights, biases = operands(shape, given, torch.float32, True, device=kernels)
    y = multi_conv2d(x, made(given, weights, biases), combine=combine, one_launch=False)
    assert not [name for name in launched if name.endswith("branches")]
    torch.testing.assert_close(y, plainly(x, given, weights, biases, combine), rtol=1e-4, atol=1e-4)


def test_channels_that_nobody_reads_have_a_gradient_of_zero(kernels, poisoned, launched):
    x = torch.randn(1, 6, 3, 3, device=kernels, requires_grad=True)
    w = torch.randn(5, 2, 3, 3, device=kernels)
    reads = [Branch(w, padding=1, channels=(3, 2)), Branch(w, padding=1, channels=(0, 2))]
    multi_conv2d(x, reads, one_launch=True).sum().backward()
    assert launched == ["gather_branches"] * 2
    assert (x.grad[:, [2, 5]] == 0).all()
    assert (x.grad[:, [0, 1, 3, 4]] != 0).all()


def test_far_taps_are_left_out(kernels, launched):
    """An infinite weight times the zeros around the image would be NaN."""
    x = torch.randn(1, 16, 4, 4, device=kernels)
    w = torch.randn(2, 16, 3, 3, device=kernels)
    w[:, :, 0] = torch.inf
    assert multi_conv2d(x, [Branch(w, padding=9, dilation=9)], one_launch=True).isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# Operators


def flat(given, C, combine="concatenate"):
    weights = [torch.empty(w, device="meta") for w, _ in given]
    return branches._params("multi_conv2d", C, made(given, weights, [None] * len(weights)), combine, None, None)


@pytest.mark.parametrize(("case", "combine"), [("pyramid", "concatenate"), ("odd", "sum")])
def test_gradients_of_any_order(case, combine):
    (_, C, *_), given = of_one_width(case)
    given = [((2, *w[1:]), how) for w, how in given]
    x, weights, biases = operands((1, C, 3, 3), given, torch.float64)
    weights = [w.requires_grad_() for w in weights]
    biases = [None if b is None else b.requires_grad_() for b in biases]

    def f(x, first, bias):
        return multi_conv2d(x, made(given, [first, *weights[1:]], [bias, *biases[1:]]), combine=combine)

    inputs = (x[:, :, :3].requires_grad_(), weights[0], biases[0])
    assert torch.autograd.gradcheck(f, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


@pytest.mark.parametrize("combine", ["sum", pytest.param("concatenate", marks=pytest.mark.slow)])
def test_opcheck(combine):
    (N, C, *image), given = of_one_width("odd")
    x, weights, biases = operands((N, C, *image), given, torch.float32)
    params = flat(given, C, combine)
    leaves = [w.requires_grad_() for w in weights]
    torch.library.opcheck(multi_conv, (x.requires_grad_(), leaves, biases, *params))
    y = multi_conv(x, leaves, biases, *params).detach().requires_grad_()
    torch.library.opcheck(multi_conv_dgrad, (y, leaves, list(x.shape), *params))


def test_compiled_and_transformed():
    _, given = CASES["odd"]
    x, weights, biases = operands((2, 5, 4, 5), given, torch.float32)
    leaves = [x.requires_grad_(), *(w.requires_grad_() for w in weights)]

    def f(x, *weights):
        return multi_conv2d(x, made(given, weights, biases))

    y = f(*leaves)
    wanted = torch.autograd.grad(y.square().sum(), leaves)
    z = torch.compile(f, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(z, y)
    for got, want in zip(torch.autograd.grad(z.square().sum(), leaves), wanted, strict=True):
        torch.testing.assert_close(got, want)
    each = torch.vmap(f, (0, None, 3))(x.unsqueeze(1), weights[0], weights[1].unsqueeze(3).expand(3, 4, 1, 2, 1))
    torch.testing.assert_close(each.squeeze(1), y)
    params = flat(given, 5)
    dx = torch.vmap(lambda y: multi_conv_dgrad(y, weights, [1, 5, 4, 5], *params))(y.unsqueeze(1))
    torch.testing.assert_close(dx.squeeze(1), multi_conv_dgrad(y, weights, [2, 5, 4, 5], *params))
    got = torch.func.grad(lambda *leaves: f(*leaves).square().sum(), argnums=(0, 1, 2))(*leaves)
    torch.testing.assert_close(got, wanted)
    _, tangent = torch.func.jvp(lambda x: f(x, *weights), (x,), (x,))
    torch.testing.assert_close(tangent, y - f(torch.zeros_like(x), *weights))


def test_autocast_and_unbatched():
    _, given = CASES["odd"]
    x, weights, biases = operands((2, 5, 4, 5), given, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert multi_conv2d(x, made(given, weights, biases)).dtype == torch.bfloat16
    assert multi_conv2d(x[0], made(given, weights, biases)).shape == (10, 4, 5)
    assert multi_conv2d(x[:0], made(given, weights, biases)).shape == (0, 10, 4, 5)
    assert multi_conv2d(x.to(torch.complex64), [Branch(weights[0].to(torch.complex64))]).is_complex()


ERRORS = {
    "extents": (
        [Branch(torch.randn(2, 4, 3, 3)), Branch(torch.randn(2, 4, 1, 1))],
        {},
        RuntimeError,
        "same output ext",
    ),
    "channels": ([Branch(torch.randn(2, 2, 1, 1), channels=(3, 2))], {}, RuntimeError, "reads 2 channels from 3 on"),
    "widths": ([Branch(torch.randn(k, 4, 1, 1)) for k in (2, 3)], {"combine": "sum"}, RuntimeError, "branch 1 .*3, 5"),
    "weight": ([Branch(torch.randn(2, 3, 1, 1))], {}, RuntimeError, "to have 3 channels, but got 4"),
    "none": ([], {}, RuntimeError, "at least one branch"),
    "kind": ([torch.randn(2, 4, 1, 1)], {}, TypeError, "must be a sequence of Branch"),
    "combine": ([Branch(torch.randn(2, 4, 1, 1))], {"combine": "mean"}, ValueError, "combine='mean'"),
    "one_launch": ([Branch(torch.randn(2, 4, 1, 1))], {"one_launch": 1}, TypeError, "must be bool or None"),
    "dtype": ([Branch(torch.randn(2, 4, 1, 1).half())], {}, RuntimeError, "should be the same"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    given, options, kind, words = ERRORS[name]
    with pytest.raises(kind, match=words):
        multi_conv2d(torch.randn(1, 4, 5, 5), given, **options)


def test_what_one_launch_cannot_do(kernels):
    x, depthwise = torch.randn(1, 4, 3, 3, device=kernels), torch.randn(4, 1, 3, 3, device=kernels)
    mixed = [Branch(depthwise, padding=1, groups=4), Branch(depthwise, padding=1, groups=4)]
    with pytest.raises(RuntimeError, match="too narrow for a dot"):
        multi_conv2d(x, mixed, one_launch=True)
    wanted = functional.conv2d(x, depthwise, padding=1, groups=4)
    torch.testing.assert_close(multi_conv2d(x, mixed), torch.cat((wanted, wanted), 1))


# ---------------------------------------------------------------------------------------------------------------------
# Plans


def pyramid(C, K, rates):
    dilated = (((K, C, 3, 3), {"padding": rate, "dilation": rate}) for rate in rates)
    return (((K, C, 1, 1), {}), *dilated)


def planned(shape, given, **options):
    what = {"dtype": torch.bfloat16, "channels_last": True, "bias": True} | options
    return branches.plans(shape, given[0][0], branches=given, **what)


def test_the_pyramid_of_deeplab():
    found = planned((16, 2048, 33, 33), pyramid(2048, 256, (6, 12, 18)))
    assert list(found)[:2] == ["forward", "input gradient"]
    forward = found["forward"]
    assert forward.kernel == "box_branches"
    assert forward.order[-1].number == 0  # the 1x1 has the shortest tiles
    assert forward.worth_it
    assert forward.roofline.seconds < forward.seconds < forward.apart_seconds
    assert "launches, one for each branch" in str(forward)


def test_taps_that_meet_nothing_are_no_steps():
    """Of a tile that is all of the image, at a dilation of its height, one tap of nine meets it."""
    given = (((64, 64, 3, 3), {"padding": 8, "dilation": 8}),)
    plan = planned((128, 64, 8, 8), given)["forward"]
    tiles = branches_cost.steps(plan.problem, plan.order[0], config.BoxConfig((2, 1, 8, 8), 64, 64))
    assert tiles.steps == tiles.total
    near = planned((128, 64, 8, 8), (((64, 64, 3, 3), {"padding": 1}),))["forward"]
    tiles = branches_cost.steps(near.problem, near.order[0], config.BoxConfig((2, 1, 8, 8), 64, 64))
    assert tiles.steps == 9 * tiles.total


def test_filters_that_are_not_channels_last_are_copied_for_boxes():
    x = torch.empty(2, 64, 8, 8, device="meta", dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    weights = [torch.empty(16, 64, n, n, device="meta", dtype=torch.bfloat16) for n in (1, 3)]
    params = flat([((16, 64, 1, 1), {}), ((16, 64, 3, 3), {"padding": 1})], 64)
    calls = branches.branches_ops._forward(x, weights, [None, None], params)
    (plan,) = branches._of(calls, branches.branches_run.empty_output(calls), H200, True).values()
    assert plan.packs == (1,)
    assert plan.workspace_bytes == weights[1].numel() * 2
    assert "copy the filters of branches 1 to channels-last" in str(plan)


def test_what_one_launch_takes_longer_for_is_planned_apart():
    """Groups of four channels: alone several of them are computed as one."""
    given = tuple(((128, 4, 3, 3), {"padding": d, "dilation": d, "groups": 32}) for d in (1, 2))
    how = {"dtype": torch.bfloat16, "channels_last": True, "branches": given}
    apart = branches.plans((64, 128, 56, 56), (128, 4, 3, 3), **how)
    (_, together), *_ = branches.plans((64, 128, 56, 56), (128, 4, 3, 3), **how, one_launch=True).items()
    assert [name for name in apart if name.startswith("forward")] == ["forward of branch 0", "forward of branch 1"]
    assert not together.worth_it
    assert together.comparison in apart["forward of branch 1"].reason


def test_whether_one_launch_runs_depends_on_no_batch_where_that_is_asked():
    """`batch_invariant` plans for a batch of 8; alone, one sample would go in one launch."""
    shapes = [(N, 256, 28, 28) for N in (1, 8, 64)]
    given = tuple(((256, 8, 3, 3), {"padding": d, "dilation": d, "groups": 32}) for d in (1, 2))
    how = {"dtype": torch.bfloat16, "channels_last": True, "branches": given}
    assert len({tuple(branches.plans(shape, (256, 8, 3, 3), **how)) for shape in shapes}) == 2
    with triton_conv.batch_invariant():
        assert len({tuple(branches.plans(shape, (256, 8, 3, 3), **how)) for shape in shapes}) == 1


def test_offsets_are_as_wide_as_the_tensors_are_large():
    small, large = (planned((N, 64, 64, 64), pyramid(64, 16, (2,))) for N in (2, 16384))
    assert small["forward"].numerics.index_bits == 32
    assert large["forward"].numerics.index_bits == 64


def test_what_cannot_be_one_launch_has_a_plan_for_each_branch():
    given = (((8, 1, 3, 3), {"padding": 1, "groups": 8}), ((8, 1, 5, 5), {"padding": 2, "groups": 8}))
    found = planned((2, 8, 9, 9), given)
    assert [found[f"forward of branch {i}"].kernel for i in (0, 1)] == ["depthwise"] * 2


def test_a_batch_invariant_plan_is_that_of_another_batch():
    with triton_conv.batch_invariant():
        few, many = (planned((N, 64, 33, 33), pyramid(64, 64, (6, 12)))["forward"] for N in (1, 300))
    assert few.config == many.config
    assert "chosen for a batch of 8" in str(few)


# ---------------------------------------------------------------------------------------------------------------------
# Modules: the same parameters, one branch after the other


def normed(x, conv, norm, part, whole):
    """Convolution, batch norm of its share of the channels, ReLU."""
    shares = [t.split(whole)[part] for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)]
    statistics = (t.clone() for t in shares[:2])
    return functional.relu(functional.batch_norm(conv(x), *statistics, *shares[2:], True, 0, norm.eps))


def plain_aspp(m, x):
    K = m.convs[0].out_channels
    parts = [normed(x, conv, m.norm, i, K) for i, conv in enumerate(m.convs)]
    pooled = normed(x.mean((2, 3), keepdim=True), m.pool_conv, m.pool_norm, 0, K)
    parts.append(functional.interpolate(pooled, x.shape[2:], mode="bilinear", align_corners=False))
    return normed(torch.cat(parts, 1), m.project, m.project_norm, 0, K)


def plain_inception(m, x):
    whole, ends = [conv.out_channels for conv in m.entry], [conv.out_channels for conv in m.convs]
    first, three, five = (normed(x, conv, m.entry_norm, i, whole) for i, conv in enumerate(m.entry))
    parts = [normed(t, conv, m.norm, i, ends) for i, (t, conv) in enumerate(zip((three, five), m.convs, strict=True))]
    pooled = normed(functional.max_pool2d(x, 3, 1, 1), m.pool_conv, m.pool_norm, 0, m.pool_conv.out_channels)
    return torch.cat((first, *parts, pooled), 1)


def plain_selective(m, x):
    parts = torch.stack([normed(x, conv, m.norm, i, x.shape[1]) for i, conv in enumerate(m.convs)])
    z = functional.relu(m.squeeze_norm(m.squeeze(parts.sum(0).mean((2, 3)))))
    scores = m.select(z).reshape(len(x), len(parts), -1).softmax(1)
    return sum(part * scores[:, i, :, None, None] for i, part in enumerate(parts))


MODULES = {
    "ASPP": (lambda: triton_conv.nn.ASPP(6, 4, rates=(2, 3), dropout=0), plain_aspp, 6),
    "InceptionBranches": (lambda: triton_conv.nn.InceptionBranches(6, 2, 3, 4, 2, 3, 2), plain_inception, 6),
    "SelectiveKernel": (lambda: triton_conv.nn.SelectiveKernel(8, branches=2, groups=2), plain_selective, 8),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_the_plain_composition(name):
    torch.manual_seed(0)
    make, plain, C = MODULES[name]
    module = make().double()
    for norm in (m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    x = torch.randn(3, C, 7, 6, dtype=torch.float64, requires_grad=True)
    leaves = [x, *module.parameters()]
    y, wanted = module(x), plain(module, x)
    torch.testing.assert_close(y, wanted)
    dy = torch.randn_like(y)
    expected = torch.autograd.grad(wanted, leaves, dy)
    for got, want in zip(torch.autograd.grad(y, leaves, dy), expected, strict=True):
        torch.testing.assert_close(got, want)
    with torch.no_grad():
        torch.testing.assert_close(module(x), wanted)
    assert triton_conv.nn.__dict__[name] is type(module)


# ---------------------------------------------------------------------------------------------------------------------
# Code

LAYERS = {
    90: {
        "pyramid": ((16, 256, 33, 33), pyramid(256, 128, (6, 12, 18)), {}),
        "gathered": ((16, 250, 33, 33), pyramid(250, 128, (6, 12)), {"combine": "sum"}),
        "inception": (
            (32, 112, 28, 28),
            (
                ((128, 96, 3, 3), {"padding": 1, "channels": (0, 96)}),
                ((32, 16, 5, 5), {"padding": 2, "channels": (96, 16)}),
            ),
            {},
        ),
    },
    80: {"tf32": ((16, 256, 33, 33), pyramid(256, 128, (6, 12)), {"dtype": torch.float32, "precision": "tf32"})},
    100: {"sum": ((16, 256, 33, 33), pyramid(256, 128, (6, 12)), {"combine": "sum"})},
}


@pytest.mark.slow
@pytest.mark.parametrize("arch", LAYERS)
def test_code(arch):
    """No spill, a matrix instruction, loads ahead of their use; with boxes, both operands from shared memory."""
    subjects = []
    for name, (shape, given, options) in LAYERS[arch].items():
        plans = planned(shape, given, device=TARGETS[arch], **options)
        subjects += [audit.Subject(name, p) for p in plans.values() if p.kernel.endswith("branches")]
    assert len(subjects) == 2 * len(LAYERS[arch])
    rows = [row for _, found in audit.audit(subjects, arch, jobs=1) for row in found]
    assert [(row.layer, row.role, audit.faults(row)) for row in rows if audit.faults(row)] == []
    boxed = [row for row in rows if row.kernel == "box_branches"]
    assert all(row.code.tma_loads and row.code.tma_stores for row in boxed)
    assert bool(boxed) == (arch >= 90)
