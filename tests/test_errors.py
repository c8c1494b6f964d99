"""What callers catch, and what the command line makes of errors that were foreseen and of those that were not."""

import json
import pickle
from typing import Any

import numpy as np
import pytest
import terminal

from smark_jax import _validate, cli, errors, files

PUBLIC = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.SmarkError)]


def raised(error: BaseException) -> Any:
    def app(**options: Any) -> None:
        raise error

    return app


def test_an_error_of_another_library_is_a_bug_with_its_traceback(monkeypatch):
    monkeypatch.setattr(cli, "app", raised(ValueError("zip() argument 2 is shorter")))
    ran = terminal.run("trace", "vault")
    assert (ran.code, ran.out) == (1, "")
    assert "report" in ran.err and "Traceback" in ran.err and "test_errors.py" in ran.err


def test_an_error_that_was_foreseen_shows_a_traceback_only_when_asked(tmp_path):
    quiet = terminal.run("attack", tmp_path / "absent", tmp_path / "out", "--prune", "0.5")
    assert (quiet.code, quiet.out) == (1, "")
    assert "Check the path" in quiet.err and "Traceback" not in quiet.err
    loud = terminal.run("--verbose", "attack", tmp_path / "absent", tmp_path / "out", "--prune", "0.5")
    assert loud.code == 1
    assert "Check the path" in loud.err and "Traceback" in loud.err


@pytest.mark.parametrize(
    ("arguments", "code", "kind"),
    [
        (("attack", "absent", "out", "--prune", "0.5", "--json"), 1, "Unreadable"),
        (("attack", "absent", "out", "--json"), 2, "Usage"),
        (("attack", "--json", "--colour"), 2, "Usage"),
        (("evidence", "verify", "absent", "absent", "absent", "--json"), 1, "FileNotFoundError"),
    ],
)
def test_json_errors_are_one_document(arguments, code, kind, tmp_path):
    ran = terminal.run(*arguments, folder=tmp_path)
    assert ran.code == code
    document = json.loads(ran.out)
    assert (document.keys(), document["error"].keys()) == ({"error"}, {"kind", "message"})
    assert document["error"]["kind"] == kind
    assert document["error"]["message"]


def test_a_json_bug_is_a_document_too(monkeypatch):
    monkeypatch.setattr(cli, "app", raised(RuntimeError("odd")))
    ran = terminal.run("models", "--json")
    assert json.loads(ran.out)["error"]["kind"] == "Bug"
    assert "Traceback" in ran.err


def test_an_error_of_the_operating_system_names_the_file_and_what_to_do(tmp_path):
    ran = terminal.run("evidence", "verify", "absent", "absent", "absent", folder=tmp_path)
    assert (ran.code, ran.err.count("\n")) == (1, 1)
    assert ran.err.startswith("smark: absent: No such file or directory. Is the name right")


def test_two_texts_one_for_each_reader():
    error = _validate.fail("trace", "a leaf", "none", "Pass given={...}.", desk="Say --map.", kind=errors.Ambiguous)
    assert str(error) == "trace: expected a leaf, but got none.\nPass given={...}."
    assert error.desk == "expected a leaf, but got none.\nSay --map."
    plain = _validate.fail("trace", "a leaf", "none", "Is it empty?")
    assert plain.desk == "expected a leaf, but got none.\nIs it empty?"


@pytest.mark.parametrize("kind", PUBLIC)
def test_every_error_is_a_value_error_and_survives_pickling(kind):
    error = _validate.fail("who", "this", "that", "why", kind=kind, desk="how")
    assert isinstance(error, ValueError)
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.desk) == (kind, str(error), error.desk)


def test_the_layout_question_names_the_option_at_the_desk_and_the_argument_elsewhere():
    rng = np.random.default_rng(1)
    base = {"a": rng.normal(size=(9, 9)), "b": rng.normal(size=(9, 9))}
    suspect = {"x": rng.normal(size=(9, 9)), "y": rng.normal(size=(9, 9))}
    with pytest.raises(errors.Ambiguous) as asked:
        files.match_layout(suspect, base)
    assert "given={" in str(asked.value)
    assert "--map" in asked.value.desk
    assert "given=" not in asked.value.desk and "match_layout" not in asked.value.desk


def test_a_missing_extra_is_an_import_error_that_says_how_to_install_it():
    with pytest.raises(errors.MissingExtra) as missing, _validate.needs("query", "query"):
        raise ModuleNotFoundError("No module named 'PIL'", name="PIL")
    error = missing.value
    assert isinstance(error, ImportError)
    assert "pip install 'smark-jax[query]'" in str(error)
    assert (error.extra, error.name) == ("query", "PIL")
