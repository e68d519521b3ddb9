"""examples/train.py: runs that are killed, distillation, pictures and weights, with settings that take seconds."""

import copy
import dataclasses
import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nmconv

# ruff: noqa: E402
for needed in ("timm", "torchvision", "accelerate", "rich"):
    pytest.importorskip(needed)

from recipes import checkpoint, training
from recipes.batches import Share, batches, inputs, mixed
from recipes.networks import build
from recipes.pictures import Decoded, load_data
from recipes.recipe import Recipe
from recipes.training import loss_of, train

from examples import train as script

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """An ImageFolder of two classes whose pictures differ in size."""
    from PIL import Image

    root, pixels = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, each in (("train", {"cat": 29, "dog": 21}), ("test", {"cat": 3, "dog": 5})):
        for label, count in each.items():
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                picture = pixels.integers(0, 256, size=(8 + i % 3, 9, 3), dtype=np.uint8)
                Image.fromarray(picture).save(root / split / label / f"{i}.jpg")
    return root


@pytest.fixture(scope="module")
def data(pictures):
    return load_data(pictures, 8)


def tiny():
    """A network in which every kind of state matters: parameters, running statistics, and numbers drawn at random."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(512, 2))


def same(one, other):
    states = [model.state_dict() for model in (one, other)]
    return states[0].keys() == states[1].keys() and all(torch.equal(v, states[1][k]) for k, v in states[0].items())


RECIPE = Recipe(epochs=2, batch_size=10, lr=0.05, distill=0.3)  # 5 steps an epoch


# Runs that are killed


def test_a_killed_run_ends_with_the_same_bits(pictures, tmp_path, monkeypatch):
    flags = ["cifar_resnet8", "--data-dir", str(pictures), "--size", "8", "--epochs", "4", "--batch-size", "4"]
    flags += ["--threads", "1", "--seed", "3", "--mixup", "0.2", "--ema", "0.9", "--ratio", "2:1", "--gradual"]
    flags += ["--device", "cpu", "--no-compile", "--precision", "no"]
    path = str(ROOT / "examples" / "train.py")

    def run(out, *more):
        monkeypatch.setattr(sys, "argv", [path, *flags, "--out", str(out), *more])
        script.main()
        return json.loads((out / "result.json").read_text())

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = [sys.executable, path, *flags, "--out", str(killed), "--every", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("step 17 of 48"):  # the fifth of an epoch's twelve
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    assert not (killed / "result.json").exists()
    assert 17 <= checkpoint.read(killed / "checkpoint.pt", CPU)["step"] < 48

    first, second = run(whole), run(killed)
    assert (whole / "model.safetensors").read_bytes() == (killed / "model.safetensors").read_bytes()
    assert first.pop("seconds") > 0 < second.pop("seconds")
    assert first == second
    assert first["images"] == 50 and first["seed"] == 3 and len(first["curve"]) == len(first["losses"]) == 4
    again = run(whole)  # nothing to do
    assert {key: again[key] for key in first} == first
    assert not list(whole.glob(".*.tmp"))


@pytest.mark.parametrize(
    "at, more",
    [
        (1, {}),
        (3, {"precision": "bf16"}),
        (5, {}),
        (6, {"mixup": 0.8, "cutmix": 1.0}),
        (9, {"precision": "bf16", "cutmix": 0.5}),
        (13, {"accumulate": 2, "ema": 0.9, "opt": "adamw"}),  # in the midst of an update
    ],
)
def test_a_run_cut_at_any_time_goes_on_exactly(data, tmp_path, monkeypatch, at, more):
    monkeypatch.setattr("recipes.recipe.fast_bf16", lambda: True)  # for so small a network any CPU will do
    teacher, whole, cut = tiny(), tiny(), tiny()
    recipe = dataclasses.replace(RECIPE, **more)
    log = train(whole, data, recipe, teacher=teacher)

    calls = []
    with monkeypatch.context() as patch:

        def interrupted(*args):
            calls.append(args)
            if len(calls) > at:
                raise KeyboardInterrupt
            return loss_of(*args)

        patch.setattr(training, "loss_of", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(cut, data, recipe, teacher=teacher, out=tmp_path, every=0)

    resumed = tiny()
    torch.manual_seed(at)  # the states of the generators at the start are of no account
    np.random.seed(at)
    random.seed(at)
    assert train(resumed, data, recipe, teacher=teacher, out=tmp_path)["losses"] == log["losses"]
    assert same(whole, resumed) and not same(whole, cut)


def test_a_failed_write_leaves_the_checkpoint_before(data, tmp_path, monkeypatch):
    train(tiny(), data, Recipe(epochs=1, batch_size=10), out=tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(RuntimeError), checkpoint.replacing(tmp_path / "checkpoint.pt") as file:
        file.write(b"half")
        raise RuntimeError
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_checkpoint_of_another_recipe_is_refused(data, tmp_path):
    train(tiny(), data, Recipe(epochs=1, batch_size=10), out=tmp_path)
    with pytest.raises(ValueError, match="another run"):
        train(tiny(), data, Recipe(epochs=1, batch_size=10, seed=1), out=tmp_path)


def test_the_callers_random_numbers_are_left_alone(data):
    def seeded():
        torch.manual_seed(5)
        np.random.seed(5)
        random.seed(5)

    def drawn():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()

    seeded()
    expected = drawn()
    model = tiny()
    seeded()
    train(model, data, Recipe(epochs=1, batch_size=10, mixup=1.0))
    assert drawn() == expected


def test_a_quiet_run_prints_nothing(data, capsys):
    recipe = Recipe(epochs=2, batch_size=10)
    train(tiny(), data, recipe, every=0, quiet=True)
    assert capsys.readouterr().out == ""
    train(tiny(), data, recipe, every=0)
    assert len(capsys.readouterr().out.splitlines()) == 10  # four steps and an epoch, twice


# Augmentation


@pytest.mark.parametrize("mixup, cutmix", [(1.0, 0.0), (0.0, 1.0)])
def test_pictures_and_labels_are_mixed_by_the_same_share(mixup, cutmix):
    """Each picture has one value of its own: how much of which is in a mixed one can be read off its pixels."""
    recipe = Recipe(mixup=mixup, cutmix=cutmix)
    values = torch.tensor([0, 40, 80, 120, 160, 200])
    images = values.float().view(6, 1, 1, 1).expand(6, 3, 8, 10).clone()
    kept, drawn = images.clone(), set()
    for step in range(8):
        x, shares = mixed(images, torch.arange(6), recipe, 6, step)
        assert torch.equal(images, kept) and x.shape == images.shape and shares.shape == (6, 6)
        assert torch.allclose(shares.sum(1), torch.ones(6))
        assert torch.allclose(x.mean((1, 2, 3)), shares @ values.float(), atol=1e-2)
        assert cutmix == 0 or x.unique().numel() <= 6
        again = mixed(images, torch.arange(6), recipe, 6, step)
        assert torch.equal(x, again[0]) and torch.equal(shares, again[1])
        drawn.add(round(float(shares[0, 0]), 5))
    assert len(drawn) > 4


def test_nothing_is_mixed_unless_asked(data):
    images, labels = data.train.images[:10], data.train.labels[:10]
    assert mixed(images, labels, Recipe(), 2, 0) == (images, labels)
    with pytest.raises(ValueError, match="not 5"):
        train(tiny(), data, Recipe(batch_size=5, mixup=0.2))


# Distillation


def test_the_loss_is_the_mixture_of_labels_and_teacher():
    torch.manual_seed(0)
    logits, targets, labels = torch.randn(6, 4), torch.randn(6, 4), torch.randint(4, (6,))
    hard = F.cross_entropy(logits, labels)
    soft, hot = (targets / 3).softmax(1), (logits / 3).softmax(1)
    apart = 9 * (soft * (soft / hot).log()).sum(1).mean()
    recipe = Recipe(distill=0.25, temperature=3.0)
    assert torch.equal(loss_of(logits, labels, None, recipe), hard)
    torch.testing.assert_close(loss_of(logits, labels, targets, recipe), 0.75 * hard + 0.25 * apart)
    agreeing = loss_of(logits, labels, logits + 1, recipe)  # a constant more is the same answer
    torch.testing.assert_close(agreeing, 0.75 * hard)


def test_the_teacher_answers_in_eval_mode_and_stays_as_it_is(data):
    teacher, alone, taught = tiny(), tiny(), tiny()
    before, modes = copy.deepcopy(teacher), []
    teacher.register_forward_hook(lambda module, args, out: modes.append((module.training, out.requires_grad)))
    train(taught, data, RECIPE, teacher=teacher)
    assert modes == [(False, False)] * 10
    assert same(teacher, before)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    train(alone, data, Recipe(epochs=2, batch_size=10, lr=0.05))
    assert not same(alone, taught)


@pytest.mark.parametrize("teacher, distill", [(None, 0.5), (tiny, 0.0)])
def test_a_teacher_and_its_weight_go_together(data, teacher, distill):
    with pytest.raises(ValueError, match="distillation"):
        train(tiny(), data, Recipe(distill=distill, batch_size=10), teacher=teacher and teacher())


# Pictures and weights


def test_pictures_are_decoded_once_balanced_and_nested(pictures, data, tmp_path, monkeypatch):
    assert data.classes == ("cat", "dog") and data.train.images.shape == (50, 8, 8, 3)
    assert data.train.labels[:42].tolist() == [0, 1] * 21  # then cats alone
    monkeypatch.setattr("PIL.Image.open", None)
    fewer = load_data(pictures, 8, images=11)
    assert torch.equal(fewer.train.images, data.train.images[:11])
    assert torch.equal(fewer.train.labels, data.train.labels[:11])
    monkeypatch.undo()
    other = load_data(pictures, 8, cache=tmp_path)
    assert torch.equal(other.test.images, data.test.images) and len(list(tmp_path.glob("*.npy"))) == 2


def test_an_epoch_shows_every_picture_once_in_an_order_of_its_own(data):
    recipe, model = Recipe(batch_size=10), tiny()

    def epoch(pictures, number, start=0):
        return list(batches(model, pictures, recipe, number, start, Share()))

    plain = Decoded(torch.arange(50).view(50, 1, 1, 1).expand(50, 8, 8, 3).to(torch.uint8), torch.arange(50))
    epochs = [epoch(plain, number) for number in (0, 0, 1)]
    orders = [torch.cat([labels for _, labels in each]) for each in epochs]
    assert orders[0].sort().values.tolist() == list(range(50))
    assert torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], orders[2])
    for images, labels in epochs[0]:  # pixels and class together
        assert torch.equal(images, inputs(model, plain.images[labels]))
    for (x, y), (all_x, all_y) in zip(epoch(data.train, 3, 2), epoch(data.train, 3)[2:], strict=True):
        assert torch.equal(x, all_x) and torch.equal(y, all_y)


def test_resnet20_is_the_published_one():
    net = build("cifar_resnet20", 10)
    assert sum(parameter.numel() for parameter in net.parameters()) == 269_722 + 2_752  # and two 1x1 projections
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert nmconv.make_plan(net, "2:1").counts.activations_before == 19


def test_weights_of_a_converted_network_and_of_other_classes(tmp_path):
    start = build("cifar_resnet20", 5, seed=1)
    converted = nmconv.convert(start, "2:1")
    nmconv.save(converted, tmp_path / "converted.safetensors")
    loaded = build("cifar_resnet20", 5, tmp_path / "converted.safetensors")
    assert nmconv.get_plan(loaded) == nmconv.get_plan(converted) and same(loaded, converted)

    renamed = {f"other.{i}": value for i, value in enumerate(start.state_dict().values())}
    torch.save(renamed, tmp_path / "renamed.pth")
    assert same(build("cifar_resnet20", 5, tmp_path / "renamed.pth"), start)
    more = build("cifar_resnet20", 7, tmp_path / "renamed.pth")
    assert torch.equal(more.conv1.weight, start.conv1.weight) and not more.fc.weight.any()
    del renamed["other.3"]
    torch.save(renamed, tmp_path / "short.pth")
    with pytest.raises(ValueError):
        build("cifar_resnet20", 5, tmp_path / "short.pth")
