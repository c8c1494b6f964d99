"""The licence experiments at a tiny size, and that what they make for speed is what packages and disputes give."""

import math

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("nacl")

import numpy as np
from scipy import stats
from section_checks import run_and_resume

import experiments.licence.__main__ as licences
from experiments.licence import framing, guilt, hostile, owners, parties, price
from smark_jax import carriers, extraction, keys, licence
from smark_jax.licence import conviction, segments

pytestmark = pytest.mark.usefixtures("small_cnn")


@pytest.fixture(scope="module")
def small():
    """An owner, a licence of 64 choices in 8 parts, and a base with a mark."""
    rng, owner, key = np.random.default_rng(0), parties.identity(0, "owner"), keys.new()
    base = {"kernel": rng.normal(size=(40, 48)).astype(np.float32), "bias": rng.normal(size=48).astype(np.float32)}
    mark = carriers.mark(keys.new(), base, 64)
    signed = parties.offer(owner, key, 64, 8)
    return owner, parties.agree(signed, key, licence.Identity(keys.new())), base, mark, rng.choice([-1, 1], 64)


def test_owners_frame_within_the_bound_and_the_controls_always(tmp_path):
    tiny = framing.Config(owners=40, grinders=1, tokens=2000, spoilers=1, num_segments=512)
    result = run_and_resume({framing: tiny}, tmp_path)["framing"]["result"]
    assert len(result["rows"]) == len(owners.STRATEGIES) + 3
    assert result["all"]["framed"] <= stats.binom.isf(1e-6, result["all"]["owners"], 0.1)
    # Negative controls: where the owner knows the word, or attempts are free, the innocent are convicted.
    assert [one["framed"] for one in result["controls"][:3]] == [one["owners"] for one in result["controls"][:3]]
    assert result["refused"]["tried"] == result["refused"]["replayed"] == result["refused"]["asked"] == 2


def test_leakers_are_convicted_by_their_own_words_alone(tmp_path):
    tiny = guilt.Config(
        (guilt.CNN,),
        leakers=1,
        innocents=1,
        coalitions=(2,),
        rebuilt=(),
        epochs=1,
        train_images=320,
        num_chips=64,
        only=("none", "int8"),
    )
    cheap = price.Config((guilt.CNN,), repeats=1, base=tiny)
    documents_of = run_and_resume({guilt: tiny, price: cheap}, tmp_path)
    (found,) = documents_of["guilt"]["result"]["networks"]
    assert [row["attack"] for row in found["lone"]] == ["none", "int8"]
    assert all(row["parts"] == 8 and row["whole"] > 2 * row["least"] for row in found["lone"])
    assert all(row["convicted"] == row["size"] for row in found["coalitions"] if row["mix"] != "midpoint")
    assert not any(row["wrong"] for row in (*found["lone"], *found["coalitions"]))
    both, one = (np.mean([row["change"] for row in found["cost"]["rows"][name]]) for name in ("both words", "one word"))
    assert both == pytest.approx(one, rel=0.4)  # of one copy each; two words at full strength would cost 1.41 times
    (paid,) = documents_of["price"]["result"]["networks"]
    rows = paid["disputes"]["rows"]
    assert sorted(row["part"] for row in rows) == list(range(8)) and all(row["log10_p"] < -6 for row in rows)
    assert "no more than are left" in paid["disputes"]["refused"]
    assert paid["bytes"]["package"] < 2.5 * paid["bytes"]["model"]


def test_copies_and_readings_are_those_of_the_protocol(small):
    owner, party, base, mark, word = small
    content = licence.package(party.signed, base, mark, word, party.key, owner.signing)
    opened, made = parties.opened(content, party), parties.copy(party, base, mark, word)
    assert opened.keys() == made.keys()
    assert all(np.array_equal(opened[name], made[name]) for name in made)
    values = licence.shifts(extraction.shifts(made, base, mark), mark)
    reader = parties.reader(party, mark)
    z, part_keys = reader.read(values), parties.part_keys_of(party)
    for part in range(8):
        expected = segments.readings(values, reader.found, part, part_keys[part])
        np.testing.assert_allclose(z[reader.found.of_part(part)], expected, rtol=1e-12, atol=1e-12)
    asked = parties.challenge(party, "ab" * 32)
    words = parties.answered(party, asked, "ab" * 32, "cd" * 32)
    convicted, read = licence.convict(values, asked, words), reader.test(z, asked.parts)
    assert (read.segments, read.fraction) == (convicted.segments, convicted.fraction) == (8, 0.125)
    assert read.statistic == pytest.approx(convicted.statistic) and read.log10_p == pytest.approx(convicted.log10_p)


def test_a_spoiled_package_is_damaged_exactly_where_the_customer_took_that_variant(small):
    owner, party, base, mark, word = small
    content = licence.package(party.signed, base, mark, word, party.key, owner.signing)
    bits = party.secrets.choices.bits
    for segment in range(3):
        kept = int(bits[segment])
        which = np.array([segment])
        whole = hostile.spoil(content, party, owner, which, np.array([kept]))
        assert whole != content and hostile.opens(whole, party)
        assert not hostile.opens(hostile.spoil(content, party, owner, which, np.array([1 - kept])), party)


def test_just_enough_segments_convict():
    """Of the 2^k rows of k signs, two agree throughout: p = 2^(1 - k), times 8 parts and q (q + 1)."""
    for attempt in (1, 3, 50):
        k = owners.enough(0.1, 8, attempt)
        p = [2.0 ** (1 - size) * 8 * attempt * (attempt + 1) for size in (k, k - 1)]
        assert p[0] <= 0.1 < p[1]
        z = np.concatenate([np.ones(k), np.zeros(512 - k)])
        found = conviction.test(z, np.ones(512), 8, attempt, 4096)
        assert found.log10_p == pytest.approx(math.log10(p[0]), abs=1e-6)


def test_ground_signs_are_the_best_of_many():
    rng, wanted = np.random.default_rng(1), np.resize([1, -1, -1], 64)
    found = hostile.ground(wanted, 5000, rng)
    assert set(found) == {-1.0, 1.0}
    agreement = abs(found @ wanted) / 8
    assert agreement >= stats.norm.isf(0.5 / 5000) - 0.5 > 3  # of 5,000 draws, about 3.7
    assert abs(found @ rng.choice([-1, 1], 64)) / 8 < 5  # another word gains nothing


def test_licence_help_lists_examples(capsys):
    with pytest.raises(SystemExit):
        licences.main(["--help"])
    assert "--config full" in capsys.readouterr().out


def test_favourite_suspects_have_their_parts_in_order(small):
    _, party, *_ = small
    found = hostile._favourite_suspects(party, 3000, np.random.default_rng(2))
    first = [part for part in licence.order(found[0], party.signed) if part < 5]
    assert first == [0, 1, 2, 3, 4]  # of 120 suspects, one has these five in order
