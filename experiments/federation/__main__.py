"""Masked training over Flower, measured.

killed        SuperLink and SuperNodes as processes on loopback (TLS, authenticated nodes); a client's process is
              killed in the middle of several rounds, and training goes on
timing        seconds per round: masked, plain FedAvg, and Flower's SecAgg+, on the same processes and the same
              million weights
participants  ten participants in one process, with a separate fingerprint in each copy of the global model: leaks from
              several rounds are traced, and the global model stays unmarked
simulation    the same app in Flower's own simulation (needs ray)
"""

import argparse
import contextlib
import itertools
import json
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import rich.console
import rich.table

from experiments.common import sections
from experiments.federation import participants, processes

_EXAMPLES = """examples:
  python -m experiments.federation participants
  python -m experiments.federation killed --rounds 10
  python -m experiments.federation timing --rounds 5 --out out/federation
"""
_HIDDEN_OF_A_MILLION = 312


def _rounds(report: Path) -> dict[str, Any]:
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        return json.loads(report.read_text())
    return {"rounds": [], "logs": []}


def _follow(report: Path, rounds: int, console: rich.console.Console, limit_seconds: float) -> Iterator[int]:
    """Yields each second the number of finished rounds, until there are enough.

    Raises:
      RuntimeError: when the run takes longer than the limit.
    """
    end, shown = time.monotonic() + limit_seconds, -1
    while time.monotonic() < end:
        lines = _rounds(report)["rounds"]
        if len(lines) - 1 > shown:
            shown = len(lines) - 1
            last = lines[-1]
            console.print(
                f"round {last['round']} of {rounds}: accuracy {last['accuracy']:.3f}, {last['seconds']:.0f} s"
            )
        yield max(0, shown)
        if shown >= rounds:
            return
        time.sleep(1)
    raise RuntimeError(f"The run did not end in {limit_seconds:.0f} seconds; see the logs beside {report}")


def killed(options: argparse.Namespace, console: rich.console.Console) -> dict[str, Any]:
    """Kills a client in rounds 2, 4 and 6 while its ClientApp runs, and starts it again when the round is over."""
    folder = Path(tempfile.mkdtemp(prefix="smark-federation-"))
    report, plan, victims, down = folder / "masked.json", {2: 1, 4: 3, 6: 0}, [], {}
    with processes.start(folder, options.clients) as federation:
        console.print(f"{options.clients} SuperNodes are up; logs in {folder}")
        processes.submit(
            federation,
            aggregation="masked",
            rounds=options.rounds,
            report=str(report),
            seed=options.seed,
            clients=options.clients,
            quorum=max(3, options.clients - 2),
            train_timeout=options.timeout,
        )
        for finished in _follow(report, options.rounds, console, 240.0 * options.rounds):
            for client in [client for client, round_ in down.items() if round_ <= finished]:
                federation.nodes[client] = federation.launch(client)
                del down[client]
            victim = plan.get(finished + 1)
            if victim is not None and processes.training(federation.nodes[victim]):
                time.sleep(1)  # until it is at work
                processes.kill(federation.nodes[victim])
                down[victim] = finished + 1
                victims.append({"round": finished + 1, "client": victim})
                console.print(f"killed client {victim} in round {finished + 1}")
                del plan[finished + 1]
    result = {**_rounds(report), "killed": victims}
    table = rich.table.Table("round", "updates in the sum", "examples", "seconds", title="Rounds", title_justify="left")
    for log in result["logs"]:
        table.add_row(str(log["round"]), str(len(log["nodes"])), str(log["examples"]), f"{log['seconds']:.1f}")
    console.print(table)
    console.print(f"final accuracy {result['rounds'][-1]['accuracy']:.3f}; a client killed in {len(victims)} rounds")
    return result


def timing(options: argparse.Namespace, console: rich.console.Console) -> dict[str, Any]:
    """Masked, plain and SecAgg+ runs in turn over the same processes; the first round of each is left out."""
    folder = Path(tempfile.mkdtemp(prefix="smark-federation-"))
    seconds: dict[str, list[float]] = {kind: [] for kind in processes.APPS}
    with processes.start(folder, options.clients) as federation:
        for turn in range(options.turns):
            for kind in seconds:
                report = folder / f"{kind}{turn}.json"
                processes.submit(
                    federation,
                    aggregation=kind,
                    rounds=options.rounds,
                    report=str(report),
                    seed=options.seed,
                    clients=options.clients,
                    hidden=_HIDDEN_OF_A_MILLION,
                )
                list(_follow(report, options.rounds, console, 240.0 * options.rounds))
                ends = [line["seconds"] for line in _rounds(report)["rounds"]]
                seconds[kind] += [after - before for before, after in itertools.pairwise(ends[1:])]
                time.sleep(5)
    medians = {kind: statistics.median(values) for kind, values in seconds.items()}
    ratios = {kind: value / medians["plain"] for kind, value in medians.items()}
    table = rich.table.Table(
        "aggregation", "median seconds a round", "against plain", title="Rounds of a million weights"
    )
    for kind, value in medians.items():
        table.add_row(kind, f"{value:.1f}", f"{ratios[kind]:.2f}")
    console.print(table)
    return {"seconds": seconds, "medians": medians, "ratios": ratios}


def _simulation(options: argparse.Namespace, console: rich.console.Console) -> dict[str, Any]:
    from experiments.federation import simulation  # only this import needs ray

    return simulation.run(options, console)


_COMMANDS: dict[str, Callable[[argparse.Namespace, rich.console.Console], dict[str, Any]]] = {
    "killed": killed,
    "timing": timing,
    "participants": participants.run,
    "simulation": _simulation,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = sections.parser("federation", __doc__, _EXAMPLES)
    parser.add_argument("what", choices=tuple(_COMMANDS))
    parser.add_argument("--rounds", type=sections.whole(1), default=10)
    parser.add_argument("--clients", type=sections.whole(3), default=5, help="of killed, timing and simulation")
    parser.add_argument("--turns", type=sections.whole(1), default=2, help="of timing: how often the three take turns")
    parser.add_argument(
        "--timeout", type=sections.positive(), default=60.0, help="seconds after which a client has dropped out"
    )
    parser.add_argument("--out", type=sections.folder, default=Path("out/federation"), help="folder for results")
    options = parser.parse_args(arguments)
    if options.what == "killed" and options.clients < 4:
        parser.error("--clients: killed stops clients 0, 1 and 3, so it needs 4 or more")
    if options.what == "timing" and options.rounds < 2:
        parser.error("--rounds: timing leaves the first round out, so it needs 2 or more")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes are stopped too
    console = rich.console.Console()
    result = _COMMANDS[options.what](options, console)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{options.what}.json"
    path.write_text(json.dumps({"seed": options.seed, "rounds": options.rounds, "result": result}, indent=2) + "\n")
    console.print(f"Results in {path}")


if __name__ == "__main__":
    main()
