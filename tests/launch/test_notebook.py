"""The notebook, every cell, at a size that a CPU does in a minute."""

import importlib.util
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]


def test_a_repository_that_was_not_filled_in_is_asked_for(monkeypatch):
    cells = nbformat.read(ROOT / "launch" / "colab_tpu.ipynb", as_version=4).cells
    install = next(cell.source for cell in cells if "REPOSITORY = " in cell.source)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)  # as on a new runtime
    with pytest.raises(SystemExit, match="REPOSITORY"):
        exec(install, {})


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of Jupyter's own
def test_the_notebook_runs_from_top_to_bottom_twice_and_leaves_its_exports(tmp_path, monkeypatch):
    """The second run is that after a restart of the runtime: it finds what the first has left."""
    monkeypatch.setenv("LLADA_SMALL", "1")
    monkeypatch.setenv("LLADA_WORK", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    for _ in range(2):
        notebook = nbformat.read(ROOT / "launch" / "colab_tpu.ipynb", as_version=4)
        NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
        printed = [
            "".join(o.get("text", "") for o in cell.outputs) for cell in notebook.cells if cell.cell_type == "code"
        ]
        before, after = next(
            text.split(" nats")[0].split(" → ") for text in printed if " → " in text and "nats" in text
        )
        assert float(after) > float(before)
        assert (tmp_path / "adapter" / "adapter_config.json").is_file()
        assert (tmp_path / "merged" / "model.safetensors").is_file()
