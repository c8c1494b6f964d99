"""SuperLink and SuperNodes as processes on loopback, with TLS, authenticated nodes and signed apps."""

import contextlib
import datetime
import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from flwr.cli.build import build_fab_from_disk

from experiments.distributed.launch import free_port
from experiments.federation import superlink
from smark_jax.federation import identities

APPS = {
    "masked": Path(__file__).parent / "app",
    "plain": Path(__file__).parent / "plain",
    "secaggplus": Path(__file__).parent / "secaggplus",
}
"""The Flower app of each aggregation."""


class Federation(NamedTuple):
    """Running processes.

    Attributes:
      folder: certificates, keys, logs.
      environment: for ``flwr`` commands.
      nodes: the SuperNodes, in order of partition.
      launch: starts the SuperNode of a partition, again after it was killed.
    """

    folder: Path
    environment: dict[str, str]
    nodes: list[subprocess.Popen]
    launch: Callable[[int], subprocess.Popen]


@contextlib.contextmanager
def start(folder: Path, clients: int, wait_seconds: float = 90.0) -> Iterator[Federation]:
    """Starts everything, waits until it answers, and stops it at the end.

    Raises:
      RuntimeError: when a process ends early or does not come up; it names the log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    _certificates(folder)
    port, runtime = free_port(), [free_port() for _ in range(clients)]
    environment = _environment(folder, port)
    roster = folder / "roster.txt"
    lines = []
    for index in range(clients):
        path = folder / f"{index}.identity"
        path.unlink(missing_ok=True)
        lines.append(f"{identities.create(path).hex()}  # participant {index}\n")
    roster.write_text("".join(lines))
    environment |= superlink.sign(folder, [build_fab_from_disk(app) for app in APPS.values()])
    with contextlib.ExitStack() as stack:
        link = [
            sys.executable,
            "-m",
            "experiments.federation.superlink",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--enable-supernode-auth",
        ]
        link += ["--ssl-certfile", "server.pem", "--ssl-keyfile", "server.key", "--ssl-ca-certfile", "ca.pem"]
        link += ["--disable-runtime-dependency-installation"]
        process = _spawn(stack, link, folder, environment, "superlink")
        _wait_for_port(port, process, folder / "superlink.log", wait_seconds)
        for index in range(clients):
            _node_key(folder, index)
            _register(folder, index, environment)

        def launch(index: int) -> subprocess.Popen:
            command = ["flower-supernode", "--superlink", f"127.0.0.1:{port}", "--root-certificates", "ca.pem"]
            command += ["--auth-supernode-private-key", f"node{index}.key", "--port", str(runtime[index])]
            command += ["--trusted-entities", "trusted.yaml"]
            config = f'partition-id={index} smark-identity="{folder}/{index}.identity" smark-roster="{roster}"'
            config += " smark-least-share=0.5"  # allows a sum over three of five while two restart
            return _spawn(stack, [*command, "--node-config", config], folder, environment, f"node{index}")

        nodes = [launch(index) for index in range(clients)]
        time.sleep(5)
        for index, node in enumerate(nodes):
            if node.poll() is not None:
                raise RuntimeError(f"SuperNode {index} ended at once; see {folder / f'node{index}.log'}")
        yield Federation(folder, environment, nodes, launch)


def _environment(folder: Path, port: int) -> dict[str, str]:
    """In which Flower's processes run; its settings lie in the folder."""
    home = folder / "flwr"
    home.mkdir(exist_ok=True)
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "loopback"\n\n[superlink.loopback]\naddress = "127.0.0.1:{port}"\n'
        f'root-certificates = "{folder / "ca.pem"}"\n'
    )
    return {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "JAX_PLATFORMS": "cpu",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")))),
    }


def submit(federation: Federation, aggregation: str, **config: object) -> str:
    """Submits the app of an aggregation with this run configuration, and returns the run's number."""
    pairs = " ".join(
        f"{name.replace('_', '-')}={value}" if not isinstance(value, str) else f'{name.replace("_", "-")}="{value}"'
        for name, value in config.items()
    )
    done = subprocess.run(
        ["flwr", "run", str(APPS[aggregation]), "loopback", "--run-config", pairs, "--format", "json"],
        env=federation.environment,
        capture_output=True,
        text=True,
    )
    answer = json.loads(done.stdout) if done.stdout.lstrip().startswith("{") else {}
    if done.returncode or not answer.get("success"):
        raise RuntimeError(f"flwr run failed:\n{answer.get('error-message', done.stdout)}{done.stderr}")
    return str(answer["run-id"])


def training(node: subprocess.Popen) -> bool:
    """Whether a SuperNode has a ClientApp's process running at this moment."""
    table = subprocess.run(["ps", "-eo", "pgid,args"], capture_output=True, text=True, check=True).stdout
    return any(f"{node.pid} " in line.lstrip()[:12] and "flwr-clientapp" in line for line in table.splitlines())


def kill(node: subprocess.Popen) -> None:
    """Kills a client outright: its SuperNode, and the ClientApp's process below it."""
    os.killpg(node.pid, signal.SIGKILL)
    node.wait()


def _spawn(
    stack: contextlib.ExitStack, command: list[str], folder: Path, environment: dict[str, str], name: str
) -> subprocess.Popen:
    log = stack.enter_context((folder / f"{name}.log").open("a"))
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )

    def stop() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    stack.callback(stop)
    return process


def _wait_for_port(port: int, process: subprocess.Popen, log: Path, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"SuperLink ended; see {log}")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.3)
    raise RuntimeError(f"SuperLink did not answer in {seconds:g} seconds; see {log}")


def _register(folder: Path, index: int, environment: dict[str, str]) -> None:
    command = ["flwr", "supernode", "register", str(folder / f"node{index}.pub"), "loopback"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


def _node_key(folder: Path, index: int) -> None:
    """Flower's own authentication of nodes: a P-384 key pair, in OpenSSH's format."""
    key = ec.generate_private_key(ec.SECP384R1())
    form = serialization.PrivateFormat.OpenSSH
    private = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    (folder / f"node{index}.key").write_bytes(private)
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    (folder / f"node{index}.pub").write_bytes(public)


def _certificates(folder: Path) -> None:
    """A certificate authority of this folder, and a server certificate for loopback."""

    def name(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    now = datetime.datetime.now(datetime.UTC)
    ca_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    span = {"start": now - datetime.timedelta(minutes=5), "end": now + datetime.timedelta(days=30)}

    def builder(subject: str, public: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        made = x509.CertificateBuilder().subject_name(name(subject)).issuer_name(name("smark loopback CA"))
        made = made.public_key(public).serial_number(x509.random_serial_number())
        return made.not_valid_before(span["start"]).not_valid_after(span["end"])

    usage = dict.fromkeys(
        (
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    ca = builder("smark loopback CA", ca_key.public_key())
    ca = ca.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    ca = ca.add_extension(x509.KeyUsage(digital_signature=True, key_cert_sign=True, crl_sign=True, **usage), True)
    ca = ca.add_extension(x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key()), False)
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    hosts = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    server = builder("localhost", key.public_key()).add_extension(hosts, False).add_extension(authority, False)
    for file, certificate in (("ca.pem", ca), ("server.pem", server)):
        signed = certificate.sign(ca_key, hashes.SHA256())
        (folder / file).write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    form = serialization.PrivateFormat.PKCS8
    (folder / "server.key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    )
