"""What runs on accelerators: every compiled entry point is lowered for them, and their cipher gives OpenSSL's bits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from smark_jax import aggregation, carriers, chacha, codes, embedding, extraction, keys, tracing
from smark_jax.aggregation import masks

KEY = keys.from_bytes(bytes(range(32)))
PLATFORMS = ("cuda", "rocm", "tpu")
NAMES = ("keystream", "pairwise mask", "encode", "codewords", "scores", "many scores", "products")
NAMES += ("embed, white", "extract, white", "embed, shaped", "extract, shaped")
BASE = {"a": np.sin(np.arange(2000.0)).reshape(40, 50), "b": np.cos(np.arange(500.0)).reshape(50, 10)}


def apply_fn(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def mark(shaped: bool) -> carriers.Mark:
    images = jax.random.normal(jax.random.key(2), (8, 40))
    return carriers.mark(KEY, BASE, 32, shape=carriers.shape(BASE, apply_fn, images) if shaped else None)


def pair_keys() -> jax.Array:
    return jax.random.bits(jax.random.key(3), (4, 8), jnp.uint32)


@pytest.fixture(scope="module")
def entries() -> dict:
    fixed = aggregation.FixedPoint(1.0, 4)
    words = jnp.asarray(KEY.to_words())
    scored = functools.partial(tracing.scoring._score_packed, planes=22)
    found = {
        "keystream": (lambda key: keys.keystream(key, jnp.zeros(3, jnp.uint32), 100), words),
        "pairwise mask": (lambda row: aggregation.pairwise_mask(row, 1, 7, 1000), pair_keys()),
        "encode": (lambda tree: aggregation.encode(tree, fixed, jax.random.key(0)), BASE),
        "codewords": (
            functools.partial(codes._drawn, number=1, version=2),
            *(words, jnp.arange(64, dtype=jnp.uint32), jnp.zeros(64, jnp.uint32)),
        ),
        "scores": (scored, jnp.ones((1, 300)), jnp.zeros((4096, 1, 16), jnp.uint32)),
        "many scores": (scored, jnp.ones((9, 300)), jnp.zeros((4096, 1, 16), jnp.uint32)),
        "products": (tracing.scoring._score_held, jnp.ones((1, 300)), jnp.ones((64, 300), jnp.int8)),
    }
    for shaped in (False, True):
        mine, kind = mark(shaped), "shaped" if shaped else "white"
        found[f"embed, {kind}"] = (embedding.embed, BASE, mine, codes.codebook(KEY, [1], 32)[0])
        found[f"extract, {kind}"] = (extraction.extract, BASE, BASE, mine)
    assert tuple(found) == NAMES
    return found


@pytest.mark.parametrize("name", NAMES)
def test_accelerators_need_no_host(name, entries):
    function, *args = entries[name]
    lowered = export.export(jax.jit(function), platforms=PLATFORMS)(*args)
    assert lowered.platforms == PLATFORMS
    assert "callback" not in lowered.mlir_module()


def test_cpus_are_served_by_a_callback():
    """The control of the test above: a callback is seen where there is one."""
    text = jax.jit(lambda key: keys.keystream(key, jnp.zeros(3, jnp.uint32), 100)).lower(KEY.to_words()).as_text()
    assert "callback" in text


@pytest.mark.parametrize("num_words", [1, 16, 1000, 16 * chacha.BLOCKS_PER_PASS + 5])
def test_compiled_streams_are_openssls(num_words):
    nonce = np.array([1, 2, 3], np.uint32)
    blocks = -(-num_words // 16)
    counters = jnp.arange(7, 7 + blocks, dtype=jnp.uint32)
    nonces = jnp.broadcast_to(jnp.asarray(nonce)[:, None], (3, blocks))
    compiled = jax.jit(chacha.blocks)(KEY.to_words(), counters, nonces).reshape(-1)[:num_words]
    np.testing.assert_array_equal(compiled, chacha.openssl(KEY.to_words(), nonce, 7, num_words))


@pytest.mark.parametrize("party", [0, 2, 3])
@pytest.mark.parametrize("num_words", [5, 40_000])
def test_compiled_masks_are_openssls(party, num_words, monkeypatch):
    monkeypatch.setattr(masks, "_WORDS_PER_CALL", 1 << 12)
    row, round = pair_keys(), jnp.uint32(9)
    compiled = jax.jit(masks._drawn, static_argnames="num_words")(row, jnp.int32(party), round, num_words=num_words)
    np.testing.assert_array_equal(compiled, masks._called(row, party, round, num_words))


def test_streams_under_vmap_and_in_a_loop():
    nonces = jnp.arange(12, dtype=jnp.uint32).reshape(4, 3)
    expected = [chacha.openssl(KEY.to_words(), nonce, 0, 40) for nonce in np.asarray(nonces)]
    stream = lambda nonce: keys.keystream(jnp.asarray(KEY.to_words()), nonce, 40)  # noqa: E731
    np.testing.assert_array_equal(jax.vmap(stream)(nonces), expected)
    np.testing.assert_array_equal(jax.jit(lambda x: jax.lax.map(stream, x))(nonces), expected)


@pytest.mark.parametrize("axes", [{"a"}, {"a", "b"}])
def test_streams_under_shard_map_over_some_axes_or_all(axes):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b"))
    nonces = jnp.arange(6, dtype=jnp.uint32).reshape(2, 3)
    expected = [chacha.openssl(KEY.to_words(), nonce, 0, 40) for nonce in np.asarray(nonces)]
    stream = lambda nonce: keys.keystream(KEY.to_words(), nonce[0], 40)[None]  # noqa: E731
    rows = jax.sharding.PartitionSpec("a")
    mapped = jax.shard_map(stream, mesh=mesh, in_specs=rows, out_specs=rows, axis_names=axes)
    np.testing.assert_array_equal(jax.jit(mapped)(nonces), expected)
