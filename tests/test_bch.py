"""The BCH codec against textbooks, all words of a small code, and words that another library coded."""

import itertools
import math

import numpy as np
import pytest

from smark_jax.blackbox import bch


# Lin, Costello, "Error control coding", table of generators, as exponents.
@pytest.mark.parametrize(("errors", "generator"), [(1, (4, 1, 0)), (2, (8, 7, 6, 4, 0)), (3, (10, 8, 5, 4, 2, 1, 0))])
def test_generators_of_length_15_are_those_of_textbooks(errors, generator):
    code = bch.code(4, errors)
    parity = np.isin(np.arange(generator[0])[::-1], generator).astype(int)
    np.testing.assert_array_equal(code.parity[-1], parity)  # the remainder of x^r is the generator without x^r
    assert code.message == 15 - generator[0]


@pytest.mark.parametrize("errors", [1, 2, 3])
def test_of_all_words_of_length_15_those_near_a_codeword_are_decoded_and_no_others(errors):
    code = bch.code(4, errors)
    messages = np.array(list(itertools.product((0, 1), repeat=code.message)))
    words = np.array(list(itertools.product((0, 1), repeat=15)), np.uint8)
    codewords = bch.encode(code, messages)
    signs = 1 - 2 * np.float32(words), 1 - 2 * np.float32(codewords)
    apart = (15 - signs[0] @ signs[1].T) / 2  # Hamming distances
    near, distance = apart.argmin(axis=1), apart.min(axis=1)
    found, ok = bch.decode(code, words)
    np.testing.assert_array_equal(ok, distance <= errors)
    np.testing.assert_array_equal(found, messages[near] * ok[:, None])
    # Balls of radius t around codewords do not meet.
    assert ok.sum() == len(messages) * sum(math.comb(15, i) for i in range(errors + 1))


def test_the_code_of_payloads_has_the_length_and_the_bits_that_it_always_had():
    code = bch.code(9, 25)
    assert (code.length, code.message) == (511, 304)  # the table of Lin and Costello
    (word,) = bch.encode(code, np.unpackbits(np.arange(38, dtype=np.uint8))[None])
    # By galois 0.4.11 and by the BCH library of the Linux kernel alike.
    assert np.packbits(word[304:]).tobytes().hex() == "666caa348a4e6c6efde5577561669f0c2061056aae6bb38bcc7e"


def test_25_wrong_bits_are_corrected_and_more_are_refused():
    code, rng = bch.code(9, 25), np.random.default_rng(0)
    messages = rng.integers(0, 2, (90, 304))
    words, count = bch.encode(code, messages), np.arange(90) % 30
    for word, wrong in zip(words, count, strict=True):
        word[rng.choice(511, wrong, replace=False)] ^= 1
    found, ok = bch.decode(code, words)
    np.testing.assert_array_equal(ok, count <= 25)
    np.testing.assert_array_equal(found, messages * ok[:, None])
