"""Odd values at every option of every command: one clear error, exit code 1 or 2, and never a traceback."""

import contextlib
import io
import math
import os
import sys

import flax.nnx as nnx
import jax
import numpy as np
import orbax.checkpoint
import pytest
import safetensors.numpy
import typer
from test_desk import SECRET, Here

from smark_jax import cli, statistics
from smark_jax.vault import crypto, models

GROUP = typer.main.get_command(cli.app)
ODD = ("", "(", "-1", "nan", "9" * 20, "foo", "x" * 5000, "\udcff")
# What a command takes so that it works, apart from the one value that is odd.
RIGHT = {
    "init": ("made",),
    "demo": (),
    "bench": (),
    "add-model": ("other", "new", "base.npz"),
    "plan": ("vault", "net"),
    "customers": ("vault",),
    "draw": ("vault", "later", "--out", "draft.json"),
    "issue": ("vault", "net", "Ada", "--out", "copies"),
    "trace": ("vault", "net", "base.npz"),
    "report": ("vault", "9"),
    "query": ("vault", "net", "false"),
    "attack": ("base.npz", "leaked", "--prune", "0.5"),
    "evidence export": ("vault", "9", "--out", "bundle"),
    "evidence verify": ("bundle.json", "base.npz", "base.npz"),
    "evidence timestamp": ("vault", "net", "1", "base.npz"),
    "licence init": ("new-wallet",),
    "licence offer": ("vault", "net", "Bob", "--choices", "64", "--out", "offers"),
    "licence request": ("wallet", "offers/000001-Bob.offer", "--out", "request"),
    "licence open": ("wallet", "bundle.json", "--out", "opened.npz"),
    "licence complain": ("wallet", "bundle.json", "--out", "request"),
    "licence answer": ("wallet", "bundle.json", "--out", "answer"),
    "licence status": ("wallet",),
    "train": ("train.toml",),
}
NEVER_RIGHT = ("", "(", "-1", "nan", "9" * 20)  # for numbers of these, which take seconds wherever a value is right


def commands():
    for name, command in GROUP.commands.items():
        for inner, leaf in getattr(command, "commands", {"": command}).items():
            yield f"{name} {inner}".strip(), leaf


def cases():
    """Each option and argument of each command, and the arguments with each odd value in its place."""
    for name, command in commands():
        right, place = RIGHT[name], 0
        values = NEVER_RIGHT if name in ("demo", "bench") else ODD
        for parameter in command.params:
            if parameter.param_type_name == "argument" and place < len(right):
                tried = [(*right[:place], odd, *right[place + 1 :]) for odd in values]
                place += 1
            elif (
                parameter.param_type_name == "option"
                and not parameter.is_flag
                and (name, parameter.name) != ("demo", "out")
            ):
                tried = [(*right, f"{parameter.opts[0]}={odd}") for odd in values]
            else:
                continue
            yield pytest.param(name, tried, id=f"{name} {parameter.name}")


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A vault with a model and a customer, whose passphrase is quickly stretched."""
    desk = Here(tmp_path_factory.mktemp("odd"))
    np.savez(desk.folder / "base.npz", kernel=np.random.default_rng(0).normal(size=(60, 100)).astype(np.float32))
    (desk.folder / "train.toml").write_text("epochs = 0\n")
    (desk.folder / "bundle.json").write_text("{}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crypto, "_N", 2)
        desk.run("init", "vault")
        desk.run("init", "other")  # for models of odd names, which then are
    desk.run("add-model", "vault", "net", "base.npz", "--chips", 64)
    desk.run("issue", "vault", "net", "Ada", "--out", "copies")
    desk.run("add-model", "vault", "later", "base.npz", "--chips", 64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crypto, "_N", 2)
        desk.run("licence", "init", "wallet")
    desk.run("licence", "offer", "vault", "net", "Bob", "--choices", 64, "--out", "offers")
    return desk


def run(desk: Here, *arguments: str) -> tuple[int, str]:
    """A command in this process; whatever it raises but an exit would be a traceback."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(desk.folder)
        patch.setenv("SMARK_PASSPHRASE", SECRET)
        patch.setattr(sys, "argv", ["smark", *arguments])
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            try:
                cli.main()
            except SystemExit as end:
                return end.code or 0, stderr.getvalue()
    return 0, stderr.getvalue()


