import hashlib
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from hypothesis import given, settings
from hypothesis import strategies as st

from smark_jax import chacha, keys


def words(data: bytes) -> np.ndarray:
    return np.frombuffer(data, "<u4").astype(np.uint32)


def library_stream(key: bytes, nonce: bytes, start_block: int, num_words: int) -> np.ndarray:
    cipher = Cipher(algorithms.ChaCha20(key, start_block.to_bytes(4, "little") + nonce), mode=None)
    return words(cipher.encryptor().update(bytes(4 * num_words)))


def test_rfc8439_block_vector():
    """Section 2.3.2."""
    nonce = bytes.fromhex("000000090000004a00000000")
    expected = bytes.fromhex(
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e"
    )
    key = bytes(range(32))
    got = keys.keystream(words(key), words(nonce), 16, start_block=1)
    assert np.asarray(got).astype("<u4").tobytes() == expected
    assert reference.chacha20_block(key, 1, nonce) == expected


@pytest.mark.parametrize(
    ("key", "nonce", "counter", "first"),
    [  # Appendix A.1, test vectors 1, 2, 4, 5: the first 16 bytes
        ("00" * 32, "00" * 12, 0, "76b8e0ada0f13d90405d6ae55386bd28"),
        ("00" * 32, "00" * 12, 1, "9f07e7be5551387a98ba977c732d080d"),
        ("00ff" + "00" * 30, "00" * 12, 2, "72d54dfbf12ec44b362692df94137f32"),
        ("00" * 32, "00" * 11 + "02", 0, "c2c64d378cd536374ae204b9ef933fcd"),
    ],
)
def test_rfc8439_appendix_vectors(key, nonce, counter, first):
    got = keys.keystream(words(bytes.fromhex(key)), words(bytes.fromhex(nonce)), 4, start_block=counter)
    assert np.asarray(got).astype("<u4").tobytes().hex() == first


@settings(deadline=None, max_examples=25)
@given(
    key=st.binary(min_size=32, max_size=32),
    nonce=st.binary(min_size=12, max_size=12),
    start_block=st.integers(0, 2**32 - 20),
    num_words=st.sampled_from([1, 15, 16, 17, 300]),
)
def test_keystream_equals_cryptography(key, nonce, start_block, num_words):
    got = keys.keystream(words(key), words(nonce), num_words, start_block)
    np.testing.assert_array_equal(got, library_stream(key, nonce, start_block, num_words))


def test_long_keystream_over_several_passes_equals_cryptography():
    num_words = 16 * (2 * chacha.BLOCKS_PER_PASS + 3) + 5
    got = keys.keystream(words(bytes(range(32))), words(bytes(12)), num_words)
    np.testing.assert_array_equal(got, library_stream(bytes(range(32)), bytes(12), 0, num_words))


def test_keystream_under_jit_and_vmap(key):
    rows = jnp.stack([keys.derive(key, str(i)).to_words() for i in range(3)])
    nonce = jnp.zeros(3, jnp.uint32)
    batched = jax.jit(jax.vmap(lambda row: keys.keystream(row, nonce, 40)))(rows)
    for row, stream in zip(rows, batched, strict=True):
        np.testing.assert_array_equal(stream, keys.keystream(row, nonce, 40))
    traced = jax.jit(lambda start: keys.keystream(rows[0], nonce, 16, start))(jnp.uint32(1))
    np.testing.assert_array_equal(traced, keys.keystream(rows[0], nonce, 32)[16:])


def test_keystream_refuses_to_repeat(key):
    nonce = np.zeros(3, np.uint32)
    keys.keystream(key.to_words(), nonce, 16, start_block=2**32 - 1)
    with pytest.raises(ValueError, match=r"keystream: expected at most 2\^32 blocks"):
        keys.keystream(key.to_words(), nonce, 17, start_block=2**32 - 1)


@pytest.mark.parametrize(
    ("key", "nonce"),
    [(np.zeros(7, np.uint32), np.zeros(3, np.uint32)), (np.zeros(8, np.uint32), np.zeros(2, np.uint32))],
)
def test_keystream_refuses_other_shapes(key, nonce):
    with pytest.raises(ValueError, match=r"keystream: expected (key|nonce) to be uint32"):
        keys.keystream(key, nonce, 16)


def test_derive_is_hkdf_sha256(key):
    info = b"smark-jax v1" + b"\0\0\0\x05model" + b"\0\0\0\x07carrier"
    assert keys.derive(key, "model", "carrier").to_bytes() == reference.hkdf_sha256(key.to_bytes(), info)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=4), min_size=1, max_size=4), st.lists(st.text(max_size=4), min_size=1, max_size=4))
def test_different_labels_give_different_keys(first, second):
    key = keys.from_bytes(bytes(32))
    assert (keys.derive(key, *first) == keys.derive(key, *second)) == (first == second)


def test_derive_refuses_no_label(key):
    with pytest.raises(ValueError, match="at least one text label"):
        keys.derive(key)


def test_commitment_is_sha256_of_the_key(key):
    assert keys.commitment(key) == hashlib.sha256(bytes(range(32))).hexdigest()
    assert keys.commitment(keys.new()) != keys.commitment(keys.new())


def test_a_key_never_shows_itself(key):
    secret = key.to_bytes()
    shown = [repr(key), str(key), f"{key}", f"{[key]}", "%r" % {"k": key}]  # noqa: UP031
    for text in shown:
        assert secret.hex() not in text
        assert repr(secret) not in text
        assert text.count("hidden") == 1


@pytest.mark.parametrize("secret", [b"", bytes(31), bytes(33), "0" * 32])
def test_from_bytes_refuses_other_lengths(secret):
    with pytest.raises(ValueError, match="expected 32 bytes"):
        keys.from_bytes(secret)


def test_round_trip_and_equality(key):
    assert keys.from_bytes(key.to_bytes()) == key
    assert hash(keys.from_bytes(key.to_bytes())) == hash(key)
    assert key != keys.new()
    assert key != key.to_bytes()
    assert pickle.loads(pickle.dumps(key)) == key
