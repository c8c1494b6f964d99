import jax.numpy as jnp
import numpy as np
import pytest
import reference

from smark_jax import codes, keys, tracing
from smark_jax.tracing import scoring


def reference_word(key: keys.SecretKey, serial: int, num_chips: int, version: int) -> np.ndarray:
    low, high = ((serial >> shift & 2**32 - 1).to_bytes(4, "little") for shift in (0, 32))
    blocks = range(-(-num_chips // 512))
    places = [(i, bytes(4) + low + high) for i in blocks]
    if version == 2:
        places = [(serial % 2**32, i.to_bytes(4, "little") + high + bytes([0, 0, 0, 128])) for i in blocks]
    stream = b"".join(reference.chacha20_block(key.to_bytes(), counter, nonce) for counter, nonce in places)
    bits = np.unpackbits(np.frombuffer(stream, np.uint8), bitorder="little")[:num_chips]
    return 1 - 2 * bits.astype(int)


@pytest.mark.parametrize("num_chips", [1, 304, 512, 513, 1300])
@pytest.mark.parametrize("version", [1, 2])
def test_words_are_the_keyed_stream_at_the_serial(key, num_chips, version):
    serials = np.array([0, 5, 2**32 - 2, 2**32 - 1, 2**32, 2**40 + 7, 2**63 - 1])
    book = np.asarray(codes.codebook(key, serials, num_chips, version))
    assert book.shape == (7, num_chips)
    assert book.dtype == np.int8
    for serial, word in zip(serials, book, strict=True):
        np.testing.assert_array_equal(word, reference_word(key, int(serial), num_chips, version))


@pytest.mark.parametrize("version", [1, 2])
def test_words_by_openssl_and_by_compiled_code_are_the_same(key, version, monkeypatch):
    serials = np.concatenate([np.arange(20), 3 * np.arange(50), 2**32 + np.arange(-3, 3)]).astype(np.uint64)
    by_openssl = np.asarray(codes.packed_words(key, serials, 600, version))
    monkeypatch.setattr(codes, "_MOST_CALLS", 0)
    monkeypatch.setattr(codes, "_run", None)  # whoever calls it now fails
    np.testing.assert_array_equal(codes.packed_words(key, serials, 600, version), by_openssl)
    np.testing.assert_array_equal(codes.packed_words(key, range(20), 600, version), by_openssl[:20])


@pytest.mark.parametrize("num_chips", [1, 304, 1300])
@pytest.mark.parametrize("version", [1, 2])
def test_a_drawn_word_is_the_own_word_times_the_public_one(key, num_chips, version, monkeypatch):
    public = keys.from_bytes(bytes(range(32)))
    serials = np.array([0, 5, 6, 2**32 - 1, 2**32, 2**63 - 1])
    expected = [
        reference_word(key, int(s), num_chips, version) * reference_word(public, int(s), num_chips, version)
        for s in serials
    ]
    np.testing.assert_array_equal(codes.codebook(key, serials, num_chips, version, public), expected)
    book = codes.Codebook(key, 6, num_chips, version, public)
    np.testing.assert_array_equal(book.words(serials), expected)
    monkeypatch.setattr(codes, "_MOST_CALLS", 0)  # by compiled code
    np.testing.assert_array_equal(book.words(serials), expected)


def test_a_codebook_of_drawn_words_is_scored_as_its_words_are(key):
    public, rng = keys.derive(key, "public"), np.random.default_rng(0)
    book = codes.Codebook(key, 700, 304, public=public)
    words = np.asarray(codes.codebook(key, range(700), 304, public=public), np.float64)
    found = tracing.trace(words[[3, 600]].mean(axis=0) + rng.normal(scale=0.3, size=304), book)
    assert {accused.serial for accused in found.accused} == {3, 600}
    for count in (1, 9):  # by bit planes, and by a matmul
        vectors = rng.normal(size=(count, 304)).astype(np.float32)
        scores = scoring.score(vectors, book, np.zeros(count), keep=True).all
        np.testing.assert_allclose(scores, vectors @ words.T, atol=1e-3)
    own = np.asarray(codes.codebook(key, range(700), 304), np.float64)
    assert np.abs(np.sum(own * words, axis=1)).max() < 5.5 * np.sqrt(304)  # the own words tell nothing of them


def test_versions_of_the_code_share_no_word(key):
    one, two = (np.asarray(codes.codebook(key, range(100), 304, version)) for version in (1, 2))
    assert np.abs(one.astype(int) @ two.T.astype(int)).max() < 5.5 * np.sqrt(304)
    with pytest.raises(ValueError, match="version 1 or 2, but got 3"):
        codes.codebook(key, [1], version=3)


def test_a_word_depends_on_nothing_but_key_and_serial(key):
    one = codes.codebook(key, [7])
    many = codes.codebook(key, [3, 7, 11])
    np.testing.assert_array_equal(one[0], many[1])
    np.testing.assert_array_equal(one[0, :100], codes.codebook(key, jnp.array([7]), 100)[0])
    assert (one != codes.codebook(keys.derive(key, "other"), [7])).any()


def test_words_are_unbiased_and_uncorrelated(key):
    """Column means and pairwise products stay within what independent fair signs give (5 standard deviations)."""
    book = np.asarray(codes.codebook(key, range(4000)), np.float64)
    assert np.abs(book.mean(axis=0)).max() < 5 / np.sqrt(4000)
    gram = book[:300] @ book[:300].T / 304
    assert np.abs(gram - np.eye(300)).max() < 5.5 / np.sqrt(304)
    biased = np.sign(book + 0.2)
    biased[:400] = 1  # a control that the test must catch
    assert np.abs(biased.mean(axis=0)).max() > 5 / np.sqrt(4000)


@pytest.mark.parametrize("serials", [[3, 3], [-1], [], [[1, 2]], [1.5]])
def test_codebook_refuses(key, serials):
    with pytest.raises(ValueError, match=r"codebook: expected (distinct )?serials"):
        codes.codebook(key, np.array(serials))


def test_duplicates_are_named(key):
    with pytest.raises(ValueError, match=r"distinct serials, but got duplicates of \[4\]"):
        codes.codebook(key, [4, 1, 4])


def test_codebook_refuses_sizes(key):
    with pytest.raises(ValueError, match="num_chips"):
        codes.codebook(key, [1], 0)
    with pytest.raises(ValueError, match="num_customers"):
        codes.Codebook(key, 0)
