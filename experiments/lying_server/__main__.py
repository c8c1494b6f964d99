"""Lying servers against honest participants of Flower's own classes: no server may open an update or hang anybody.

Each server follows one of the planned lies, and most of them also alter, drop or repeat messages at random. A judge
who sees all answers and knows the true updates tries every combination in which masks cancel. A breach is a bare sum of
fewer than three participants, a bare sum that equals one participant's update, a participant that raises anything but
SmarkError (which includes ProtocolError) or computes for more than ten seconds on one message, or a round that takes
longer than a minute.

Three controls show that the judge detects breaches: the same servers against participants whose operators agreed to
anything, against masks that are not bound to what participants are told, and against participants that keep no ledger.
The result is servers.json in the output folder. The exit code is 1 if the default policy was broken, or if a control
was not.
"""

import collections
import contextlib
import json
import logging
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import rich.console
import rich.progress

from experiments.common import sections
from experiments.lying_server import judge
from experiments.lying_server.parties import Parties
from experiments.lying_server.server import PLANS, LyingServer, Plan
from smark_jax.errors import SmarkError
from smark_jax.federation import ledger, task

LEAST = 3
"""The default policy's fewest parties in a sum."""
_SERVERS = {"quick": 60, "full": 1_000}
_MOST_SECONDS = 10.0
_EXAMPLES = """examples:
  python -m experiments.lying_server
  python -m experiments.lying_server --config full --out experiments/lying_server/results
"""


def plan_of(seed: int, number: int) -> Plan:
    """What the server of this number does: the plans by turns, half of them without other lies."""
    rng = np.random.default_rng([seed, number, 0])
    return Plan(PLANS[number % len(PLANS)], float(rng.choice([0.0, 0.0, 0.05, 0.2])), bool(rng.random() < 0.2))


def trial(parties: Parties, seed: int, number: int, least: int = LEAST) -> dict[str, Any]:
    """One lying server; what it opened, and what went wrong."""
    plan = plan_of(seed, number)
    parties.begin(number)
    server = LyingServer(parties, plan, np.random.default_rng([seed, number, 2]))
    try:
        with _alarm(6 * _MOST_SECONDS):
            heard = server.play()
    except TimeoutError:
        return {"number": number, "plan": plan._asdict(), "breach": "hung", "sums": 0, "errors": {}, "slowest": 60.0}
    found = judge.opened(heard)
    wrong = judge.breach(found, least)
    errors = collections.Counter(type(a.error).__name__ for a in server.answers if a.error is not None)
    slowest = max((answer.seconds for answer in server.answers), default=0.0)
    strange = [a.error for a in server.answers if a.error is not None and not isinstance(a.error, SmarkError)]
    if strange:
        wrong = f"raised {type(strange[0]).__name__}: {strange[0]}"
    elif slowest > _MOST_SECONDS:
        wrong = f"computed for {slowest:.0f} seconds"
    return {
        "number": number,
        "plan": plan._asdict(),
        "breach": wrong,
        "sums": sum(len(one.parties) >= least for one in found),
        "errors": dict(errors),
        "slowest": slowest,
    }


@contextlib.contextmanager
def control(name: str) -> Iterator[dict[str, Any]]:
    """Takes one protection away; yields the options that operators agreed to."""
    with contextlib.ExitStack() as stack:
        agreed: dict[str, Any] = {}
        if name == "no policy":
            agreed = {"smark-least-parties": 1, "smark-least-share": 0.0, "smark-bind-model": False}
            agreed |= {"smark-corruption-rate": 0.0, "smark-roster": None}
        elif name == "nothing bound":
            stack.enter_context(mock.patch.object(task, "digest", lambda *_, **__: bytes(32)))
            stack.enter_context(mock.patch.object(task.Limits, "check", lambda *_: None))
        elif name == "no ledger":
            stack.enter_context(mock.patch.object(ledger, "claim", lambda *_: None))
        yield agreed


def run(servers: int, seed: int, name: str, console: rich.console.Console) -> dict[str, Any]:
    """All servers against one kind of participants."""
    began = time.perf_counter()
    rows = []
    with tempfile.TemporaryDirectory(prefix="smark-lying-") as folder, control(name) as agreed:
        parties = Parties(Path(folder), agreed)
        for number in rich.progress.track(range(servers), name, console=console):
            rows.append(trial(parties, seed, number))
    errors: collections.Counter[str] = collections.Counter()
    for row in rows:
        errors.update(row["errors"])
    broken = [row for row in rows if row["breach"]]
    return {
        "servers": servers,
        "broken": len(broken),
        "broken_by_plan": dict(sorted(collections.Counter(row["plan"]["name"] for row in broken).items())),
        "opened_a_sum_of_three_or_more": sum(row["sums"] > 0 for row in rows),
        "refusals": dict(sorted(errors.items())),
        "slowest_answer_seconds": round(max(row["slowest"] for row in rows), 3),
        "seconds": round(time.perf_counter() - began, 1),
        "first_breaches": [{"number": row["number"], "breach": row["breach"]} for row in broken[:3]],
    }


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = sections.sized("lying_server", __doc__, _EXAMPLES, "60 servers; full: 1,000")
    options = parser.parse_args(arguments)
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    console = rich.console.Console()
    servers = _SERVERS[options.config]
    result: dict[str, Any] = {"seed": options.seed, "default policy": run(servers, options.seed, "default", console)}
    for name in ("no policy", "nothing bound", "no ledger"):
        result[f"control: {name}"] = run(min(servers, 150), options.seed, name, console)
    out = options.out or Path("out") / "lying_server" / options.config
    out.mkdir(parents=True, exist_ok=True)
    (out / "servers.json").write_text(json.dumps(result, indent=2) + "\n")
    for name, row in result.items():
        if name != "seed":
            console.print(
                f"{name}: {row['broken']} of {row['servers']} servers broke it {row['broken_by_plan']}; "
                f"{row['opened_a_sum_of_three_or_more']} opened a sum of three or more; {row['seconds']} s",
                markup=False,
            )
    console.print(f"Results in {out / 'servers.json'}")
    controls = [row["broken"] for name, row in result.items() if name.startswith("control")]
    return int(result["default policy"]["broken"] > 0 or min(controls) == 0)


if __name__ == "__main__":
    sys.exit(main())
