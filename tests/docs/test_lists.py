"""The lists of tests beside conftest.py name tests that there are."""

import json
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
SLOW = [line for line in (TESTS / "slow.txt").read_text().splitlines() if not line.startswith("#")]


@pytest.mark.parametrize("names", [SLOW, json.loads((TESTS / "known_limits.json").read_text())], ids=["slow", "limits"])
def test_each_name_is_a_test(names):
    assert len(set(names)) == len(names)
    for name in names:
        file, function = name.partition("[")[0].split("::")
        assert f"def {function}(" in (TESTS / file).read_text(), name
