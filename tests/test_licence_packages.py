"""Packages: the copy that they make, what their owner can spoil, and what the customer says then."""

import hashlib
import itertools
import json
import math
import tracemalloc
import zipfile
import zlib

import jax.numpy as jnp
import licence_reference as reference
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from licences import CUSTOMER, KEY, canonical, model, offer, packed, resigned, unpacked

from smark_jax import carriers, errors, files, licence
from smark_jax.licence import documents, group, issuing, packages, segments, variants
from smark_jax.licence.documents import FileRow

RNG = np.random.default_rng(5)


@pytest.fixture(scope="module")
def made():
    return licence.request(offer(), CUSTOMER)


@pytest.fixture(scope="module")
def owned():
    return model()


@pytest.fixture(scope="module")
def package(made, owned):
    return packed(owned, made.request)


def mixed() -> dict[str, np.ndarray]:
    """Leaves of every dtype, one that is no kernel, two that are tied, one that is not contiguous."""
    rng = np.random.default_rng(1)
    kernel = rng.normal(size=(48, 64)).astype(np.float32)
    return {
        "a/kernel": kernel,
        "b/kernel": rng.normal(size=(3, 3, 8, 16)).astype(np.float16),
        "c/kernel": rng.normal(size=(50, 20)).astype(ml_dtypes.bfloat16),
        "d/kernel": rng.normal(size=(40, 30)),
        "e/kernel": np.asfortranarray(rng.normal(size=(60, 42)).astype(np.float32)[::2]),
        "head/bias": rng.normal(size=7).astype(np.float32),
        "tied/kernel": kernel.copy(),
    }


def shaped() -> tuple[dict[str, np.ndarray], carriers.Shape]:
    """A network of three layers. The inputs of the first lie in six directions, which are its coordinates."""
    rng = np.random.default_rng(2)
    base = {
        "a/bias": rng.normal(0, 0.1, 40).astype(np.float32),
        "a/kernel": rng.normal(0, 0.1, (240, 40)).astype(np.float32),
        "b/kernel": rng.normal(0, 0.2, (40, 50)).astype(np.float16),
        "head/kernel": rng.normal(0, 0.2, (50, 5)).astype(np.float32),
    }
    images = (rng.normal(size=(24, 6)) @ rng.normal(size=(6, 240))).astype(np.float32)

    def apply_fn(params, x):
        x = jnp.tanh(x @ params["a/kernel"] + params["a/bias"][None])
        return jnp.tanh(x @ params["b/kernel"]) @ params["head/kernel"]

    return base, carriers.shape(base, apply_fn, images)


def expected(one, made):
    """The customer's copy in float64 NumPy: the base, the owner's word, and the secret one; and both changes."""
    mark, request = one.mark, made.request.request
    strength = math.sqrt(0.5) * float(mark.strength)
    owners = reference_of_owner(mark, one.word, strength)
    held = [where.stop - where.start for where in segments.slices(mark)]
    seed = hashlib.sha256(bytes.fromhex(request.offer) + bytes.fromhex(request.points)).digest()
    members, part_of = reference.segments(seed, sum(held), 64, 8)
    digest = hashlib.sha256(b"smark licence v1 request\n" + canonical(request)).hexdigest()
    part_keys = [reference.derive(KEY.to_bytes(), "part", digest, str(part)) for part in range(8)]
    secret = strength * made.secrets.choices.word[members] * reference.signs(part_of[members], part_keys)
    found, begin = {}, 0
    for number, leaf in enumerate(mark.spec.leaves):
        weights = np.asarray(one.base[leaf.path], np.float64)
        scales, basis = scales_of(mark, number, weights)
        own = np.zeros(scales.size)
        own[: held[number]] = secret[begin : begin + held[number]]
        begin += held[number]
        change = (scales.reshape(-1) * (owners[number] + own)).reshape(scales.shape)
        change = change if basis is None else basis @ change
        found |= dict.fromkeys((leaf.path, *TIES.get(leaf.path, ())), weights + change.reshape(weights.shape))
    return found


TIES = {"a/kernel": ("tied/kernel",)}


