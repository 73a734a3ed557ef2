"""The suites of layer shapes: consistent, complete and those of the networks they name."""

import importlib.util
import math
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch

from triton_conv import explain, plan
from triton_conv.devices import A100, H200
from triton_conv.tuning import suites
from triton_conv.tuning.suites import SUITES


def products(suite):
    """Multiplications of an image's forward, taps in the border included, as published numbers have it."""
    total = 0
    for layer in suites.layers(suite, batch=1).values():
        g = explain.problems(layer.input, layer.weight, **layer.options)["forward"].geometry
        total += layer.times * g.N * g.K * (g.C // g.groups) * math.prod((*g.filter, *g.output))
    return total


def parameters(suite):
    return sum(layer.times * math.prod(layer.weight) for layer in SUITES[suite].layers.values())


def tasks(suite, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return suites.tasks(suite, *args, **kwargs)


@pytest.mark.parametrize("name", SUITES)
def test_every_layer_has_plans(name):
    suite = SUITES[name]
    assert suite.name == name
    assert suite.about
    for layer in suite.layers.values():
        shown = explain.plans(layer.input, layer.weight, device=H200, **layer.options)
        assert all(p.roofline.flops > 0 for p in shown.values())
        assert all(p.seconds > 0 for p in shown.values())


@pytest.mark.parametrize("name", SUITES)
def test_every_layer_is_there_once(name):
    kinds = [(layer.input, layer.weight, str(layer.options)) for layer in SUITES[name].layers.values()]
    assert len(set(kinds)) == len(kinds)


def test_resnet50_has_its_23_layers_and_4_giga_products():
    layers = SUITES["resnet50"].layers
    assert len(layers) == 23
    assert sum(layer.times for layer in layers.values()) == 53
    assert {layer.input[0] for layer in layers.values()} == {128}
    assert products("resnet50") == pytest.approx(4.09e9, rel=0.002)  # torchvision's documentation
    assert parameters("resnet50") == 25_557_032 - 2048 * 1000 - 1000 - 2 * 26_560  # without classifier and norms


@pytest.mark.parametrize(
    ("name", "convolutions", "giga"),  # of torchvision's documentation, with classifier, squeeze and excitation
    [
        ("resnext50", 53, 4.23),
        ("regnety", 56, 8.47),
        ("mobilenetv3", 46, 0.217),
        ("efficientnetv2", 110, 8.37),
    ],
)
def test_networks_have_their_published_products(name, convolutions, giga):
    assert sum(layer.times for layer in SUITES[name].layers.values()) == convolutions
    assert giga * 0.975 < products(name) / 1e9 <= giga


def test_the_fused_resnet50_is_resnet50():
    """The same convolutions, counted; first shortcuts are no longer one with what ends a block."""
    fused, plain = (
        Counter({(layer.input, layer.weight, layer.options.get("stride", 1)): 0 for layer in layers})
        for layers in (SUITES["resnet50_fused"].layers.values(), SUITES["resnet50"].layers.values())
    )
    for counts, name in ((fused, "resnet50_fused"), (plain, "resnet50")):
        for layer in SUITES[name].layers.values():
            counts[layer.input, layer.weight, layer.options.get("stride", 1)] += layer.times
    assert fused == plain
    added = [layer for layer in SUITES["resnet50_fused"].layers.values() if "residual" in layer.options]
    assert sum(layer.times for layer in added) == 3 + 4 + 6 + 3
    relus = [layer for layer in SUITES["resnet50_fused"].layers.values() if "activation" in layer.options]
    assert sum(layer.times for layer in relus) == 53 - 4


def test_compound_networks_have_as_many_layers_as_published():
    count = {name: sum(layer.times for layer in suite.layers.values()) for name, suite in SUITES.items()}
    assert count["sknet50"] == 3 + 4 + 6 + 3
    assert count["dcnv2_resnet50"] == 4 + 6 + 3
    # two convolutions a residual block, those at both ends, and those in time or before more positions
    assert count["wan_streaming"] == 2 * (5 + 3 + 3 + 3) + 2 + 2
    assert count["ltx_streaming"] == 4 * 2 * 5 + 2 + 3
    assert count["qwen_image"] == 2 * (5 + 3 + 3 + 3) + 2
    assert {
        weight[0] for layer in SUITES["inception_v3"].layers.values() for weight, _ in layer.options["branches"]
    } == {*(48, 64, 128, 160, 192, 320, 384, 448)}


def test_a_fused_layer_is_tuned_as_the_convolution_that_it_is():
    assert {task.problem for task in tasks("resnet50_fused", H200)} == {
        task.problem for task in tasks("resnet50", H200)
    }


def test_the_diffusion_unet_has_its_98_convolutions():
    assert sum(layer.times for layer in SUITES["sd_unet"].layers.values()) == 98


def test_layers_chain():
    """What comes out of a layer of a decoder goes into another one: sizes and channels fit together."""
    for name in ("sd_vae", "wan_vae"):
        seen = {layer.input[1] for layer in SUITES[name].layers.values()}
        widths = {layer.weight[0] for layer in SUITES[name].layers.values()} - {3, 4}
        assert widths - seen <= {768, 3 * 384}, name  # of Wan's, those that become frames, and keys beside queries


def test_tasks_are_each_problem_once_with_all_roles():
    found = tasks("resnet50", H200)
    problems = [task.problem for task in found]
    assert len(set(problems)) == len(problems) == 23 * 3
    assert {p.role.value for p in problems} == {"fprop", "dgrad", "wgrad"}
    assert {task.label for task in found} == set(SUITES["resnet50"].layers)
    assert {p.dtype for p in problems} == {"bfloat16"}
    assert all(plan.make(p).device is H200 for p in problems[:3])


def test_tasks_at_another_batch_dtype_and_memory_format():
    found = tasks("resnet50", A100, batch=4, dtype=torch.float16, channels_last=False)
    assert len(found) == 69
    assert {p.problem.geometry.N for p in found} == {4}
    assert {p.problem.dtype for p in found} == {"float16"}
    three = [t.problem for t in found if t.problem.geometry.filter[2] == 3 and t.problem.role.value == "fprop"]
    assert all(p.strides.x[1] > 1 for p in three)
    assert {p.problem.device for p in found} == {A100}


def test_patches_that_come_one_by_one_grow_with_the_batch():
    one, two = (suites.layers("patches", batch) for batch in (1, 2))
    name = next(name for name in one if name.startswith("Qwen2-VL"))
    assert (one[name].input[0], two[name].input[0]) == (1024, 2048)
    assert suites.layers("patches")[name].input == SUITES["patches"].layers[name].input


def test_layers_without_configs_are_left_out_aloud():
    with pytest.warns(UserWarning, match="is left out: causal_conv1d has one config") as warned:
        assert suites.tasks("mamba", H200) == []
    assert len(warned) == len(SUITES["mamba"].layers)


def test_what_there_is_not():
    with pytest.raises(ValueError, match=r"suite 'resnet51' is not one of resnet50, "):
        suites.tasks("resnet51", H200)
    with pytest.raises(ValueError, match="batch 0 is not positive"):
        suites.tasks("resnet50", H200, batch=0)


def test_benchmarks_take_the_same_list():
    path = Path(__file__).parents[1] / "bench" / "shapes.py"
    spec = importlib.util.spec_from_file_location("shapes", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.SUITES is SUITES
