"""examples/demo.py, as a user runs it, with settings that take seconds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

for needed in ("timm", "torchvision", "sklearn", "rich", "matplotlib"):
    pytest.importorskip(needed)

ROOT = Path(__file__).resolve().parent.parent
PNG = b"\x89PNG\r\n\x1a\n"


def demo(tmp_path, *flags):
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]  # the tree under test, installed or not
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / "demo.py"), "--epochs", "1", "--device", "cpu", *flags],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path),
            "COLUMNS": "120",
            "MPLCONFIGDIR": str(tmp_path / "mpl"),
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
    )


def rows(stdout):
    """The table's body as lists of cells."""
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in stdout.splitlines() if line[:1] == "│"]


def image_folder(root, classes=("cat", "dog"), splits=("train", "val"), each=4):
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(0)
    for split in splits:
        for label in classes:
            folder = root / split / label
            folder.mkdir(parents=True)
            for i in range(each):
                picture = pixels.integers(0, 256, size=(20 + i, 24, 3), dtype=np.uint8)
                Image.fromarray(picture).save(folder / f"{i}.jpg")
    return root


def test_digits(tmp_path):
    result = demo(tmp_path, "--limit", "128", "--out", "plots/demo.png")
    assert result.returncode == 0, result.stderr
    assert "The plan at 2:1:" in result.stdout
    assert "layer1.0.act1" in result.stdout
    columns = [(row[0], row[3]) for row in rows(result.stdout)]  # ratio asked, activations
    assert float(rows(result.stdout)[-1][-1]) < 1e-4  # merged against converted
    assert columns == [("1:1", "17"), ("2:1", "9"), ("2:1 merged", "9")]
    assert (tmp_path / "plots" / "demo.png").read_bytes().startswith(PNG)
    # torch's timer looks for a compiler's home, and says so on machines with one and no GPU
    assert [line for line in result.stderr.splitlines() if "No CUDA runtime is found" not in line] == []


def test_image_folder_and_several_ratios(tmp_path):
    root = image_folder(tmp_path / "pictures")
    flags = ("--data-dir", str(root), "--ratio", "2:1", "3:1", "--model", "resnet10t", "--size", "16")
    result = demo(tmp_path, *flags, "--batch-size", "4", "--out", "demo.png")
    assert result.returncode == 0, result.stderr
    assert "8 pictures to train on, 8 to test on, 2 classes" in result.stdout
    assert [row[0] for row in rows(result.stdout)] == ["1:1", "2:1", "2:1 merged", "3:1", "3:1 merged"]
    assert (tmp_path / "demo.png").read_bytes().startswith(PNG)


def test_merging_leaves_fewer_convolutions(tmp_path):
    flags = ("--limit", "64", "--ratio", "3:1", "--model", "mobilenetv2_035", "--relocate", "--hoist")
    result = demo(tmp_path, *flags, "--out", "demo.png")
    assert result.returncode == 0, result.stderr
    before, after = rows(result.stdout)[-2:]
    assert (before[0], after[0]) == ("3:1", "3:1 merged")
    assert int(after[2]) < int(before[2])  # convolutions
    assert float(after[4].split()[0]) < float(before[4].split()[0])  # multiply-adds
    assert float(after[-1]) < 1e-4


def test_a_ratio_that_is_none_is_one_clear_line(tmp_path):
    result = demo(tmp_path, "--limit", "64", "--ratio", "nonsense", "--out", "demo.png")
    assert result.returncode != 0
    assert "RatioError" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "demo.png").exists()


def test_a_folder_without_test_pictures_is_one_clear_line(tmp_path):
    root = image_folder(tmp_path / "pictures", splits=("train",))
    result = demo(tmp_path, "--data-dir", str(root))
    assert result.returncode != 0
    assert "train/ and test/ (or val/)" in result.stderr
    assert "Traceback" not in result.stderr
