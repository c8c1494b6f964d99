"""The server: FedAvg, wrapped so that it sees nothing but sums."""

import json
import time
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from digits import task
from smark_jax import federation, keys

app = ServerApp()


class Plain(FedAvg):
    """FedAvg that asks for bare updates."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        drafts = super().configure_train(server_round, arrays, config, grid)
        return [Message(d.content, dst_node_id=d.metadata.dst_node_id, message_type="train.plain") for d in drafts]


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Trains, and writes a line for every round."""
    config = context.run_config
    clients = int(config["clients"])
    common = {"fraction_evaluate": 0.0, "min_train_nodes": 1, "min_available_nodes": clients}
    if config["aggregation"] == "masked":
        secret = str(config["fingerprints"])
        marks = federation.Fingerprints(keys.from_bytes(bytes.fromhex(secret))) if secret else None
        strategy = federation.Masked(
            FedAvg(**common), metrics=("train-loss",), quorum=int(config["quorum"]) or None, fingerprints=marks
        )
    else:
        strategy = Plain(**common)
    started = time.time()
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
