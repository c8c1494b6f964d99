"""Mark, read and trace a model of real size, and print what it took. By default D = 25M weights and m = 65,536 chips.

    python -m experiments.large_model
    python -m experiments.large_model --weights 100000000 --chips 304 --out out/bench

The copy is made and read one at a time, as an owner would who streams copies to disk. Peak memory is that of the whole
process, interpreter and compiler included; the budget at the default size is 3 GB.
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from smark_jax import carriers, codes, embedding, extraction, keys, tracing


def synthetic_model(num_weights: int, seed: int) -> dict[str, jax.Array]:
    """Normal weights in layers of different spread, made leaf by leaf."""
    sizes = np.full(8, num_weights // 8)
    sizes[0] += num_weights - sizes.sum()
    layers = jax.random.split(jax.random.key(seed), 8)
    return {
        f"layer_{i}": 0.5**i * jax.random.normal(key, (size,))
        for i, (key, size) in enumerate(zip(layers, sizes, strict=True))
    }


def peak_gb() -> float:
    """Largest resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would begin at the size of whatever process started this one
        kilobytes = status.read_text().split("VmHWM:")[1].split()[0]
        return int(kilobytes) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def measure(num_weights: int, num_chips: int, customers: int, seed: int) -> dict[str, float | int | str]:
    seconds: dict[str, float] = {}

    def timed(name: str, function, *arguments):
        start = time.perf_counter()
        result = jax.block_until_ready(function(*arguments))
        seconds[name] = round(time.perf_counter() - start, 3)
        return result

    key = keys.derive(keys.from_bytes(seed.to_bytes(32, "big")), "large model")
    base = synthetic_model(num_weights, seed)
    spec = carriers.select(base)
    carrier = timed("draw carrier", carriers.draw, keys.derive(key, "carrier"), spec, num_chips)
    book = timed("draw codebook", codes.codebook, keys.derive(key, "code"), range(customers), num_chips)
    wrong = traced = 0
    for customer in range(customers):
        name = "first copy (with compilation)" if customer == 0 else "copy"
        copy = timed(f"embed {name}", embedding.embed, base, spec, carrier, book[customer])
        chips = timed(f"extract {name}", extraction.extract, copy, base, spec, carrier)
        del copy
        wrong += int(jnp.sum(jnp.sign(chips) != book[customer]))
        verdict = timed(f"trace {name}", tracing.trace, chips, book)
        traced += [a.serial for a in verdict.accused] == [customer]
    return {
        "weights": num_weights,
        "chips": num_chips,
        "customers": customers,
        "seed": seed,
        "wrong_chips": wrong,
        "traced": traced,
        "peak_gb": round(peak_gb(), 3),
        "device": str(jax.devices()[0].device_kind),
        **{f"{name} [s]": value for name, value in seconds.items()},
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=int, default=25_000_000)
    parser.add_argument("--chips", type=int, default=65_536)
    parser.add_argument("--customers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for large_model.json")
    options = parser.parse_args(arguments)
    result = measure(options.weights, options.chips, options.customers, options.seed)
    print(f"{options.weights:,} weights, {options.chips:,} chips, {options.customers} customers, {result['device']}")
    print(f"wrong chips   {result['wrong_chips']} of {options.customers * options.chips:,}")
    print(f"traced        {result['traced']} of {options.customers}")
    print(f"peak memory   {result['peak_gb']} GB")
    for name, value in result.items():
        if name.endswith("[s]"):
            print(f"{name:<42} {value:.3f}")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "large_model.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
