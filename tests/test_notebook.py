from __future__ import annotations

from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "own_images.ipynb"


@pytest.mark.filterwarnings("default")
def test_the_notebook_runs_and_ends_with_verdicts(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = [
        "".join(output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]
    assert "faint" in said[1]
    assert "Lagrangian" in said[3]
    assert " MB, " in said[4]
    assert "finished" in said[5]
    assert "waiting" not in said[5]
    assert "undecided" in said[-1] or "holds" in said[-1]
