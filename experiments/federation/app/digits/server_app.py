"""The server: FedAvg, wrapped so that it sees only sums."""

import json
import time
from pathlib import Path

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg, Strategy

from digits import task
from smark_jax import federation, keys

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Masked training."""
    config = context.run_config
    inner = FedAvg(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=int(config["clients"]))
    secret = str(config["fingerprints"])
    strategy = federation.Masked(
        inner,
        metrics=("train-loss",),
        quorum=int(config["quorum"]) or None,
        run_config=config,
        fingerprints=federation.Fingerprints(keys.from_bytes(bytes.fromhex(secret))) if secret else None,
    )
    train(grid, context, strategy)


def train(grid: Grid, context: Context, strategy: Strategy) -> None:
    """Trains by a strategy, and writes a line for every round."""
    config, started = context.run_config, time.time()
    lines: list[dict] = []

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        accuracy = task.accuracy(arrays, config)
        lines.append({"round": server_round, "seconds": round(time.time() - started, 2), "accuracy": accuracy})
        if config["report"]:
            logs = [log._asdict() for log in getattr(strategy, "results", [])]
            Path(str(config["report"])).write_text(json.dumps({"rounds": lines, "logs": logs}, indent=2) + "\n")
        return MetricRecord({"accuracy": accuracy})

    strategy.start(
        grid,
        task.to_record(task.initial(config)),
        num_rounds=int(config["rounds"]),
        timeout=float(config["train-timeout"]),
        evaluate_fn=evaluate,
    )
