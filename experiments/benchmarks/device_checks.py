"""What a device computes, against references on the host: OpenSSL's keystream, and NumPy in float64.

A compiler for an accelerator may round matrix products to fewer bits or mistranslate a loop, and every number would
still look plausible. The references share no code with smark_jax; each check runs with the sizes at which smark_jax
works in several passes.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from experiments.common import sections
from smark_jax import aggregation, carriers, chacha, codes, embedding, extraction, keys, parallel
from smark_jax.tracing import scoring

Found = tuple[bool, str]

# Relative errors. Float32 has 6e-8, sums over thousands of terms a few times that; TF32 has 5e-4, bfloat16 4e-3.
_EXACT = 1e-5
_PARTIES = 4
_ROUND = 7


def checks(parties: int, seed: int) -> Mapping[str, Callable[[], dict[str, Any]]]:
    """The arms of a worker: each makes one check, and reports whether it passed and what it found."""

    def arm(check: Callable[..., Found], *args: int) -> Callable[[], dict[str, Any]]:
        def run() -> dict[str, Any]:
            try:
                passed, found = check(*args)
            except Exception as error:  # what the device refuses to run has failed
                passed, found = False, f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
            return {"passed": bool(passed), "found": found}

        return run

    return {
        "keystream": arm(_keystream, seed),
        "masks": arm(_masks, seed),
        "codewords": arm(_codewords, seed),
        "carrier": arm(_carrier, seed),
        "scores": arm(_scores, seed),
        "copy": arm(_copy, seed),
        "training step": arm(_step, parties, seed),
    }


def _secret(seed: int, *names: str) -> keys.SecretKey:
    return sections.secret(seed, "device", *names)


def _stream(key: np.ndarray, nonce: tuple[int, int, int], counter: int, num_words: int) -> np.ndarray:
    """OpenSSL's ChaCha20 keystream (RFC 8439), uint32, shape [num_words]."""
    start = np.array([counter, *nonce], "<u4").tobytes()
    cipher = Cipher(algorithms.ChaCha20(np.asarray(key, "<u4").tobytes(), start), mode=None)
    return np.frombuffer(cipher.encryptor().update(bytes(4 * num_words)), "<u4")


def _wrong(found: Any, expected: np.ndarray) -> int:
    found = np.asarray(found)
    return int((found != expected).sum()) if found.shape == expected.shape else expected.size


def _error(found: Any, expected: np.ndarray) -> float:
    """The largest error in units of the expected values' RMS; infinite where something is not finite."""
    worst = np.abs(np.asarray(found, np.float64) - expected).max() / np.sqrt(np.mean(expected**2))
    return float(worst) if np.isfinite(worst) else np.inf


def _keystream(seed: int) -> Found:
    """The compiled cipher and the public function, up to the last block that a counter can name."""
    blocks = 2 * chacha.BLOCKS_PER_PASS + 5
    key, nonce = _secret(seed, "cipher").to_words(), (1, 2**31 + 5, 3)
    first, count = 2**32 - blocks, 16 * blocks
    expected = _stream(key, nonce, first, count)
    counters = jnp.arange(blocks, dtype=jnp.uint32) + jnp.uint32(first)
    nonces = jnp.broadcast_to(jnp.asarray(nonce, jnp.uint32)[:, None], (3, blocks))
    compiled = jax.jit(lambda *args: chacha.blocks(*args))(key, counters, nonces)
    wrong = _wrong(compiled.reshape(-1), expected)
    wrong += _wrong(keys.keystream(key, jnp.asarray(nonce, jnp.uint32), count, first), expected)
    return wrong == 0, f"{wrong:,} of {2 * count:,} words differ from OpenSSL's"


