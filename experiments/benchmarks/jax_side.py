"""The system, built from smark_jax's public functions."""

import contextlib
import functools
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax

from experiments.benchmarks import network_sizes
from experiments.common import sections
from smark_jax import (
    aggregation,
    carriers,
    codes,
    embedding,
    extraction,
    files,
    keys,
    losses,
    models,
    parallel,
    tracing,
    vault,
)
from smark_jax._types import PyTree

Arms = Mapping[str, Callable[[], dict[str, Any] | None]]

_COPIES_PER_BATCH = 32
_PASSPHRASE = "benchmark"


def device() -> str:
    return str(jax.devices()[0].device_kind)


def device_peak() -> float | None:
    """Peak megabytes on an accelerator; None on a CPU, whose memory is the process's."""
    found = jax.devices()[0].memory_stats()
    return found["peak_bytes_in_use"] / 1e6 if found and "peak_bytes_in_use" in found else None


def _secret(seed: int, *names: str) -> keys.SecretKey:
    return sections.secret(seed, "benchmark", *names)


def _wait(value: Any) -> None:
    jax.block_until_ready(value)


def _base(num_weights: int, seed: int) -> PyTree:
    return {"w": jax.random.normal(jax.random.key(seed), (num_weights,))}


def weights(num_weights: int, num_chips: int, seed: int) -> Arms:
    """Work on one vector of weights, and one copy of it."""
    base = _base(num_weights, seed)
    mark = carriers.mark(_secret(seed, "carrier"), base, num_chips)
    word = codes.codebook(_secret(seed, "code"), [1], num_chips)[0]
    chips = word.astype(jnp.float32)
    marked = functools.cache(lambda: embedding.embed(base, mark, word))  # only made, and stored, if it is read
    copy = jax.jit(lambda vector: vector + 1)

    def extract() -> dict[str, Any]:
        read = np.asarray(extraction.extract(marked(), base, mark))
        return {"wrong_chips": int((np.sign(read) != np.asarray(word)).sum())}

    return {
        "copy": lambda: _wait(copy(base["w"])),
        "spread": lambda: _wait(carriers.spread(chips, mark)),
        "despread": lambda: _wait(carriers.despread(base["w"], mark)),
        "embed": lambda: _wait(embedding.embed(base, mark, word)),
        "extract": extract,
    }


def fingerprint_losses(num_weights: int, num_chips: int, seed: int) -> Arms:
    """Value and gradient of the loss of Uchida et al. and of DeepMarks', with the keyed carrier."""
    base = _base(num_weights, seed)
    mark = carriers.mark(_secret(seed, "carrier"), base, num_chips)
    word = codes.codebook(_secret(seed, "code"), [1], num_chips)[0].astype(jnp.float32)

    def arm(loss: Callable) -> Callable[[], None]:
        both = jax.jit(jax.value_and_grad(lambda vector, mark, word: loss(carriers.despread(vector, mark), word)))
        return lambda: _wait(both(base["w"], mark, word))

    return {"uchida": arm(losses.bit_cross_entropy), "deepmarks": arm(losses.code_mse)}


def cpu_devices(number: int) -> None:
    """So many virtual CPU devices, for parties without accelerators of their own."""
    with contextlib.suppress(RuntimeError):  # raised if computation has begun; there are then as many as there are
        jax.config.update("jax_num_cpu_devices", number)


def train(parties: int, batch: int, seed: int, engine: parallel.Engine = "pmap") -> Arms:
    """A round of the CNN: with a bare psum of floats, under masks, and under masks with the owner's mark."""
    cpu_devices(parties)
    network = models.CNN()
    apply_fn = models.apply_fn(network)
    start = models.init(network, jax.random.key(seed), (28, 28, 1))
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (parties, batch, 28, 28, 1), dtype=np.uint8)
    labels = rng.integers(0, 10, (parties, batch)).astype(np.int32)
    pair_keys = aggregation.pair_keys([_secret(seed, "party", str(party)) for party in range(parties)])
    mark = carriers.mark(_secret(seed, "carrier"), start)
    word = codes.codebook(_secret(seed, "code"), [0])[0]
    margin = functools.partial(losses.sign_hinge, margin=1.0)
    marking = optax.chain(embedding.add_fingerprint_gradient(margin, mark, word), optax.adam(1e-3))

    def masked(optimizer: optax.GradientTransformation) -> Callable[[], None]:
        step = parallel.train_step(apply_fn, optimizer, aggregation.FixedPoint(1.0, parties), engine=engine)
        state = step.init(start)

        def update() -> None:
            nonlocal state
            state, _ = step.update(state, images, labels, pair_keys)
            _wait(state)

        return update

    return {
        "plain": _plain_round(apply_fn, start, images, labels),
        "masks": masked(optax.adam(1e-3)),
        "masks and fingerprint": masked(marking),
    }


