"""The pictures in docs/ are what the files beside them draw."""

import importlib.util
import re
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
DOCS = Path(__file__).resolve().parents[2] / "docs"


def lines_of(path):
    """From the id of each line to its numbers in the file, whatever fonts and styles there are."""
    found = re.findall(r'<g id="([^"]+)">\s*<path d="([^"]+)"', path.read_text())
    return {name: [float(number) for number in re.findall(r"-?[\d.]+", path)] for name, path in found}


def loaded(name):
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_of_units_is_up_to_date():
    assert (DOCS / "units.svg").read_text() == loaded("units").svg(), "python docs/units.py"


def test_the_picture_of_gradual_sites_is_up_to_date(tmp_path):
    gradual = loaded("gradual")
    gradual.draw(tmp_path / "gradual.svg")
    drawn, kept = lines_of(tmp_path / "gradual.svg"), lines_of(DOCS / "gradual.svg")
    for panel in gradual.curves().values():
        for name, (x, _) in panel.items():
            assert len(kept[name]) == 2 * len(x)
            assert kept[name] == pytest.approx(drawn[name], abs=0.5), f"{name}: python docs/gradual.py"