def test_no_command_is_left_out():
    assert {name for name, _ in commands()} == set(RIGHT)


@pytest.mark.parametrize(("name", "tried"), list(cases()))
def test_an_odd_value_ends_in_one_clear_error(desk, name, tried, monkeypatch):
    monkeypatch.setattr(crypto, "_N", 2)
    base = (desk.folder / "base.npz").read_bytes()
    for number, arguments in enumerate(tried):
        if name == "add-model" and arguments[1] == "new":  # a name of its own, since some values are right ones
            arguments = (
                arguments[0],
                f"{len(list((desk.folder / 'other/models').iterdir()))}-{number}",
                *arguments[2:],
            )
        code, told = run(desk, *name.split(), *arguments)
        assert code in (0, 1, 2), arguments
        if code:
            assert "smark: " in told or "Usage: " in told or name == "trace", (arguments, told)
        if code == 1 and "smark: " in told:
            assert len(told[told.index("smark: ") :].strip().splitlines()) <= 4, told
        (desk.folder / "base.npz").write_bytes(base)  # to which a report may have been written, on request


@pytest.mark.parametrize(
    "line",
    [
        *(
            f"{name} = {value}"
            for name in ("seed", "parties", "epochs", "batch", "checkpoint_every")
            for value in (10**30, -1)
        ),
        *(f"{name} = {value}" for name in ("clip", "learning_rate") for value in ("nan", "-inf", "0")),
        *(f'{name} = ""' for name in ("network", "epochs")),
        "owner_mark = []",
        "epochs = {}",
        "[epochs]",
        "\x00",
        "epochs = 1e400",
    ],
)
def test_an_odd_line_in_a_training_configuration_ends_in_one_clear_error(desk, line):
    (desk.folder / "odd.toml").write_text(line)
    code, told = run(desk, "train", "odd.toml", "--out", "odd")
    assert code == 1
    assert told.startswith("smark: expected ")
    assert not (desk.folder / "odd").exists()