def _plain_round(apply_fn: Any, params: PyTree, images: np.ndarray, labels: np.ndarray) -> Callable[[], None]:
    """The same round with a psum of bare floats: each device its party's gradient, the first one the update."""
    optimizer = optax.adam(1e-3)
    devices = parallel.devices(len(images))

    def gradient(params: PyTree, images: jax.Array, labels: jax.Array) -> PyTree:
        found = jax.grad(lambda p: parallel.cross_entropy(apply_fn(p, images), labels))(params)
        return jax.lax.pmean(found, parallel.AXIS)

    collect = jax.pmap(gradient, parallel.AXIS, in_axes=(None, 0, 0), out_axes=None, devices=devices)

    @jax.jit
    def apply(params: PyTree, state: Any, mean: PyTree) -> tuple[PyTree, Any]:
        updates, state = optimizer.update(mean, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.device_put(params, devices[0])
    state = optimizer.init(params)

    def update() -> None:
        nonlocal params, state
        mean = jax.tree.map(lambda leaf: leaf.addressable_data(0), collect(params, images, labels))
        params, state = apply(params, state, jax.device_put(mean, devices[0]))
        _wait(params)

    return update


def copies(num_copies: int, num_weights: int, num_chips: int, seed: int) -> Arms:
    """Copies made some at a time and forgotten: what a copy costs before it is written."""
    base = _base(num_weights, seed)
    mark = carriers.mark(_secret(seed, "carrier"), base, num_chips)
    words = np.asarray(codes.codebook(_secret(seed, "code"), range(num_copies), num_chips))

    def embed() -> None:
        for start in range(0, num_copies, _COPIES_PER_BATCH):
            _wait(embedding.embed_batch(base, mark, words[start : start + _COPIES_PER_BATCH]))

    return {"embed": embed}


def disk(num_copies: int, model: str, folder: str, scored: int, seed: int) -> Arms:
    """Copies of a trained CNN as files: through the vault, which licenses, hashes and logs each, and without it."""
    base, test_images, test_labels = _trained(model)
    apply_fn = models.apply_fn(models.CNN())
    accuracy = lambda params: models.accuracy(apply_fn, params, test_images, test_labels)  # noqa: E731
    mark = carriers.mark(_secret(seed, "carrier"), base)

    def judge(paths: list[Path]) -> dict[str, Any]:
        mean = float(np.mean([accuracy(files.nest(files.read(path).leaves)) for path in paths[:scored]]))
        return {"accuracy": mean, "of_base": accuracy(base), "bytes": sum(path.stat().st_size for path in paths)}

    def write() -> dict[str, Any]:
        with tempfile.TemporaryDirectory(dir=folder) as name:
            out = Path(name)
            began = time.perf_counter()
            words = np.asarray(codes.codebook(_secret(seed, "code"), range(num_copies)))
            for start in range(0, num_copies, _COPIES_PER_BATCH):
                some = words[start : start + _COPIES_PER_BATCH]
                made = jax.device_get(embedding.embed_batch(base, mark, some))
                for row in range(len(some)):
                    copy = jax.tree.map(lambda leaf, row=row: leaf[row], made)
                    files.write(out / f"{start + row}.safetensors", copy)
            seconds = time.perf_counter() - began
            return {"seconds": seconds, **judge(sorted(out.glob("*.safetensors")))}

    def issue() -> dict[str, Any]:
        with tempfile.TemporaryDirectory(dir=folder) as name:
            out = Path(name)
            vault.create(out / "vault", _PASSPHRASE)
            with vault.opened(out / "vault", _PASSPHRASE) as desk:
                model = vault.models.add(desk, "mnist-cnn", files.flatten(base))
                customers = vault.customers.add(desk, [f"customer {number}" for number in range(num_copies)])
                began = time.perf_counter()
                issued = vault.issuing.issue(model, customers, out / "copies")
                seconds = time.perf_counter() - began
            return {"seconds": seconds, **judge(list(issued.files))}

    return {"write": write, "issue": issue}


def _trained(model: str) -> tuple[PyTree, np.ndarray, np.ndarray]:
    """The base and the held-out digits in a file of :func:`experiments.benchmarks.compare.trained`."""
    with np.load(model) as saved:
        leaves = {name.removeprefix("weights:"): saved[name] for name in saved.files if name.startswith("weights:")}
        return files.nest(leaves), saved["test_images"], saved["test_labels"]


def verdict(
    num_customers: int, num_chips: int, decoder: Literal["single", "joint"], seed: int, keep: bool = True
) -> Arms:
    """From the key to every customer's p-value, no codeword held; ``keep`` says whether all statistics are returned."""
    book = codes.Codebook(_secret(seed, "code"), num_customers, num_chips)
    guilty = num_customers // 3
    word = np.asarray(codes.codebook(book.key, [guilty], num_chips)[0], np.float64)
    chips = word + np.random.default_rng(seed).normal(size=num_chips)

    def trace() -> dict[str, Any]:
        found = tracing.trace(chips, book, decoder=decoder, keep_statistics=keep)
        return {"right": [accusation.serial for accusation in found.accused] == [guilty]}

    return {"verdict": trace}


def party(parties: int, num_words: int, seed: int) -> Arms:
    """What one party does in a round, and what whoever adds up does with the messages of all."""
    fixed_point = aggregation.FixedPoint(1.0, parties)
    pair_keys = aggregation.pair_keys([_secret(seed, "party", str(number)) for number in range(parties)])
    update = 0.1 * jax.random.normal(jax.random.key(seed), (num_words,))
    messages = jax.random.bits(jax.random.key(seed), (parties, num_words), jnp.uint32)

    @jax.jit
    def message(update: jax.Array, row: jax.Array, round: jax.Array) -> jax.Array:
        words = aggregation.encode(update, fixed_point, aggregation.rounding_key(row, 0, round))
        return words + aggregation.pairwise_mask(row, 0, round, num_words)

    @jax.jit
    def aggregate(messages: jax.Array) -> jax.Array:
        return aggregation.decode(messages.sum(axis=0, dtype=jnp.uint32), fixed_point, parties)

    rounds = iter(range(1 << 30))
    row = jnp.asarray(pair_keys[0])
    return {
        "party": lambda: _wait(message(update, row, jnp.uint32(next(rounds)))),
        "aggregate": lambda: _wait(aggregate(messages)),
    }


def model(name: str, dtype: str, num_chips: int, folder: str, seed: int, num_weights: int = 0) -> Arms:
    """A network of real size, or eight layers of ``num_weights``: a copy each lap, issued to a file, read and traced.

    One copy is in memory at a time, as with an owner who streams copies to disk.
    """
    leaves = network_sizes.NAMED[name]() if name in network_sizes.NAMED else network_sizes.layers(num_weights)
    rng = np.random.default_rng(seed)
    number = np.dtype(getattr(ml_dtypes, dtype)) if dtype == "bfloat16" else np.dtype(dtype)
    base = {leaf: jnp.asarray(0.05 * rng.standard_normal(shape, np.float32), number) for leaf, shape in leaves.items()}
    mark = carriers.mark(_secret(seed, "carrier"), base, num_chips)
    book = np.asarray(codes.codebook(_secret(seed, "code"), range(100), num_chips))
    customers = iter(range(1 << 30))
    customer, copy, chips = 0, base, np.zeros(num_chips)

    def embed() -> None:
        nonlocal customer, copy
        customer = next(customers) % len(book)
        copy = None  # the previous copy is already on disk
        copy = embedding.embed(base, mark, book[customer])
        _wait(copy)

    def issue() -> dict[str, Any]:
        path = Path(folder) / "copy.safetensors"
        began = time.perf_counter()
        files.write(path, copy)
        seconds, size = time.perf_counter() - began, path.stat().st_size
        path.unlink()
        return {"seconds": seconds, "bytes": size}

    def extract() -> dict[str, Any]:
        nonlocal chips
        chips = np.asarray(extraction.extract(copy, base, mark))
        kept = all(leaf.dtype == number for leaf in jax.tree.leaves(copy))
        return {"wrong_chips": int((np.sign(chips) != book[customer]).sum()), "dtype_kept": kept}

    def trace() -> dict[str, Any]:
        return {"right": [accusation.serial for accusation in tracing.trace(chips, book).accused] == [customer]}

    return {"embed": embed, "issue": issue, "extract": extract, "trace": trace}


CASES: dict[str, Callable[..., Arms]] = {
    "weights": weights,
    "losses": fingerprint_losses,
    "train": train,
    "copies": copies,
    "disk": disk,
    "verdict": verdict,
    "party": party,
    "model": model,
}
