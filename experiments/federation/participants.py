"""Participants as suspects: every copy of the global model carries its participant's fingerprint."""

import argparse
import logging
from typing import Any

import numpy as np
import rich.console
import rich.table
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import FedAvg

from experiments.federation.local import LocalGrid, client_app, task  # pyright: ignore[reportAttributeAccessIssue]
from smark_jax import codes, extraction, federation, keys, tracing
from smark_jax.federation import wire

PARTICIPANTS = 10
_REGISTRY = 1000  # participants who might be accused, in this run or another
_ALPHA = 1e-6


def run(options: argparse.Namespace, console: rich.console.Console) -> dict[str, Any]:
    logging.getLogger("flwr").setLevel(logging.WARNING)
    key = keys.derive(keys.from_bytes(options.seed.to_bytes(32, "big")), "participants")
    config = {"clients": PARTICIPANTS, "epochs": 2, "learning-rate": 1e-3, "hidden": 128, "seed": options.seed}
    marks = federation.Fingerprints(key)
    marked, grid, strategy = _train(config, options.rounds, marks, console)
    plain, _, _ = _train(config, options.rounds, None, console)

    book = codes.Codebook(keys.derive(key, "code"), _REGISTRY, marks.num_chips)

    def verdict(leak: dict[str, np.ndarray], base: ArrayRecord) -> tracing.Verdict:
        mark = federation.participant_mark(_tree(base), marks)  # a new mark for each round's model
        return tracing.trace(extraction.extract(leak, _tree(base), mark), book, _ALPHA)

    serials = {node: strategy.serial(node) for node in grid.get_node_ids()}
    rows, coalitions = [], []
    for round_ in sorted({1, min(5, options.rounds), options.rounds}):
        base = marked[round_ - 1]
        sent = [m for m in grid.sent if "arrays" in m.content]
        asked = [(m, request) for m in sent for request in wire.take(m.content).requests or ()]
        given = {
            m.metadata.dst_node_id: _tree(m.content.array_records["arrays"])
            for m, (number, _) in asked
            if number == round_
        }
        found = {node: verdict(copy, base) for node, copy in given.items()}
        right = [v for n, v in found.items() if [a.serial for a in v.accused] == [serials[n]]]
        worst = max((v.accused[0].p_value for v in right), default=1.0)
        rows.append({"round": round_, "copies": len(found), "traced": len(right), "largest_p": worst})
        three = list(given)[:3]
        mixed = {name: np.mean([given[n][name] for n in three], axis=0) for name in given[three[0]]}
        accused = {a.serial for a in verdict(mixed, base).accused}
        coalitions.append(
            {
                "round": round_,
                "caught": len(accused & {serials[n] for n in three}),
                "innocent": len(accused - {serials[n] for n in three}),
            }
        )
    statistics = []
    for base in (marked[0], marked[-2]):  # relative to the start, and to the previous round
        found = verdict(_tree(marked[-1]), base)
        own = np.abs(found.statistics[list(serials.values())])
        statistics.append({"largest": float(own.max()), "threshold": float(found.threshold)})
    accuracy = {"with": task.accuracy(marked[-1], config), "without": task.accuracy(plain[-1], config)}

    result = {"leaks": rows, "coalitions": coalitions, "global": statistics, "accuracy": accuracy}
    _show(console, result)
    return result


def _show(console: rich.console.Console, result: dict[str, Any]) -> None:
    table = rich.table.Table(
        "leaked in round",
        "traced",
        "largest p",
        "three who average",
        title_justify="left",
        title="Leaks of participants' copies",
    )
    for row, mix in zip(result["leaks"], result["coalitions"], strict=True):
        table.add_row(
            str(row["round"]),
            f"{row['traced']} of {row['copies']}",
            f"{row['largest_p']:.1e}",
            f"{mix['caught']} of 3, innocent {mix['innocent']}",
        )
    console.print(table)
    for name, row in zip(("start", "round before"), result["global"], strict=True):
        console.print(
            f"global model against the {name}: largest participant's |T| {row['largest']:.2f}, "
            f"threshold {row['threshold']:.2f}"
        )
    accuracy = result["accuracy"]
    console.print(f"accuracy {accuracy['with']:.4f} with fingerprints, {accuracy['without']:.4f} without")


def _train(
    config: dict[str, Any], rounds: int, marks: federation.Fingerprints | None, console: rich.console.Console
) -> tuple[list[ArrayRecord], LocalGrid, federation.Masked]:
    """The global model before and after every round, and what was sent."""
    app = client_app(config)
    models: list[ArrayRecord] = []

    def keep(round_: int, arrays: ArrayRecord) -> None:
        models.append(arrays)
        console.print(f"round {round_} of {rounds}: accuracy {task.accuracy(arrays, config):.4f}")

    agreed = {"smark-bind-model": marks is None}
    grid = LocalGrid(app, {100 + p: {"partition-id": p, **agreed} for p in range(PARTICIPANTS)})
    inner = FedAvg(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
    strategy = federation.Masked(inner, fingerprints=marks)
    strategy.start(grid, task.to_record(task.initial(config)), num_rounds=rounds, timeout=5, evaluate_fn=keep)
    return models, grid, strategy


def _tree(arrays: ArrayRecord) -> dict[str, np.ndarray]:
    return {name: arrays[name].numpy() for name in sorted(arrays)}
