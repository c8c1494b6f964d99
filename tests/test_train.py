"""``smark train``: what it refuses, what it leaves, and that a killed run ends where an uninterrupted one does."""

import contextlib
import importlib.metadata
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import sysconfig
import time
import tomllib
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from PIL import Image

from smark_jax import _documents, data, errors, files, keys, models
from smark_jax.cli import _train, _train_config
from smark_jax.cli._console import Console
from smark_jax.training import checkpoints, runs

TINY = _train_config.Config(
    network="small",
    train_split="train[:5%]",
    test_split="test[:20%]",
    parties=2,
    epochs=3,
    batch=20,
    learning_rate=0.01,
    checkpoint_every=4,
)
ROUNDS = 15
FILES = {"base.safetensors", "private", "results.json", "training.png"}


class Small(nn.Module):
    """A network that compiles in a second."""

    num_classes: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = images.astype("float32").reshape(images.shape[0], -1) / 255
        return nn.Dense(self.num_classes)(nn.relu(nn.Dense(64)(x)))


models.Small = Small  # for the configurations of this file, and of the processes below
_train_config.NETWORKS["small"] = "Small"


def write_config(path: Path, config: _train_config.Config) -> Path:
    path.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in config._asdict().items()))
    return path


def number_keys(monkeypatch: pytest.MonkeyPatch, first: int = 1) -> list[keys.SecretKey]:
    drawn, numbers = [], itertools.count(first)

    def new() -> keys.SecretKey:
        drawn.append(keys.from_bytes(next(numbers).to_bytes(32, "big")))
        return drawn[-1]

    monkeypatch.setattr(keys, "new", new)
    return drawn


