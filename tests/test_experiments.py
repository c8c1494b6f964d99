"""The experiments run at a tiny size, write what they promise, and resume."""

import dataclasses
import json

import pytest
import rich.console

pytest.importorskip("matplotlib")

from experiments.collusion import __main__ as collusion
from experiments.collusion import capability, code_table, null, roc

TINY = {
    "capability": capability.Config(((304, 20, 200),), ((304, 20, 1000),), (2,), joint_trials=2, single_trials=5),
    "null": null.Config(trials=3, control_trials=8),
    "codes": code_table.Config((3,), ("average",), trials=1, order=7, weights=1 << 12, designed_for=3),
    "roc": roc.Config(customers=20_000, num_chips=48),
}


def test_collusion_sections_run_and_resume(tmp_path):
    console = rich.console.Console(quiet=True)
    documents = {name: collusion.run_section(name, config, 0, tmp_path, console) for name, config in TINY.items()}
    for name, document in documents.items():
        path = tmp_path / f"{name}.json"
        assert json.loads(path.read_text()) == json.loads(json.dumps(document))
        assert {"config", "parameters", "seed", "device", "seconds", "result"} <= document.keys()
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
        written = path.stat().st_mtime_ns
        collusion.run_section(name, TINY[name], 0, tmp_path, console)
        assert path.stat().st_mtime_ns == written
    changed = dataclasses.replace(TINY["roc"], customers=10_000)
    again = collusion.run_section("roc", changed, 0, tmp_path, console)
    assert again["result"]["innocents_a_curve"] == 10_000

    ours = [row for row in documents["codes"]["result"]["rows"] if row["code"] == "ours, joint"]
    assert [row["caught_mean"] for row in ours] == [3]
    assert not any(row["innocents_mean"] for row in ours)
    controls = {row["decoder"]: row["rate"] for row in documents["null"]["result"]["controls"]}
    assert controls["support minus j"] > 0.3 > controls["leave one out"]
    assert documents["null"]["result"]["one_sided"]["missed_by_one_sided"] == 1
    assert all(row["largest_log10_excess"] < 0.3 for row in documents["roc"]["result"]["rows"])


def test_collusion_help_lists_examples(capsys):
    with pytest.raises(SystemExit):
        collusion.main(["--help"])
    assert "--only null roc" in capsys.readouterr().out
