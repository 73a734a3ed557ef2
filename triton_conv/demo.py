"""The network of `triton-conv demo`, trained on real handwritten digits in torch.nn and in triton_conv.nn alike.

The images are the 1,797 8x8 digits that scikit-learn ships (E. Alpaydin and C. Kaynak, UCI, 1998). One function
builds the network from a namespace, so that both models are the same code; they share initial weights and batches,
and may differ by rounding only.
"""

from __future__ import annotations

import io
import os
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (its name everywhere)
from torch.utils._python_dispatch import TorchDispatchMode

from . import nn as ours
from .execute import INTERPRETER, default_precision, device_of

EPOCHS = 8
BATCH = 32
LEARNING_RATE = 4e-3
TEST_IMAGES = 450
RECONSTRUCTION_WEIGHT = 0.5
REQUIRED_ACCURACY = 0.95
# In the interpreter a step takes seconds where it takes milliseconds elsewhere.
INTERPRETED_STEPS = 3
INTERPRETED_BATCH = 4

# How far the two gradients of a parameter may lie apart, as a share of its largest element: sums of up to
# 32 * 64 products, behind seven layers, of float32 or of TF32 with its 2^-11.
GRADIENT_TOLERANCE = {"ieee": 1e-4, "tf32": 3e-2}


class Digits(NamedTuple):
    """Images (N, 1, 8, 8) in 0..1 and labels (N) of a training and a test set."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass
class Training:
    """One model, and what its training recorded."""

    name: str
    model: torch.nn.Module
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    seconds: float = 0.0


class DigitNet(torch.nn.Module):
    """A classifier with a reconstruction head; `namespace` has the convolutions: torch.nn or triton_conv.nn.

    >>> logits, picture = DigitNet(triton_conv.nn)(torch.rand(2, 1, 8, 8))
    >>> logits.shape, picture.shape
    (torch.Size([2, 10]), torch.Size([2, 1, 8, 8]))
    """

    def __init__(self, namespace: ModuleType):
        super().__init__()
        self.stem = namespace.Conv2d(1, 16, 3, padding=1)
        self.depthwise = namespace.Conv2d(16, 16, 3, padding=1, groups=16)
        self.pointwise = namespace.Conv2d(16, 32, 1, bias=False)
        self.pointwise_norm = torch.nn.BatchNorm2d(32)
        self.grouped = namespace.Conv2d(32, 32, 3, stride=2, padding=1, groups=4)
        self.dilated = namespace.Conv2d(32, 32, 3, padding=2, dilation=2, bias=False)
        self.dilated_norm = torch.nn.BatchNorm2d(32)
        self.classifier = torch.nn.Linear(32 * 4 * 4, 10)
        self.expand = namespace.ConvTranspose2d(32, 16, 4, stride=2, padding=1)
        self.picture = namespace.Conv2d(16, 1, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N, 10) and a reconstruction (N, 1, 8, 8) of images (N, 1, 8, 8)."""
        x = F.relu(self.stem(x))
        x = F.relu(self.depthwise(x))
        x = F.relu(self.pointwise_norm(self.pointwise(x)))
        x = F.relu(self.grouped(x))
        x = F.relu(self.dilated_norm(self.dilated(x)))
        return self.classifier(x.flatten(1)), self.picture(F.relu(self.expand(x)))


def load_digits(device: torch.device, seed: int) -> Digits:
    """scikit-learn's digits on a device, shuffled by `seed`."""
    from sklearn import datasets

    images, labels = datasets.load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    x = (torch.from_numpy(images).float() / 16).view(-1, 1, 8, 8)[order].to(device)
    y = torch.from_numpy(labels).long()[order].to(device)
    return Digits(x[TEST_IMAGES:], y[TEST_IMAGES:], x[:TEST_IMAGES], y[:TEST_IMAGES])


def pair(device: torch.device, seed: int) -> tuple[Training, Training]:
    """The same network in torch.nn and in triton_conv.nn, with the same initial weights."""
    trainings = []
    for name, namespace in (("torch.nn", torch.nn), ("triton_conv.nn", ours)):
        torch.manual_seed(seed)
        trainings.append(Training(name, DigitNet(namespace).to(device)))
    return trainings[0], trainings[1]


