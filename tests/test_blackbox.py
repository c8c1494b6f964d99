import pytest

pytest.importorskip("matplotlib")

import numpy as np
from scipy import stats
from section_checks import run_and_resume

from experiments.blackbox import answers, images, payloads, subsets
from experiments.common import networks
from smark_jax import blackbox

pytestmark = pytest.mark.usefixtures("small_cnn")


def test_payloads_are_read_back_and_other_ways_are_worse(tmp_path):
    counts = tuple((name, 3) for name in payloads._STRONG)
    tiny = payloads.Config(counts, strengths=(1.2,), epochs=1, learned_steps=3, train_images=320)
    result = run_and_resume({payloads: tiny}, tmp_path)["payloads"]["result"]
    assert all(row["recovered_png"] == 1 and row["psnr_mean"] > 40 for row in result["rows"] if not row["stronger"])
    assert all(row["recovered_noise"] == row["recovered_jpeg"] == 1 for row in result["rows"] if row["stronger"])
    # The control: a weak payload in a small image does not survive JPEG.
    assert result["rows"][0]["recovered_jpeg"] == 0
    ours, *others = result["alternatives"]
    assert ours["recovered"] == 1 and not any(row["recovered"] for row in others)
    assert result["unmarked_read"] == 0
    # What the picture shows is made again from the payloads in the result, and carries them.
    pictures = payloads.shown(result)
    assert pictures.keys() == dict(counts).keys()
    for name, (clean, marked) in pictures.items():
        read = blackbox.read_images(marked, networks.secret(0, "payloads"), result["shown"]["strength"]).payload
        written = [np.packbits(bits).tobytes().hex() for bits in read]
        assert written == result["shown"]["payloads"][name]
        assert 40 < images.psnr(clean, marked).min() < 60


def test_copies_are_traced_by_labels(tmp_path):
    tiny = answers.Config(
        copies=2,
        epochs=2,
        attack_epochs=1,
        teaching_epochs=16,
        probe_weight=1.0,
        distilled=1,
        distillation_epochs=1,
        timed=1,
        train_images=320,
        customers=20,
        num_chips=64,
    )
    result = run_and_resume({answers: tiny}, tmp_path)["answers"]["result"]
    for copy in result["copies"]:
        assert copy["agreement"] > 0.9
        assert copy["attacks"][0]["caught"] == 1
        assert sum(row["wrong"] for row in copy["attacks"]) == 0
        assert copy["weights_T"] > 6
    # Controls: whoever never saw the codeword is not accused.
    assert all(row["caught"] == row["wrong"] == 0 for row in result["innocent"])
    # A detector sees every random pattern, and takes blends of two digits for digits: their mean is smoother.
    seen = {(row["probes"], row["detector"].split()[0]): row["auc"] for row in result["stealth"]}
    assert seen["patterns", "distance"] == 1
    assert seen["blends", "distance"] < 0.5
    assert len(seen) == 4
    assert result["cost"]["alone_step_seconds"] > 0


def test_the_area_under_a_curve_is_that_of_mann_and_whitney():
    rng = np.random.default_rng(0)
    clean, odd = rng.integers(0, 9, 40).astype(float), rng.integers(2, 12, 30).astype(float)  # with ties
    expected = stats.mannwhitneyu(odd, clean).statistic / (clean.size * odd.size)
    assert answers._auc(clean, odd) == pytest.approx(expected, abs=1e-12)
    assert answers._auc(odd, clean) == pytest.approx(1 - expected, abs=1e-12)


def test_the_stated_number_of_probes_is_tried(tmp_path):
    tiny = subsets.Config((0.97,), (20, 1000), 5)
    result = run_and_resume({subsets: tiny}, tmp_path)["subsets"]["result"]
    assert result["rows"] == [{"agreement": 0.97, "needed": [50, 60], "traced": 5, "innocents": 0}]
