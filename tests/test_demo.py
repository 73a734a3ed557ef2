"""The demo's promises: the same code twice, the same numbers, a picture, and a verdict."""

import re
import struct

import pytest
import torch

from triton_conv import cli, demo, nn

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
pytest.importorskip("matplotlib", reason="the picture is drawn by matplotlib")
pytest.importorskip("tqdm", reason="the demo shows a progress bar")


@pytest.fixture(autouse=True)
def plain_torch(monkeypatch):
    """Plain torch on the CPU, unless a test says otherwise."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def is_picture(path) -> bool:
    head = path.read_bytes()[:24]
    width, height = struct.unpack(">II", head[16:24])
    return head.startswith(b"\x89PNG") and width > 600 and height > 300


def test_the_network_has_every_kind_of_convolution():
    layers = [m for m in demo.DigitNet(nn).modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.ConvTranspose2d))]
    assert all(type(m).__module__ == "triton_conv.nn" for m in layers)
    assert any(m.groups == m.in_channels > 1 for m in layers)
    assert any(1 < m.groups < m.in_channels for m in layers)
    assert any(m.dilation == (2, 2) for m in layers)
    assert any(m.kernel_size == (1, 1) for m in layers)
    assert any(m.stride == (2, 2) for m in layers)
    assert any(isinstance(m, torch.nn.ConvTranspose2d) for m in layers)


def test_both_models_start_equal_and_stay_together():
    torchs, ours = demo.pair(torch.device("cpu"), seed=3)
    for p, q in zip(torchs.model.parameters(), ours.model.parameters(), strict=True):
        assert torch.equal(p, q)
    digits = demo.load_digits(torch.device("cpu"), seed=3)
    assert digits.train_images.shape == (1347, 1, 8, 8)
    assert digits.test_images.shape == (450, 1, 8, 8)
    images, labels = digits.train_images[:32], digits.train_labels[:32]
    assert demo.gradient_difference(torchs.model, ours.model, images, labels) < demo.GRADIENT_TOLERANCE["ieee"]
    for training in (torchs, ours):
        optimizer = torch.optim.Adam(training.model.parameters(), lr=demo.LEARNING_RATE)
        for _ in range(5):
            demo._step(training, optimizer, images, labels)
    torch.testing.assert_close(torchs.losses, ours.losses, rtol=1e-3, atol=0)
    assert ours.losses[-1] < ours.losses[0]


def test_a_step_runs_our_operators():
    torchs, ours = demo.pair(torch.device("cpu"), seed=0)
    images, labels = torch.rand(4, 1, 8, 8), torch.arange(4)
    assert demo.operators_of_a_step(torchs.model, images, labels) == {}
    assert demo.operators_of_a_step(ours.model, images, labels) == {
        "triton_conv::conv": 6,
        "triton_conv::conv_dilated": 1,
        "triton_conv::conv_transpose": 1,
        "triton_conv::conv_dgrad": 5,
        "triton_conv::conv_wgrad": 7,
    }


def test_one_epoch_draws_a_picture_and_reports(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "REQUIRED_ACCURACY", 0.5)
    picture = tmp_path / "loss.png"
    assert cli.main(["demo", "--epochs", "1", "--device", "cpu", "--output", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert is_picture(picture)
    assert "triton_conv runs: plain torch" in printed
    assert "1 x triton_conv::conv_transpose" in printed
    starts = re.findall(r"test accuracy [\d.]+%, loss ([\d.]+)", printed)
    assert len(starts) == 2
    assert starts[0] == starts[1]


def test_too_low_an_accuracy_or_wrong_gradients_fail(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "REQUIRED_ACCURACY", 1.01)
    monkeypatch.setattr(demo, "gradient_difference", lambda *_: float("nan"))
    assert demo.run("cpu", epochs=1, output=str(tmp_path / "loss.png")) == 1
    printed = capsys.readouterr().out
    assert "FAILED: the gradients of step 0 differ by nan" in printed
    assert "FAILED: torch.nn reached" in printed
    assert "FAILED: triton_conv.nn reached" in printed


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("nowhere/loss.png", "nowhere' is not a directory"),
        ("loss.xyz", "Format 'xyz' is not supported"),
        ("loss", "has no extension"),
        ("folder.png", "is a directory"),
    ],
)
def test_a_picture_that_cannot_be_written_is_found_before_training(output, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "run", lambda *_, **__: pytest.fail("trained"))
    (tmp_path / "folder.png").mkdir()
    assert cli.main(["demo", "--device", "cpu", "--output", str(tmp_path / output)]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("triton-conv: error: argument --output: ")
    assert message in printed
    assert printed.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["folder.png"]


@pytest.mark.parametrize("name", ["loss.png", "loss.PNG", "loss.svg", "loss.pdf"])
def test_the_check_of_the_output_writes_nothing(name, tmp_path, monkeypatch):
    demo.check_output(str(tmp_path / name))
    monkeypatch.chdir(tmp_path)
    demo.check_output(name)
    assert not list(tmp_path.iterdir())


def test_a_file_without_permission_is_found_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # a superuser may write everywhere
    with pytest.raises(ValueError, match="cannot be written"):
        demo.check_output(str(tmp_path / "loss.png"))


@pytest.mark.slow
def test_the_demo_reaches_its_accuracy(tmp_path, capsys):
    picture = tmp_path / "loss.png"
    assert cli.main(["demo", "--device", "cpu", "--output", str(picture)]) == 0
    reached = [float(a) for a in re.findall(r"test accuracy ([\d.]+)%", capsys.readouterr().out)]
    assert len(reached) == 2
    assert min(reached) >= 95
    assert is_picture(picture)


@pytest.mark.slow
def test_the_interpreted_demo_agrees(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "")  # the command sets it, and the test takes it away
    picture = tmp_path / "loss.png"
    assert cli.main(["demo", "--interpret", "--output", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "Triton kernels, interpreted" in printed
    assert "too few for an accuracy" in printed
    assert "test accuracy" not in printed
    first, last = zip(*re.findall(r"loss ([\d.]+) -> ([\d.]+)", printed), strict=True)
    assert first[0] == first[1]
    assert float(last[0]) == pytest.approx(float(last[1]), rel=1e-2)
    assert is_picture(picture)
