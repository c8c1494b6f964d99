"""The same app in Flower's own simulation: clients are Ray actors in processes of this machine."""

import argparse
import logging
from typing import Any

import rich.console
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from experiments.federation.local import client_app, task  # pyright: ignore[reportAttributeAccessIssue]
from smark_jax import federation


def run(options: argparse.Namespace, console: rich.console.Console) -> dict[str, Any]:
    logging.getLogger("flwr").setLevel(logging.WARNING)
    config = {"clients": options.clients, "epochs": 2, "learning-rate": 1e-3, "hidden": 128, "seed": options.seed}
    app = client_app(config)
    server, rounds = ServerApp(), []

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        everyone = {"min_train_nodes": options.clients, "min_available_nodes": options.clients}
        strategy = federation.Masked(FedAvg(fraction_evaluate=0.0, **everyone))

        def evaluate(round_: int, arrays: ArrayRecord) -> MetricRecord:
            accuracy = task.accuracy(arrays, config)
            updates = len(strategy.results[-1].nodes) if round_ else 0
            rounds.append({"round": round_, "accuracy": accuracy, "updates": updates})
            console.print(f"round {round_} of {options.rounds}: accuracy {accuracy:.3f}, {updates} updates in the sum")
            return MetricRecord({"accuracy": accuracy})

        strategy.start(
            grid,
            task.to_record(task.initial(config)),
            num_rounds=options.rounds,
            timeout=options.timeout,
            evaluate_fn=evaluate,
        )

    run_simulation(server, app, options.clients, backend_config={"client_resources": {"num_cpus": 1}})
    return {"rounds": rounds}
