"""The server of Flower's SecAgg+ workflow: all clients are neighbours, as in the masked app."""

import json
import time
from pathlib import Path

import numpy as np
from flwr.app import Context
from flwr.common import ndarrays_to_parameters
from flwr.server import LegacyContext, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
from flwr.serverapp import Grid, ServerApp

from experiments.federation.app.digits import task

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Trains, and writes a line for every round."""
    settings, started, lines = context.run_config, time.time(), []
    like = task.to_record(task.initial(settings))

    def evaluate(round_: int, parameters: list[np.ndarray], config: dict) -> tuple[float, dict]:
        accuracy = task.accuracy(task.named(parameters, like), settings)
        lines.append({"round": round_, "seconds": round(time.time() - started, 2), "accuracy": accuracy})
        Path(str(settings["report"])).write_text(json.dumps({"rounds": lines, "logs": []}, indent=2) + "\n")
        return 1 - accuracy, {"accuracy": accuracy}

    strategy = FedAvg(
        fraction_evaluate=0.0,
        min_fit_clients=int(settings["clients"]),
        min_available_clients=int(settings["clients"]),
        initial_parameters=ndarrays_to_parameters(like.to_numpy_ndarrays()),
        evaluate_fn=evaluate,
        on_fit_config_fn=lambda round_: {"round": round_},
    )
    legacy = LegacyContext(context, ServerConfig(num_rounds=int(settings["rounds"])), strategy)
    secagg = SecAggPlusWorkflow(num_shares=1.0, reconstruction_threshold=int(settings["quorum"]))
    DefaultWorkflow(fit_workflow=secagg)(grid, legacy)
