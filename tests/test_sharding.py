"""Models that a mesh holds: marked and read where they lie, with one device's numbers and an eighth of its memory."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from smark_jax import carriers, codes, embedding, extraction, keys
from smark_jax.carriers import sharded

KEY = keys.from_bytes(bytes(32))
M = 64
# Every way of lying on a mesh of 2 x 4: by the first axis or a later one, by both of the mesh, or not at all.
LEAVES = {
    "bias": ((333,), P()),
    "both": ((16, 50), P(("y", "x"))),
    "columns": ((37, 32), P(None, "x")),
    "middle": ((7, 24, 8), P(None, "y", "x")),
    "rows": ((64, 3, 5), P("y", None, None)),
    "scalar": ((), P()),
}
STRENGTH = 0.05


def mesh_of(kind: AxisType) -> Mesh:
    return jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind, kind))


def base_of(dtype, seed: int = 0, factor: int = 1) -> dict:
    rng = np.random.default_rng(seed)
    shapes = {name: (*(factor * size for size in shape[:1]), *shape[1:]) for name, (shape, _) in LEAVES.items()}
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()} | {
        "steps": jnp.arange(3)
    }


def on(mesh: Mesh, params: dict) -> dict:
    axes = {name: axes for name, (_, axes) in LEAVES.items()} | {"steps": P()}
    return {name: jax.device_put(leaf, NamedSharding(mesh, axes[name])) for name, leaf in params.items()}


def flat(params: dict, spec: carriers.Spec) -> np.ndarray:
    parts = zip(spec.leaves, spec.scales, strict=True)
    return np.concatenate([np.asarray(params[leaf.path], np.float64).reshape(-1) / scale for leaf, scale in parts])


def prepared(base: dict) -> tuple[carriers.Mark, np.ndarray]:
    return carriers.mark(KEY, base, M), np.asarray(codes.codebook(KEY, [3], M)[0])


@pytest.fixture(scope="module")
def dense():
    base = base_of(jnp.float32)
    mark, word = prepared(base)
    assert 2048 < mark.carrier.num_carrying < mark.spec.num_weights  # several blocks and a tail
    matrix = reference.carrier_matrix(*map(np.asarray, mark.carrier.arrays), mark.spec.num_weights)
    return base, mark, word, matrix


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_marks_and_reads_are_those_of_the_dense_matrix(dense, kind):
    base, mark, word, matrix = dense
    held = on(mesh_of(kind), base)
    copy = embedding.embed(held, mark, word, STRENGTH)
    delta = STRENGTH * math.sqrt(mark.carrier.num_carrying / M)
    np.testing.assert_allclose(flat(copy, mark.spec), flat(base, mark.spec) + delta * word @ matrix, atol=2e-6)
    for seed in (1, 2):  # weights that have nothing to do with the code
        other = base_of(jnp.float32, seed)
        expected = matrix @ (flat(other, mark.spec) - flat(base, mark.spec))
        np.testing.assert_allclose(extraction.extract(on(mesh_of(kind), other), held, mark), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_mesh_changes_neither_numbers_nor_places(monkeypatch, dtype):
    # No other test has leaves of these shapes: they are compiled for three blocks a pass, so for several passes, some
    # of which are not full.
    monkeypatch.setattr(sharded, "_PASS_WEIGHTS", 3 * 2048)
    base = base_of(dtype, factor=30)
    mark, word = prepared(base)
    held = on(mesh_of(AxisType.Auto), base)
    alone, copy = (embedding.embed(params, mark, word, STRENGTH) for params in (base, held))
    for name, leaf in copy.items():
        assert leaf.dtype == base[name].dtype
        assert leaf.sharding == held[name].sharding
        # Where float32 rounds differently, bfloat16 may on rare occasions be off by one of its own steps.
        tolerance = 1e-6 if dtype == jnp.float32 else 2**-7
        np.testing.assert_allclose(np.float32(leaf), np.float32(alone[name]), rtol=tolerance, atol=1e-6)
        assert np.mean(np.asarray(leaf) != np.asarray(alone[name])) < (1 if dtype == jnp.float32 else 1e-3)
    expected = extraction.extract(alone, base, mark)
    np.testing.assert_array_equal(np.sign(expected), word)
    # Wherever suspect and base come from: the same mesh, the host, one device.
    for suspect, original in ((copy, held), (jax.device_get(alone), held), (copy, base), (alone, held)):
        np.testing.assert_allclose(extraction.extract(suspect, original, mark), expected, atol=1e-5)


@pytest.mark.parametrize("axes", [P("d"), P(None, "d")])
def test_a_device_needs_room_for_its_own_share_only(axes):
    """By what XLA compiles for 64 million weights, without making them; one device's way on a mesh is the control."""
    mesh = Mesh(np.array(jax.devices()), ("d",))
    spec = carriers.Spec((carriers.Leaf("w", (2**13, 2**13)),), (1.0,))
    whole, share = 4 * spec.num_weights, 4 * spec.num_weights // mesh.size

    def like(*shape, axes=None, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, axes or P()))

    n, length = spec.num_weights // 2048, 2048
    signs = like(n, length // 32, dtype=jnp.uint32)
    carrier = carriers.Carrier(signs, signs, like(n, 304, dtype=jnp.int32), spec.num_weights)
    leaf, start = like(2**13, 2**13, axes=axes), sharded._Start(*(like(dtype=jnp.int32) for _ in range(3)))
    embed = sharded._add_to_leaf.lower(leaf, start, like(), like(304), carrier, like(), axes, mesh)
    extract = sharded._despread_leaf.lower(leaf, leaf, start, like(), like(), carrier, axes, mesh)
    finite = embedding.copies._finite.lower({"w": leaf}, spec)
    for program, room in ((embed, 1.1 * share), (extract, 0.4 * share), (finite, 0.4 * share)):
        program = program.compile()
        assert program.memory_analysis().temp_size_in_bytes < room
        assert not re.search(r"all-gather|all-to-all|collective-permute", program.as_text())
    assert embed.compile().memory_analysis().output_size_in_bytes < 1.01 * share
    control = extraction.reading._extract.lower([leaf], [leaf], spec.factors, carrier).compile()
    assert control.memory_analysis().temp_size_in_bytes > whole
    assert "all-gather" in control.as_text()


def test_places_are_counted_right_in_the_largest_leaves():
    """A leaf of two thousand million weights, the last column of eight, against whole numbers without bound."""
    rows, columns, start, length = 65_536, 32_000, 2**33 + 77, 2048
    begin = 7 * columns // 8
    part = sharded._Part((rows, columns), (rows, columns // 8), (0, begin), 0, 1)
    at = sharded._Start(jnp.int32(start // length), jnp.int32(start % length), jnp.int32(rows * columns))
    n = (start + rows * columns) // length
    touched = sharded._touched(part, at, length)
    assert touched.first == (start % length + begin) // length
    # The last weight that the shard holds is the leaf's last one, which lies in the last block, or in the tail.
    assert touched.most >= n - start // length - touched.first
    last = np.array([n - 2, n - 1, n, n + 1]) - start // length
    numbers, index = sharded._held(part, at, jnp.asarray(last, jnp.int32), n, length)
    assert numbers.tolist() == [n - 2, n - 1, n - 1, n - 1]
    expected = np.full((4, length), rows * columns // 8)
    for row, block in enumerate([n - 2, n - 1]):
        for place in range(length):
            i, j = divmod(block * length + place - start, columns)
            if i < rows and j >= begin:
                expected[row, place] = i * (columns // 8) + j - begin
    assert (expected < rows * columns // 8).any()
    np.testing.assert_array_equal(index, expected)


def test_odd_weights_read_the_same_on_a_mesh():
    """NaN, infinity, a swamped leaf, a missing one and one of another shape, against one device's numbers."""
    base = base_of(jnp.float32)
    mark, word = prepared(base)
    copy = embedding.embed(base, mark, word, STRENGTH)
    odd = {
        **copy,
        "columns": copy["columns"].at[3, 5].set(jnp.nan).at[36, 31].set(-jnp.inf),
        "middle": copy["middle"].at[2].add(1e18),
        "bias": copy["bias"][:300],
    }
    del odd["both"]
    alone = extraction.extract(odd, base, mark)
    held = on(mesh_of(AxisType.Auto), base)
    on_mesh = {
        name: jax.device_put(leaf, NamedSharding(mesh_of(AxisType.Auto), LEAVES[name][1]))
        for name, leaf in odd.items()
        if name in LEAVES and name != "bias"
    } | {"bias": odd["bias"]}
    np.testing.assert_allclose(extraction.extract(on_mesh, held, mark), alone, atol=1e-5)
    assert float(alone @ word / np.linalg.norm(alone)) > 5  # of sqrt(64) = 8, with 28 % of the weights gone
    assert extraction.coverage(on_mesh, held, mark) == extraction.coverage(odd, base, mark)


def test_a_model_smaller_than_a_block_on_a_mesh():
    base = {"w": jnp.float32(np.random.default_rng(0).normal(size=(24, 25)))}
    mark, word = prepared(base)
    held = {"w": jax.device_put(base["w"], NamedSharding(mesh_of(AxisType.Auto), P("y")))}
    copy = embedding.embed(held, mark, word)
    np.testing.assert_allclose(copy["w"], embedding.embed(base, mark, word)["w"], atol=1e-6)
    chips = extraction.extract(copy, held, mark)
    np.testing.assert_allclose(chips, extraction.extract(copy, base, mark), atol=1e-5)
    np.testing.assert_array_equal(np.sign(chips), word)


def test_bad_input_is_refused_on_a_mesh_too(monkeypatch):
    base = base_of(jnp.float32)
    mark, word = prepared(base)
    held = on(mesh_of(AxisType.Auto), base)
    broken = {**held, "rows": held["rows"].at[63, 2, 4].set(jnp.nan)}  # in the tail or not: it is refused
    with pytest.raises(ValueError, match="embed: expected finite weights in the base"):
        embedding.embed(broken, mark, word)
    with pytest.raises(ValueError, match="extract: expected finite carrying weights in the base"):
        extraction.extract(held, broken, mark)
    with pytest.raises(ValueError, match=r"codewords of -1 and \+1"):
        embedding.embed(held, mark, word * 2)
    other = jax.make_mesh((8,), ("z",), axis_types=(AxisType.Auto,))
    mixed = {**held, "both": jax.device_put(base["both"], NamedSharding(other, P("z")))}
    with pytest.raises(ValueError, match="embed: expected carrying leaves split over one mesh, but got 2 meshes"):
        embedding.embed(mixed, mark, word)
    monkeypatch.setattr(sharded, "_MAX_LEAF", 1000)
    with pytest.raises(ValueError, match=r"extract: expected leaves of at most 1,000 weights, .*'columns' of 1,184"):
        extraction.extract(held, held, mark)