def run(out: Path, config: _train_config.Config = TINY) -> tuple[dict, str]:
    console = Console()
    console.file, console.width = io.StringIO(), 300
    return _documents.plain(_train.run(config, out, console)), console.file.getvalue()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run, with numbered secrets: its folder, results and output."""
    out = tmp_path_factory.mktemp("whole") / "new" / "folder"
    with pytest.MonkeyPatch.context() as patch:
        number_keys(patch)
        results, shown = run(out)
    return out, results, shown


def interrupt(monkeypatch: pytest.MonkeyPatch, out: Path, at: int) -> list[int]:
    """Runs until round ``at`` is done, then stops as Ctrl-C does; the numbers of the rounds that were computed."""
    rounds, fit = [], checkpoints.fit

    def counted(*arguments, on_progress, **options):
        def count(done, total, loss):
            on_progress(done, total, loss)
            if not np.isnan(loss):
                rounds.append(done)
            if rounds[-1:] == [at]:
                raise KeyboardInterrupt

        return fit(*arguments, on_progress=count, **options)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "fit", counted)
        if at <= ROUNDS:
            with pytest.raises(KeyboardInterrupt):
                run(out)
        else:
            run(out)
    return rounds


@pytest.fixture(scope="module")
def halfway(tmp_path_factory):
    """A run that was interrupted after round 2, and again after round 10: its folder, and the rounds computed."""
    out = tmp_path_factory.mktemp("halfway")
    with pytest.MonkeyPatch.context() as patch:
        number_keys(patch)
        before = interrupt(patch, out, 2)
        number_keys(patch, first=100)  # what is drawn from now on must not matter
        return out, [before, interrupt(patch, out, 10)]


# --- The configuration ---


def test_the_example_says_the_defaults():
    assert tomllib.loads(_train_config.EXAMPLE) == _train_config.Config()._asdict()


def test_a_configuration_may_leave_keys_out(tmp_path):
    path = tmp_path / "train.toml"
    path.write_text('network = "resnet18"\nlearning_rate = 1\n')
    assert _train_config.read(path) == _train_config.Config(network="resnet18", learning_rate=1.0)
    assert isinstance(_train_config.read(path).learning_rate, float)
    assert _train_config.read(write_config(path, TINY._replace(network="cnn"))) == TINY._replace(network="cnn")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learningrate = 1", r"keys of network, dataset.*\n.*mean 'learning_rate'"),
        ("colour = 1", r"keys of .*checkpoint_every.*'colour'.\nsmark train --example"),
        ("epochs = 0", "epochs .* whole number of at least 1, but got 0"),
        ("epochs = 1.5", "epochs .* whole number"),
        ("epochs = true", "epochs .* whole number"),
        ("seed = -1", "seed .* at least 0"),
        ("clip = 0", "clip .* a number above 0"),
        ("clip = inf", "clip .* a number above 0"),
        ("owner_mark = 1", "owner_mark .* true or false"),
        ("network = 'vgg'", "network .* 'cnn' or 'resnet18'"),
        ("dataset = 5", "dataset .* a text"),
        ("epochs 5", r"a TOML file in .*\(at line 1"),
        ("epochs = 5\nepochs = 6", "a TOML file in"),
    ],
)
def test_a_wrong_configuration_is_refused(tmp_path, text, message):
    path = tmp_path / "train.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"^train: expected .*{message}"):
        _train_config.read(path)


def test_every_network_of_the_configuration_is_built():
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), np.uint8)
    for name in _train_config.NETWORKS.keys() - {"small"}:
        network = getattr(models, _train_config.NETWORKS[name])(num_classes=7)
        params = jax.eval_shape(lambda key, net=network: models.init(net, key, (32, 32, 3)), jax.random.key(0))
        assert jax.eval_shape(models.apply_fn(network), params, images).shape == (2, 7)
        assert "batch_stats" not in params  # which gradients do not train


# --- What it leaves behind ---


def test_it_trains_and_says_what_came_of_it(whole):
    out, results, shown = whole
    assert {path.name for path in out.iterdir()} == FILES
    assert json.loads((out / "results.json").read_text()) == results
    assert results["config"] == TINY._asdict()
    assert results["rounds"] == ROUNDS
    assert len(results["loss"]) == TINY.epochs
    assert results["loss"][-1] < 0.7 * results["loss"][0]
    base = files.read(out / "base.safetensors")
    assert results["file_sha256"] == base.sha256
    assert results["base_sha256"] == files.content_hash(base.leaves)
    test = data.load("mnist_5k", "test[:20%]")
    params = files.nest(base.leaves)
    accuracy = models.accuracy(models.apply_fn(Small(10)), params, test.images, test.labels)
    assert results["accuracy"] == pytest.approx(accuracy)
    assert accuracy > 0.4
    assert "Loading mnist_5k" in shown
    with Image.open(out / "training.png") as picture:
        assert len(np.unique(np.asarray(picture.convert("L")))) > 20


def test_the_owner_proves_the_mark_as_documented(whole, monkeypatch, capsys):
    out, results, _ = whole
    page = (Path(__file__).parent.parent / "docs" / "training.md").read_text()
    (example,) = (code for code in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL) if "owner.key" in code)
    monkeypatch.chdir(out)
    exec(example, {})
    shown = float(capsys.readouterr().out)
    assert shown == pytest.approx(results["owner_mark_log10_p"], rel=1e-3)
    assert shown < -25
    exec(example.replace('Path("private/owner.key").read_text()', "'00' * 32"), {})  # another's key reads nothing
    assert capsys.readouterr().out == "nothing\n"


def exposed(folder: Path) -> list[str]:
    """What others than the owner may read, besides locks, which are empty."""
    found = [path for path in (folder, *folder.rglob("*")) if path.name != ".lock"]
    return [str(path) for path in found if stat.S_IMODE(path.stat().st_mode) & 0o077]


def test_secrets_are_private_and_do_not_stay(whole):
    out, results, shown = whole
    assert stat.S_IMODE((out / "private").stat().st_mode) == 0o700
    assert exposed(out / "private") == []
    assert not exposed(out / "base.safetensors")
    assert {path.name for path in (out / "private").iterdir()} <= {
        "owner.key",
        "start.safetensors",
        "config.json",
        ".lock",
    }
    for number in range(1, 4):  # the owner's key, and two parties' secrets
        secret = number.to_bytes(32, "big")
        holders = [path.name for path in out.rglob("*") if path.is_file() and secret.hex() in path.read_text("latin-1")]
        assert holders == (["owner.key"] if number == 1 else [])
        assert secret.hex() not in shown + json.dumps(results)


def test_without_matplotlib_or_mark_it_trains_as_well(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    results, shown = run(tmp_path, TINY._replace(owner_mark=False, epochs=1))
    assert results["owner_mark_log10_p"] is None
    assert "pip install 'smark-jax[train]'" in shown
    assert not (tmp_path / "training.png").exists()
    assert not (tmp_path / "private" / "owner.key").exists()


# --- Interrupted ---


def test_an_interrupted_run_goes_on_to_the_same_model(tmp_path, monkeypatch, whole, halfway):
    out, results, _ = whole
    shutil.copytree(halfway[0], tmp_path, dirs_exist_ok=True)
    number_keys(monkeypatch, first=200)
    assert halfway[1] == [[1, 2], list(range(1, 11))]
    assert interrupt(monkeypatch, tmp_path, ROUNDS + 1) == list(range(9, ROUNDS + 1))
    for name in ("base.safetensors", "training.png", "private/start.safetensors"):
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes(), name
    again = json.loads((tmp_path / "results.json").read_text())
    assert {**again, "seconds": 0} == {**results, "seconds": 0}


def test_a_checkpoint_holds_no_secret_of_earlier_rounds(halfway):
    out, _ = halfway
    folder = out / "private" / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["8"]
    assert exposed(out / "private") == []
    assert not {path.name for path in out.iterdir()} & {"base.safetensors", "results.json"}
    loading = ocp.options.PyTreeOptions.Loading(partial_load=True)
    context = ocp.Context(pytree_options=ocp.options.PyTreeOptions(loading=loading))
    with ocp.training.Checkpointer(folder, context=context) as checkpoints:
        shape = jax.ShapeDtypeStruct((2, 32), np.uint8, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
        held = np.asarray(checkpoints.load(8, {"secrets": shape})["secrets"])
    for party, row in enumerate(held):
        first = keys.from_bytes((2 + party).to_bytes(32, "big"))  # the first that was drawn is the owner's
        second = keys.derive(first, "next stretch")
        assert row.tobytes() == keys.derive(second, "next stretch").to_bytes()
        assert row.tobytes() not in (first.to_bytes(), second.to_bytes())


def test_where_rounds_do_not_repeat_the_parties_agree_new_secrets(tmp_path, monkeypatch, whole, halfway):
    out, results, _ = whole
    shutil.copytree(halfway[0], tmp_path, dirs_exist_ok=True)
    drawn = number_keys(monkeypatch, first=300)
    with monkeypatch.context() as patch:
        patch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"] + " --xla_cpu_enable_fast_math=true")
        version = importlib.metadata.version
        patch.setattr(importlib.metadata, "version", lambda name: "99" if name == "jax" else version(name))
        other, shown = run(tmp_path)
    assert f"jax is 99, was {version('jax')}" in shown
    assert f"fast_math=true, was {os.environ['XLA_FLAGS']};" in shown
    assert "stop this run before its next checkpoint" in shown
    assert len(drawn) == 2
    assert other["base_sha256"] != results["base_sha256"]  # only last digits: rounding is drawn from the secrets
    assert other["accuracy"] == pytest.approx(results["accuracy"], abs=0.05)
    first, second = (files.read(folder / "base.safetensors").leaves["Dense_0/kernel"] for folder in (out, tmp_path))
    assert 0 < np.abs(first - second).max() < 0.01


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *((name, {"version": name}) for name in ("smark-jax", "jax", "jaxlib", "flax", "optax", "numpy", "ml_dtypes")),
        *((name, {"variable": name}) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE")),
        ("jax_default_matmul_precision", {"setting": "jax_default_matmul_precision"}),
        (None, {"variable": "XLA_DUMP_TO"}),
        (None, {"variable": "HOME"}),
    ],
    ids=str,
)
def test_whatever_changes_the_bits_of_a_round_is_part_of_the_environment(monkeypatch, name, change):
    """Who overlooked one would send other messages under the masks of a round that was sent before."""
    images = data.Dataset(np.zeros((1, 2, 2, 1), np.uint8), np.zeros(1, np.int32), 2)
    before = checkpoints.environment_of(images, 1)
    version = importlib.metadata.version
    if "version" in change:
        monkeypatch.setattr(importlib.metadata, "version", lambda of: "99" if of == change["version"] else version(of))
    if "variable" in change:
        monkeypatch.setenv(change["variable"], "other")
    with contextlib.ExitStack() as stack:
        if "setting" in change:
            stack.enter_context(jax.default_matmul_precision("float32"))
        after = checkpoints.environment_of(images, 1)
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert changed == ({name} if name else set())


def test_a_finished_run_is_left_alone_and_another_configuration_refused(whole, monkeypatch):
    out, results, _ = whole
    before = (out / "base.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(checkpoints, "fit", None)
    left = out / "private" / "checkpoints" / "12"  # killed just before it would have removed them
    left.mkdir(parents=True)
    (out / "base.safetensors").chmod(0o644)  # as versions before left it
    again, shown = run(out)
    assert not exposed(out / "base.safetensors")
    assert not left.parent.exists()
    assert again == results
    assert "nothing is left to do" in shown
    with pytest.raises(ValueError, match=r"one that began with epochs 3, clip 1.0.\nChoose another folder"):
        run(out, TINY._replace(epochs=4, clip=2.0))
    assert (out / "base.safetensors").stat().st_mtime_ns == before


def test_two_runs_do_not_share_a_folder(whole):
    out, _, _ = whole
    code = (
        "import filelock, sys, time\n"
        "with filelock.FileLock(sys.argv[1]):\n print('held', flush=True)\n time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(out / "private" / ".lock")], stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(errors.InUse, match="another smark train at work"):
            run(out)
        other.kill()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[1]", b"{"])
@pytest.mark.parametrize("name", ["private/config.json", "results.json"])
def test_a_damaged_file_of_a_run_is_named(tmp_path, monkeypatch, name, content):
    monkeypatch.setattr(runs, "_same_settings" if name == "results.json" else "_start", lambda *_: None)
    (tmp_path / "private").mkdir()
    (tmp_path / name).write_bytes(content)
    if name == "results.json":
        (tmp_path / "base.safetensors").touch()
    with pytest.raises(errors.SmarkError, match=name.rpartition("/")[2]):
        run(tmp_path)


def test_results_are_read_back_and_a_wrong_field_of_them_is_named(tmp_path, whole):
    results = runs.Results(**whole[1] | {"loss": (0.5, math.nan)})
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results._asdict()))  # as versions before wrote what diverged
    assert runs._results(path) == results._replace(loss=(0.5, None), devices=tuple(results.devices))
    path.write_text(json.dumps(results._asdict() | {"rounds": -1}))
    with pytest.raises(errors.SmarkError, match=r"results\.json, but got some whose field 'rounds'"):
        runs._results(path)


def test_a_damaged_key_is_not_shown(tmp_path):
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "owner.key").write_text("5ec2e7" * 9)
    with pytest.raises(ValueError, match="64 hexadecimal digits") as caught:
        run(tmp_path)
    assert "5ec2e7" not in str(caught.value)
    assert caught.value.__suppress_context__


def test_batches_too_large_are_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "fit", None)
    with pytest.raises(ValueError, match="batch size of at most 100"):
        run(tmp_path, TINY._replace(batch=101))


# --- As a command ---

NUMBERED = """
import itertools, sys
import test_train  # the small network
from smark_jax import keys
numbers = itertools.count(int(sys.argv.pop(1)))
keys.new = lambda: keys.from_bytes(next(numbers).to_bytes(32, "big"))
from smark_jax.cli import main
main()
"""


def test_kill_9_and_the_same_command_again_give_the_same_model(tmp_path, whole):
    """Killed in the middle of whatever it does, once the second checkpoint is there."""
    config, out = write_config(tmp_path / "train.toml", TINY), tmp_path / "out"

    def command(first_secret: int) -> list[str]:
        return [sys.executable, "-c", NUMBERED, str(first_secret), "train", str(config), "--out", str(out), "--json"]

    here = os.pathsep.join((str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "PYTHONPATH": here}
    with subprocess.Popen(command(1), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as victim:
        waiting = time.monotonic() + 120
        while not (out / "private" / "checkpoints" / "4").exists() and time.monotonic() < waiting:
            time.sleep(0.002)
        victim.send_signal(signal.SIGKILL)
    assert victim.returncode == -signal.SIGKILL
    assert not (out / "results.json").exists()
    done = subprocess.run(command(100), capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert "Going on after round" in done.stderr
    assert json.loads(done.stdout)["base_sha256"] == whole[1]["base_sha256"]
    assert (out / "base.safetensors").read_bytes() == (whole[0] / "base.safetensors").read_bytes()


def smark(*arguments: str) -> subprocess.CompletedProcess:
    command = [str(Path(sysconfig.get_path("scripts")) / "smark"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, "COLUMNS": "160"})


def test_help_has_examples_and_wrong_usage_is_told(tmp_path):
    shown = smark("train", "--help").stdout
    for text in ("smark train --example > train.toml", "smark train train.toml --out out/base", "--json", "Killed?"):
        assert text in shown
    assert smark("train", "--example").stdout == _train_config.EXAMPLE
    none = smark("train")
    assert none.returncode == 2
    assert "smark train --example" in none.stderr
    (tmp_path / "bad.toml").write_text("epoch = 3")
    for path in ("bad.toml", "absent.toml"):
        refused = smark("train", str(tmp_path / path), "--out", str(tmp_path / "out"))
        assert refused.returncode == 1
        assert refused.stderr.startswith("smark:")
        assert "Traceback" not in refused.stderr
    assert not (tmp_path / "out").exists()
