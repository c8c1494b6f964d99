"""The experiments run at a tiny size, write what they promise, and resume."""

import dataclasses

import pytest

pytest.importorskip("matplotlib")

import section_checks

from experiments.collusion import __main__ as collusion
from experiments.collusion import capability, codes, null, readings, roc
from experiments.common import sections
from smark_jax import errors

TINY = {
    capability: capability.Config(((304, 20, 200),), ((304, 20, 1000),), (2,), joint_trials=2, single_trials=5),
    null: null.Config(trials=3, control_trials=8),
    readings: readings.Config(trials=12, rectify=False),
    codes: codes.Config((3,), ("average",), trials=1, order=7, weights=1 << 12, designed_for=3),
    roc: roc.Config(customers=20_000, num_chips=48),
}


def test_collusion_sections_run_and_resume(tmp_path):
    documents = section_checks.run_and_resume(TINY, tmp_path)
    changed = dataclasses.replace(TINY[roc], customers=10_000)
    again = sections.run_section(roc, changed, 0, tmp_path, section_checks.CONSOLE)
    assert again["result"]["innocents_per_curve"] == 10_000

    ours = [row for row in documents["codes"]["result"]["rows"] if row["code"] == "ours, joint"]
    assert [row["caught_mean"] for row in ours] == [3]
    assert not any(row["innocents_mean"] for row in ours)
    controls = {row["decoder"]: row["rate"] for row in documents["null"]["result"]["controls"]}
    assert controls["support minus j"] > 0.3 > controls["leave one out"]
    desk = {row["suspects"]: row["rate"] for row in documents["readings"]["result"]["rows"]}
    assert desk.pop("control: the same maps, not counted") > 0.5
    assert max(desk.values()) < 0.5  # of 12 trials at alpha = 0.1, six would be a miracle
    assert documents["null"]["result"]["one_sided"]["missed_by_one_sided"] == 1
    assert all(row["largest_log10_excess"] < 0.3 for row in documents["roc"]["result"]["rows"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--seed -1", "--seed: expected a whole number from 0 to 4294967295, got '-1'"),
        ("--seed 4294967296", "--seed: expected a whole number from 0"),
        ("--out {file}", "--out: expected a folder"),
        ("--out {file}/below", "--out: expected a folder"),
        ("--least 0", "--least: expected a whole number from 1 to"),
        ("--least three", "--least: expected a whole number from 1 to"),
        ("--share nan", "--share: expected a number above 0 and below 1, got 'nan'"),
        ("--share 1", "--share: expected a number above 0 and below 1, got '1'"),
    ],
)
def test_a_wrong_value_of_an_option_is_named_in_one_line(arguments, message, tmp_path, capsys):
    (tmp_path / "file").touch()
    parser = sections.sized("collusion", None, "", "small")
    parser.add_argument("--least", type=sections.whole(1))
    parser.add_argument("--share", type=sections.positive(below=1))
    assert parser.parse_args(["--out", str(tmp_path / "new"), "--least", "1", "--share", "1e-5"]).share == 1e-5
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(arguments.format(file=tmp_path / "file").split())
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b'{"section": '])
def test_a_damaged_result_is_named_with_what_to_do(content, tmp_path):
    (tmp_path / "readings.json").write_bytes(content)
    with pytest.raises(errors.SmarkError, match=r"readings\.json[^\n]*\n.*--fresh"):
        sections.run_section(readings, TINY[readings], 0, tmp_path, section_checks.CONSOLE)


def test_collusion_help_lists_examples(capsys):
    with pytest.raises(SystemExit):
        collusion.main(["--help"])
    assert "--only null roc" in capsys.readouterr().out