def _masks(seed: int) -> Found:
    """Each party's mask is the signed sum of its pairs' streams, the masks cancel, and the sum of messages is right."""
    size, rng = 70_001, np.random.default_rng(seed)
    pair_keys = aggregation.pair_keys([_secret(seed, "party", str(party)) for party in range(_PARTIES)])
    updates = rng.uniform(-1, 1, (_PARTIES, size))
    fixed_point = aggregation.FixedPoint(1.0, _PARTIES)
    wrong, total, messages = 0, np.zeros(size, np.uint32), np.zeros(size, np.uint32)
    for party in range(_PARTIES):
        mask = np.asarray(aggregation.pairwise_mask(pair_keys[party], party, _ROUND, size))
        expected = np.zeros(size, np.uint32)
        for partner in set(range(_PARTIES)) - {party}:
            stream = _stream(pair_keys[party][partner], (_ROUND, 0, 1), 0, size)
            expected = expected + stream if partner > party else expected - stream
        wrong += _wrong(mask, expected)
        total += mask
        rounding = aggregation.rounding_key(pair_keys[party], party, _ROUND)
        messages += mask + np.asarray(aggregation.encode(updates[party], fixed_point, rounding))
    left = np.count_nonzero(total)
    off = _error(aggregation.decode(jnp.asarray(messages), fixed_point, _PARTIES), updates.sum(axis=0))
    found = f"{wrong:,} of {_PARTIES * size:,} words wrong; {left:,} do not cancel; error of the sum {off:.0e}"
    return wrong == left == 0 and off < _EXACT, found


def _codewords(seed: int) -> Found:
    """Bits of words scattered over all serials, in more than one block each."""
    key, num_chips = _secret(seed, "code"), 700
    serials = np.unique(np.random.default_rng(seed).integers(0, 2**40, 2100))
    blocks = [
        [_stream(key.to_words(), (block, int(s) >> 32, 2**31), int(s) & (2**32 - 1), 16) for block in range(2)]
        for s in serials
    ]
    expected = _chips(np.array(blocks).reshape(len(serials), -1), num_chips)
    wrong = _wrong(codes.codebook(key, serials, num_chips), expected)
    return wrong == 0, f"{wrong:,} of {expected.size:,} chips wrong"


def _chips(words: np.ndarray, num_chips: int) -> np.ndarray:
    """Chips of -1 and +1 from the bits of little-endian words, int8, shape [K, m]."""
    octets = np.ascontiguousarray(words, "<u4").view(np.uint8)
    return 1 - 2 * np.unpackbits(octets, axis=1, count=num_chips, bitorder="little").astype(np.int8)


def _carrier(seed: int) -> Found:
    """Spreading, its transpose and their orthonormality, in several blocks and in a single one of odd length."""
    worst, rng = 0.0, np.random.default_rng(seed)
    for size, num_chips in ((20_000, 64), (1500, 40)):
        mark = carriers.mark(_secret(seed, "carrier"), {"w": rng.normal(size=size).astype(np.float32)}, num_chips)
        rows, chips, vector = _dense(mark.carrier), rng.normal(size=num_chips), rng.normal(size=size)
        spread = carriers.spread(chips, mark)
        worst = max(
            worst,
            _error(spread, rows.T @ chips),
            _error(carriers.despread(vector.astype(np.float32), mark), rows @ vector),
            _error(carriers.despread(spread, mark), chips),
        )
    return worst < _EXACT, f"relative error {worst:.0e}, at most {_EXACT:.0e}"


def _dense(carrier: carriers.Carrier) -> np.ndarray:
    """The m x D matrix that a carrier's signs and positions stand for, S2 H S1 H P / sqrt(n) block by block."""
    (n, length), num_chips = carrier.blocks, carrier.num_chips
    inner, outer = (_chips(np.asarray(signs), length).astype(np.float64) for signs in carrier.arrays[:2])
    dense = np.zeros((num_chips, carrier.num_weights))
    for block, positions in enumerate(np.asarray(carrier.positions)):
        columns = np.zeros((length, num_chips))
        columns[positions, np.arange(num_chips)] = 1
        for signs in (inner[block], outer[block]):
            columns = signs[:, None] * _mixed(columns)
        dense[:, block * length : (block + 1) * length] = columns.T / np.sqrt(n)
    return dense


def _mixed(columns: np.ndarray) -> np.ndarray:
    """The orthonormal Walsh-Hadamard transform over the first 2^k rows and, where there are more, over the last."""
    window, columns = 1 << (len(columns).bit_length() - 1), columns.copy()
    for first in sorted({0, len(columns) - window}):
        columns[first : first + window] = _transformed(columns[first : first + window])
    return columns


