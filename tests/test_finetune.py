"""examples/finetune.py: runs that are killed, distillation, pictures and weights, with settings that take seconds."""

import copy
import dataclasses
import json
import os
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

finetune = pytest.importorskip("examples.finetune", reason="it needs timm and torchvision")

ROOT = Path(__file__).resolve().parent.parent


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
    return finetune.load_data(pictures, 8)


def tiny():
    """A network in which every kind of state matters: parameters, running statistics, and numbers drawn at random."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(512, 2))


def same(one, other):
    states = [model.state_dict() for model in (one, other)]
    return states[0].keys() == states[1].keys() and all(torch.equal(v, states[1][k]) for k, v in states[0].items())


RECIPE = finetune.Recipe(epochs=2, batch_size=10, lr=0.05, distill=0.3)  # 5 steps an epoch


# Runs that are killed


def test_a_killed_run_ends_with_the_same_bits(pictures, tmp_path, monkeypatch):
    flags = ["resnet20", "--data-dir", str(pictures), "--size", "8", "--epochs", "4", "--batch-size", "4"]
    flags += ["--threads", "1", "--seed", "3", "--mixup", "0.2"]
    script = str(ROOT / "examples" / "finetune.py")

    def run(out, *more):
        monkeypatch.setattr(sys, "argv", [script, *flags, "--out", str(out), *more])
        finetune.main()
        return json.loads((out / "result.json").read_text())

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, script, *flags, "--out", str(killed), "--every", "0"]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("step 17 of 48"):  # the fifth of an epoch's twelve
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    assert not (killed / "result.json").exists()
    assert 17 <= torch.load(killed / "checkpoint.pt")["step"] < 48

    first, second = run(whole), run(killed)
    assert (whole / "model.safetensors").read_bytes() == (killed / "model.safetensors").read_bytes()
    assert first.pop("seconds") > 0 < second.pop("seconds")
    assert first == second
    assert first["images"] == 50 and first["seed"] == 3 and len(first["curve"]) == len(first["losses"]) == 4
    with pytest.raises(SystemExit, match="nothing to do"):
        run(whole)
    assert not list(whole.glob(".*.tmp"))


@pytest.mark.parametrize(
    "at, more",
    [(1, {}), (3, {"bf16": True}), (5, {}), (6, {"mixup": 0.8, "cutmix": 1.0}), (9, {"bf16": True, "cutmix": 0.5})],
)
def test_a_run_cut_after_any_step_goes_on_exactly(data, tmp_path, monkeypatch, at, more):
    teacher, whole, cut = tiny(), tiny(), tiny()
    recipe = dataclasses.replace(RECIPE, **more)
    log = finetune.train(whole, data, recipe, teacher=teacher)

    steps = []
    with monkeypatch.context() as patch:

        def loss_of(*args):
            steps.append(args)
            if len(steps) > at:
                raise KeyboardInterrupt
            return genuine(*args)

        genuine = finetune.loss_of
        patch.setattr(finetune, "loss_of", loss_of)
        with pytest.raises(KeyboardInterrupt):
            finetune.train(cut, data, recipe, teacher=teacher, out=tmp_path, every=0)

    resumed = tiny()
    torch.manual_seed(at)  # the states of the generators at the start are of no account
    np.random.seed(at)
    assert finetune.train(resumed, data, recipe, teacher=teacher, out=tmp_path)["losses"] == log["losses"]
    assert same(whole, resumed) and not same(whole, cut)


def test_a_failed_write_leaves_the_checkpoint_before(data, tmp_path, monkeypatch):
    finetune.train(tiny(), data, finetune.Recipe(epochs=1, batch_size=10), out=tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(RuntimeError), finetune.replacing(tmp_path / "checkpoint.pt") as file:
        file.write(b"half")
        raise RuntimeError
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_checkpoint_of_another_recipe_is_refused(data, tmp_path):
    finetune.train(tiny(), data, finetune.Recipe(epochs=1, batch_size=10), out=tmp_path)
    with pytest.raises(ValueError, match="another run"):
        finetune.train(tiny(), data, finetune.Recipe(epochs=1, batch_size=10, seed=1), out=tmp_path)


def test_the_callers_random_numbers_are_left_alone(data):
    torch.manual_seed(5)
    np.random.seed(5)
    expected = torch.rand(3), np.random.rand(3)
    model = tiny()
    torch.manual_seed(5)
    np.random.seed(5)
    finetune.train(model, data, finetune.Recipe(epochs=1, batch_size=10, mixup=1.0))
    assert torch.equal(torch.rand(3), expected[0]) and (np.random.rand(3) == expected[1]).all()


# Augmentation


@pytest.mark.parametrize("mixup, cutmix", [(1.0, 0.0), (0.0, 1.0)])
def test_pictures_and_labels_are_mixed_by_the_same_share(mixup, cutmix):
    """Each picture has one value of its own: how much of which is in a mixed one can be read off its pixels."""
    recipe = finetune.Recipe(mixup=mixup, cutmix=cutmix)
    values = torch.tensor([0, 40, 80, 120, 160, 200])
    images = values.to(torch.uint8).view(6, 1, 1, 1).expand(6, 8, 10, 3).clone()
    kept, drawn = images.clone(), set()
    for step in range(8):
        x, shares = finetune.mixed(images, torch.arange(6), recipe, 6, step)
        assert torch.equal(images, kept) and x.shape == images.shape and shares.shape == (6, 6)
        assert torch.allclose(shares.sum(1), torch.ones(6))
        assert torch.allclose(x.mean((1, 2, 3)), shares @ values.float(), atol=1e-2)
        assert cutmix == 0 or x.unique().numel() <= 6
        again = finetune.mixed(images, torch.arange(6), recipe, 6, step)
        assert torch.equal(x, again[0]) and torch.equal(shares, again[1])
        drawn.add(round(float(shares[0, 0]), 5))
    assert len(drawn) > 4


def test_nothing_is_mixed_unless_asked(data):
    images, labels = data.train.images[:10], data.train.labels[:10]
    assert finetune.mixed(images, labels, finetune.Recipe(), 2, 0) == (images, labels)
    with pytest.raises(ValueError, match="not 5"):
        finetune.train(tiny(), data, finetune.Recipe(batch_size=5, mixup=0.2))


# Distillation


def test_the_loss_is_the_mixture_of_labels_and_teacher():
    torch.manual_seed(0)
    logits, targets, labels = torch.randn(6, 4), torch.randn(6, 4), torch.randint(4, (6,))
    hard = F.cross_entropy(logits, labels)
    soft, hot = (targets / 3).softmax(1), (logits / 3).softmax(1)
    apart = 9 * (soft * (soft / hot).log()).sum(1).mean()
    recipe = finetune.Recipe(distill=0.25, temperature=3.0)
    assert torch.equal(finetune.loss_of(logits, labels, None, recipe), hard)
    torch.testing.assert_close(finetune.loss_of(logits, labels, targets, recipe), 0.75 * hard + 0.25 * apart)
    agreeing = finetune.loss_of(logits, labels, logits + 1, recipe)  # a constant more is the same answer
    torch.testing.assert_close(agreeing, 0.75 * hard)


def test_the_teacher_answers_in_eval_mode_and_stays_as_it_is(data):
    teacher, alone, taught = tiny(), tiny(), tiny()
    before, modes = copy.deepcopy(teacher), []
    teacher.register_forward_hook(lambda module, args, out: modes.append((module.training, out.requires_grad)))
    finetune.train(taught, data, RECIPE, teacher=teacher)
    assert modes == [(False, False)] * 10
    assert same(teacher, before)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    finetune.train(alone, data, finetune.Recipe(epochs=2, batch_size=10, lr=0.05))
    assert not same(alone, taught)


@pytest.mark.parametrize("teacher, distill", [(None, 0.5), (tiny, 0.0)])
def test_a_teacher_and_its_weight_go_together(data, teacher, distill):
    with pytest.raises(ValueError, match="distillation"):
        finetune.train(tiny(), data, finetune.Recipe(distill=distill, batch_size=10), teacher=teacher and teacher())


# Pictures and weights


def test_pictures_are_decoded_once_balanced_and_nested(pictures, data, tmp_path, monkeypatch):
    assert data.classes == ("cat", "dog") and data.train.images.shape == (50, 8, 8, 3)
    assert data.train.labels[:42].tolist() == [0, 1] * 21  # then cats alone
    monkeypatch.setattr(finetune.Image, "open", None)
    fewer = finetune.load_data(pictures, 8, images=11)
    assert torch.equal(fewer.train.images, data.train.images[:11])
    assert torch.equal(fewer.train.labels, data.train.labels[:11])
    monkeypatch.undo()
    other = finetune.load_data(pictures, 8, cache=tmp_path)
    assert torch.equal(other.test.images, data.test.images) and len(list(tmp_path.glob("*.npy"))) == 2


def test_an_epoch_shows_every_picture_once_in_an_order_of_its_own(data):
    recipe = finetune.Recipe(batch_size=10)
    plain = finetune.Split(torch.arange(50).view(50, 1, 1, 1).expand(50, 8, 8, 3).to(torch.uint8), torch.arange(50))
    epochs = [list(finetune.batches(plain, recipe, epoch, 0)) for epoch in (0, 0, 1)]
    orders = [torch.cat([labels for _, labels in epoch]) for epoch in epochs]
    assert orders[0].sort().values.tolist() == list(range(50))
    assert torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], orders[2])
    assert all(bool((images[:, 0, 0, 0] == labels).all()) for images, labels in epochs[0])  # pixels and class together
    rest = list(finetune.batches(data.train, recipe, 3, 2))
    for (x, y), (all_x, all_y) in zip(rest, list(finetune.batches(data.train, recipe, 3, 0))[2:], strict=True):
        assert torch.equal(x, all_x) and torch.equal(y, all_y)


def test_resnet20_is_the_published_one():
    net = finetune.build("resnet20", 10)
    assert sum(parameter.numel() for parameter in net.parameters()) == 269_722 + 2_752  # and two 1x1 projections
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert nmconv.make_plan(net, "2:1").counts.activations_before == 19


def test_weights_of_a_converted_network_and_of_other_classes(tmp_path):
    start = finetune.build("resnet20", 5, seed=1)
    converted = nmconv.convert(start, "2:1")
    nmconv.save(converted, tmp_path / "converted.safetensors")
    loaded = finetune.build("resnet20", 5, tmp_path / "converted.safetensors")
    assert nmconv.get_plan(loaded) == nmconv.get_plan(converted) and same(loaded, converted)

    renamed = {f"other.{i}": value for i, value in enumerate(start.state_dict().values())}
    torch.save(renamed, tmp_path / "renamed.pth")
    assert same(finetune.build("resnet20", 5, tmp_path / "renamed.pth"), start)
    more = finetune.build("resnet20", 7, tmp_path / "renamed.pth")
    assert torch.equal(more.conv1.weight, start.conv1.weight) and not more.fc.weight.any()
    del renamed["other.3"]
    torch.save(renamed, tmp_path / "short.pth")
    with pytest.raises(ValueError):
        finetune.build("resnet20", 5, tmp_path / "short.pth")
