"""Trains on mnist_5k over several processes, one party per device, and prints the accuracy on held-out digits.

With --epsilon, differential privacy protects each example, and the guarantee is printed. This experiment derives all
keys from --seed: a real run must draw fresh ones (keys.new), or masks and noise protect nobody.
"""

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Sequence

import jax
import numpy as np
import optax
import rich.console
import rich.progress

from experiments.common import sections
from experiments.distributed import launch
from smark_jax import aggregation, data, keys, models, parallel, training

_EXAMPLES = """examples:
  python -m experiments.distributed --processes 4
  python -m experiments.distributed --processes 2 --engine shard_map --epochs 5
  python -m experiments.distributed --processes 4 --epsilon 8 --delta 1e-5
  python -m experiments.distributed --coordinator 10.0.0.1:1234 --processes 2 --process 0   # and --process 1 elsewhere
  python -m experiments.distributed --coordinator auto   # on each host of a TPU pod or Slurm job
"""
_CLIP = 1.0


def train(options: argparse.Namespace) -> float:
    num_parties, shown = jax.device_count(), jax.process_index() == 0
    console = rich.console.Console(quiet=not shown)
    digits, held_out = data.load("mnist_5k", "train"), data.load("mnist_5k", "test")
    images, labels = training.partition(digits.images, digits.labels, num_parties, options.seed)
    own = parallel.own_parties(num_parties)
    rows = slice(own.start, own.stop)
    master = keys.from_bytes(options.seed.to_bytes(32, "big"))
    secrets = [keys.derive(master, "party", str(party)) for party in range(num_parties)]
    pair_keys = aggregation.pair_keys(secrets)[rows]
    model = models.CNN()
    params = models.init(model, jax.random.key(options.seed), images.shape[2:])
    optimizer, examples = optax.adam(1e-3), labels.shape[1]
    rounds = training.num_batches(examples, options.batch_size, options.epochs)
    if options.epsilon is None:
        step = parallel.train_step(
            models.apply_fn(model), optimizer, aggregation.FixedPoint(_CLIP, num_parties), engine=options.engine
        )
        shuffle = 10_000 * options.seed + own.start
        batches = training.batches(images[rows], labels[rows], options.batch_size, options.epochs, shuffle)
    else:
        from smark_jax import privacy

        sampling = privacy.Sampling(num_parties, examples, options.batch_size / examples, rounds)
        guarantee = privacy.plan(sampling, options.epsilon, options.delta)
        noise = privacy.gaussian_noise(guarantee, _CLIP, params, keys.derive(master, "noise"))
        step = parallel.train_step(
            models.apply_fn(model),
            optax.chain(noise, optimizer),
            privacy.fixed_point(sampling, _CLIP),
            value_and_grad=privacy.value_and_clipped_grad(sampling, _CLIP),
            engine=options.engine,
        )
        batches = privacy.batches(sampling, images[rows], labels[rows], secrets[rows])
        console.print(str(guarantee))
    with rich.progress.Progress(console=console, disable=not shown) as progress:
        task = progress.add_task(f"{num_parties} parties in {jax.process_count()} processes", total=rounds)
        state = training.fit(step, step.init(params), batches, pair_keys, lambda s, i: progress.advance(task))
    logits = jax.jit(models.apply_fn(model))(state.params, held_out.images)
    accuracy = float((np.asarray(logits).argmax(axis=1) == held_out.labels).mean())
    console.print(f"accuracy {accuracy:.1%} on {len(held_out.labels):,} held-out digits after {rounds} rounds")
    return accuracy


def main(arguments: Sequence[str] | None = None) -> None:
    parser = sections.parser("distributed", __doc__, _EXAMPLES)
    parser.add_argument("--processes", type=sections.whole(1), default=2)
    parser.add_argument("--epochs", type=sections.whole(1), default=3)
    parser.add_argument("--batch-size", type=sections.whole(1), default=64, help="examples of one party in a round")
    parser.add_argument("--engine", choices=("pmap", "shard_map"), default="pmap")
    parser.add_argument(
        "--epsilon", type=sections.positive(), help="train with differential privacy (needs smark-jax[dp])"
    )
    parser.add_argument("--delta", type=sections.positive(below=1), default=1e-5)
    parser.add_argument(
        "--timeout", type=sections.positive(), default=1800, help="seconds until processes of this machine are ended"
    )
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="be one process of a group on several machines")
    parser.add_argument("--process", type=sections.whole(0), help="which of them, from 0")
    options = parser.parse_args(arguments)
    if options.coordinator not in (None, "auto") and options.process not in range(options.processes):
        parser.error("--process: with --coordinator HOST:PORT, say which process this is, from 0 to --processes - 1")
    if options.coordinator is None:
        given = list(sys.argv[1:] if arguments is None else arguments)
        group = ["--coordinator", f"127.0.0.1:{launch.free_port()}"]
        command = [sys.executable, "-m", "experiments.distributed", *given, *group, "--process"]
        # JAX's own handler makes workers ignore the signal, so a terminated launcher would leave them running.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        launch.run([[*command, str(i)] for i in range(options.processes)], options.timeout, show_first=True)
        return
    try:
        group = (options.coordinator, options.processes, options.process) if options.coordinator != "auto" else ()
        jax.distributed.initialize(*group, heartbeat_timeout_seconds=20)
        train(options)
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # an ordinary exit would wait minutes for the other processes


if __name__ == "__main__":
    main()