def _transformed(columns: np.ndarray) -> np.ndarray:
    """The same for 2^k rows: sums and differences of neighbours, of pairs, of fours, and so on."""
    half, shape = 1, columns.shape
    while half < len(columns):
        pairs = columns.reshape(-1, 2, half, shape[1])
        columns = np.stack([pairs.sum(axis=1), pairs[:, 0] - pairs[:, 1]], axis=1).reshape(shape)
        half *= 2
    return columns / np.sqrt(half)


def _scores(seed: int) -> Found:
    """Correlations with packed words by bit planes and by matmul, with words held, and the counts of joint decoding."""
    key, customers, num_chips = _secret(seed, "code"), 3000, 304
    stream = _stream(key.to_words(), (0, 0, 2**31), 0, 16 * customers)
    words = _chips(stream.reshape(customers, 16), num_chips)
    book, worst = codes.Codebook(key, customers, num_chips), 0.0
    vectors = np.random.default_rng(seed).normal(size=(9, num_chips))
    for some, held in ((vectors[:1], book), (vectors, book), (vectors, words)):
        found = scoring.score(some, held, np.zeros(len(some)), keep=True).all
        worst = max(worst, _error(found, some @ words.T.astype(np.float64)))
    joint = scoring.correlate(range(5), scoring.shortlist(book, np.arange(customers)))
    wrong = _wrong(joint, words[:5].astype(int) @ words.T.astype(int))
    found = f"relative error {worst:.0e}, at most {_EXACT:.0e}; {wrong:,} of {joint.size:,} counts wrong"
    return worst < _EXACT and wrong == 0, found


def _copy(seed: int) -> Found:
    """A copy is marked and read: every chip right."""
    base = {"w": np.random.default_rng(seed).normal(size=(200, 500)).astype(np.float32)}
    mark, key = carriers.mark(_secret(seed, "carrier"), base), _secret(seed, "code")
    word = _chips(_stream(key.to_words(), (0, 0, 2**31), 5, 16)[None], mark.num_chips)[0]
    read = extraction.extract(embedding.embed(base, mark, codes.codebook(key, [5], mark.num_chips)[0]), base, mark)
    wrong = _wrong(np.sign(read), word)
    return wrong == 0, f"{wrong} of {word.size} chips wrong"


def _step(parties: int, seed: int) -> Found:
    """Two rounds of a linear classifier under pmap and under shard_map: equal to the bit, and right in float64."""
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(parties, 32, 20)).astype(np.float32)
    labels = rng.integers(0, 10, (parties, 32))
    start = {"w": np.zeros((20, 10), np.float32), "b": np.zeros(10, np.float32)}
    pair_keys = aggregation.pair_keys([_secret(seed, "party", str(party)) for party in range(parties)])
    ends = []
    with jax.default_matmul_precision("highest"):
        for engine in ("pmap", "shard_map"):
            step = parallel.train_step(
                lambda params, x: x @ params["w"] + params["b"][None],
                optax.sgd(1.0),
                aggregation.FixedPoint(1.0, parties),
                engine=engine,
            )
            state = step.init(start)
            for _ in range(2):
                state, _ = step.update(state, images, labels, pair_keys)
            ends.append({name: np.asarray(leaf) for name, leaf in state.params.items()})
    same = all(np.array_equal(ends[0][name], ends[1][name]) for name in start)
    expected = _descended(images.astype(np.float64), labels)
    off = max(_error(ends[0]["w"], expected[:-1]), _error(ends[0]["b"], expected[-1]))
    who = f"{parties} parties" if parties > 1 else "one device, so one party and no masks"
    found = f"pmap and shard_map {'equal' if same else 'differ'}; relative error {off:.0e}, at most {_EXACT:.0e}"
    return same and off < _EXACT, f"{who}: {found}"


def _descended(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Weights and, in the last row, biases after two steps along the mean of the parties' clipped gradients."""
    params = np.zeros((images.shape[-1] + 1, 10))
    for _ in range(2):
        mean = np.zeros_like(params)
        for x, y in zip(images, labels, strict=True):
            x = np.hstack([x, np.ones((len(x), 1))])
            logits = np.exp(x @ params)
            excess = logits / logits.sum(axis=1, keepdims=True) - np.eye(10)[y]
            gradient = x.T @ excess / len(x)
            mean += gradient * min(1.0, 1 / np.linalg.norm(gradient)) / len(images)
        params -= mean
    return params
