import pytest

pytest.importorskip("matplotlib")

from section_checks import run_and_resume

import experiments.robustness.__main__ as robustness
from experiments.robustness import removal, rewrites, strength


def test_rewritten_copies_are_traced_after_alignment_only(tmp_path):
    tiny = rewrites.Config(
        compositions=2, epochs=1, networks=("concatenating",), train_images=320, customers=1000, large=False
    )
    document = run_and_resume({rewrites: tiny}, tmp_path)["rewrites"]
    (row,) = document["result"]["networks"]
    assert all(found["traced"] and not found["traced_unaligned"] for found in row["compositions"])
    assert max(found["logits"] for found in row["compositions"]) < 1e-3
    assert sum(found["wrong"] for found in row["compositions"]) == 0
    assert row["unrelated"] | {"similarity": 0, "innocent_mean": 0, "largest": 0} == {
        "refused": True,
        "similarity": 0,
        "accused": 0,
        "innocent_mean": 0,
        "largest": 0,
    }


def test_removal_attacks_are_set_against_the_accuracy_they_keep(tmp_path):
    tiny = removal.Config(
        chips=(64,),
        embeddings=("trained",),
        most_epochs=1,
        epochs=1,
        max_drop=0.05,
        train_images=320,
        customers=1000,
        only=("none", "noise", "L2 burst", "distil"),
    )
    result = run_and_resume({removal: tiny}, tmp_path)["removal"]["result"]
    rows = result["rows"]
    assert len(rows) == 1 + 4 + 3 + 2
    assert all(row["traced"] for row in rows if row["attack"] in ("none", "noise"))
    # The control: students owe the copy no weight.
    assert not any(row["traced"] for row in rows if row["attack"] == "distil")
    assert sum(row["wrong"] for row in rows) == 0


def test_strength_is_set_against_what_attacks_leave(tmp_path):
    tiny = strength.Config(
        (0.01, 0.1), ("all",), copies=2, attack_epochs=1, epochs=1, train_images=320, networks=("CNN",)
    )
    result = run_and_resume({strength: tiny}, tmp_path)["strength"]["result"]
    rows, (found,) = result["rows"], result["calibrations"]
    assert found["all"]["strength"] in found["all"]["strengths"]
    assert [(row["layers"], row["strength"]) for row in rows] == [("all", 0.01), ("all", 0.1)]
    weak, strong = (row["attacks"] for row in rows)
    assert all(strong[name]["T"] > weak[name]["T"] for name in ("fine-tune", "noise 0.5"))


def test_robustness_help_lists_examples(capsys):
    with pytest.raises(SystemExit):
        robustness.main(["--help"])
    assert "--config full" in capsys.readouterr().out
