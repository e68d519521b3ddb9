"""The layout of ImageNet, from end to end: train, stop, resume, validate, merge; on real pictures where they are there.

`NMCONV_IMAGENET_SAMPLE` names an ImageFolder with val/: it serves as train/, too.
"""

import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("torchvision")
pytest.importorskip("accelerate")
pytest.importorskip("rich")

import recipes.training
from recipes.networks import build
from recipes.pictures import load_data
from recipes.training import evaluate

import nmconv
from examples import train


@pytest.fixture(params=["made", "sample"])
def layout(request, tmp_path):
    """A folder with train/ and val/, a folder a class, as ImageNet has them."""
    root = tmp_path / "imagenet"
    if request.param == "sample":
        sample = Path(os.environ.get("NMCONV_IMAGENET_SAMPLE", "none")) / "val"
        if not sample.is_dir():
            pytest.skip("NMCONV_IMAGENET_SAMPLE names no ImageFolder with val/")
        root.mkdir()
        for split in ("train", "val"):
            (root / split).symlink_to(sample)
        return root
    from PIL import Image

    draw = np.random.default_rng(0)
    for split, each in (("train", 8), ("val", 2)):
        for label in ("n01440764", "n01530575", "n01601694"):
            (root / split / label).mkdir(parents=True)
            for i in range(each):
                pixels = draw.integers(0, 256, size=(70 + 9 * i, 90, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / label / f"{label}_{i}.JPEG")
    return root


def test_train_resume_validate_merge(layout, tmp_path, monkeypatch, capsys):
    flags = ["resnet10t", "--data-dir", str(layout), "--size", "64", "--augment", "timm", "--auto-augment"]
    flags += [
        "rand-m9-mstd0.5",
        "--erase",
        "0.2",
        "--workers",
        "2",
        "--device",
        "cpu",
        "--threads",
        "1",
        "--every",
        "0",
    ]
    flags += ["--ratio", "2:1", "--epochs", "2", "--batch-size", "8", "--lr", "0.05", "--ema", "0.9", "--log"]

    def run(out):
        train.main([*flags, "--out", str(out)])
        return json.loads((out / "result.json").read_text())

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    first = run(whole)
    steps = []
    genuine = recipes.training.loss_of

    def loss_of(*args):
        steps.append(args)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return genuine(*args)

    with monkeypatch.context() as patch:
        patch.setattr(recipes.training, "loss_of", loss_of)
        with pytest.raises(KeyboardInterrupt):
            run(stopped)
    second = run(stopped)
    assert (whole / "model.safetensors").read_bytes() == (stopped / "model.safetensors").read_bytes()
    assert first["accuracy"] == second["accuracy"] and first["losses"] == second["losses"]
    assert list(whole.rglob("events.out.tfevents.*"))

    data = load_data(layout, 64, decode=False)
    model = build("resnet10t", len(data.classes), whole / "model.safetensors")
    assert nmconv.get_plan(model).counts.activations_after < nmconv.get_plan(model).counts.activations_before
    assert evaluate(model, data.test) == first["accuracy"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nmconv.NoEffectWarning)
        merged = nmconv.merge(model.eval(), gate="always")
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(merged(x), model(x), rtol=1e-3, atol=1e-4)
    assert evaluate(merged, data.test) == first["accuracy"]
