"""``smark bench``: times marking, reading and tracing on this machine."""

import time
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import typer

from smark_jax.cli import _common
from smark_jax.cli._common import AsJson

_REPEATS = 5


class Times(NamedTuple):
    """How long each step takes, in milliseconds, at these sizes and on this device."""

    weights: int
    chips: int
    customers: int
    device: str
    milliseconds: dict[str, float]


def bench(
    weights: Annotated[int, typer.Option(min=2048, max=2**31 - 1, help="Weights of the model.")] = 1_000_000,
    chips: Annotated[int, typer.Option(min=1, max=2**20, help="Bits of a fingerprint.")] = 304,
    customers: Annotated[int, typer.Option(min=2, max=2**31, help="Customers to compare with.")] = 100_000,
    as_json: AsJson = False,
) -> None:
    """Time marking, reading and tracing on this machine: medians of five runs, without compilation."""
    with _common.err.status("starting") as status:
        found = _measure(weights, chips, customers, status.update)

    def words() -> None:
        rows = [(name, f"{milliseconds:.1f}") for name, milliseconds in found.milliseconds.items()]
        _common.out.table(("step", "milliseconds"), rows, keep=("milliseconds", "step"), figures=("milliseconds",))
        _common.say(f"{weights:,} weights, {chips} chips, {customers:,} customers, on {found.device}.")

    _common.show(found, as_json, words)


def _measure(weights: int, chips: int, customers: int, tell: Callable[[str], Any]) -> Times:
    import jax
    import numpy as np

    from smark_jax import carriers, codes, embedding, extraction, keys, parallel, tracing

    key = keys.derive(keys.from_bytes(bytes(32)), "benchmark")
    base = {"kernel": jax.random.normal(jax.random.key(0), (weights,))}
    tell("drawing the carrier")
    mark = carriers.mark(key, base, chips)
    word = codes.codebook(key, [1], chips)[0]
    copy = embedding.embed(base, mark, word)
    soft = np.asarray(extraction.extract(copy, base, mark))
    book = codes.Codebook(key, customers, chips)
    cases: dict[str, Callable[[], Any]] = {
        "draw the carrier": lambda: carriers.draw(key, mark.spec, chips).positions,
        "mark one copy": lambda: embedding.embed(base, mark, word),
        "read one suspect": lambda: extraction.extract(copy, base, mark),
        "trace one suspect": lambda: tracing.trace(soft, book).statistics,
    }
    found = {}
    for name, run in cases.items():
        tell(name)
        run()
        times = []
        for _ in range(_REPEATS):
            began = time.perf_counter()
            jax.block_until_ready(run())
            times.append(1e3 * (time.perf_counter() - began))
        found[name] = round(float(np.median(times)), 2)
    return Times(weights, chips, customers, str(parallel.devices(1)[0].device_kind), found)
