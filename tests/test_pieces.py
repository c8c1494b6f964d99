"""Evidence that opens a part of a carrier: what is drawn, proved, refused, and what stays secret."""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import NamedSharding, PartitionSpec
from test_desk import SECRET, Here

from smark_jax import carriers, embedding, errors, extraction, files, keys, vault
from smark_jax.carriers import hadamard, marks, shapes
from smark_jax.vault import (
    bundles,
    commitments,
    crypto,
    customers,
    documents,
    evidence,
    issuing,
    models,
    openings,
    verdicts,
    verification,
)
from smark_jax.vault import shapes as vault_shapes

M = 64
CHIPS = 128
WHITE = {"kernel": np.random.default_rng(0).normal(size=(256, 64)).astype(np.float32)}


def label(text: str) -> bytes:
    return b"smark-jax v1" + len(text).to_bytes(4, "big") + text.encode()


def leaves_by_hand(carrier_key: bytes) -> list[bytes]:
    """The tree's leaves by HKDF on bytes: leaf p takes the bits of p from the highest, 0 to the left."""
    found = []
    for piece in range(64):
        node = reference.hkdf_sha256(carrier_key, label("pieces"))
        for bit in f"{piece:06b}":
            node = reference.hkdf_sha256(node, label("right" if bit == "1" else "left"))
        found.append(node)
    return found


def root_by_hand(leaves: list[bytes]) -> bytes:
    """The Merkle root over the hashes of 64 keys, whose tree is full."""
    level = [hashlib.sha256(b"\0piece " + hashlib.sha256(leaf).digest()).digest() for leaf in leaves]
    while len(level) > 1:
        level = [hashlib.sha256(b"\1" + level[i] + level[i + 1]).digest() for i in range(0, len(level), 2)]
    return level[0]