def loss_of(model: torch.nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of the labels plus a share of the squared error of the reconstruction."""
    logits, picture = model(images)
    return F.cross_entropy(logits, labels) + RECONSTRUCTION_WEIGHT * F.mse_loss(picture, images)


def gradient_difference(torchs: torch.nn.Module, ours: torch.nn.Module, images: Tensor, labels: Tensor) -> float:
    """The largest difference between two models' gradients, each relative to its parameter's largest gradient."""
    gradients = [torch.autograd.grad(loss_of(m, images, labels), list(m.parameters())) for m in (torchs, ours)]
    return max(float((g - h).abs().max() / g.abs().max()) for g, h in zip(*gradients, strict=True))


class _CountOperators(TorchDispatchMode):
    """Counts the operators of this package that run, in forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "triton_conv":
            self.counts[function._schema.name] += 1
        return function(*args, **(kwargs or {}))


def operators_of_a_step(model: torch.nn.Module, images: Tensor, labels: Tensor) -> Counter[str]:
    """How often each triton_conv operator runs in one forward and backward pass."""
    with _CountOperators() as counter:
        torch.autograd.grad(loss_of(model, images, labels), list(model.parameters()))
    return counter.counts


def accuracy(model: torch.nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images whose largest logit is the label's."""
    model.eval()
    with torch.no_grad():
        share = float((model(images)[0].argmax(1) == labels).float().mean())
    model.train()
    return share


def train(training: Training, digits: Digits, epochs: int, seed: int, progress: Any) -> None:
    """Adam with a one-cycle schedule; the batches of an epoch depend on the seed alone."""
    count = len(digits.train_labels)
    steps = epochs * -(-count // BATCH)
    optimizer = torch.optim.Adam(training.model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps, pct_start=0.2, div_factor=4)
    generator = torch.Generator().manual_seed(seed)
    start = time.perf_counter()
    for _ in range(epochs):
        for batch in torch.randperm(count, generator=generator).to(digits.train_images.device).split(BATCH):
            _step(training, optimizer, digits.train_images[batch], digits.train_labels[batch])
            schedule.step()
            progress.update()
        training.accuracies.append(accuracy(training.model, digits.test_images, digits.test_labels))
        progress.set_postfix_str(f"{training.name} {training.accuracies[-1]:.1%}")
    training.seconds = time.perf_counter() - start


def _step(training: Training, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
    optimizer.zero_grad()
    loss = loss_of(training.model, images, labels)
    loss.backward()
    optimizer.step()
    training.losses.append(float(loss.detach()))


def run(device_name: str, epochs: int | None = None, seed: int = 0, output: str = "demo_loss.png") -> int:
    """Trains both models, prints what came of it, and returns 0, or 1 if the promises of this page are broken.

    Where the kernels are interpreted it takes a few steps of small batches, and claims no accuracy.
    """
    device = torch.device(device_name)
    found = device_of(device)
    interpreted = found is INTERPRETER
    path = "plain torch" if found is None else "Triton kernels, interpreted" if interpreted else "Triton kernels"
    name = found.name if found is not None and not interpreted else f"CPU, {torch.get_num_threads()} thread(s)"
    print(f"device: {name} (torch {torch.__version__}); triton_conv runs: {path}")

    digits = load_digits(device, seed)
    torchs, mine = pair(device, seed)
    batch = INTERPRETED_BATCH if interpreted else BATCH
    images, labels = digits.train_images[:batch], digits.train_labels[:batch]
    parameters = sum(p.numel() for p in mine.model.parameters())
    print(
        f"{len(digits.train_labels)} training and {len(digits.test_labels)} test images of 8x8 pixels; "
        f"{parameters:,} parameters"
    )
    difference = gradient_difference(torchs.model, mine.model, images, labels)
    tolerance = GRADIENT_TOLERANCE[default_precision() if device.type == "cuda" else "ieee"]
    counts = operators_of_a_step(mine.model, images, labels)
    print(f"one step of triton_conv.nn: {', '.join(f'{n} x {k}' for k, n in sorted(counts.items()))}")
    print(f"largest gradient difference at step 0: {difference:.1e} of the parameter's largest (bound {tolerance:.0e})")

    if interpreted:
        _few_steps((torchs, mine), images, labels)
    else:
        _epochs((torchs, mine), digits, EPOCHS if epochs is None else epochs, seed)
    for training in (torchs, mine):
        reached = f"test accuracy {training.accuracies[-1]:.2%}, " if training.accuracies else ""
        print(
            f"{training.name:<15} {reached}loss {training.losses[0]:.4f} -> {training.losses[-1]:.4f}, "
            f"{len(training.losses)} steps in {training.seconds:.1f} s"
        )
    draw((torchs, mine), f"{name}; triton_conv: {path}", output)
    print(f"picture: {output}")

    broken = []
    if not difference <= tolerance:
        broken.append(f"the gradients of step 0 differ by {difference:.1e}, more than {tolerance:.0e}")
    broken += [
        f"{t.name} reached {t.accuracies[-1]:.2%} test accuracy, less than {REQUIRED_ACCURACY:.0%}"
        for t in (torchs, mine)
        if t.accuracies and t.accuracies[-1] < REQUIRED_ACCURACY
    ]
    for line in broken:
        print(f"FAILED: {line}")
    return 1 if broken else 0


def _epochs(trainings: tuple[Training, Training], digits: Digits, epochs: int, seed: int) -> None:
    from tqdm import tqdm

    steps = epochs * -(-len(digits.train_labels) // BATCH)
    with tqdm(total=2 * steps, unit="step", disable=None) as progress:
        for training in trainings:
            train(training, digits, epochs, seed, progress)


def _few_steps(trainings: tuple[Training, Training], images: Tensor, labels: Tensor) -> None:
    from tqdm import tqdm

    print(f"{INTERPRETED_STEPS} steps of {INTERPRETED_BATCH} images: too few for an accuracy")
    with tqdm(total=2 * INTERPRETED_STEPS, unit="step", disable=None) as progress:
        for training in trainings:
            optimizer = torch.optim.Adam(training.model.parameters(), lr=LEARNING_RATE)
            start = time.perf_counter()
            for _ in range(INTERPRETED_STEPS):
                _step(training, optimizer, images, labels)
                progress.update()
            training.seconds = time.perf_counter() - start


def check_output(output: str) -> None:
    """Raises ValueError, with the reason in one line, if `draw` could not write its picture there."""
    from matplotlib.figure import Figure

    path = Path(output)
    kind = path.suffix.removeprefix(".")
    if not kind:
        raise ValueError(f"{output!r} has no extension to name the format, such as .png")
    try:
        Figure(figsize=(1, 1)).savefig(io.BytesIO(), format=kind)
    except (ValueError, RuntimeError, OSError) as error:  # unknown, or without what it takes to write it
        raise ValueError(f"no picture can be written as {output!r}: {_first_line(error)}") from error
    if not path.parent.is_dir():
        raise ValueError(f"{str(path.parent)!r} is not a directory")
    if path.is_dir():
        raise ValueError(f"{output!r} is a directory")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{output!r} cannot be written")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def draw(trainings: tuple[Training, Training], title: str, output: str) -> None:
    """Writes a picture of the loss of each step and the test accuracy of each epoch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    loss, test = figure.subplots(1, 2)
    for training, width in zip(trainings, (4, 1), strict=True):  # the second line lies on the first
        steps = range(1, len(training.losses) + 1)
        loss.plot(steps, training.losses, label=f"{training.name} ({training.seconds:.1f} s)", linewidth=width)
        epochs = range(1, len(training.accuracies) + 1)
        test.plot(epochs, [100 * a for a in training.accuracies], label=training.name, marker="o", linewidth=width)
    loss.set(xlabel="step", ylabel="training loss (cross entropy + reconstruction)", yscale="log")
    loss.legend()
    test.set(xlabel="epoch", ylabel=f"accuracy on {TEST_IMAGES} test images (%)")
    if trainings[0].accuracies:
        test.axhline(100 * REQUIRED_ACCURACY, color="gray", linestyle=":", label=f"{REQUIRED_ACCURACY:.0%}")
        test.legend()
    else:
        test.text(0.5, 0.5, "too few steps for an accuracy", ha="center", transform=test.transAxes)
    figure.suptitle(f"handwritten digits on {title}", fontsize=10)
    figure.savefig(output, dpi=120)
