"""One process of tests/test_distributed.py: python distributed_worker.py PROCESSES INDEX PORT FOLDER CASE."""

import os
import sys
import traceback
from pathlib import Path

import numpy as np

PARTIES, ROUNDS, RATE, CLIP = 4, 6, 0.5, 0.7
COLLUDERS = (7, 90_000, 199_999)  # of three calls, so of two processes
ENGINES = ("pmap", "shard_map")


def problem() -> tuple[dict, np.ndarray, np.ndarray, np.ndarray]:
    """Params, images [P B 6], labels [P B], pair keys [P P 8], the same in every process."""
    from smark_jax import aggregation, keys

    rng = np.random.default_rng(1)
    params = {"b": np.zeros(3, np.float32), "w": np.float32(rng.normal(size=(6, 3)))}
    images = np.float32(rng.normal(size=(PARTIES, 10, 6)))
    labels = rng.integers(0, 3, (PARTIES, 10)).astype(np.int32)
    secrets = [keys.derive(keys.from_bytes(bytes(32)), "party", str(party)) for party in range(PARTIES)]
    return params, images, labels, aggregation.pair_keys(secrets)


def apply_linear(params, x):
    return x @ params["w"] + params["b"][None]


def make_step(engine: str, num_parties: int = PARTIES):
    import optax

    from smark_jax import aggregation, parallel

    fixed_point = aggregation.FixedPoint(CLIP, num_parties)
    return parallel.train_step(apply_linear, optax.sgd(RATE), fixed_point, engine=engine)


def train(engine: str, rounds: int = ROUNDS) -> dict[str, np.ndarray]:
    """The final params and every round's info, from this process's rows."""
    from smark_jax import parallel, training

    params, images, labels, pair_keys = problem()
    own = parallel.own_parties(PARTIES)
    step, infos = make_step(engine), []
    batches = [(images[own.start : own.stop], labels[own.start : own.stop])] * rounds
    state = training.fit(
        step, step.init(params), batches, pair_keys[own.start : own.stop], lambda state, info: infos.append(info)
    )
    assert int(state.round) == rounds
    return {
        **{name: np.asarray(leaf) for name, leaf in state.params.items()},
        "loss": np.array([info.loss for info in infos]),
        "diverged": np.array([info.diverged for info in infos]),
    }


def traced(collective: bool, customers: int = 200_000) -> dict[str, np.ndarray]:
    """What a verdict on three colluders says, with every statistic and without."""
    from smark_jax import codes, keys, tracing

    book = codes.Codebook(keys.derive(keys.from_bytes(bytes(32)), "code"), customers)
    words = np.asarray(codes.codebook(book.key, COLLUDERS, book.num_chips), np.float64)
    y = words.mean(axis=0) + 0.3 * np.random.default_rng(2).normal(size=book.num_chips)
    scored: list[int] = []
    options = {"collective": collective, "on_progress": lambda done, total: scored.append(done)}
    kept = tracing.trace(y, book, **options)
    progress = np.array(scored)
    alone = tracing.trace(y, book, decoder="single", keep_statistics=False, collective=collective)
    fields = ("serial", "statistic", "log10_p", "share")
    return {
        "statistics": kept.statistics,
        "progress": progress,
        **{name: np.array([getattr(accused, name) for accused in kept.accused]) for name in fields},
        "single": np.array([accused.log10_p for accused in alone.accused]),
    }


def refusals(index: int) -> dict[str, str]:
    """What is refused; each message must come in every process alike, or the others would wait for it."""
    from smark_jax import codes, keys, parallel, tracing

    params, images, labels, pair_keys = problem()
    own = parallel.own_parties(PARTIES)
    step = make_step("pmap")
    book, decoders = codes.Codebook(keys.from_bytes(bytes(32)), 10), ("joint", "single")
    state = step.init(params)
    crooked = pair_keys.copy()
    crooked[own[0], own[-1]] += 1
    rows = slice(own.start, own.stop)
    tries = {
        "other params": lambda: step.init({**params, "b": params["b"] + (index == 1)}),
        "all rows": lambda: step.update(state, images, labels, pair_keys),
        "idle process": lambda: make_step("pmap", num_parties=1),
        "too many parties": lambda: make_step("pmap", num_parties=5),
        "other chips": lambda: tracing.trace(np.where(np.arange(304) == index, -1.0, 1.0), book, collective=True),
        "other levels": lambda: tracing.trace(np.ones(304), book, 0.1 + 0.1 * index, collective=True),
        "other decoders": lambda: tracing.trace(np.ones(304), book, decoder=decoders[index > 0], collective=True),
    }
    if len(own) > 1:
        tries["crooked keys"] = lambda: step.update(state, images[rows], labels[rows], crooked[rows])
    messages = {}
    for name, attempt in tries.items():
        try:
            attempt()
        except ValueError as error:
            messages[name] = str(error)
    return messages


def main() -> None:
    processes, index, port = map(int, sys.argv[1:4])
    folder, case = Path(sys.argv[4]), sys.argv[5]
    import jax

    jax.config.update("jax_num_cpu_devices", PARTIES // processes)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    limits = {"initialization_timeout": 5 if case == "missing" else 60, "heartbeat_timeout_seconds": 10}
    jax.distributed.initialize(f"127.0.0.1:{port}", processes, index, **limits)
    if case == "dies" and index == 1:
        os._exit(9)
    if case == "raises" and index == 1:
        raise RuntimeError("the data of this process are missing")
    for engine in ENGINES:
        np.savez(folder / f"{engine}{index}.npz", **train(engine))
    np.savez(folder / f"refusals{index}.npz", **refusals(index))
    np.savez(folder / f"traced{index}.npz", **traced(collective=True))


if __name__ == "__main__":
    try:
        main()
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # an ordinary exit would wait minutes for the other processes