def scales_of(mark, number, weights):
    if mark.shape is None:
        return np.full(weights.size, np.sqrt(np.mean(weights**2))), None
    one = mark.shape.scales[number]
    rows, columns, floor, cap = (np.asarray(x, np.float64) for x in (one.rows, one.columns, one.floor, one.cap))
    sizes = np.minimum((rows * columns + floor) ** -0.5, cap)
    basis = None if one.basis is None else np.asarray(one.basis, np.float64)
    shape = weights.shape if basis is None else (basis.shape[1], weights.size // len(basis))
    return np.broadcast_to(sizes, shape), basis


def reference_of_owner(mark, word, strength):
    """What the owner's word adds to each leaf's coordinates."""
    change = reference.owners_change(mark.carrier, word, strength)
    counts = [leaf.size for leaf in mark.spec.leaves] if mark.shape is None else list(mark.shape.counts)
    total, found, start, end = mark.carrier.num_weights, [], 0, 0
    for count in counts:
        begin, end = end, end + count
        size = end * total // sum(counts) - begin * total // sum(counts)
        found.append(np.pad(change[start : start + size], (0, count - size)))
        start += size
    return found


def check_copy(copy, one, made):
    wanted = expected(one, made)
    assert copy.keys() == one.base.keys()
    for name, leaf in one.base.items():
        assert copy[name].dtype == leaf.dtype
        if name not in wanted:
            np.testing.assert_array_equal(copy[name], leaf)
            continue
        change = np.abs(wanted[name] - np.asarray(leaf, np.float64))
        # Two roundings to the leaf's dtype, and one of directions to float16.
        bound = 1.5 * float(ml_dtypes.finfo(leaf.dtype).eps) * np.abs(wanted[name]) + 1e-3 * change.max()
        assert (np.abs(copy[name].astype(np.float64) - wanted[name]) <= bound).all(), name
        if leaf.dtype.itemsize > 2:
            assert np.median(bound) < 0.03 * np.median(change)


def test_leaves_of_all_dtypes_have_both_words_as_float64_has_them(made, tmp_path):
    one = model(mixed())
    copy = unpacked(packed(one, made.request), made.request, made.secrets, tmp_path / "copy.safetensors")
    check_copy(copy, one, made)
    np.testing.assert_array_equal(copy["tied/kernel"], copy["a/kernel"])


def test_directions_and_scales_have_both_words_as_float64_has_them(made, tmp_path):
    base, shape = shaped()
    assert any(one.basis is not None for _, one in shape) and any(one.basis is None for _, one in shape)
    one = model(base, shape)
    copy = unpacked(packed(one, made.request), made.request, made.secrets, tmp_path / "copy.safetensors")
    check_copy(copy, one, made)


DAMAGED = (
    "licence: expected a whole package, but got one that cannot be opened, although its owner signed it.\n"
    "Do not say more to the owner than that: 'smark licence complain' draws a new word and asks for a new one."
)


def damaged(content, made, folder):
    """Requires the one text that a customer may see, a small use of memory, and no file outside the named path."""
    before = {path.name for path in folder.parent.iterdir()}
    tracemalloc.start()
    with pytest.raises(licence.Damaged) as caught:
        unpacked(content, made.request, made.secrets, folder / "copy")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(caught.value) == DAMAGED and caught.value.desk == DAMAGED.partition(": ")[2]
    assert peak < 2**28 and not list(folder.iterdir()) and {path.name for path in folder.parent.iterdir()} == before


def rest_key(made):
    context = bytes.fromhex(documents.digest(made.request.request))
    return issuing._rest_key(group.times(licence.scalar(KEY), bytes.fromhex(made.request.request.rest)), context)


def with_rest(package, body, made, *plain, compress=zlib.compress):
    """The head and the body with another rest, sealed with the right key."""
    sealed = [packages._sealed(rest_key(made), compress(one), number) for number, one in enumerate(plain)]
    old = sum(package.pieces) + 16 * len(package.pieces)
    package = package._replace(pieces=tuple(len(one) - 16 for one in sealed))
    return package, b"".join(sealed) + body[old:]


def place(package, body, **fields):
    return package._replace(leaves=(package.leaves[0]._replace(**fields),)), body


def rows(package, body, *rows, **fields):
    return package._replace(files=rows, **fields), body


def bomb(package, body, made, size):
    zeros = zlib.compress(bytes(1 << 26))
    head, body = with_rest(package, body, made, *[zeros] * size, compress=bytes)
    return head._replace(files=(FileRow("", size << 26),)), body


HOSTILE = {
    "held 2^62": lambda p, b, m: place(p, b, held=2**62),
    "held 10^9": lambda p, b, m: place(p, b, held=10**9),
    "held one more": lambda p, b, m: place(p, b, held=4097),
    "held one less": lambda p, b, m: place(p, b, held=4095),
    "held none": lambda p, b, m: place(p, b, held=0),
    "no leaves": lambda p, b, m: (p._replace(leaves=()), b),
    "a leaf twice": lambda p, b, m: (p._replace(leaves=p.leaves * 2), b),
    "another leaf": lambda p, b, m: place(p, b, path="b/kernel"),
    "a tie to nothing": lambda p, b, m: place(p, b, tied=("b/kernel",)),
    "a tie to itself": lambda p, b, m: place(p, b, tied=("a/kernel",)),
    "another shape": lambda p, b, m: place(p, b, shape=(4096,)),
    "an empty shape": lambda p, b, m: place(p, b, shape=(0, 64), axes=(0,), directions=1),
    "directions of nothing": lambda p, b, m: place(p, b, axes=(), directions=1),
    "2^40 directions": lambda p, b, m: place(p, b, axes=(0,), directions=2**40),
    "axis 7": lambda p, b, m: place(p, b, axes=(7,), directions=4),
    "an axis twice": lambda p, b, m: place(p, b, axes=(0, 0), directions=4),
    "a shape beyond 2^64": lambda p, b, m: place(p, b, shape=(2**62, 2**62), axes=(0, 1), directions=4),
    "a file of 2^62": lambda p, b, m: rows(p, b, FileRow("", 2**62)),
    "a file of 0": lambda p, b, m: rows(p, b, FileRow("", 0)),
    "no files": lambda p, b, m: rows(p, b),
    "two files without a name": lambda p, b, m: rows(p, b, *[FileRow("", p.files[0].size // 2)] * 2),
    "a piece of 2^62": lambda p, b, m: (p._replace(pieces=(2**62,)), b),
    "a piece of 0": lambda p, b, m: (p._replace(pieces=(0,)), b),
    "100,000 pieces": lambda p, b, m: (p._replace(pieces=(1,) * 10**5), b),
    "one piece more": lambda p, b, m: (p._replace(pieces=(*p.pieces, 1)), b),
    "a piece that is not compressed": lambda p, b, m: with_rest(p, b, m, b"plain", compress=bytes),
    "a bomb": lambda p, b, m: bomb(p, b, m, 5),
    "a bomb with another size": lambda p, b, m: with_rest(p, b, m, bytes(1 << 28)),
    "nothing after the head": lambda p, b, m: (p, b""),
    "a byte more": lambda p, b, m: (p, b + b"\0"),
    "a byte less": lambda p, b, m: (p, b[:-1]),
    "noise": lambda p, b, m: (p, bytes(len(b))),
    "a rest of noise": lambda p, b, m: with_rest(p, b, m, bytes(p.files[0].size)),
    **{
        f"suffix {suffix[:20]!r}": lambda p, b, m, suffix=suffix: (p._replace(suffix=suffix), b)
        for suffix in ("/../../x", "/x", "\0", "x" * 5000, "\\..\\x", "\ud800")
    },
    **{
        f"name {name[:20]!r}": lambda p, b, m, name=name: rows(p, b, FileRow(name, p.files[0].size))
        for name in (
            "../x.safetensors",
            "/tmp/x",
            ".x",
            "..",
            ".",
            "a/b",
            "\0",
            "x" * 5000,
            "a\\b",
            "C:x",
            "\x1b[2J",
            "\ud800",
        )
    },
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_spoiled_package_is_damaged_and_nothing_else(name, made, package, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    damaged(resigned(package, lambda head, body: HOSTILE[name](head, body, made)), made, folder)


def test_a_leaf_of_float64_has_its_word_in_float64(made, tmp_path):
    """A change of a hundred millionth of the weights is less than float32 can hold."""
    one = model({"d/kernel": np.random.default_rng(3).normal(size=(64, 64))})
    one = one._replace(mark=one.mark._replace(strength=1e-8))
    copy = unpacked(packed(one, made.request), made.request, made.secrets, tmp_path / "copy.safetensors")
    check_copy(copy, one, made)


def spans(path):
    """Where each leaf of a safetensors file lies, by its header."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    head = json.loads(content[8 : 8 + size])
    return {
        name: slice(8 + size + row["data_offsets"][0], 8 + size + row["data_offsets"][1])
        for name, row in head.items()
        if name != "__metadata__"
    }


def same_outside(base, copy, places):
    """Requires that two files differ at these places alone, and do there."""
    old, new = (np.frombuffer(path.read_bytes(), np.uint8) for path in (base, copy))
    assert len(old) == len(new)
    differ = old != new
    for where in places:
        assert differ[where].any()
        differ[where] = False
    assert not differ.any()


def in_form_of(path):
    form = files.Form(path)
    return {"write": lambda out, leaves: form.write(out, dict(leaves)), "suffix": form.suffix}


def test_a_safetensors_file_keeps_every_other_byte(made, tmp_path):
    one = model(
        {"a/kernel": np.float32(RNG.normal(size=(64, 64))), "steps": np.arange(9), "none": np.zeros(0, np.float32)}
    )
    safetensors.numpy.save_file(one.base, tmp_path / "base.safetensors", {"by": "us"})
    content = packed(one, made.request, **in_form_of(tmp_path / "base.safetensors"))
    unpacked(content, made.request, made.secrets, tmp_path / "copy.safetensors")
    same_outside(
        tmp_path / "base.safetensors", tmp_path / "copy.safetensors", [spans(tmp_path / "base.safetensors")["a/kernel"]]
    )


def test_an_npz_file_keeps_every_other_byte_but_checksums(made, tmp_path):
    one = model({"a/kernel": np.float32(RNG.normal(size=(64, 64))), "steps": np.arange(9)})
    np.savez(tmp_path / "base.npz", **one.base)
    content = packed(one, made.request, **in_form_of(tmp_path / "base.npz"))
    copy = unpacked(content, made.request, made.secrets, tmp_path / "copy.npz")
    with zipfile.ZipFile(tmp_path / "base.npz") as archive:
        member, directory = archive.getinfo("a/kernel.npy"), archive.start_dir
    data = (tmp_path / "base.npz").read_bytes().index(one.base["a/kernel"].tobytes())
    entry = (tmp_path / "base.npz").read_bytes().index(b"a/kernel.npy", directory) - 46
    sums = [slice(member.header_offset + 14, member.header_offset + 18), slice(entry + 16, entry + 20)]
    same_outside(tmp_path / "base.npz", tmp_path / "copy.npz", [slice(data, data + 4 * 4096), *sums])
    with np.load(tmp_path / "copy.npz") as loaded:
        np.testing.assert_array_equal(loaded["a/kernel"], copy["a/kernel"])


def test_a_folder_of_shards_keeps_every_other_byte(made, tmp_path):
    one = model({"a.weight": np.float32(RNG.normal(size=(64, 64))), "b.weight": np.float32(RNG.normal(size=(32, 32)))})
    base, copy = tmp_path / "base", tmp_path / "copy"
    base.mkdir()
    shards = {name: f"model-{number}-of-2.safetensors" for number, name in enumerate(one.base, 1)}
    for name, shard in shards.items():
        safetensors.numpy.save_file({name: one.base[name]}, base / shard)
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (base / "config.json").write_text('{"layers": 2}')
    content = packed(one, made.request, **in_form_of(base))
    unpacked(content, made.request, made.secrets, copy)
    assert {path.name for path in copy.iterdir()} == {path.name for path in base.iterdir()}
    for path in base.iterdir():
        held = spans(path).values() if path.suffix == ".safetensors" else []
        same_outside(path, copy / path.name, held)


def test_what_one_variant_spoils_says_nothing_of_the_choice(made, package, tmp_path):
    """Each variant in turn: the customer fails where it chose that one, and always in the same words."""
    for segment, bit in itertools.product(range(0, 64, 3), (0, 1)):

        def spoil(head, body, place=(2 * segment + bit) * (4 * 64 + 16) + 5):
            place += sum(head.pieces) + 16 * len(head.pieces)
            return head, body[:place] + bytes([body[place] ^ 1]) + body[place + 1 :]

        content, path = resigned(package, spoil), tmp_path / "copy.safetensors"
        if made.secrets.choices.bits[segment] != bit:
            unpacked(content, made.request, made.secrets, path)
        else:
            with pytest.raises(licence.Damaged) as caught:
                unpacked(content, made.request, made.secrets, path)
            assert str(caught.value) == DAMAGED


@pytest.mark.parametrize("value", [np.nan, np.inf, 3.4e38])
def test_a_variant_that_is_not_finite_is_damaged(made, owned, tmp_path, monkeypatch, value):
    true = variants.cut

    def cut(*args):
        found = true(*args)
        spoiled = np.full(64, value, np.float32).tobytes()
        plus, minus = found.variants[9]
        pair = (plus, spoiled) if made.secrets.choices.bits[9] else (spoiled, minus)
        return found._replace(variants=[*found.variants[:9], pair, *found.variants[10:]])

    monkeypatch.setattr(variants, "cut", cut)
    content = packed(owned, made.request)
    if np.isfinite(value):  # large weights are the owner's own affair
        unpacked(content, made.request, made.secrets, tmp_path / "copy.safetensors")
    else:
        damaged(content, made, tmp_path)


def test_an_owner_is_told_of_a_variant_that_is_not_finite():
    """Else a customer would have to complain, which tells its choice."""
    kernel = RNG.normal(size=(64, 64)).astype(np.float16)
    one = model({"a/kernel": kernel})
    found = segments.draw(bytes(32), 4096, 64, 8)
    near = {"a/kernel": np.full_like(kernel, 65504)}
    variants.cut(near, one.mark, found, np.ones(4096), 0.1)
    with pytest.raises(errors.SmarkError, match="finite weights"):
        variants.cut(near, one.mark, found, np.ones(4096), 32.0)


def test_a_model_smaller_than_its_word_is_refused(made):
    with pytest.raises(errors.SmarkError, match="A small model bears fewer choices"):
        packed(model({"a/kernel": np.float32(RNG.normal(size=(7, 9)))}, m=8), made.request)
