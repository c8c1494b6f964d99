"""Time the core on this machine: keystream, carriers, embedding, extraction, tracing, and what masking adds to a step.

    python -m experiments.benchmarks.core
    python -m experiments.benchmarks.core --repeats 20 --out out/bench

Each figure is the median over the repeats after one warm-up (compilation is not counted), next to the time of one copy
of the same bytes on the same machine. Measure on a quiet machine; ratios travel better than seconds.
"""

import argparse
import json
import statistics as stats
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
import rich.progress
import rich.table

from smark_jax import aggregation, carriers, codes, embedding, extraction, keys, models, parallel, tracing

PARTIES = 4
KEY = keys.derive(keys.from_bytes(bytes(32)), "benchmark")


Row = dict[str, Any]


def median_ms(function: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Median and interquartile range in milliseconds, after one call to warm up."""
    jax.block_until_ready(function())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(1e3 * (time.perf_counter() - start))
    quarters = stats.quantiles(times, n=4)
    return stats.median(times), quarters[2] - quarters[0]


def weights_cases(num_weights: int, num_chips: int) -> tuple[tuple[str, Callable], list[tuple[str, Callable]]]:
    """Work on one vector of weights, against copying it once."""
    base = {"w": jax.random.normal(jax.random.key(0), (num_weights,))}
    spec = carriers.select(base)
    carrier = carriers.draw(KEY, spec, num_chips)
    word = codes.codebook(KEY, [0], num_chips)[0].astype(jnp.float32)
    vector = carriers.spread(word, carrier)
    copy = embedding.embed(base, spec, carrier, word)
    add = jax.jit(lambda v: v + 1)
    size = f"D = {num_weights:,}, m = {num_chips:,}"
    return (f"one copy of the weights, {size}", lambda: add(vector)), [
        (f"spread, {size}", lambda: carriers.spread(word, carrier)),
        (f"despread, {size}", lambda: carriers.despread(vector, carrier)),
        (f"embed, {size}", lambda: embedding.embed(base, spec, carrier, word)),
        (f"extract, {size}", lambda: extraction.extract(copy, base, spec, carrier)),
        (
            f"keystream, {num_weights:,} words",
            lambda: keys.keystream(KEY.to_words(), np.zeros(3, np.uint32), num_weights),
        ),
    ]


def tracing_cases(num_customers: int) -> tuple[tuple[str, Callable], list[tuple[str, Callable]]]:
    """A verdict from the key, against one from a codebook of a thousand."""
    book = codes.Codebook(KEY, num_customers)
    chips = np.asarray(codes.codebook(KEY, [7])[0], np.float64) + np.random.default_rng(0).normal(size=304)
    small = codes.Codebook(KEY, 1000)
    return ("verdict among 1,000", lambda: tracing.trace(chips, small).statistics), [
        (f"verdict among {num_customers:,}", lambda: tracing.trace(chips, book).statistics)
    ]


def training_cases() -> tuple[tuple[str, Callable], list[tuple[str, Callable]]]:
    """A round of the CNN with 4 parties: masked words, against a plain psum of floats."""
    network = models.CNN()
    apply_fn = models.apply_fn(network)
    params = models.init(network, jax.random.key(0), (28, 28, 1))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (PARTIES, 32, 28, 28, 1), dtype=np.uint8)
    labels = rng.integers(0, 10, (PARTIES, 32)).astype(np.int32)
    pair_keys = aggregation.pair_keys([keys.derive(KEY, str(party)) for party in range(PARTIES)])
    optimizer = optax.adam(1e-3)

    def plain_round(params, images, labels):
        gradient = jax.grad(lambda p: parallel.cross_entropy(apply_fn(p, images), labels))(params)
        return jax.lax.pmean(gradient, parallel.AXIS)

    devices = parallel.devices(PARTIES)
    plain = jax.pmap(plain_round, parallel.AXIS, in_axes=(None, 0, 0), out_axes=None, devices=devices)
    apply_plain = jax.jit(lambda p, s, g: optimizer.update(g, s, p))
    opt_state = optimizer.init(params)

    def plain_step():
        updates, _ = apply_plain(params, opt_state, jax.device_put(plain(params, images, labels), devices[0]))
        return optax.apply_updates(params, updates)

    masked = []
    for engine in ("pmap", "shard_map"):
        step = parallel.train_step(apply_fn, optimizer, aggregation.FixedPoint(1.0, PARTIES), engine=engine)
        state = step.init(params)
        call = lambda step=step, state=state: step.update(state, images, labels, pair_keys)[0].params  # noqa: E731
        masked.append((f"masked round, {PARTIES} parties, {engine}", call))
    return (f"plain psum round, {PARTIES} parties", plain_step), masked


def run(repeats: int, console: rich.console.Console) -> list[Row]:
    groups = [
        lambda: weights_cases(421_642, 304),
        lambda: weights_cases(11_000_000, 304),
        lambda: tracing_cases(1_000_000),
        training_cases,
    ]
    rows = []
    for group in rich.progress.track(groups, description="measuring", console=console):
        (base_name, base), cases = group()
        base_ms, base_spread = median_ms(base, repeats)
        rows.append(Row(name=base_name, median_ms=base_ms, spread_ms=base_spread, ratio=1.0))
        for name, function in cases:
            # The baseline is timed again next to each case, so that a drifting machine moves both.
            base_ms, _ = median_ms(base, repeats)
            median, spread = median_ms(function, repeats)
            rows.append(Row(name=name, median_ms=median, spread_ms=spread, ratio=median / base_ms))
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--out", type=Path, help="folder for core.json")
    options = parser.parse_args(arguments)
    jax.config.update("jax_num_cpu_devices", PARTIES)
    console = rich.console.Console()
    rows = run(options.repeats, console)
    table = rich.table.Table(title=f"median of {options.repeats} on {jax.devices()[0].device_kind}")
    for column in ("what", "ms", "spread (IQR)", "x the first of its group"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for row in rows:
        table.add_row(row["name"], f"{row['median_ms']:.2f}", f"{row['spread_ms']:.2f}", f"{row['ratio']:.2f}")
    console.print(table)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        result = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "rows": rows}
        (options.out / "core.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
