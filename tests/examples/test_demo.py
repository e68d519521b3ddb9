"""examples/demo.py, as a user runs it, with settings that take seconds."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

for needed in ("timm", "torchvision", "accelerate", "sklearn", "rich", "matplotlib"):
    pytest.importorskip(needed)

ROOT = Path(__file__).resolve().parents[2]
PNG = b"\x89PNG\r\n\x1a\n"
HEADINGS = ["ratio", "accuracy, %", "loss", "convs", "acts", "MACs, M", "latency", "diff"]


def demo(tmp_path, *flags):
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / "demo.py"), "--epochs", "1", "--device", "cpu", *flags],
        env={
            **os.environ,
            "COLUMNS": "80",
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


def assert_fits(stdout):
    """No line of the table and its legend is over 80 columns, none was wrapped, and no cell was cut or left out."""
    lines = stdout[stdout.index("┏") :].splitlines()[:-1]  # without the plot's path
    assert max(map(len, lines)) <= 80 and "…" not in stdout
    assert [cell.strip() for cell in lines[1].strip("┃").split("┃")] == HEADINGS
    assert all(len(row) == len(HEADINGS) and all(row[:2] + row[3:7]) for row in rows(stdout))
    assert lines[-1] == "A few seeds and a short schedule: no claim about which ratio is better."


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
    result = demo(tmp_path, "--limit", "128", "--seeds", "2", "--out", "plots/demo.png")
    assert result.returncode == 0, result.stderr
    assert "128 pictures to train on, 128 to test on, 10 classes" in result.stdout
    assert "The plan at 2:1:" in result.stdout and "layer1.0.act1" in result.stdout
    assert "resnet18, a quarter as wide: 1 epoch, 2 seeds" in result.stdout
    assert_fits(result.stdout)
    found = rows(result.stdout)
    assert [(row[0], row[4]) for row in found] == [("1:1", "17"), ("2:1", "9"), ("merged", "9")]
    assert float(found[2][-1]) < 1e-4  # merged against converted
    for row, ratio in zip(found, ("1:1", "2:1", "2:1"), strict=True):
        lines = [line for line in result.stdout.splitlines() if line.startswith(f"{ratio}, seed")]
        by_seed = [float(line.split()[3]) for line in lines]
        mean, _, sd = row[1].partition(" ± ")
        assert len(by_seed) == 2
        assert float(mean) == pytest.approx(sum(by_seed) / 2, abs=0.11)
        assert float(sd) == pytest.approx(abs(by_seed[0] - by_seed[1]) / 2**0.5, abs=0.13)
    assert (tmp_path / "plots" / "demo.png").read_bytes().startswith(PNG)
    # torch's timer looks for a compiler's home, and says so on machines with one and no GPU
    assert [line for line in result.stderr.splitlines() if "No CUDA runtime is found" not in line] == []


def test_image_folder_and_several_ratios(tmp_path):
    root = image_folder(tmp_path / "pictures")
    files = sorted(root.rglob("*"))
    flags = ("--data-dir", str(root), "--ratio", "2:1", "3:1", "--model", "cifar_resnet8", "--size", "16")
    result = demo(tmp_path, *flags, "--limit", "6", "--batch-size", "4", "--seeds", "1", "--out", "demo.png")
    assert result.returncode == 0, result.stderr
    assert "6 pictures to train on, 6 to test on, 2 classes" in result.stdout
    assert [row[0] for row in rows(result.stdout)] == ["1:1", "2:1", "merged", "3:1", "merged"]
    assert "±" not in "".join(row[1] for row in rows(result.stdout))  # one seed
    assert (tmp_path / "demo.png").read_bytes().startswith(PNG)
    assert sorted(root.rglob("*")) == files  # nothing is written beside the pictures


def test_merging_leaves_fewer_convolutions(tmp_path):
    flags = ("--limit", "64", "--ratio", "3:1", "--model", "mobilenetv2_035", "--relocate", "--hoist", "--seeds", "1")
    result = demo(tmp_path, *flags, "--out", "demo.png")
    assert result.returncode == 0, result.stderr
    assert_fits(result.stdout)
    before, after = rows(result.stdout)[-2:]
    assert (before[0], after[0]) == ("3:1", "merged")
    assert int(after[3]) < int(before[3])  # convolutions
    assert float(after[5]) < float(before[5])  # multiply-adds
    assert float(after[-1]) < 1e-4


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--ratio", "nonsense"), "^RatioError: .*nonsense"),
        (("--model", "resnet1800"), "'resnet1800' is not a network"),
        (("--batch-size", "65"), "64 pictures do not fill a batch of 65"),
        (("--data-dir", "pictures"), r"train/ and test/ \(or val/\)"),
    ],
)
def test_what_cannot_be_done_is_one_clear_line(tmp_path, monkeypatch, flags, said):
    image_folder(tmp_path / "pictures", splits=("train",))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--limit", "64", "--device", "cpu", *flags])
    with pytest.raises(SystemExit, match=said) as stopped:
        importlib.import_module("examples.demo").main()
    assert "\n" not in stopped.value.code
    assert not (tmp_path / "out").exists()
