"""What training scripts do to a model, done to a converted one, gives what it gives for PyTorch's convolutions.

Mixed precision, checkpointing, hooks, pruning, parametrizations, meta devices, copies and files.
"""

import copy
import pickle

import pytest
import torch
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim import swa_utils
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import triton_conv
from triton_conv import nn


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1, padding_mode="replicate"),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 8, 3, stride=2, padding=2, dilation=2, groups=4),
        torch.nn.ReLU(),
        torch.nn.ConvTranspose2d(8, 2, 4, stride=2, padding=1),
    )


def pair(change=lambda model: model):
    """The script's model as it is, and converted."""
    theirs, ours = change(network()), change(network())
    assert len(triton_conv.convert(ours)) == 3
    return theirs, ours


def batches(count=3, channels_last=False):
    torch.manual_seed(1)
    made = [(torch.randn(2, 3, 8, 8), torch.randn(2, 2, 8, 8)) for _ in range(count)]
    return [(x.to(memory_format=torch.channels_last), y) for x, y in made] if channels_last else made


def gradients(model, x=None, run=None):
    x = (batches(1)[0][0] if x is None else x).clone().requires_grad_()
    y = (run or model)(x)
    return [y, *torch.autograd.grad(y.square().mean(), [x, *model.parameters()])]


def assert_same(ours, theirs, tolerance=1e-5):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.detach().abs().max().clamp(min=1)))


# ---------------------------------------------------------------------------------------------------------------------
# Mixed precision


