"""Licences between people who do not keep to the order of things: customers who dodge, owners who forge."""

import json
import shutil

import numpy as np
import pytest
import terminal

from smark_jax import files, keys, licence
from smark_jax.licence import documents

CHOICES, PARTS = 512, 4


def smark(folder, *arguments, code=0):
    ran = terminal.run(*arguments, folder=folder)
    assert ran.code == code, ran.out + ran.err
    return ran.out + ran.err


@pytest.fixture(scope="module")
def offered(tmp_path_factory):
    """A vault with offers to three customers, and wallets; nobody has requested anything."""
    folder = tmp_path_factory.mktemp("licence")
    base = {"a/kernel": np.random.default_rng(0).normal(size=(128, 200)).astype(np.float32)}
    files.write(folder / "base.safetensors", base)
    smark(folder, "init", "vault")
    smark(folder, "add-model", "vault", "net", "base.safetensors")
    for name in ("ada", "bob", "arbiter"):
        smark(folder, "licence", "init", name)
    about = ("--choices", CHOICES, "--parts", PARTS, "--out", "offers")
    smark(folder, "licence", "offer", "vault", "net", "Ada", "Bob", "Cleo", *about)
    return folder


@pytest.fixture
def desk(offered, tmp_path):
    shutil.copytree(offered, tmp_path / "desk")
    return tmp_path / "desk"


def offer(folder, name="000000-Ada"):
    return documents.loads(licence.SignedOffer, (folder / f"offers/{name}.offer").read_bytes(), "offer")


def sent(folder, name, file):
    (folder / name).write_bytes(documents.dumps(file))
    return name


def signed(made, who, **fields):
    """A request whose customer changed some of its fields, and signed it."""
    plain = made.request.request._replace(**fields)
    return made.request._replace(request=plain, signature=documents.sign(who.signing, plain))


ADA, EVE, ARBITER = (licence.Identity(keys.new()) for _ in range(3))


def test_a_customer_cannot_make_its_conviction_dear(desk):
    """Each p-value pays for the attempt's number, which the customer states."""
    request = licence.request(offer(desk), ADA, 2**62).request
    name = sent(desk, "dear.request", documents.RequestFile(request))
    assert "attempt" in smark(desk, "issue", "vault", "net", "--request", name, "--out", "packages", code=1)


def test_two_requests_of_a_customer_are_not_served_at_once(desk):
    """The second would be served and not noted: nobody would ask for the word in its copy."""
    names = [
        sent(desk, f"{i}.request", documents.RequestFile(licence.request(offer(desk), who).request))
        for i, who in enumerate((ADA, ADA, EVE))
    ]
    for one, other in ((0, 1), (0, 2)):
        both = ("--request", names[one], "--request", names[other])
        refused = smark(desk, "issue", "vault", "net", *both, "--out", "packages", code=1)
        assert "one request of each customer" in refused and not list((desk / "packages").glob("*"))


@pytest.mark.parametrize("what", ["created", "pieces"])
def test_a_request_cannot_make_the_evidence_too_large(desk, what):
    """Bundles hold the request and the sealed parts; one of more than 16 MiB is not read."""
    made = licence.request(offer(desk), ADA, arbiter=ARBITER.public)
    request, pieces = made.request, made.pieces
    if what == "created":
        request = signed(made, ADA, created="2026" * (1 << 20))
    else:
        pieces = (bytes(10_000), *pieces[1:])
        deposit = documents.Deposit(ARBITER.public, tuple(map(documents.sha256, pieces)))
        request = signed(made, ADA, deposit=deposit)
    name = sent(desk, "long.request", documents.RequestFile(request, tuple(piece.hex() for piece in pieces)))
    smark(desk, "issue", "vault", "net", "--request", name, "--out", "packages", code=1)
