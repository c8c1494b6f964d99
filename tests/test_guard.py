"""Flower delivers the ClientApp from the server; a guarded client runs, in Flower's own code, what was pinned."""

import hashlib
import subprocess
import sys
import time
import types
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

pytest.importorskip("flwr")

from flwr.app import Array, ArrayRecord, Context, Message, Metadata, RecordDict
from flwr.cli.build import build_fab_from_files
from flwr.supercore.fab import Fab
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.runtime import run_clientapp

from smark_jax.federation import guard, wire

# flwr 1.42 calls what pathspec 1 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "delivered"
version = "1.0.0"
description = "an app"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "server"
[tool.flwr.app.components]
serverapp = "delivered.app:server"
clientapp = "delivered.app:app"
"""
APP = """
from pathlib import Path
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.app import Message, RecordDict
app, server = ClientApp(), ServerApp()
Path(PLACE).write_text("ran")

@app.train()
def train(message, context):
    return Message(RecordDict({"arrays": message.content["arrays"]}), reply_to=message)
"""


def bundle(place: Path) -> bytes:
    """An app of the server's that sends the bare update, and leaves a trace where it ran."""
    return build_fab_from_files(
        {
            "pyproject.toml": PROJECT.encode(),
            "delivered/__init__.py": b"",
            "delivered/app.py": APP.replace("PLACE", repr(str(place))).encode(),
        }
    )[0]


def run(fab: bytes, monkeypatch, hash_str: str | None = None) -> Message:
    """What Flower's own process for a message answers; only its connection to the SuperNode is replaced."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    name = hash_str or hashlib.sha256(fab).hexdigest()
    content = RecordDict({"arrays": ArrayRecord({"w": Array(np.ones(3, np.float32))})})
    meta = Metadata(1, "1", 1, 100, "", "", time.time(), 3600.0, "train")
    message = Message(content, metadata=meta)
    delivered = types.SimpleNamespace(fab_id="server/delivered", fab_version="1.0.0", run_id=1)
    task = (message, Context(1, 100, {}, RecordDict(), {}), delivered, Fab(name, fab, {}))
    sent: list[Message] = []
    for part in ("RuntimeHttpClient", "HeartbeatSender", "register_signal_handlers", "flwr_exit", "event"):
        monkeypatch.setattr(run_clientapp, part, mock.MagicMock())
    monkeypatch.setattr(run_clientapp, "pull_task_input", lambda client: task)
    monkeypatch.setattr(run_clientapp, "push_message", lambda client, reply, context: sent.append(reply))
    run_clientapp.run_clientapp("none:0", "token", insecure=True)
    for loaded in [name for name in sys.modules if name.startswith("delivered")]:
        del sys.modules[loaded]
    return sent[0]


@pytest.fixture
def guarded(monkeypatch, tmp_path):
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flwr"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    for hook in ("install_from_fab", "get_load_client_app_fn"):
        monkeypatch.setattr(run_clientapp, hook, getattr(run_clientapp, hook))
    return lambda pinned, add_mod=False: guard.install(run_clientapp, pinned, add_mod)


def test_without_a_guard_whatever_the_server_delivers_runs(guarded, monkeypatch, tmp_path):
    """The control: an app without the mod sends the bare update, and no line of the client's was asked."""
    reply = run(bundle(tmp_path / "trace"), monkeypatch)
    assert reply.content["arrays"]["w"].numpy().tolist() == [1, 1, 1]
    assert (tmp_path / "trace").exists()


def test_an_app_that_nobody_pinned_does_not_run(guarded, monkeypatch, tmp_path):
    known, other = bundle(tmp_path / "known"), bundle(tmp_path / "trace")
    guarded({hashlib.sha256(known).hexdigest()})
    reply = run(other, monkeypatch)
    assert "an app that this client's operator pinned" in reply.error.reason
    # Under the name of the pinned one it does not run either, nor the pinned one under another's.
    assert run(other, monkeypatch, hashlib.sha256(known).hexdigest()).has_error()
    assert run(known, monkeypatch, "0" * 64).has_error()
    assert not list(tmp_path.glob("trace"))
    assert not run(known, monkeypatch).has_error()


def test_a_plain_app_runs_under_the_clients_own_mod(guarded, monkeypatch, tmp_path):
    plain = bundle(tmp_path / "trace")
    guarded({hashlib.sha256(plain).hexdigest()}, add_mod=True)
    reply = run(plain, monkeypatch)
    assert "a request for a masked update, but got one for a bare update" in reply.error.reason
    assert wire.RECORD not in (reply.content if reply.has_content() else {})


def test_the_guards_command_is_flowers_and_other_kinds_of_code_are_refused(tmp_path):
    fab = tmp_path / "app.fab"
    fab.write_bytes(b"bundle")
    command = [sys.executable, "-m", "smark_jax.federation", "guard", str(tmp_path / "guarded"), str(fab)]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert hashlib.sha256(b"bundle").hexdigest() in Path(path).read_text()
    help_ = subprocess.run([path, "--help"], capture_output=True, text=True, check=True).stdout
    assert "--runtime-api-address" in help_
    refused = subprocess.run([tmp_path / "guarded" / "flwr-agentapp"], capture_output=True, text=True)
    assert refused.returncode == 1
    assert "refused" in refused.stderr


def test_supernodes_accept_what_the_publisher_signed_and_nothing_else(tmp_path):
    """Flower's own check, of --trusted-entities, against the signatures of the loopback runs."""
    import json

    import yaml
    from flwr.supernode.start_client_internal import _verify_fab

    from experiments.federation import superlink

    known, other = bundle(tmp_path / "known"), bundle(tmp_path / "other")
    superlink.sign(tmp_path, [known])
    trusted = yaml.safe_load((tmp_path / "trusted.yaml").read_text())
    signed = json.loads((tmp_path / "signatures.json").read_text())[hashlib.sha256(known).hexdigest()]
    assert _verify_fab(Fab("", known, signed), trusted)
    assert not _verify_fab(Fab("", other, signed), trusted)
    superlink.sign(tmp_path, [known])  # by another publisher
    assert not _verify_fab(Fab("", known, signed), yaml.safe_load((tmp_path / "trusted.yaml").read_text()))


def test_another_version_of_flower_runs_nothing():
    with pytest.raises(ValueError, match="another version of Flower"):
        guard.install(types.SimpleNamespace(__name__="flwr"), set(), False)