def trained(model, dtype, channels_last=False):
    """Losses, scales and parameters of some steps with autocast and a gradient scaler."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2, enabled=dtype is torch.float16)
    losses, scales = [], []
    for x, target in batches(6, channels_last):
        with torch.autocast("cpu", dtype):
            y = model(x)
            loss = torch.nn.functional.mse_loss(y.float(), target)
        assert y.dtype is dtype
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        scales.append(scaler.get_scale())
    return losses, scales


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_and_gradient_scaler(dtype, channels_last):
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    theirs, ours = pair(lambda model: model.to(memory_format=memory_format))
    (losses, scales), (expected, wanted) = (trained(model, dtype, channels_last) for model in (ours, theirs))
    assert scales == wanted
    assert losses == pytest.approx(expected, rel=0.02)
    assert all(p.dtype is torch.float32 for p in ours.parameters())


def test_a_gradient_that_overflows_is_found_and_its_step_left_out():
    _, ours = pair()
    optimizer, scaler = torch.optim.SGD(ours.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = [p.detach().clone() for p in ours.parameters()]
    with torch.autocast("cpu", torch.float16):
        loss = ours(batches(1)[0][0]).float().square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**39
    assert all(torch.equal(p, old) for p, old in zip(ours.parameters(), before, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Activation checkpointing


CHECKPOINTED = {
    "reentrant": lambda model: lambda x: checkpoint(model, x, use_reentrant=True),
    "not reentrant": lambda model: lambda x: checkpoint(model, x, use_reentrant=False),
    "in segments": lambda model: lambda x: checkpoint_sequential(model, 2, x, use_reentrant=False),
}


@pytest.mark.parametrize("how", CHECKPOINTED)
def test_checkpointed_gradients_are_those_without(how):
    def step(model, run):
        x = batches(1)[0][0].requires_grad_()
        run(x).square().mean().backward()  # reentrant checkpoints know no torch.autograd.grad
        return [x.grad, *(p.grad for p in model.parameters())]

    theirs, ours = pair()
    assert_same(step(ours, CHECKPOINTED[how](ours)), step(theirs, theirs))


def test_selective_checkpointing_knows_the_operators_by_name():
    """A policy may keep what convolutions return and compute the rest again."""
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    ran = []

    def policy(context, op, *args, **kwargs):
        if op.namespace != "triton_conv":
            return CheckpointPolicy.PREFER_RECOMPUTE
        ran.append((op._schema.name, context.is_recompute))
        return CheckpointPolicy.MUST_SAVE

    theirs, ours = pair()
    contexts = lambda: create_selective_checkpoint_contexts(policy)  # noqa: E731
    run = lambda x: checkpoint(ours, x, use_reentrant=False, context_fn=contexts)  # noqa: E731
    assert_same(gradients(ours, run=run), gradients(theirs))
    assert {name for name, _ in ran} == {f"triton_conv::{op}" for op in ("conv", "conv_dilated", "conv_transpose")}


# ---------------------------------------------------------------------------------------------------------------------
# Hooks


def test_hooks_of_modules_and_tensors_see_what_they_saw():
    def watched(model):
        seen, handles = [], []
        for module in (model[0], model[5]):
            handles += [
                module.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach())),
                module.register_forward_hook(lambda m, args, y: seen.append(y.detach())),
                module.register_full_backward_pre_hook(lambda m, dy: seen.append(dy[0])),
                module.register_full_backward_hook(lambda m, dx, dy: seen.extend([dx[0], dy[0]])),
                module.weight.register_hook(seen.append),
                module.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone())),
            ]
        x = batches(1)[0][0].requires_grad_()
        y = model(x)
        y.register_hook(seen.append)
        y.square().mean().backward()
        for handle in handles:
            handle.remove()
        return seen

    theirs, ours = pair()
    seen = watched(ours)
    assert len(seen) == 2 * 7 + 1
    assert_same(seen, watched(theirs))


def test_hooks_may_replace_what_they_see():
    def changed(model):
        model[0].register_forward_hook(lambda m, args, y: y * 2)
        model[5].register_full_backward_hook(lambda m, dx, dy: (dx[0] * 3,))
        model[3].weight.register_hook(lambda dw: dw * 5)
        return model

    theirs, ours = pair(changed)
    assert_same(gradients(ours), gradients(theirs))


def test_tensors_saved_for_backward_may_be_packed_away():
    theirs, ours = pair()
    packed = []

    def pack(t):
        packed.append(t)
        return t.numpy(force=True)

    with torch.autograd.graph.saved_tensors_hooks(pack, torch.from_numpy):
        x = batches(1)[0][0].requires_grad_()
        loss = ours(x).square().mean()
    assert packed
    loss.backward()
    assert_same([x.grad, *(p.grad for p in ours.parameters())], gradients(theirs)[1:])


# ---------------------------------------------------------------------------------------------------------------------
# Parametrizations and pruning, before and after conversion


def each(change):
    def changed(model):
        for index in (0, 3, 5):
            change(model[index])
        return model

    return changed


class Symmetric(torch.nn.Module):
    def forward(self, w):
        return w + w.flip(-1)


CHANGES = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": lambda m: parametrizations.spectral_norm(m, n_power_iterations=2),
    "orthogonal": parametrizations.orthogonal,
    "own": lambda m: parametrize.register_parametrization(m, "weight", Symmetric()),
    "pruned": lambda m: prune.l1_unstructured(m, "weight", 0.4),
    "channels pruned": lambda m: prune.ln_structured(m, "weight", 0.5, n=2, dim=0),
    "pruned twice": lambda m: prune.l1_unstructured(prune.l1_unstructured(m, "weight", 0.3), "weight", 0.3),
}


@pytest.mark.parametrize("first", ["convert", "change"])
@pytest.mark.parametrize("name", CHANGES)
def test_changed_weights_train_alike(name, first):
    """Whichever comes first, conversion or the change; and when the change is made for good."""

    def made():
        model = network()
        torch.manual_seed(2)
        return each(CHANGES[name])(model)

    theirs, ours = made(), network()
    if first == "convert":
        triton_conv.convert(ours)
    torch.manual_seed(2)
    ours = each(CHANGES[name])(ours)
    triton_conv.convert(ours)
    assert all(isinstance(ours[i], (nn.Conv2d, nn.ConvTranspose2d)) for i in (0, 3, 5))
    for model in (theirs, ours):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for x, target in batches(2):
            torch.nn.functional.mse_loss(model(x), target).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same(list(ours.parameters()), list(theirs.parameters()), 1e-4)
    for model in (theirs, ours):
        for index in (0, 3, 5):
            if parametrize.is_parametrized(model[index]):
                parametrize.remove_parametrizations(model[index], "weight")
            else:
                prune.remove(model[index], "weight")
    assert [type(ours[i]) for i in (0, 3, 5)] == [nn.Conv2d, nn.Conv2d, nn.ConvTranspose2d]
    assert_same(gradients(ours), gradients(theirs), 1e-4)


def test_global_pruning_takes_our_modules_for_what_they_are():
    theirs, ours = pair()
    for model in (theirs, ours):
        chosen = [(m, "weight") for m in model if isinstance(m, (torch.nn.Conv2d, torch.nn.ConvTranspose2d))]
        assert len(chosen) == 3
        prune.global_unstructured(chosen, prune.L1Unstructured, amount=0.5)
    assert_same([m.weight_mask for m in (ours[0], ours[3])], [m.weight_mask for m in (theirs[0], theirs[3])])
    assert_same(gradients(ours), gradients(theirs))


# ---------------------------------------------------------------------------------------------------------------------
# Channels-last


def test_a_channels_last_model_keeps_its_layout_and_that_of_its_gradients():
    theirs, ours = pair(lambda model: model.to(memory_format=torch.channels_last))
    x = batches(1, channels_last=True)[0][0]
    found, wanted = gradients(ours, x), gradients(theirs, x)
    assert_same(found, wanted)
    assert [t.stride() for t in found] == [t.stride() for t in wanted]
    layouts = []
    for module in ours:
        module.register_forward_hook(
            lambda m, args, y: layouts.append(y.is_contiguous(memory_format=torch.channels_last))
        )
    ours(x)
    assert layouts == [True] * len(ours)


# ---------------------------------------------------------------------------------------------------------------------
# Meta device, deferred initialisation


def test_made_without_memory_and_given_it_later():
    with torch.device("meta"):
        model = network()
        assert len(triton_conv.convert(model)) == 3
        y = model(torch.empty(2, 3, 8, 8))
    assert (y.device.type, y.shape) == ("meta", (2, 2, 8, 8))
    assert all(p.is_meta for p in model.parameters())
    theirs, _ = pair()
    filled = copy.deepcopy(model).to_empty(device="cpu")
    filled.load_state_dict(theirs.state_dict())
    assert_same(gradients(filled), gradients(theirs))
    model.load_state_dict(theirs.state_dict(), assign=True)
    assert_same(gradients(model), gradients(theirs))


@pytest.mark.parametrize(
    "name", ["Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"]
)
def test_our_classes_made_on_the_meta_device(name):
    cls = getattr(nn, name)
    with torch.device("meta"):
        by_context = cls(4, 6, 3)
    by_argument = cls(4, 6, 3, device="meta")
    skipped = torch.nn.utils.skip_init(cls, 4, 6, 3)
    x = torch.empty(2, 4, *(6,) * int(name[-2]))
    shape = by_context(x.to("meta")).shape
    assert by_context.weight.is_meta
    assert by_argument.weight.is_meta
    assert not skipped.weight.is_meta
    for module in (by_context, by_argument):
        module.to_empty(device="cpu").reset_parameters()
        assert module.weight.abs().max() > 0
        assert module(x).shape == shape
    skipped.reset_parameters()
    assert skipped(x).shape == shape


# ---------------------------------------------------------------------------------------------------------------------
# Copies and files


def through_file(model, path):
    torch.save(model, path)
    return torch.load(path, weights_only=False)


COPIES = {
    "deepcopy": lambda model, path: copy.deepcopy(model),
    "pickle": lambda model, path: pickle.loads(pickle.dumps(model)),
    "file": through_file,
}


@pytest.mark.parametrize("how", COPIES)
def test_whole_models_are_copied_and_trained_on(how, tmp_path):
    _, ours = pair()
    twin = COPIES[how](ours, tmp_path / "model.pt")
    assert [type(m) for m in twin] == [type(m) for m in ours]
    assert_same(gradients(twin), gradients(ours), 0)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert ours[0].weight.abs().max() > 0


def test_a_parametrized_model_is_copied():
    _, ours = pair(each(parametrizations.weight_norm))
    assert_same(gradients(copy.deepcopy(ours)), gradients(ours), 0)


@pytest.mark.parametrize("mmap", [False, True])
def test_state_dicts_go_both_ways_through_files(mmap, tmp_path):
    theirs, ours = pair()
    for source, target in ((theirs, ours), (ours, theirs)):
        with torch.no_grad():
            source[0].weight.mul_(1.5)
        torch.save(source.state_dict(), tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True, mmap=mmap)
        assert target.load_state_dict(state).missing_keys == []
        assert_same(gradients(target), gradients(source))


def test_whole_models_are_loaded_with_weights_only_once_their_classes_are_allowed(tmp_path):
    _, ours = pair()
    torch.save(ours[0], tmp_path / "layer.pt")
    with pytest.raises(pickle.UnpicklingError, match=r"triton_conv\.nn\.Conv2d"):
        torch.load(tmp_path / "layer.pt", weights_only=True)
    with torch.serialization.safe_globals([nn.Conv2d]):
        twin = torch.load(tmp_path / "layer.pt", weights_only=True)
    assert type(twin) is nn.Conv2d


# ---------------------------------------------------------------------------------------------------------------------
# Averages, ensembles, graphs of modules


@pytest.mark.parametrize("average", [None, swa_utils.get_ema_multi_avg_fn(0.9)], ids=["mean", "moving"])
def test_averages_of_weights(average):
    def averaged(model):
        kept = swa_utils.AveragedModel(model, multi_avg_fn=average)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for x, target in batches(3):
            torch.nn.functional.mse_loss(model(x), target).backward()
            optimizer.step()
            optimizer.zero_grad()
            kept.update_parameters(model)
        swa_utils.update_bn([x for x, _ in batches(2)], kept)
        return kept

    theirs, ours = (averaged(model) for model in pair())
    assert type(ours.module[0]) is nn.Conv2d
    assert_same(gradients(ours), gradients(theirs), 1e-4)


def test_ensembles_by_vmap_are_models_one_by_one():
    models = [pair()[1].eval() for _ in range(3)]
    with torch.no_grad():
        for n, model in enumerate(models):
            for p in model.parameters():
                p.mul_(1 + n / 4)
    stacked = torch.func.stack_module_state(models)
    skeleton = copy.deepcopy(models[0]).to("meta")
    x = batches(1)[0][0]
    run = torch.func.vmap(lambda state: torch.func.functional_call(skeleton, state, (x,)), (0,))
    assert_same(run(stacked), [model(x) for model in models])


def test_batch_norms_are_folded_into_ours():
    theirs, ours = pair()
    x = batches(1)[0][0]
    for model in (theirs, ours):
        model(x)
        model.eval()
    fused = torch.nn.utils.fuse_conv_bn_eval(ours[0], ours[1])
    assert type(fused) is nn.Conv2d
    assert fused.padding_mode == "replicate"
    torch.testing.assert_close(fused(x), theirs[1](theirs[0](x)))


def test_graphs_of_modules_before_and_after_conversion():
    """What torch.fx traced keeps its modules, and these convert; in a converted model it traces our functions."""
    theirs, ours = pair()
    x = batches(1)[0][0]
    before = torch.fx.symbolic_trace(theirs)
    assert len(triton_conv.convert(before)) == 3
    assert [node.op for node in before.graph.nodes].count("call_module") == len(theirs)
    after = torch.fx.symbolic_trace(ours)
    called = [node.target for node in after.graph.nodes if node.op == "call_function"]
    assert called == [triton_conv.conv2d, triton_conv.conv2d, triton_conv.conv_transpose2d]
    assert_same(gradients(before, x), gradients(network(), x))
    assert_same(gradients(after, x)[:2], gradients(network(), x)[:2])


@pytest.mark.filterwarnings("ignore:.*(quantiz|reduce_range)")
def test_quantized_activations_are_refused_in_words():
    """Tools that swap torch's classes for quantized ones do not know ours: they stay, and say what they are given."""
    quantization = pytest.importorskip("torch.ao.quantization")
    model = quantization.QuantWrapper(torch.nn.Conv2d(3, 4, 3)).eval()
    triton_conv.convert(model)
    engine = next(e for e in torch.backends.quantized.supported_engines if e != "none")
    model.qconfig = quantization.get_default_qconfig(engine)
    quantization.prepare(model, inplace=True)
    x = batches(1)[0][0]
    model(x)
    quantization.convert(model, inplace=True)
    with pytest.raises(NotImplementedError, match=r"conv2d\(\): input is quantized; convert it with \.dequantize\(\)"):
        model(x)
