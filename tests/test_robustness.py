import pytest

pytest.importorskip("matplotlib")

from section_checks import run_and_resume

import experiments.robustness.__main__ as robustness
from experiments.robustness import rewrites


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


def test_robustness_help_lists_examples(capsys):
    with pytest.raises(SystemExit):
        robustness.main(["--help"])
    assert "--config full" in capsys.readouterr().out
