"""The package as a whole: docstrings' examples run, annotations hold, memory stays in bounds."""

import doctest
import importlib
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import smark_jax
from experiments.benchmarks import race
from experiments.common import comparators

ROOT = Path(__file__).parent.parent
MODULES = [
    name
    for package in (smark_jax, comparators)
    for _, name, _ in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
]


def run(code: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    failures, _ = doctest.testmod(importlib.import_module(name))
    assert failures == 0


def test_every_public_module_is_reachable_and_unknown_names_say_what_there_is():
    for name in smark_jax.__all__:
        assert getattr(smark_jax, name).__doc__
    with pytest.raises(AttributeError, match="its modules are aggregation"):
        smark_jax.encryption  # noqa: B018


def test_annotations_hold_on_the_way_from_key_to_verdict():
    """Beartype checks every call of a whole run, shapes included, in a process of its own."""
    code = """
import jax
jax.config.update("jax_num_cpu_devices", 2)
from jaxtyping import install_import_hook
install_import_hook("smark_jax", "beartype.beartype")
import jax.numpy as jnp, numpy as np, optax
from smark_jax import (aggregation, attacks, carriers, codes, embedding, extraction, keys, losses, parallel,
                       statistics, tracing, training)
key = keys.from_bytes(bytes(32))
base = {"w": jnp.sin(jnp.arange(6000.0)).reshape(60, 100), "b": jnp.cos(jnp.arange(100.0))}
mark = carriers.mark(keys.derive(key, "carrier"), base)
book = codes.codebook(keys.derive(key, "code"), [3, 1, 4])
copies = embedding.embed_batch(base, mark, book)
chips = extraction.extract_batch(copies, base, mark)
assert [a.serial for a in tracing.trace(chips[1], book).accused] == [1]
streamed = codes.Codebook(keys.derive(key, "code"), 10)
assert [a.serial for a in tracing.trace(np.asarray(chips[1]), streamed).accused] == [1]
optimizer = optax.chain(embedding.add_fingerprint_gradient(losses.code_mse, mark, book[0]), optax.adam(1e-3))
updates, state = optimizer.update(jax.tree.map(jnp.zeros_like, base), optimizer.init(base), base)
apply_fn = lambda p, x: x @ p["w"] + p["b"][None]
x, y = np.ones((8, 60), np.float32), np.arange(8)
pairs = aggregation.pair_keys([keys.derive(key, str(i)) for i in range(2)])
for engine in ("pmap", "shard_map"):
    step = parallel.train_step(apply_fn, optax.sgd(0.1), aggregation.FixedPoint(1.0, 2), engine=engine)
    training.fit(step, step.init(base), training.batches(*training.partition(x, y, 2, 0), 2, 1, 0), pairs)
attacks.quantise(attacks.prune(attacks.fine_tune(base, apply_fn, x, y, batch_size=4), 0.5), 4)
print("sound")
"""
    assert run(code).strip() == "sound"


def test_memory_stays_far_below_a_dense_carrier(tmp_path):
    """4M weights, 8,192 chips: a dense carrier would take 131 GB; experiments/benchmarks has D = 25M, m = 65,536."""
    params = {"name": "layers", "dtype": "float32", "num_weights": 4_000_000, "num_chips": 8192, "seed": 0}
    worker = race.Worker(race.Entry("jax", "model", {**params, "folder": str(tmp_path)}), race.Setting(2, False, False))
    try:
        laps = [{arm: worker.lap(arm) for arm in ("embed", "issue", "extract", "trace")} for _ in range(3)]
    finally:
        worker.close()
    assert [lap["extract"]["facts"]["wrong_chips"] for lap in laps] == [0, 0, 0]
    assert all(lap["trace"]["facts"]["right"] for lap in laps)
    assert all(lap["issue"]["facts"]["bytes"] > 16_000_000 for lap in laps)
    assert 100 < laps[-1]["trace"]["peak"] < 1500
