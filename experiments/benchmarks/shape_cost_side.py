"""The worker's side of ``shape_cost``: makes the shape of a network's mark, and copies and read-outs with one."""

import contextlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import jax_side, network_sizes, worker
from experiments.benchmarks.jax_side import device, device_peak
from experiments.common import sections
from smark_jax import carriers, codes, embedding, extraction, keys, models

__all__ = ["CASES", "device", "device_peak"]

# Images are mixtures of this many patterns, so that the inputs of the CNN's dense layer vary in few directions.
_PATTERNS = 20
# Directions of the over-parametrised kernel.
_DIRECTIONS = 48


def _secret(seed: int, name: str) -> keys.SecretKey:
    return sections.secret(seed, "benchmark", name)


def making(network: str, images: int, seed: int) -> jax_side.Arms:
    """Shapes of a network's mark: of the CNN with random weights, or of a network in ``experiments.common.real``.

    ``shape`` makes one from the network and ``images``; ``weights alone`` makes one without, and measures how far
    a copy at the default strength changes the logits.
    """
    if network == "CNN":
        rng = np.random.default_rng(seed)
        base, apply_fn = models.init(models.CNN(), jax.random.key(seed), (28, 28, 1)), models.apply_fn(models.CNN())
        mixed = rng.dirichlet(np.ones(_PATTERNS), images) @ rng.integers(0, 256, (_PATTERNS, 784))
        inputs = mixed.reshape(-1, 28, 28, 1).astype(np.uint8)
    else:
        from experiments.common import real  # needs the extra 'real'

        found = {"EfficientNet-Lite0": real.efficientnet_lite0, "OpenNSFW": real.opennsfw}[network]()
        base, apply_fn = found.params, found.apply_fn
        inputs = found.preprocess(real.natural_images("shape", images).images)

    def shape() -> dict[str, Any]:
        began = time.process_time()
        found = carriers.shape(base, apply_fn, inputs, seed=seed)
        return {
            "cpu": time.process_time() - began,
            "stored": found.num_stored,
            "weights": sum(np.size(leaf) for leaf in jax.tree.leaves(base)),
            "bases": sum(one.basis is not None for _, one in found),
        }

    def weights_alone() -> dict[str, Any]:
        mark = carriers.mark(_secret(seed, "carrier"), base, shape=carriers.shape(base))
        copy = embedding.embed(base, mark, codes.codebook(_secret(seed, "code"), [1])[0])
        return {"change": embedding.measure(copy, base, apply_fn, inputs).cost.change}

    return {"shape": shape, "weights alone": weights_alone}


def using(network: str, num_chips: int, seed: int, num_weights: int = 0) -> jax_side.Arms:
    """Making a copy, and reading a suspect: the memory beyond what the process held before, in copies of the weights.

    Run one arm per process: compilation then counts, and no arm uses memory that another has freed.
    """
    rng = np.random.default_rng(seed)
    leaves = network_sizes.over_parametrised() if network == "over-parametrised" else _leaves(network, num_weights)
    base = {name: jnp.asarray(0.05 * rng.standard_normal(size, np.float32)) for name, size in leaves.items()}
    found = [(carriers.Leaf(name, base[name].shape), _scales(base[name].shape, rng)) for name in sorted(base)]
    shape = carriers.Shape(*zip(*found, strict=True))
    mark = carriers.mark(_secret(seed, "carrier"), base, num_chips, shape=shape)
    word = codes.codebook(_secret(seed, "code"), [1], num_chips)[0]
    suspect = {name: leaf * np.float32(1.001) for name, leaf in base.items()}
    jax.block_until_ready((suspect, mark))
    weights = sum(leaf.nbytes for leaf in base.values())
    return {
        "embed": lambda: _peak(lambda: embedding.embed(base, mark, word), weights),
        "extract": lambda: _peak(lambda: extraction.extract(suspect, base, mark), weights),
    }


def _leaves(network: str, num_weights: int) -> network_sizes.Shapes:
    if network in network_sizes.NAMED:
        return network_sizes.NAMED[network]()
    width = math.isqrt(num_weights // 8)
    return {f"layer_{i}": (width, width) for i in range(8)}


def _scales(size: tuple[int, ...], rng: np.random.Generator) -> carriers.Scales:
    """Scales by channel; by direction for a kernel with more than a hundred inputs for each direction."""
    wide = len(size) == 2 and size[0] > 100 * _DIRECTIONS
    basis = np.linalg.qr(rng.standard_normal((size[0], _DIRECTIONS), np.float32))[0] if wide else None
    inputs = (_DIRECTIONS,) if wide else size[:-1] or size
    outputs = size[-1:] if len(size) > 1 else ()
    rows = rng.uniform(1, 4, (*inputs, *[1] * len(outputs))).astype(np.float32)
    columns = rng.uniform(100, 400, (*[1] * len(inputs), *outputs)).astype(np.float32)
    return carriers.Scales(
        rows, columns, np.asarray(3, np.float32), np.asarray(1.5, np.float32), basis, tuple(range(len(size) - 1))
    )


def _peak(work: Callable[[], Any], weights: int) -> dict[str, Any]:
    """The peak of memory during the work, less what was held before, in copies of the weights."""
    with contextlib.suppress(OSError):  # where it is refused, the peak of the preparation counts too
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    before = worker.memory("VmRSS")
    jax.block_until_ready(work())
    after = worker.memory("VmHWM")
    return {"copies": None if before is None or after is None else 1e6 * (after - before) / weights}


CASES = {"making": making, "using": using}