def stream(key: bytes, text: str, count: int) -> np.ndarray:
    """Words of the ChaCha20 keystream under a derived key."""
    derived = reference.hkdf_sha256(key, label(text))
    blocks = (reference.chacha20_block(derived, number, bytes(12)) for number in range(-(-count // 16)))
    return np.frombuffer(b"".join(blocks), "<u4")[:count]


# The draw


def test_the_tree_its_root_and_a_piece_s_blocks_are_those_made_by_hand(key):
    by_hand, found = leaves_by_hand(key.to_bytes()), carriers.piece_keys(key)
    assert [found[piece].to_bytes() for piece in range(64)] == by_hand and len(found) == 64
    assert openings.root(key) == root_by_hand(by_hand).hex()
    spec = carriers.select({"kernel": jnp.ones((67, 2048))})
    carrier = carriers.draw({1: found[1]}, spec, 16)
    assert (carrier.blocks, carrier.num_pieces) == ((67, 2048), 64)
    # Piece 1 has blocks 1 and 65; the second one's bits follow those of the first.
    for name, array in (("inner signs", carrier.inner_signs), ("outer signs", carrier.outer_signs)):
        np.testing.assert_array_equal(np.asarray(array)[[1, 65]].reshape(-1), stream(by_hand[1], name, 128))
    numbers = stream(by_hand[1], "positions", 2 * 2 * 2048).view("<u8").reshape(2, 2048) >> np.uint64(11)
    np.testing.assert_array_equal(np.asarray(carrier.positions)[[1, 65]], np.argsort(numbers, axis=1)[:, :16])
    others = np.delete(np.arange(67), [1, 65])
    assert (np.asarray(carrier.positions)[others] >= 2048).all() and not np.asarray(carrier.inner_signs)[others].any()


def test_some_keys_draw_the_same_as_the_part_of_all_and_the_rest_reads_as_zero(key):
    found = carriers.piece_keys(key)
    whole = carriers.mark(found, WHITE, M)
    n, length = whole.carrier.blocks
    assert (n, length, whole.carrier.num_pieces) == (8, 2048, 8)
    x = reference.carrier_matrix(*(np.asarray(a) for a in whole.carrier.arrays), whole.carrier.num_weights)
    np.testing.assert_allclose(x @ x.T, np.eye(M), atol=1e-12)
    part = carriers.mark({1: found[1], 6: found[6]}, WHITE, M)
    vector = np.random.default_rng(1).normal(size=n * length)
    kept = np.isin(np.arange(n * length) // length, [1, 6])
    word = np.random.default_rng(2).choice([-1.0, 1.0], M)
    for mark in (part, whole._replace(carrier=whole.carrier.part([6, 1]))):
        np.testing.assert_allclose(carriers.despread(vector, mark), x @ (vector * kept), atol=1e-4)
        np.testing.assert_allclose(carriers.spread(word, mark), (x.T @ word) * kept, atol=1e-5)
    assert (np.asarray(carriers.spread(word, part))[~kept] == 0).all()
    change = np.random.default_rng(3).normal(size=n * length).astype(np.float32)
    _, derivative = jax.jvp(lambda v: carriers.despread(v, part), (jnp.asarray(vector, jnp.float32),), (change,))
    np.testing.assert_allclose(derivative, x @ (change * kept), atol=1e-4)
    with pytest.raises(errors.SmarkError, match="at least one of the carrier's 8 pieces"):
        carriers.mark({9: found[9]}, WHITE, M)


@pytest.mark.parametrize("kind", ["white", "rectified", "shaped", "sharded"])
def test_the_parts_of_a_reading_add_up_to_the_whole(key, kind):
    """So nothing but the carrier depends on what is open: weights follow from suspect, base and shape."""
    tree = files.nest({"a": WHITE["kernel"], "b": WHITE["kernel"][::-1, :9].copy()})
    shape = carriers.shape(tree) if kind == "shaped" else None
    whole = carriers.mark(carriers.piece_keys(key), tree, M, shape=shape)
    word = np.random.default_rng(4).choice([-1, 1], M)
    noise = np.random.default_rng(5)
    copy = embedding.embed(tree, whole, word)
    suspect = {
        name: jnp.asarray(leaf + 0.02 * noise.normal(size=leaf.shape), jnp.float32) for name, leaf in copy.items()
    }
    if kind == "sharded":
        mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
        suspect = {n: jax.device_put(leaf, NamedSharding(mesh, PartitionSpec("x"))) for n, leaf in suspect.items()}
    groups = ([0], [3, 5], [1, 2, 4, 6, 7, 8, 9])
    read = lambda mark: np.asarray(extraction.extract(suspect, tree, mark, kind == "rectified"), np.float64)  # noqa: E731
    some = [read(whole._replace(carrier=whole.carrier.part(group))) for group in groups]
    assert whole.carrier.num_pieces in (8, 9)
    np.testing.assert_allclose(sum(some), read(whole), atol=2e-4 * np.abs(read(whole)).max())
    assert all(y @ word / np.linalg.norm(y) > 6 for y in some)
    if kind != "sharded":
        parts = [whole.carrier, *map(whole.carrier.part, groups)]
        together = extraction.extract_parts(suspect, tree, whole, parts, kind == "rectified")
        np.testing.assert_array_equal(np.asarray(together, np.float64), [read(whole), *some])


# Which pieces, and how many


def test_the_order_is_that_of_sorted_hashes_and_shares_are_rounded_up():
    root, content = "ab" * 32, "cd" * 32
    hashes = {
        piece: hashlib.sha256(b"smark pieces v1\n" + b"\xab" * 32 + b"\xcd" * 32 + bytes([0, 0, 0, piece])).hexdigest()
        for piece in range(64)
    }
    assert openings.order(root, content, 64) == sorted(hashes, key=lambda piece: hashes[piece])
    assert openings.order(root, "ce" * 32, 64) != openings.order(root, content, 64)
    assert [openings.sizes(n) for n in (64, 12, 8, 5, 2, 1)] == [
        [8, 16, 32, 64], [2, 3, 6, 12], [1, 2, 4, 8], [1, 2, 3, 5], [1, 2], [1],
    ]  # fmt: skip
    assert openings.READINGS == 4


class Case(NamedTuple):
    """A model of 75 blocks, a pruned copy of Ada's, evidence on it, and another copy of Grace's."""

    folder: Path
    base: dict[str, np.ndarray]
    exported: evidence.Exported
    root: str

    def verify(self, bundle: str = "bundle", suspect: str = "pruned") -> verification.Report:
        return verification.verify(self.folder / bundle, self.folder / suspect, self.folder / "base", root=self.root)

    def opened(self):
        return vault.opened(self.folder / "vault", SECRET)


def pruned(leaves: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {n: np.where(np.abs(w) < np.median(np.abs(w)), 0, w).astype(np.float32) for n, w in leaves.items()}


@pytest.fixture(autouse=True, scope="module")
def cheap_scrypt():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crypto, "_N", 2**10)
        yield


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Case:
    folder, rng = tmp_path_factory.mktemp("pieces"), np.random.default_rng(0)
    sizes = {"a/bias": (500,), "a/kernel": (300, 500), "b/kernel": (500, 10)}
    base = {name: rng.normal(0, 0.1, size).astype(np.float32) for name, size in sizes.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys, "new", lambda: keys.from_bytes(bytes(range(32))))
        vault.create(folder / "vault", SECRET)
    with vault.opened(folder / "vault", SECRET) as desk:
        made = vault_shapes.from_weights(base, models.choose(base))
        model = models.add(desk, "net", base, num_chips=CHIPS, made=made)
        issued = issuing.issue(model, customers.resolve(desk, ["Ada", "Grace", "Emmy"]), folder / "copies")
        files.write(folder / "base", base)
        files.write(folder / "pruned", pruned(files.read(issued.files[0]).leaves))
        number = verdicts.trace(model, [folder / "pruned"]).number
        exported = evidence.export(desk, number)
        (folder / "bundle").write_bytes(exported.content)
        vault_shapes.write(folder, exported.shape)
    return Case(folder, base, exported, issued.commitment.root)


def content_of(case: Case, bundle: str = "bundle") -> dict:
    return json.loads((case.folder / bundle).read_text())["bundle"]


def failing(report: verification.Report) -> dict[str, str]:
    return {check.name: check.detail for check in report.checks if not check.holds}


def test_evidence_on_a_pruned_copy_opens_an_eighth_and_says_what_stays_secret(case):
    content, report = content_of(case), case.verify()
    assert case.exported.pieces == (8, 64, 56)
    assert report.holds and [accused.customer for accused in report.accused] == ["Ada"]
    (said,) = (check for check in report.checks if check.name == "pieces")
    assert "56 of 64 pieces of the carrier stay secret" in said.detail
    with case.opened() as desk:
        carrier_key = models.carrier_key(desk, "net").to_bytes()
    leaves = leaves_by_hand(carrier_key)
    header = content["commitment"]["header"]
    assert header["pieces"] == root_by_hand(leaves).hex() and header["versions"]["carrier"] == "hadamard/3"
    hashed = lambda p: hashlib.sha256(  # noqa: E731
        b"smark pieces v1\n" + bytes.fromhex(header["pieces"] + content["suspect"]["content"]) + p.to_bytes(4, "big")
    ).digest()
    chosen = sorted(sorted(range(64), key=hashed)[:8])
    assert [(piece["index"], piece["key"]) for piece in content["pieces"]] == [(p, leaves[p].hex()) for p in chosen]
    # Neither the carrier key nor any node above an opened leaf, nor another leaf, is in the bundle.
    secret = {carrier_key, *(leaf for piece, leaf in enumerate(leaves) if piece not in chosen)}
    nodes = [reference.hkdf_sha256(carrier_key, label("pieces"))]
    for _ in range(5):
        secret |= set(nodes)
        nodes = [reference.hkdf_sha256(node, label(side)) for node in nodes for side in ("left", "right")]
    text = case.exported.content.decode()
    assert not [one for one in secret | set(nodes) if one.hex() in text]


def test_the_statistic_is_that_of_the_opened_blocks_and_p_counts_four_shares(case):
    with case.opened() as desk:
        mark, (word,) = models.get(desk, "net").mark, models.get(desk, "net").words([0])
    content = content_of(case)
    suspect = files.nest(files.read(case.folder / "pruned").leaves)
    y = np.zeros(CHIPS)
    for piece in content["pieces"]:  # one at a time: their sum is what all read
        one = mark._replace(carrier=mark.carrier.part([piece["index"]]))
        y += np.asarray(extraction.extract(suspect, files.nest(case.base), one), np.float64)
    (accused,) = case.verify().accused
    assert accused.statistic == pytest.approx(y @ word / np.linalg.norm(y), rel=1e-4)
    plain = evidence.test(y, word.astype(float), [], evidence.Counts(3, 1, 1))
    assert accused.log10_p == pytest.approx(plain.log10_p + np.log10(4), abs=1e-2)


def test_a_weaker_suspect_takes_a_larger_share_and_no_larger_one_than_it_needs(case, tmp_path):
    with case.opened() as desk:
        model = models.get(desk, "net")
        noise, copy = np.random.default_rng(8), files.read(next((case.folder / "copies").glob("*Emmy*"))).leaves
        noisy = {n: w + noise.normal(0, 0.028, w.shape).astype(np.float32) for n, w in copy.items()}
        files.write(case.folder / "noisy", noisy)
        verdict = verdicts.trace(model, [case.folder / "noisy"])
        assert [a.customer for a in verdict.suspects[0].accused] == ["Emmy"]
        exported = evidence.export(desk, verdict.number)
        rows = verdicts.chips(desk, verdict, 0)
        (word,) = model.words([2])
    tests = [evidence.test(y, word.astype(float), [], evidence.Counts(3, 1, 1, 0.0, 4)) for y in rows]
    holds = {size: one.log10_p <= -6 for size, one in zip((64, 8, 16, 32), tests, strict=True)}
    assert not holds[8] and holds[64]
    assert exported.pieces.opened == min(size for size, held in holds.items() if held)
    (case.folder / "noisy-bundle").write_bytes(exported.content)
    assert case.verify("noisy-bundle", "noisy").holds
    # What earlier bundles opened is no secret any more.
    numbers = [{p["index"] for p in content_of(case, name).get("pieces", ())} for name in ("bundle", "noisy-bundle")]
    opened = numbers[0] | (numbers[1] or set(range(64)))
    assert exported.pieces.secret == 64 - len(opened)


# Lies


def forge(case: Case, change, name: str = "forged", resign: bool = True) -> str:
    document = json.loads((case.folder / "bundle").read_text())
    change(document["bundle"])
    master = crypto.unseal(case.folder / "vault" / "master.key", SECRET)
    content = bundles.signed(document["bundle"], master) if resign else json.dumps(document).encode()
    (case.folder / name).write_bytes(content)
    return name


def carrier_key_of(case: Case) -> keys.SecretKey:
    with case.opened() as desk:
        return models.carrier_key(desk, "net")


def shopped(case: Case, size: int):
    """Pieces with genuine keys and paths, but not those that the hash names."""

    def change(bundle):
        order = openings.order(bundle["commitment"]["header"]["pieces"], bundle["suspect"]["content"], 64)
        bundle["pieces"] = documents.plain(openings.opened(carrier_key_of(case), order[1 : size + 1]))

    return change


def first(case: Case, size: int):
    """So many pieces in the order of the hash."""

    def change(bundle):
        order = openings.order(bundle["commitment"]["header"]["pieces"], bundle["suspect"]["content"], 64)
        bundle["pieces"] = documents.plain(openings.opened(carrier_key_of(case), order[:size]))

    return change


def path(bundle, node: str = "11" * 32):
    bundle["pieces"][0]["path"][2] = node


FORGERIES = {
    "another key": (lambda case: lambda b: b["pieces"][3].update(key="11" * 32), "carrier", "it is forged"),
    "another path": (lambda case: path, "carrier", "it is forged"),
    "a shorter path": (lambda case: lambda b: b["pieces"][0]["path"].pop(), "carrier", "it is forged"),
    "another number": (lambda case: lambda b: b["pieces"][0].update(index=63 - b["pieces"][0]["index"]), "carrier", ""),
    "a number beyond": (lambda case: lambda b: b["pieces"][0].update(index=2**62), "carrier", "it is forged"),
    "a piece twice": (lambda case: lambda b: b["pieces"].append(b["pieces"][0]), "carrier", "opened twice"),
    "no piece": (lambda case: lambda b: b.pop("pieces"), "carrier", "neither the carrier nor a part"),
    "an empty part": (lambda case: lambda b: b.update(pieces=[]), "carrier", "neither the carrier nor a part"),
    "both": (lambda case: lambda b: b.update(carrier_key=carrier_key_of(case).to_bytes().hex()), "carrier", "or both"),
    "a forged carrier": (
        lambda case: lambda b: (b.pop("pieces"), b.update(carrier_key="11" * 32)),
        "carrier",
        "forged",
    ),
    "a piece less": (lambda case: lambda b: b["pieces"].pop(), "pieces", "it should be 8 or 16 or 32"),
    "a piece more": (lambda case: first(case, 9), "pieces", "9 of 64 pieces are opened"),
    "all but one": (lambda case: first(case, 63), "pieces", "it should be 8 or 16 or 32"),
    "an eighth to the owner's liking": (lambda case: shopped(case, 8), "pieces", "the owner chose them"),
    "half to the owner's liking": (lambda case: shopped(case, 32), "pieces", "the owner chose them"),
    "another root": (lambda case: lambda b: b["commitment"]["header"].update(pieces="11" * 32), "commitment", ""),
    "no root": (lambda case: lambda b: b["commitment"]["header"].pop("pieces"), "carrier", "without their root"),
}


@pytest.mark.parametrize("what", FORGERIES)
def test_a_changed_opening_is_refused_whoever_signs_it(case, what):
    change, check, why = FORGERIES[what]
    assert "signature" in failing(case.verify(forge(case, change(case), resign=False)))
    report = case.verify(forge(case, change(case)))
    found = failing(report)
    assert check in found and why in found[check] and "signature" not in found
    assert report.accused == ()


def test_a_larger_share_in_the_order_of_the_hash_is_as_good(case):
    """The owner burns more of the carrier than it must; p-values count all shares anyway."""
    for size in (16, 32):
        found = failing(case.verify(forge(case, first(case, size))))
        assert found.keys() <= {"accusation of 'Ada'"}  # whose statistic is still that of the eighth


def test_pieces_that_do_not_come_from_the_committed_carrier_are_refused(case, key):
    """An owner who commits to two carriers, one by its key and one by its pieces, would have two to choose from."""
    bundle = documents.parse(documents.Bundle, content_of(case))
    whole = bundle._replace(pieces=documents.MISSING, carrier_key=carrier_key_of(case).to_bytes().hex())
    assert openings.wrong_keys(bundle) is None and openings.wrong_keys(whole) is None
    header = bundle.header._replace(pieces=openings.root(key))
    two = whole._replace(commitment=whole.commitment._replace(header=header))
    assert "not the one that the pieces" in (openings.wrong_keys(two) or "")


def test_every_commitment_to_a_model_names_the_same_pieces(case, tmp_path):
    """So an owner gets no other pieces by opening codewords under another commitment."""
    with case.opened() as desk:
        model = models.get(desk, "net")
        issuing.issue(model, customers.resolve(desk, ["Linus"]), tmp_path)
        number = verdicts.trace(model, [case.folder / "pruned"]).number
        found = [json.loads(evidence.export(desk, number, None, n).content)["bundle"] for n in (None, 1, 2)]
        assert commitments.get(desk, "net", 2).header.pieces == commitments.get(desk, "net", 1).header.pieces
    assert found[0]["commitment"] != found[2]["commitment"]
    assert [bundle["pieces"] for bundle in found] == [content_of(case)["pieces"]] * 3


# T5: innocents


def by_piece(case: Case, suspect: dict[str, np.ndarray]) -> np.ndarray:
    """The chips that each piece alone reads, float64, shape [64, m]; any set of pieces reads their sum."""
    with case.opened() as desk:
        mark = models.get(desk, "net").mark
    parts = (mark._replace(carrier=mark.carrier.part([piece])) for piece in range(64))
    base = files.nest(case.base)
    return np.stack([np.asarray(extraction.extract(files.nest(suspect), base, part), np.float64) for part in parts])


def test_t5_innocents_are_accused_no_more_often_than_alpha_says_unless_the_owner_shops(case):
    """At alpha = 0.1, the best of four shares. An owner who may choose eight pieces accuses nearly at will."""
    rng, alpha, trials, counts = np.random.default_rng(7), 0.1, 200, evidence.Counts(5, 1, 1, 0.0, openings.READINGS)
    stranger = {name: w + rng.normal(0, 0.05, w.shape).astype(np.float32) for name, w in case.base.items()}
    for suspect in (files.read(case.folder / "pruned").leaves, stranger):
        pieces, wrong, shopped = by_piece(case, suspect), 0, 0
        for _ in range(trials):
            book = rng.choice([-1.0, 1.0], (5, CHIPS))
            order = openings.order(rng.bytes(32).hex(), rng.bytes(32).hex(), 64)
            shares = [pieces[order[:size]].sum(axis=0) for size in openings.sizes(64)]
            found = [evidence.test(y, word, [], counts).log10_p for y in shares for word in book]
            wrong += min(found) <= np.log10(alpha)
            liked = [pieces[np.argsort(pieces @ word)[-8:]].sum(axis=0) for word in book]
            found = [evidence.test(y, word, [], counts).log10_p for y, word in zip(liked, book, strict=True)]
            shopped += min(found) <= np.log10(alpha)
        assert wrong / trials <= alpha
    assert shopped / trials > 0.9  # the negative control, on the model that is nobody's


# T5: the next leaker


def along(x: np.ndarray, carrier: carriers.Carrier, block: int) -> np.ndarray:
    """The part of a block's coordinates in the directions of its chips."""
    arrays = [np.asarray(array)[block] for array in carrier.arrays]
    chips = hadamard.despread_block(jnp.asarray(x), *arrays)
    return np.asarray(hadamard.spread_block(chips, len(x), *arrays))


def erased(case: Case, copy: dict[str, np.ndarray], opened: carriers.Keys, how: str) -> dict[str, np.ndarray]:
    """A copy without anything along the opened chip directions.

    The eraser knows the opened keys, the shape and the copy. ``"weights"`` takes all of the weights in these directions
    out, which needs no base; ``"shift"`` knows the base too, in the opened blocks; ``"noise"`` drowns these blocks.
    """
    tree, base = files.nest(copy), files.nest(case.base)
    shape = carriers.shape(base)
    mark = carriers.mark(opened, tree, CHIPS, shape=shape)
    n, length = mark.carrier.blocks
    here, there = (np.asarray(marks.coordinates(params, mark)).reshape(n, length) for params in (tree, base))
    change, rng = np.zeros((n, length), np.float32), np.random.default_rng(9)
    for block in np.flatnonzero(np.asarray(mark.carrier.positions)[:, 0] < length):
        shift = here[block] - there[block]
        if how == "noise":
            change[block] = rng.normal(0, 3 * shift.std(), length) - along(shift, mark.carrier, block)
        else:
            change[block] = -along(shift if how == "shift" else here[block], mark.carrier, block)
    found, start = dict(copy), 0
    kept = shapes.kept(shape, mark.carrier.num_weights)
    for (leaf, one), count in zip(shape, kept, strict=True):
        some = np.zeros(leaf.size, np.float32)
        some[:count], start = change.reshape(-1)[start : start + count], start + count
        found[leaf.path] = copy[leaf.path] + some.reshape(leaf.shape) * np.asarray(one.sizes(leaf))
    return found


@pytest.mark.parametrize("how", ["weights", "shift", "noise"])
def test_t5_the_next_leaker_who_erases_all_that_was_opened_is_still_traced(case, tmp_path, how):
    copy = files.read(next((case.folder / "copies").glob("*Grace*"))).leaves
    published = {p["index"]: keys.from_bytes(bytes.fromhex(p["key"])) for p in content_of(case)["pieces"]}
    quarter = carriers.piece_keys(carrier_key_of(case))
    more = {piece: quarter[piece] for piece in range(8, 24)} | published  # some later dispute opened more
    assert len(published) == 8 and 16 <= len(more) <= 24
    for name, opened in (("bundle", published), ("more", more), ("whole", quarter)):
        files.write(tmp_path / name, erased(case, copy, opened, how))
    with case.opened() as desk:
        model = models.get(desk, "net")
        found = {name: verdicts.trace(model, [tmp_path / name]) for name in ("bundle", "more", "whole")}
        for name in ("bundle", "more"):
            assert [a.customer for a in found[name].suspects[0].accused] == ["Grace"]
            exported = evidence.export(desk, found[name].number)
            assert exported.accused == ("Grace",)
            (case.folder / f"{how}-{name}").write_bytes(exported.content)
            report = verification.verify(case.folder / f"{how}-{name}", tmp_path / name, case.folder / "base")
            assert report.holds
    if how != "shift":  # the negative control: with the whole carrier opened, these erasers remove the trace
        assert found["whole"].suspects[0].verdict == "nobody"


# At the desk


def test_the_commands_say_what_is_opened_and_what_stays_secret(case, tmp_path):
    desk = Here(case.folder)
    number = desk.json("trace", "vault", "net", "pruned")["number"]
    said = desk.json("evidence", "export", "vault", number, "--out", tmp_path / "bundle")["pieces"]
    assert (said["opened"], said["of"]) == (8, 64) and said["secret"] <= 56
    printed = " ".join(desk.run("evidence", "export", "vault", number, "--out", tmp_path / "bundle").split())
    assert "It opens 8 of the 64 pieces of the model's carrier" in printed
    assert f"{said['secret']} of 64 pieces stay secret" in printed
    verified = " ".join(desk.run("evidence", "verify", tmp_path / "bundle", "pruned", "base").split())
    assert "56 of 64 pieces of the carrier stay secret" in verified and "4 shares of the carrier" in verified
    desk.run("issue", "vault", "net", "Mary", "--out", tmp_path / "out")
    assert "of the 64 pieces of this model's carrier" in " ".join(desk.stderr.split())


@pytest.mark.parametrize(
    ("made", "expected"), [(True, "it is too small to be opened in part"), (False, "has no pieces")]
)
def test_a_carrier_that_cannot_be_opened_in_part_is_opened_whole_and_the_export_says_so(tmp_path, made, expected):
    """A model of one block, and one whose carrier is of an older version."""
    desk, rng = Here(tmp_path), np.random.default_rng(0)
    base = {name: rng.normal(size=(30, 50)).astype(np.float32) for name in ("a", "b")}
    files.write(tmp_path / "base", base)
    desk.run("init", "vault")
    with vault.opened(tmp_path / "vault", SECRET) as opened:
        shape = vault_shapes.from_weights({"a": base["a"]}, models.choose({"a": base["a"]})) if made else None
        models.add(opened, "net", base, num_chips=M, made=shape)
    copies = desk.json("issue", "vault", "net", "Ada", "Grace", "--out", "copies")["files"]
    number = desk.json("trace", "vault", "net", copies[0])["number"]
    printed = " ".join(desk.run("evidence", "export", "vault", number, "--out", "bundle").split())
    assert "It opens the model's whole carrier" in printed and expected in printed
    bundle = json.loads((tmp_path / "bundle").read_text())["bundle"]
    assert "carrier_key" in bundle and "pieces" not in bundle and ("pieces" in bundle["commitment"]["header"]) == made
    verified = desk.json("evidence", "verify", "bundle", copies[0], "base")
    assert verified["holds"]
    desk.run("issue", "vault", "net", "Emmy", "--out", "copies")
    assert "opened this model's carrier to everybody" in " ".join(desk.stderr.split())
