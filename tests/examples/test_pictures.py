"""docs/gradual.svg is what docs/gradual.py draws."""

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


def test_the_picture_of_gradual_sites_is_up_to_date(tmp_path):
    spec = importlib.util.spec_from_file_location("docs_gradual", DOCS / "gradual.py")
    gradual = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gradual)
    gradual.draw(tmp_path / "gradual.svg")
    drawn, kept = lines_of(tmp_path / "gradual.svg"), lines_of(DOCS / "gradual.svg")
    for panel in gradual.curves().values():
        for name, (x, _) in panel.items():
            assert len(kept[name]) == 2 * len(x)
            assert kept[name] == pytest.approx(drawn[name], abs=0.5), f"{name}: python docs/gradual.py"