def test_an_nnx_model_with_dropout_keys_is_added_from_orbax(desk):
    """Keys of random generators are of a type that NumPy does not know; copies carry their data."""

    class Network(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.layer, self.dropout = nnx.Linear(60, 100, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    state = nnx.state(Network(nnx.Rngs(0)))
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(desk.folder / "nnx", state)
    desk.run("add-model", "vault", "nnx", "nnx", "--chips", 64)
    desk.run("issue", "vault", "nnx", "Ada", "--out", "nnx-copies")
    copy = safetensors.numpy.load_file(desk.folder / "nnx-copies" / "000000-Ada.safetensors")
    (key,) = (leaf for name, leaf in copy.items() if name.endswith("key/value"))
    np.testing.assert_array_equal(key, jax.random.key_data(state["dropout"]["rngs"]["key"].get_value()))
    (desk.folder / "empty").mkdir()
    desk.run("add-model", "vault", "none", "empty", code=1)
    assert "an Orbax checkpoint in empty" in desk.stderr


# Outputs in the place of inputs


def everything(desk: Here) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(desk.folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def links(desk):
    """Other names of base.npz."""
    (desk.folder / "link").symlink_to("base.npz")
    os.link(desk.folder / "base.npz", desk.folder / "hard")
    (desk.folder / "dir").symlink_to(".")
    (desk.folder / "vault-link").symlink_to("vault")


@pytest.mark.parametrize(
    "arguments",
    [
        *(
            ("attack", "base.npz", out, "--prune", "0.5")
            for out in ("base.npz", "./base.npz", "link", "hard", "dir/base.npz")
        ),
        ("attack", "link", "base.npz", "--prune", "0.5"),
        ("attack", "base.npz", "link", "--mix", "hard"),
        ("attack", "copies/000000-Ada.npz", "base.npz", "--mix", "base.npz"),
        ("issue", "vault", "net", "Grace", "--out", "vault/models"),
        ("issue", "vault-link", "net", "Grace", "--out", "vault"),
        ("issue", "vault", "net", "Grace", "--out", "x", "--timestamp-request", "vault/vault.sqlite"),
        ("issue", "vault", "net", "--csv", "names.csv", "--out", "x", "--timestamp-request", "names.csv"),
        ("draw", "vault", "later", "--out", "vault/draft.json"),
        ("draw", "vault", "later", "--out", "x", "--timestamp-request", "dir/vault/x"),
        ("draw", "vault", "later", "--out", "secret", "--passphrase-file", "secret"),
        ("report", "vault", "1", "--out", "vault/master.key"),
        ("report", "dir/vault", "1", "--out", "vault/vault.sqlite"),
        ("evidence", "export", "vault", "1", "--out", "vault-link/vault.sqlite"),
        ("evidence", "export", "vault", "1", "--out", "secret", "--passphrase-file", "secret"),
        ("issue", "vault", "net", "Ada", "--out", "copies-and-base"),
        ("train", "results.json", "--out", "."),
        ("train", "right.toml", "--out", "trained"),
        ("demo", "--out", "demo"),
    ],
    ids=" ".join,
)
def test_no_output_takes_the_place_of_an_input_or_of_the_vaults_files(desk, links, arguments):
    (desk.folder / "names.csv").write_text("Grace\n")
    (desk.folder / "secret").write_text(SECRET)
    for name in ("right.toml", "results.json"):
        (desk.folder / name).write_text("epochs = 1\n")
    for folder in ("trained", "copies-and-base"):
        (desk.folder / folder).mkdir(exist_ok=True)
    (desk.folder / "copies-and-base" / "000000-Ada.npz").write_bytes((desk.folder / "base.npz").read_bytes())
    (desk.folder / "trained" / "base.safetensors").write_text("somebody's own")
    (desk.folder / "demo" / "private").mkdir(parents=True, exist_ok=True)
    before = everything(desk)
    code, told = run(desk, *arguments)
    assert code == (1 if arguments[-1] in ("trained", "copies-and-base") else 2), told
    assert everything(desk) == before


# Settings that cannot work


def test_so_few_chips_that_nobody_can_be_accused_are_refused_and_one_more_will_do(desk):
    """Those that read without an error, by the decoder's threshold and by the probability of 2 * 2^-m itself."""
    assert statistics.threshold(np.ones(21), math.log(1e-6 / 2)) == math.inf
    assert statistics.threshold(np.ones(22), math.log(1e-6 / 2)) <= math.sqrt(22)
    for alpha, number in ((1e-3, 2), (0.1, 7), (1e-9, 10**6)):
        fewest = models.fewest_chips(alpha, number)
        assert 2 * number * 2.0**-fewest <= alpha < 2 * number * 2.0 ** (1 - fewest)
    desk.run("add-model", "vault", "few", "base.npz", "--chips", 3, code=1)
    assert "at least 22 chips" in desk.stderr
    desk.run("add-model", "vault", "few", "base.npz", "--chips", 22)
    desk.run("issue", "vault", "few", "Ada", "Grace", "Emmy", "--out", "few")
    assert "takes 23: no copy can be traced" in desk.stderr


@pytest.mark.parametrize("strength", ["1e9", "1.01", "inf"])
def test_a_strength_that_drowns_the_weights_is_refused(desk, strength):
    desk.run("add-model", "vault", "strong", "base.npz", "--strength", strength, code=1)
    desk.run("issue", "vault", "net", "Grace", "--out", "strong", "--strength", strength, code=1)
    assert "strength" in desk.stderr
    assert not (desk.folder / "strong").exists()


def test_a_damaged_copy_is_readable_for_its_owner_only(desk):
    desk.run("attack", "copies/000000-Ada.npz", "leak", "--prune", "0.5")
    assert (desk.folder / "leak").stat().st_mode & 0o077 == 0
    assert (desk.folder / "copies/000000-Ada.npz").stat().st_mode & 0o077 == 0
