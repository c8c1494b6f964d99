"""The owner's desk from a new vault to evidence that an arbiter verifies, as commands and as the installed script."""

import base64
import concurrent.futures
import contextlib
import datetime
import hashlib
import http.server
import io
import json
import os
import pty
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import orbax.checkpoint
import pytest
import safetensors.numpy
import time_stamps
from PIL import Image

from smark_jax import alignment, attacks, blackbox, cli, codes, data, files, keys, models, training, vault
from smark_jax.vault import crypto, queries
from smark_jax.vault import models as vault_models
from smark_jax.vault import probes as vault_probes

SMARK = Path(sysconfig.get_path("scripts")) / "smark"
SECRET = "a sentence that nobody guesses"
COMMANDS = (
    *((name,) for name in "init add-model plan customers draw issue trace report query".split()),
    *((name,) for name in "attack bench demo train".split()),
    *(("evidence", name) for name in ("export", "verify", "timestamp")),
    *(("licence", name) for name in ("init", "offer", "request", "open", "complain", "answer", "status")),
)


class Desk:
    """A folder in which commands run, and all that they printed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.printed = folder, ""

    def run(self, *arguments: Any, code: int = 0, **options: Any) -> str:
        """Runs a command and returns its stdout."""
        environment = {**os.environ, "SMARK_PASSPHRASE": SECRET, "COLUMNS": "200", **options.pop("environment", {})}
        done = subprocess.run(
            [str(SMARK), *map(str, arguments)],
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=300,
            env=environment,
            **options,
        )
        self.printed += done.stdout + done.stderr
        self.stderr = done.stderr
        assert done.returncode == code, done.stderr[-3000:]
        assert "Traceback" not in done.stderr
        return done.stdout

    def json(self, *arguments: Any, code: int = 0) -> Any:
        """Runs a command with --json; its stdout is one JSON document and nothing else."""
        return json.loads(self.run(*arguments, "--json", code=code))


class Here(Desk):
    """Commands run in this process, which saves the seconds that another takes to start."""

    def run(self, *arguments: Any, code: int = 0, environment: Mapping[str, str] | None = None) -> str:
        stdout, stderr = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.folder)
            for name, value in {"SMARK_PASSPHRASE": SECRET, "COLUMNS": "200", **(environment or {})}.items():
                patch.setenv(name, value)
            patch.setattr(crypto, "_N", 2**10)  # a vault made here is opened quickly from here on
            patch.setattr(sys, "argv", ["smark", *map(str, arguments)])
            with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
                try:
                    cli.main()
                    ended = 0
                except SystemExit as end:
                    ended = end.code
        self.stderr = stderr.getvalue()
        self.printed += stdout.getvalue() + self.stderr
        assert ended == code, self.stderr
        assert "Traceback" not in self.stderr
        return stdout.getvalue()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A CNN trained for one pass over real digits."""
    train = data.load("mnist_5k", "train")
    network = models.CNN()
    apply_fn, params = models.apply_fn(network), models.init(network, jax.random.key(0), (28, 28, 1))
    optimizer = optax.adam(2e-3)

    def loss(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(apply_fn(params, x), y).mean()

    batches = training.minibatches((train.images, train.labels), batch_size=64, epochs=1, seed=0)
    params = training.minimise(loss, optimizer, training.begin(params, optimizer), batches)[0].params
    test = data.load("mnist_5k", "test")
    assert models.accuracy(apply_fn, params, test.images, test.labels) > 0.85
    return params


@pytest.fixture(scope="module")
def desk(tmp_path_factory, base):
    """The whole way, in the order of docs/desk.md."""
    desk = Here(tmp_path_factory.mktemp("desk"))
    files.write(desk.folder / "base.safetensors", base)
    (desk.folder / "customers.csv").write_text("customer,city\nAda,London\nGrace Hopper,New York\n王小明,北京\n")
    (desk.folder / "network.py").write_text(
        "import numpy as np\nfrom smark_jax import data, models\n\n\n"
        "def aligning():\n    return models.apply_fn(models.CNN()), np.zeros((1, 28, 28, 1), np.uint8)\n\n\n"
        "def marking():\n    return models.apply_fn(models.CNN()), data.load('mnist_5k', 'test').images[:48]\n"
    )
    desk.run("init", "vault")
    desk.run("add-model", "vault", "mnist-cnn", "base.safetensors", "--network", "network:marking", "--strength", 0.01)
    desk.run("customers", "vault", "--csv", "customers.csv")
    desk.issued = desk.json("issue", "vault", "mnist-cnn", "Emmy", "--all", "--out", "copies")
    return desk


def test_the_session_from_a_new_vault_to_verified_evidence(desk):
    issued = desk.issued
    assert (issued["customers"], issued["licensed"], issued["written"]) == (4, 4, 4)
    names = [Path(file).name for file in issued["files"]]
    assert names[:2] == ["000000-Ada.safetensors", "000001-Grace-Hopper.safetensors"]
    desk.run("attack", f"copies/{names[1]}", "leaked.bin", "--prune", 0.5, "--quantise", 5)
    printed = desk.run("trace", "vault", "mnist-cnn", "leaked.bin")
    assert printed.startswith("leaked.bin: a copy of Grace Hopper (customer 1).")
    script = Desk(desk.folder)  # as a user runs it, in a process of its own
    found = script.json("trace", "vault", "mnist-cnn", "leaked.bin", "base.safetensors", "customers.csv", code=1)
    desk.printed += script.printed
    assert set(found) == {"number", "model", "num_customers", "alpha", "suspects"}
    assert (found["number"], found["num_customers"], found["alpha"]) == (2, 4, 1e-6)
    verdicts = [(suspect["verdict"], [a["customer"] for a in suspect["accused"]]) for suspect in found["suspects"]]
    assert verdicts == [("traced", ["Grace Hopper"]), ("nobody", []), ("unreadable", [])]
    assert "Convert it to safetensors" in found["suspects"][2]["error"]
    accused = found["suspects"][0]["accused"][0]
    assert {"customer", "serial", "statistic", "p_value", "log10_p"} <= set(accused)
    assert accused["log10_p"] < -30
    desk.run("report", "vault", 1, "--out", "report.html")
    assert "Grace Hopper" in (desk.folder / "report.html").read_text()
    desk.run("evidence", "export", "vault", 1, "--out", "evidence.json")
    commitment = issued["commitment"]
    models_given = ("leaked.bin", "base.safetensors")
    for published in (commitment["file"], commitment["root"]):
        verified = desk.json("evidence", "verify", "evidence.json", *models_given, "--commitment", published)
        assert verified["holds"]
        assert [a["customer"] for a in verified["accused"]] == ["Grace Hopper"]
    assert "Everything holds" in desk.run("evidence", "verify", "evidence.json", *models_given)
    assert "NOT compared" in desk.stderr
    desk.run("evidence", "verify", "evidence.json", *models_given, "--commitment", "00" * 32, code=1)
    desk.run("evidence", "verify", "evidence.json", f"copies/{names[0]}", "base.safetensors", code=1)
    desk.run("issue", "vault", "mnist-cnn", "Ada", "--out", "copies")
    assert "opened this model's carrier" in desk.stderr


def test_a_mixture_is_traced_to_both(desk):
    desk.run("attack", "copies/000000-Ada.safetensors", "mixed", "--mix", "copies/000003-Emmy.safetensors")
    found = desk.json("trace", "vault", "mnist-cnn", "mixed")
    assert {a["customer"] for a in found["suspects"][0]["accused"]} == {"Ada", "Emmy"}


def test_a_pytorch_copy_is_traced(desk):
    """A state dict as torch.nn.Conv2d and Linear have it, saved as safetensors and as npz, with other names."""
    leaves = files.read(desk.folder / "copies" / "000002-王小明.safetensors").leaves
    flat = leaves["Dense_0/kernel"].reshape(7, 7, 64, 128).transpose(3, 2, 0, 1).reshape(128, -1)
    state = {
        "conv1.weight": leaves["Conv_0/kernel"].transpose(3, 2, 0, 1),
        "conv1.bias": leaves["Conv_0/bias"],
        "conv2.weight": leaves["Conv_1/kernel"].transpose(3, 2, 0, 1),
        "conv2.bias": leaves["Conv_1/bias"],
        "fc1.weight": flat,
        "fc1.bias": leaves["Dense_0/bias"],
        "fc2.weight": leaves["Dense_1/kernel"].T,
        "fc2.bias": leaves["Dense_1/bias"],
    }
    state = {name: np.ascontiguousarray(leaf) for name, leaf in state.items()}
    safetensors.numpy.save_file(state, desk.folder / "model.pt")
    np.savez(desk.folder / "model.npz", **state)
    found = desk.json("trace", "vault", "mnist-cnn", "model.pt", "model.npz")
    for suspect in found["suspects"]:
        assert [a["customer"] for a in suspect["accused"]] == ["王小明"]
        assert suspect["accused"][0]["log10_p"] < -80
    printed = desk.run("trace", "vault", "mnist-cnn", "model.pt")
    assert "conv1.weight was read as Conv_0/kernel (OIHW to HWIO)" in printed
    assert "fc1.weight was read as Dense_0/kernel (transposed, flattened CHW to HWC" in printed
    desk.run("evidence", "export", "vault", found["number"], "--suspect", 1, "--out", "pytorch.json")
    assert desk.json("evidence", "verify", "pytorch.json", "model.pt", "base.safetensors")["holds"]


def test_a_rewritten_copy_is_traced_after_alignment_and_the_arbiter_aligns_too(desk):
    copy = files.nest(files.read(desk.folder / "copies" / "000000-Ada.safetensors").leaves)
    apply_fn, images = models.apply_fn(models.CNN()), np.zeros((1, 28, 28, 1), np.uint8)
    copy = jax.tree.map(jax.numpy.asarray, copy)
    graph = alignment.trace_graph(apply_fn, copy, images)
    files.write(desk.folder / "permuted", attacks.permute(copy, graph, jax.random.key(0)))
    assert desk.json("trace", "vault", "mnist-cnn", "permuted")["suspects"][0]["verdict"] == "nobody"
    found = desk.json("trace", "vault", "mnist-cnn", "permuted", "--align", "network:aligning", "--tried", 2)
    assert [a["customer"] for a in found["suspects"][0]["accused"]] == ["Ada"]
    desk.run("evidence", "export", "vault", found["number"], "--out", "aligned.json")
    models_given = ("aligned.json", "permuted", "base.safetensors")
    assert desk.json("evidence", "verify", *models_given, "--align", "network:aligning")["holds"]
    desk.run("evidence", "verify", *models_given, code=1)
    assert "pass --align" in desk.printed
    desk.run("trace", "vault", "mnist-cnn", "permuted", "--align", "network:absent", code=1)
    assert "expected network:absent to return" in desk.stderr


def test_no_secret_is_in_anything_printed_or_written(desk):
    """Master key, derived keys but the opened carrier's, codewords of those not accused, and the passphrase."""
    desk.run("customers", "vault", environment={"SMARK_PASSPHRASE": "wrong " + SECRET}, code=1)
    with vault.opened(desk.folder / "vault", SECRET) as opened:
        master = opened.master
    purposes = ("code", "probes", "decoy", "salt")
    secrets = {"master": master, "log": keys.derive(master, "log"), "signing": keys.derive(master, "signing")}
    secrets |= {purpose: keys.derive(master, "mnist-cnn", purpose) for purpose in purposes}
    needles = {f"{name} {form}": text for name, key in secrets.items() for form, text in _forms(key.to_bytes()).items()}
    needles |= {"passphrase": SECRET.encode()}
    word = codes.codebook(keys.derive(master, "mnist-cnn", "code"), [3], 304)
    needles |= {f"Emmy's word {form}": text for form, text in _forms(np.packbits(word[0] < 0).tobytes()).items()}
    everything = {"printed": desk.printed.encode()}
    everything |= {str(path): path.read_bytes() for path in desk.folder.rglob("*") if path.is_file()}
    assert len(everything) > 15
    for where, content in everything.items():
        for name, needle in needles.items():
            assert needle not in content, f"{name} in {where}"
    carrier = keys.derive(master, "mnist-cnn", "carrier").to_bytes().hex().encode()  # negative control
    assert {Path(where).suffix for where, content in everything.items() if carrier in content} <= {".json"}


def _forms(secret: bytes) -> dict[str, bytes]:
    return {"raw": secret, "hex": secret.hex().encode(), "base64": base64.b64encode(secret).rstrip(b"=")}


# Usage


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A vault with a small model and one customer."""
    desk = Here(tmp_path_factory.mktemp("small"))
    rng = np.random.default_rng(0)
    np.savez(desk.folder / "base.npz", kernel=rng.normal(size=(60, 100)).astype(np.float32))
    (desk.folder / "empty").touch()
    (desk.folder / "cut").write_bytes((desk.folder / "base.npz").read_bytes()[:-30])
    np.savez(desk.folder / "other.npz", kernel=np.zeros((60, 50), np.float32))
    desk.run("init", "vault")
    desk.run("add-model", "vault", "net", "base.npz", "--chips", 64)
    desk.run("issue", "vault", "net", "Ada", "--out", "copies")
    return desk


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_an_example_in_its_help(command, tmp_path):
    shown = Here(tmp_path).run(*command, "--help")
    assert "Example" in shown
    assert f"smark {' '.join(command)}" in shown
    assert "--json" in shown or command == ("demo",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("init", "vault"), "Name another folder"),
        (("add-model", "vault", "net", "base.npz"), "another name"),
        (("add-model", "vault", "b", "absent"), "Check the path"),
        (("add-model", "vault", "b", "base.npz", "--alpha", "2"), "strictly between 0 and 1"),
        *(
            (("add-model", "vault", "b", "base.npz", "--probes", file, "--classes", "9"), "an npz file with 'images'")
            for file in ("empty", "cut", "base.npz")
        ),
        (("issue", "vault", "absent", "Ada", "--out", "x"), "Models in this vault: net"),
        (("issue", "vault", "net", "a\tb", "--out", "x"), "control characters"),
        (("issue", "absent", "net", "Ada", "--out", "x"), "smark init"),
        (("customers", "vault", "--csv", "base.npz"), "CSV"),
        (("customers", "vault", "--add", "Ada"), "nothing to do"),
        (("trace", "vault", "net", "base.npz", "--align", "nothing"), "MODULE:FUNCTION"),
        (("report", "vault", "7"), "'smark trace' makes the first"),
        (("evidence", "export", "vault", "7", "--out", "x"), "'smark trace' makes the first"),
        (("evidence", "verify", "base.npz", "base.npz", "base.npz"), "Ask for the file again"),
        (("evidence", "verify", "absent", "base.npz", "base.npz"), "absent"),
        (("evidence", "timestamp", "vault", "net", "1", "base.npz"), "granted RFC 3161 response"),
        (("query", "vault", "net", "http://127.0.0.1:9"), "--probes"),
        (("attack", "absent", "x", "--prune", "0.5"), "Check the path"),
        (("attack", "base.npz", "x", "--mix", "other.npz"), "Name copies of one model with --mix"),
        (("attack", "base.npz", "x", "--cast", "int8"), "--quantise"),
        (("attack", "base.npz", "x", "--noise", "-1"), "the noise relative to the RMS"),
        (("attack", "base.npz", "x", "--prune", "0"), "50 % is 0.5"),
    ],
)
def test_an_error_is_one_piece_and_says_what_to_do(small, arguments, message):
    before = sorted(small.folder.rglob("*"))
    assert small.run(*arguments, code=1) == ""
    assert small.stderr.startswith("smark: ")
    assert message in small.stderr
    assert len(small.stderr.strip().splitlines()) <= 2
    assert not re.search(r"[a-z]_[a-z]|\w=[^A-Z]", small.stderr), "a function or an argument of Python"
    assert sorted(small.folder.rglob("*")) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ("issue", "vault", "net", "--out", "x"),
        ("trace", "vault", "net"),
        ("trace", "vault", "net", "base.npz", "--map", "nonsense"),
        ("attack", "base.npz", "x"),
        ("report", "vault", "0"),
        ("init",),
        ("add-model", "vault", "b", "base.npz", "--classes", "3"),
        ("init", "vault", "--passphrase", "secret"),
    ],
)
def test_wrong_usage_exits_with_2(small, arguments):
    assert small.run(*arguments, code=2) == ""


def test_the_passphrase_comes_from_a_file_or_a_prompt_and_not_from_nowhere(tmp_path):
    desk = Here(tmp_path)  # what is typed at a terminal is typed to processes below
    (tmp_path / "secret").write_text(SECRET + "\n")
    nothing = {"SMARK_PASSPHRASE": ""}
    (desk.folder / "bytes").write_bytes(b"\xff\xfe" * 9)
    desk.run("init", "vault", "--passphrase-file", "bytes", code=1, environment=nothing)
    assert "text in UTF-8" in desk.stderr
    desk.run("init", "vault", "--passphrase-file", "secret", environment=nothing)
    assert desk.json("customers", "vault") == {"customers": [], "added": 0}
    desk.run("init", "other", environment=nothing, code=1)
    assert "an empty one" in desk.stderr
    desk.run("init", "short", environment={"SMARK_PASSPHRASE": "short"})
    assert "can be guessed" in desk.stderr
    environment = {name: value for name, value in os.environ.items() if name != "SMARK_PASSPHRASE"}
    done = subprocess.run(
        [str(SMARK), "customers", "vault"],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        start_new_session=True,
    )
    assert done.returncode == 1
    assert "Set SMARK_PASSPHRASE" in done.stderr
    code, shown = _typed(["init", "typed"], [SECRET, SECRET], tmp_path, environment)
    assert (code, (tmp_path / "typed").is_dir()) == (0, True)
    assert SECRET not in shown
    code, shown = _typed(["init", "unequal"], [SECRET, SECRET + "!"], tmp_path, environment)
    assert (code, (tmp_path / "unequal").exists()) == (1, False)
    assert SECRET not in shown
    assert desk.json("customers", "typed") == {"customers": [], "added": 0}


# In the child, not by preexec_fn: that forks Python, which JAX's threads do not allow.
_OWN_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


def _typed(arguments: list[str], lines: list[str], folder: Path, environment: dict[str, str]) -> tuple[int, str]:
    """Runs a command on a terminal of its own, types lines at its prompts, and returns what was shown."""
    here, there = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", _OWN_TERMINAL, str(SMARK), *arguments],
        cwd=folder,
        env=environment,
        stdin=there,
        stdout=there,
        stderr=there,
        start_new_session=True,
    )
    os.close(there)
    shown = b""
    for line in lines:
        prompt = b""
        while not prompt.endswith(b": "):
            prompt += os.read(here, 1000)
        shown += prompt
        os.write(here, line.encode() + b"\n")
    while True:
        try:
            more = os.read(here, 1000)
        except OSError:
            break
        if not more:
            break
        shown += more
    os.close(here)
    return process.wait(60), shown.decode()


def test_an_orbax_checkpoint_and_a_time_stamp_are_taken(small, tmp_path):
    kernel = np.load(small.folder / "base.npz")["kernel"]
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", {"dense": {"kernel": kernel}})
    added = small.json("add-model", "vault", "orbax", tmp_path / "checkpoint", "--chips", 64)
    assert (added["leaves"], added["weights"], added["carrying_weights"]) == (1, 6000, 6000)
    small.run("issue", "vault", "orbax", "Ada", "--out", "orbax", "--timestamp-request", "request.tsq")
    if shutil.which("openssl") is None:
        return
    time_stamps.authority(tmp_path)
    (tmp_path / "answer.tsr").write_bytes(time_stamps.stamp(tmp_path, (small.folder / "request.tsq").read_bytes()))
    kept = small.json("evidence", "timestamp", "vault", "orbax", 1, tmp_path / "answer.tsr")
    assert (kept["model"], kept["number"]) == ("orbax", 1)
    assert abs(datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(kept["time"])).days == 0


def test_two_issues_at_once_write_every_copy_once(small):
    """Both processes are asked for the same forty customers and ten of their own."""
    names = [f"c {i}" for i in range(60)]
    lists = [names[:50], names[10:]]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        desks = [Desk(small.folder) for _ in lists]
        done = [
            pool.submit(desk.json, "issue", "vault", "net", *some, "--out", "many")
            for desk, some in zip(desks, lists, strict=True)
        ]
        found = [one.result() for one in done]
    assert sum(one["licensed"] for one in found) == sum(one["written"] for one in found) == 60
    copies = list((small.folder / "many").iterdir())
    assert len(copies) == 60
    with vault.opened(small.folder / "vault", SECRET) as opened:
        known = {sha for (sha,) in opened.connection.execute("SELECT sha256 FROM copies WHERE model = 'net'")}
    assert {hashlib.sha256(copy.read_bytes()).hexdigest() for copy in copies} <= known


def test_a_probable_cause_is_named_when_leaves_are_ambiguous(small):
    rng = np.random.default_rng(1)
    np.savez(small.folder / "two.npz", a=rng.normal(size=(60, 60)), b=rng.normal(size=(60, 60)))
    small.run("add-model", "vault", "two", "two.npz", "--chips", 64)
    small.run("issue", "vault", "two", "Ada", "--out", "two")
    np.savez(small.folder / "unknown.npz", x=rng.normal(size=(60, 60)), y=rng.normal(size=(60, 60)))
    found = small.json("trace", "vault", "two", "unknown.npz")
    assert found["suspects"][0]["verdict"] == "undecided"
    assert "--map" in found["suspects"][0]["error"]
    mapped = small.json("trace", "vault", "two", "unknown.npz", "--map", "a=x: ", "--map", "b=y: ")
    assert mapped["suspects"][0]["verdict"] == "nobody"
    printed = small.run("trace", "vault", "two", "unknown.npz", "--map", "a=x: ", "--map", "b=y: ")
    assert "the map given is one of 32 that content would allow: p-values count them all" in printed
    printed = small.run("trace", "vault", "two", "absent.npz", code=1)
    assert "No suspect could be read. No verdict was kept" in printed


# Answers only


class Answers(NamedTuple):
    """What a copy of one customer answers, by the pixels of a probe."""

    by_pixels: dict[bytes, int]

    def of(self, png: bytes) -> int:
        with Image.open(io.BytesIO(png)) as picture:
            return self.by_pixels.get(hashlib.sha256(np.asarray(picture).tobytes()).digest(), 0)


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A vault whose model has probes, and the answers of customer 1's copy, of which one in ten is wrong."""
    desk = Here(tmp_path_factory.mktemp("asked"))
    rng = np.random.default_rng(0)
    np.savez(desk.folder / "base.npz", kernel=rng.normal(size=(60, 100)).astype(np.float32))
    np.savez(desk.folder / "images.npz", images=data.load("mnist_5k", "train").images[:50])
    desk.run("init", "vault")
    desk.run("add-model", "vault", "net", "base.npz", "--probes", "images.npz", "--classes", 10, "--chips", 240)
    desk.run("issue", "vault", "net", "Ada", "Grace", "Emmy", "--out", "copies")
    with vault.opened(desk.folder / "vault", SECRET) as opened:
        probes, classes = vault_probes.load(vault_models.get(opened, "net"))
        word = np.asarray(codes.codebook(vault_models.code_key(opened, "net"), [1], 240))[0]
    word = np.where(rng.random(240) < 0.1, -word, word)
    sides = blackbox.halves(probes, classes)
    labels = [int(np.flatnonzero(half == chip)[0]) for half, chip in zip(sides, word, strict=True)]
    pixels = [hashlib.sha256(probe[..., 0].tobytes()).digest() for probe in probes]
    return desk, Answers(dict(zip(pixels, labels, strict=True)))


def serve(answer: Any) -> tuple[http.server.ThreadingHTTPServer, str]:
    """A service on this machine that answers with ``answer(body)`` as JSON."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            reply = answer(body, self.headers["Content-Type"])
            self.send_response(200 if reply is not None else 503)
            self.end_headers()
            self.wfile.write(json.dumps(reply).encode())

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}/classify"


def test_a_service_is_traced_by_its_answers_and_a_broken_query_goes_on(asked):
    desk, answers = asked
    asked_for = []

    def fails_late(body, kind):
        asked_for.append(kind)
        return None if len(asked_for) == 70 else {"label": answers.of(body)}

    server, url = serve(fails_late)
    try:
        desk.run("query", "vault", "net", url, code=1)
        assert "answers so far are kept" in desk.stderr
        found = desk.json("query", "vault", "net", url)
    finally:
        server.shutdown()
        server.server_close()
    assert [a["customer"] for a in found["suspects"][0]["accused"]] == ["Grace"]
    # A grey picture, 64 answers that are kept, 5 that are not; 32 asked again, and what is missing of 72.
    assert len(asked_for) == 70 + queries.CHECKED + 72 - 64
    assert set(asked_for) == {"image/png"}
    desk.run("report", "vault", found["number"], "--out", "answers.html")
    desk.run("evidence", "export", "vault", found["number"], "--out", "x.json", code=1)
    assert "traced by its weights" in desk.stderr


@pytest.mark.parametrize(
    ("target", "greeting"),
    [
        ("http://127.0.0.1:port/", b""),
        ("http://[::1", b""),
        ("http://127.0.0.1:{port}/", b"SSH-2.0-none\r\n"),
        ("http://127.0.0.1:{port}/", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n5"),
    ],
)
def test_what_is_no_address_or_gives_no_whole_answer_is_one_clear_error(asked, target, greeting):
    desk, _ = asked
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet():
            with contextlib.suppress(OSError):
                connection, _ = server.accept()
                with connection:
                    connection.recv(1 << 16)
                    connection.sendall(greeting)

        threading.Thread(target=greet, daemon=True).start()
        desk.run("query", "vault", "net", target.replace("{port}", str(server.getsockname()[1])), code=1)
    assert desk.stderr.startswith("smark: expected an answer from http://")


def test_a_form_and_a_list_of_scores_will_do(asked):
    desk, answers = asked

    def form(body, kind):
        assert kind.startswith("multipart/form-data")
        head, _, rest = body.partition(b"\r\n\r\n")
        assert b'name="photo"' in head
        label = answers.of(rest.rpartition(b"\r\n--")[0])
        return [1.0 if place == label else 0.1 for place in range(10)]

    server, url = serve(form)
    try:
        found = desk.json("query", "vault", "net", url, "--field", "photo")
    finally:
        server.shutdown()
        server.server_close()
    assert [a["customer"] for a in found["suspects"][0]["accused"]] == ["Grace"]


def test_a_command_is_traced_by_its_answers_and_does_not_see_the_passphrase(asked):
    desk, answers = asked
    table = {digest.hex(): label for digest, label in answers.by_pixels.items()}
    (desk.folder / "classify.py").write_text(
        "import hashlib, json, os, sys\nimport numpy as np\nfrom PIL import Image\n"
        f"table = json.loads({json.dumps(table)!r})\n"
        "assert 'SMARK_PASSPHRASE' not in os.environ\n"
        "for line in sys.stdin:\n"
        "    pixels = np.asarray(Image.open(line.strip()))\n"
        "    print(table.get(hashlib.sha256(pixels.tobytes()).hexdigest(), 0))\n"
    )
    found = desk.json("query", "vault", "net", f"{sys.executable} classify.py")
    assert [a["customer"] for a in found["suspects"][0]["accused"]] == ["Grace"]
    desk.run("query", "vault", "net", f"{sys.executable} -c 'print(1/0)'", code=1)
    assert "exit code 1" in desk.stderr


def test_a_taught_copy_is_traced_by_its_answers_and_by_its_weights(tmp_path):
    """A linear classifier of pictures of two kinds; its 40 probes lie between them."""
    desk, rng = Here(tmp_path), np.random.default_rng(0)
    centres = rng.integers(60, 196, (4, 24, 24, 1))
    labels = rng.integers(0, 4, 1280)
    pictures = np.clip(centres[labels] + rng.normal(0, 20, (1280, 24, 24, 1)), 0, 255).astype(np.uint8)
    kernel = (centres.reshape(4, -1) - centres.mean(axis=0).ravel()).T.astype(np.float32) / 300
    np.savez(tmp_path / "base.npz", kernel=kernel)
    np.savez(tmp_path / "images.npz", images=pictures)
    (tmp_path / "linear.py").write_text(
        "import jax.numpy as jnp\nimport numpy as np\n\n\n"
        "def apply_fn(params, x):\n"
        "    x = jnp.asarray(x, jnp.float32).reshape(len(x), -1) / 255 - 0.5\n"
        "    return x @ params['kernel']\n\n\n"
        "def teaching():\n    return apply_fn, np.load('images.npz')['images']\n"
    )
    desk.run("init", "vault")
    network = ("--network", "linear:teaching")
    made = ("--probes", "images.npz", "--classes", 4, "--chips", 40, "--strength", 0.1, "--alpha", 0.01)
    desk.run("add-model", "vault", "net", "base.npz", *made, *network)
    issued = desk.json("issue", "vault", "net", "Ada", "Grace", "--out", "copies", "--teach", "linear:teaching")
    assert issued["written"] == 2
    assert "--teach" not in desk.stderr
    with vault.opened(tmp_path / "vault", SECRET) as opened:
        probes, classes = vault_probes.load(vault_models.get(opened, "net"))
        words = np.asarray(codes.codebook(vault_models.code_key(opened, "net"), [0, 1], 40))
        known = {sha256 for (sha256,) in opened.connection.execute("SELECT sha256 FROM copies")}
    sides = blackbox.halves(probes, classes)
    right = []
    for file, word in zip(issued["files"], words, strict=True):
        content = (tmp_path / file).read_bytes()
        assert hashlib.sha256(content).hexdigest() in known
        logits = np.einsum("nd,dc->nc", probes.reshape(40, -1) / 255 - 0.5, np.load(io.BytesIO(content))["kernel"])
        right.extend(sides[np.arange(40), logits.argmax(axis=1)] == word)
    # Keys are the system's: of 32 copies the mean was 0.87, with a deviation of 0.06 for the mean of two. Copies that
    # nobody taught answer half of the probes right, with a deviation of 0.06.
    assert np.mean(right) > 0.63
    traced = desk.json("trace", "vault", "net", issued["files"][1])
    assert [a["customer"] for a in traced["suspects"][0]["accused"]] == ["Grace"]
    again = desk.json("issue", "vault", "net", "Ada", "Grace", "--out", "copies", "--teach", "linear:teaching")
    assert again["written"] == 0
    desk.run("issue", "vault", "net", "Emmy", "--out", "copies")
    assert "without --teach" in desk.stderr
    desk.run("add-model", "vault", "plain", "base.npz", "--chips", 40)
    desk.run("issue", "vault", "plain", "Ada", "--out", "plain", "--teach", "linear:teaching", code=1)
    assert "--probes" in desk.stderr
