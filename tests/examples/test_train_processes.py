"""Training in two processes, against training in one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("torchvision")
pytest.importorskip("accelerate")
pytest.importorskip("rich")

import train_process

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """What two gloo processes make of it."""
    out = tmp_path_factory.mktemp("two") / "found.pt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(ROOT / "tests" / "examples" / "train_process.py"), str(out)],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(out)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_make_the_updates_of_one(of_two, dtype, bound, accumulate):
    """Six updates with momentum: the weights are sums of the gradients."""
    state, log = train_process.trained(dtype)
    start = train_process.network(dtype).state_dict()
    found = of_two[f"{dtype} {accumulate}"]
    for name, value in state.items():
        moved = (value - start[name]).abs().max()
        assert moved > 1e-3
        assert (value - found["state"][name]).abs().max() <= bound * max(1, moved)
    assert found["losses"] == pytest.approx(log["losses"], rel=10 * bound)
    assert found["curve"] == log["curve"]


def test_two_processes_draw_the_same_members(of_two):
    state, _ = train_process.trained(torch.float64, train_process.SAMPLING)
    other, _ = train_process.trained(torch.float64, {**train_process.SAMPLING, "seed": 8})
    for name, value in of_two["sampling"]["state"].items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=1e-12)
    assert any((value - other[name]).abs().max() > 1e-6 for name, value in state.items())


@pytest.mark.parametrize("accumulate", [2, 3])
def test_accumulated_gradients_are_those_of_the_whole_batch(accumulate):
    once, parts = (train_process.trained(torch.float64, accumulate=count)[0] for count in (1, accumulate))
    for name, value in once.items():
        torch.testing.assert_close(parts[name], value, rtol=0, atol=1e-12)
