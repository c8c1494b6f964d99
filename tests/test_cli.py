"""The console script as a user runs it, in processes of its own."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from conftest import COMPUTES
from PIL import Image

from smark_jax.cli import _cache

SMARK = Path(sysconfig.get_path("scripts")) / "smark"


def smark(*arguments: str, command: tuple[str, ...] = (str(SMARK),), **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=600, env={**os.environ, **environment}
    )


# The command with a quarter of the weights, which takes a quarter of the time to train.
_SMALL = """
import functools
from smark_jax import cli, models
models.CNN = functools.partial(models.CNN, width=16)
cli.main()
"""


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A short demo: two parties, two epochs, six customers."""
    out = tmp_path_factory.mktemp("demo") / "new folder"
    arguments = ("--parties", "2", "--epochs", "2", "--customers", "6", "--out", str(out))
    # It computes for longer than it compiles: with some optimisation, unlike the tests around it.
    return smark("demo", *arguments, command=(sys.executable, "-c", _SMALL), COLUMNS="160", XLA_FLAGS=COMPUTES), out


def test_demo_traces_all_and_accuses_no_innocent(demo):
    run, out = demo
    assert run.returncode == 0, run.stderr
    results = json.loads((out / "results.json").read_text())
    assert results["base_accuracy"] > 0.9
    assert results["base_accuracy"] - results["marked_accuracy_mean"] < 0.01
    assert (results["bit_errors"], results["issued"], results["traced"]) == (0, 6, 6)
    assert results["worst_p_value"] <= 1e-25
    assert (results["leaks_traced"], results["innocents_accused"]) == (4, 0)
    assert results["owner_mark_log10_p"] < -25
    assert results["suspects"][-1]["accused"] == results["suspects"][-2]["accused"] == []
    assert results["seconds"] > 0
    assert len(results["devices"]) == 2


def test_demo_prints_the_verdicts_and_draws_the_picture(demo):
    run, out = demo
    for text in (
        "Who leaked?",
        "fine-tuned",
        "pruned",
        "quantised",
        "API, labels only",
        "independent API",
        "nobody",
        "results.json",
    ):
        assert text in run.stdout
    assert "wrong)" not in run.stdout
    with Image.open(out / "statistics.png") as picture:
        pixels = np.asarray(picture.convert("RGB"), np.int16)
    assert pixels.shape[1] > 1000
    red = (pixels[..., 0] > 150) & (pixels[..., 1] < 100) & (pixels[..., 2] < 100)
    assert red.sum() > 500


def test_help_has_examples_and_version_is_told():
    shown = smark("demo", "--help", COLUMNS="120")
    assert shown.returncode == 0
    for text in ("--out", "--parties", "Examples", "smark demo --out out/demo --customers 50"):
        assert text in shown.stdout
    assert "demo" in smark("--help").stdout
    assert "The vault's folder." in smark("init", "--help", COLUMNS="120").stdout
    assert smark("--version").stdout.startswith("smark 0.")


@pytest.mark.parametrize(
    "arguments", [("demo", "--parties", "0"), ("demo", "--customers", "2"), ("demo", "--colour"), ("dance",)]
)
def test_wrong_usage_exits_with_2_and_writes_nothing(arguments, tmp_path):
    run = smark(*arguments, *(("--out", str(tmp_path / "out")) if arguments[0] == "demo" else ()))
    assert run.returncode == 2
    assert "Usage" in run.stderr
    assert not (tmp_path / "out").exists()


def test_an_impossible_folder_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    run = smark("demo", "--out", str(tmp_path / "file"))
    assert run.returncode == 1
    assert "smark:" in run.stderr
    assert "Traceback" not in run.stderr


def test_import_is_light_and_help_does_not_start_jax():
    code = "import sys, smark_jax.cli; print([m for m in ('flax', 'optax', 'tensorflow_datasets') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"


def test_compiled_programs_are_kept_for_the_next_command_where_nobody_else_reads_them(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    small = ("bench", "--weights", "2048", "--chips", "8", "--customers", "10", "--json")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    run = smark(*small, XDG_CACHE_HOME=str(tmp_path))
    (folder,) = (tmp_path / "smark-jax").iterdir()
    assert (run.returncode, run.stderr) == (0, "")
    assert folder.stat().st_mode & 0o077 == 0
    kept = list(folder.glob("*-cache"))
    assert kept
    for file in kept:  # as a killed command leaves it
        file.write_bytes(file.read_bytes()[:100])
    again = smark(*small, XDG_CACHE_HOME=str(tmp_path))
    assert (again.returncode, again.stderr) == (0, "")


def test_nothing_is_kept_where_the_user_or_the_home_forbids_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "the user's own")
    _cache.keep_compiled()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "the user's own"
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    with monkeypatch.context() as own:
        own.setenv("SMARK_NO_CACHE", "1")
        _cache.keep_compiled()
    assert not any(tmp_path.iterdir())
    (tmp_path / "smark-jax").write_text("a file in the way")
    _cache.keep_compiled()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


def test_nothing_is_kept_where_somebody_else_could_put_programs(tmp_path, monkeypatch):
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_COMPILATION_CACHE_MAX_SIZE"):
        monkeypatch.setenv(name, "0")  # so that it is restored
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    def kept(caches: str) -> str | None:
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", caches)
        _cache.keep_compiled()
        return os.environ.get("JAX_COMPILATION_CACHE_DIR")

    shared = tmp_path / "shared"
    (shared / "smark-jax").mkdir(parents=True)
    (shared / "smark-jax").chmod(0o777)  # in which anybody could replace the folder of programs
    folder = kept(str(shared))
    assert folder is not None
    assert (shared / "smark-jax").stat().st_mode & 0o077 == 0
    monkeypatch.chdir(tmp_path)
    assert str(kept("shared")).startswith(str(tmp_path / "home" / ".cache"))  # not in whatever folder one works in
    with monkeypatch.context() as other:
        other.setattr(os, "geteuid", lambda: os.getuid() + 1)
        assert kept(str(shared)) is None
    Path(folder).rename(tmp_path / "elsewhere")
    Path(folder).symlink_to(tmp_path / "elsewhere")
    assert kept(str(shared)) is None
