"""Set one thread a worker, since tests run side by side, and mark known limits and slow tests."""

import json
import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[1]
# Processes that tests start import what tests do: the tree under test, installed or not.
os.environ["PYTHONPATH"] = os.pathsep.join(str(ROOT / path) for path in (".", "examples", "tests", "tests/support"))
LIMITS = json.loads(Path(__file__).with_name("known_limits.json").read_text())
SLOW = {line for line in Path(__file__).with_name("slow.txt").read_text().splitlines() if not line.startswith("#")}


def pytest_collection_modifyitems(items):
    """Mark what the two lists name. Tests of known limits must fail: one that passes has to leave the list."""
    for item in items:
        name = item.nodeid.removeprefix("tests/")
        if name in SLOW:
            item.add_marker(pytest.mark.slow)
        reason = LIMITS.get(name)
        if reason is not None:
            item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
