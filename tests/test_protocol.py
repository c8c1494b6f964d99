"""The secure aggregation protocol: exact sums under any drop-outs, and nothing opened when anybody cheats."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from smark_jax import aggregation, keys
from smark_jax.aggregation import exchange, protocol
from smark_jax.aggregation.protocol import messages, party, server, sharing
from smark_jax.aggregation.protocol.parameters import neighbours

STAGES = ("keys", "shares", "masked", "unmask")
MODEL, OTHER = b"m" * 32, b"o" * 32


def updates_of(n: int, size: int = 9, seed: int = 0) -> dict[int, np.ndarray]:
    rng = np.random.default_rng([n, seed])
    return {p: rng.integers(0, 2**32, size, dtype=np.uint32) for p in range(n)}


def exact_sum(updates: dict[int, np.ndarray], survivors) -> np.ndarray:
    """On Python integers."""
    return (sum(updates[p].astype(object) for p in survivors) % 2**32).astype(np.uint32)


class Crowd:
    """All parties and the server of a round, driven by hand."""

    def __init__(self, n: int, quorum: int | None = None, **options) -> None:
        self.identities = [keys.from_bytes(bytes([p]) + b"identity".ljust(31)) for p in range(n)]
        self.secrets = [keys.from_bytes(bytes([p]) + b"secret".ljust(31)) for p in range(n)]
        self.words = updates_of(n)
        roster = [messages.identity_key(identity) for identity in self.identities]
        self.setup = protocol.setup(roster, 9, options.pop("round", 0), session=b"test", quorum=quorum, **options)
        # Most tests are about what holds at any quorum; tests/test_lying_server.py is about what parties insist on.
        self.policy = protocol.Policy(least_parties=self.setup.quorum, least_share=0.0, bind_model=False)
        self.server = server.start(self.setup)
        self.parties: dict[int, party.Party] = {}
        self.requests: dict = dict.fromkeys(range(n))
        self.models = dict.fromkeys(range(n), MODEL)

    def answer(self, p: int, request=None):
        request = self.requests[p] if request is None else request
        match request:
            case None:
                self.parties[p], message = party.join(self.setup, self.identities[p], self.secrets[p], self.policy)
            case messages.ShareRequest():
                self.parties[p], message = party.share(self.parties[p], request)
            case messages.MaskRequest():
                self.parties[p], message = party.mask(self.parties[p], request, self.words[p], self.models[p])
            case messages.ConfirmRequest():
                self.parties[p], message = party.confirm(self.parties[p], request)
            case messages.UnmaskRequest():
                self.parties[p], message = party.unmask(self.parties[p], request)
        return message

    def receive(self, message) -> None:
        self.server = server.receive(self.server, message)

    def stage(self, without=()) -> None:
        """All parties that are asked answer, but these; the stage is closed."""
        for p in list(self.requests):
            if p not in without:
                self.receive(self.answer(p))
        self.server, self.requests = server.close(self.server, MODEL)

    def until(self, stage: str) -> "Crowd":
        while self.server.stage != stage:
            self.stage()
        return self


@settings(deadline=None, max_examples=40)
@given(data=st.data(), n=st.integers(2, 14) | st.just(20))
def test_any_drop_outs_give_the_exact_sum_or_a_clean_abort(data, n):
    threshold = data.draw(st.integers(1, n))
    drop = data.draw(st.dictionaries(st.integers(0, n - 1), st.sampled_from((*STAGES, "confirm"))))
    updates = updates_of(n, seed=threshold)
    left = n - len(drop)  # who answers to the end
    if left >= threshold:
        result = aggregation.run_round(updates, threshold, drop)
        expected = tuple(p for p in updates if drop.get(p) not in ("keys", "shares", "masked"))
        assert result.survivors == expected
        np.testing.assert_array_equal(result.total, exact_sum(updates, expected))
    else:
        with pytest.raises(aggregation.ProtocolError, match="nothing was opened"):
            aggregation.run_round(updates, threshold, drop)


@pytest.mark.parametrize("degree", [None, 16])
def test_sixty_four_parties_a_third_of_which_drop_out(degree):
    updates = updates_of(64)
    drop = {3 * i: STAGES[i % 4] for i in range(16)}
    sparse = aggregation.Neighbourhood(degree, 8) if degree else None
    result = aggregation.run_round(updates, 33, drop, neighbourhood=sparse)
    assert set(result.survivors) == {p for p in updates if drop.get(p, "unmask") == "unmask"}
    np.testing.assert_array_equal(result.total, exact_sum(updates, result.survivors))


def test_trees_and_party_numbers_are_kept():
    fixed = aggregation.FixedPoint(1.0, 3)
    floats = {7: 0.25, 20: -0.5, 3: 0.125}
    updates = {
        p: aggregation.encode({"w": jnp.full((2, 3), x), "b": jnp.zeros(())}, fixed, jax.random.key(p))
        for p, x in floats.items()
    }
    result = aggregation.run_round(updates, 2, {20: "masked"})
    assert result.survivors == (3, 7)
    mean = aggregation.decode(result.total, fixed, 2)["w"] / 2
    np.testing.assert_allclose(mean, np.full((2, 3), 0.1875), atol=2e-8)


def test_the_host_stream_is_the_keystream_of_the_pmap_path():
    key = keys.from_bytes(bytes(range(32)))
    nonce = np.array([5, 0, 1], np.uint32)
    np.testing.assert_array_equal(exchange.stream(key, 5, 100), keys.keystream(key.to_words(), nonce, 100))


@settings(deadline=None, max_examples=20)
@given(data=st.data(), n=st.integers(1, 20))
def test_shares_recover_from_any_threshold_of_them(data, n):
    t = data.draw(st.integers(1, n))
    secret = keys.new()
    shares = dict(enumerate(sharing.split(secret, t, n)))
    chosen = data.draw(st.permutations(range(n)))[:t]
    assert sharing.combine({i: shares[i] for i in chosen}, t) == secret
    if t > 1:
        assert sharing.combine({i: shares[i] for i in chosen[1:]}, t - 1) != secret


def test_masked_words_are_uniform_and_unmasked_ones_fail_the_same_test():
    crowd = Crowd(3)
    crowd.setup = crowd.setup._replace(num_words=40_000)
    crowd.server = server.start(crowd.setup)
    fixed = aggregation.FixedPoint(1.0, 3)
    update = np.random.default_rng(0).normal(0, 0.01, 40_000).astype(np.float32)
    plain = np.asarray(aggregation.encode(update, fixed, jax.random.key(0)))
    crowd.words = dict.fromkeys(range(3), plain)
    crowd.until("masked")
    sent = crowd.answer(0).words

    def p_value(words: np.ndarray) -> float:
        return stats.chisquare(np.bincount(words.view(np.uint8), minlength=256)).pvalue

    assert p_value(sent) > 1e-6
    assert p_value(plain) < 1e-100
    assert abs(np.corrcoef(sent, plain)[0, 1]) < 5 / math.sqrt(plain.size)


# Cheating. Each of these must be noticed, by a party or by the server, before anything is opened.


def test_a_wrong_signature_is_refused_and_the_round_goes_on_without_it():
    crowd = Crowd(4, quorum=3)
    forged = crowd.answer(0)._replace(channel=exchange.public_key(keys.new()))
    with pytest.raises(aggregation.ProtocolError, match="party 0's signature on this message in round 0"):
        crowd.receive(forged)
    crowd.stage(without=(0,))
    for p in (1, 2, 3):
        assert 0 not in crowd.requests[p].advertised
    crowd.until("done")
    np.testing.assert_array_equal(server.open_sum(crowd.server), exact_sum(crowd.words, (1, 2, 3)))


@pytest.mark.parametrize("stage", ["keys", "shares", "masked", "unmask"])
def test_every_altered_message_is_refused(stage):
    crowd = Crowd(4, quorum=3).until(stage)
    good = crowd.answer(1)
    changes = {
        "keys": {"seed_hash": bytes(32)},
        "shares": {"sealed": {p: bytes(80) for p in (0, 2, 3)}},
        "masked": {"words": np.zeros(9, np.uint32)},
        "unmask": {"seeds": {p: bytes(32) for p in range(4)}},
    }
    with pytest.raises(aggregation.ProtocolError, match="party 1's signature"):
        crowd.receive(good._replace(**changes[stage]))
    crowd.receive(good)
    with pytest.raises(aggregation.ProtocolError, match="has answered already"):
        crowd.receive(good)


def test_a_server_that_forges_keys_is_noticed_by_the_parties():
    crowd = Crowd(4, quorum=3).until("shares")
    advertised = dict(crowd.requests[0].advertised)
    advertised[2] = advertised[2]._replace(channel=exchange.public_key(keys.new()))
    with pytest.raises(aggregation.ProtocolError, match="party 2's signature"):
        crowd.answer(0, messages.ShareRequest(advertised))
    exchanged = {**crowd.requests[0].advertised, 2: crowd.requests[0].advertised[3]}
    with pytest.raises(aggregation.ProtocolError, match="Were they exchanged"):
        crowd.answer(0, messages.ShareRequest(exchanged))
    few = {p: crowd.requests[0].advertised[p] for p in (0, 1)}
    with pytest.raises(aggregation.ProtocolError, match="keys of at least 3 parties"):
        crowd.answer(0, messages.ShareRequest(few))
    absent = {p: crowd.requests[0].advertised[p] for p in (1, 2, 3)}
    with pytest.raises(aggregation.ProtocolError, match="party 0's own keys"):
        crowd.answer(0, messages.ShareRequest(absent))


def test_a_copied_key_is_refused():
    crowd = Crowd(3, quorum=3)
    crowd.secrets[2] = crowd.secrets[1]
    with pytest.raises(aggregation.ProtocolError, match="the same key twice"):
        crowd.until("masked")


def test_messages_of_another_round_or_session_are_refused():
    old, new = Crowd(3, quorum=2), Crowd(3, quorum=2, round=1)
    for stage in STAGES:
        old.until(stage), new.until(stage)
        replayed = old.answer(1)
        with pytest.raises(aggregation.ProtocolError, match="replayed from another round"):
            new.receive(replayed)
        old.receive(replayed)
        old.stage(without=(1,))
    late = Crowd(3, quorum=2).answer(0)
    with pytest.raises(aggregation.ProtocolError, match="It came late, early, or twice"):
        Crowd(3, quorum=2).until("masked").receive(late)


def test_a_tampered_or_withheld_share_is_noticed_by_its_receiver():
    crowd = Crowd(4, quorum=3).until("masked")
    request = crowd.requests[0]
    altered = bytes([request.sealed[2][0] ^ 1]) + request.sealed[2][1:]
    for sealed in (altered, crowd.requests[1].sealed[2]):
        with pytest.raises(aggregation.ProtocolError, match="a share that party 2 sealed"):
            crowd.answer(0, request._replace(sealed={**request.sealed, 2: sealed}))
    with pytest.raises(aggregation.ProtocolError, match="withheld or invented"):
        crowd.answer(0, request._replace(sealed={p: request.sealed[p] for p in (1, 2)}))
    with pytest.raises(aggregation.ProtocolError, match="at least 3 members"):
        crowd.answer(0, request._replace(members=(0, 1)))


@pytest.mark.parametrize("gone", [(), (3,)])
def test_a_wrong_share_opens_nothing(gone):
    """A party that lies about the shares it holds signs its lie; the commitment and the public key show it."""
    crowd = Crowd(5, quorum=3).until("masked")
    crowd.stage(without=gone)
    crowd.until("unmask")
    for p in crowd.requests:
        honest = crowd.answer(p)
        if p == 0:
            lie = honest._replace(
                **{
                    "secrets" if gone else "seeds": {
                        **(honest.secrets if gone else honest.seeds),
                        (gone or (1,))[0]: bytes(range(32)),
                    }
                }
            )
            digest = messages.content(lie)
            state = crowd.parties[0]
            honest = lie._replace(
                signature=messages.sign(crowd.identities[0], crowd.setup, "unmask", state.transcript, 0, digest)
            )
        crowd.receive(honest)
    crowd.server, _ = server.close(crowd.server)
    with pytest.raises(aggregation.ProtocolError, match="A share was wrong: nothing is opened"):
        server.open_sum(crowd.server)


def test_both_kinds_of_share_for_one_party_are_never_given():
    crowd = Crowd(4, quorum=3).until("masked")
    crowd.stage(without=(3,))
    before = dict(crowd.parties)
    crowd.stage()
    assert crowd.server.stage == "unmask"
    request = crowd.requests[0]
    reveal = crowd.answer(0)
    assert set(reveal.seeds) == {0, 1, 2}
    assert set(reveal.secrets) == {3}
    # Again, about others: it has answered, and has nothing left to answer with.
    with pytest.raises(aggregation.ProtocolError, match="a request for stage 'done'"):
        crowd.answer(0, request)
    assert not crowd.parties[0].held
    # It agreed to (0, 1, 2) and will not reveal for all four, although all four agreed to that in advance.
    in_advance = {
        p: messages.sign(
            crowd.identities[p],
            crowd.setup,
            "agreement",
            before[p].transcript,
            p,
            messages.agreement_content(MODEL, (0, 1, 2, 3)),
        )
        for p in (0, 1, 2)
    }
    with pytest.raises(aggregation.ProtocolError, match="changed its mind"):
        crowd.answer(1, messages.UnmaskRequest((0, 1, 2, 3), in_advance))
    with pytest.raises(aggregation.ProtocolError, match="changed its mind"):
        crowd.answer(1, messages.ConfirmRequest((0, 1, 2, 3)))
    # A message with both kinds is refused by an honest server, even when it is signed.
    both = reveal._replace(secrets={**reveal.secrets, 1: bytes(32)})
    both = both._replace(
        signature=messages.sign(
            crowd.identities[0], crowd.setup, "unmask", before[0].transcript, 0, messages.content(both)
        )
    )
    with pytest.raises(aggregation.ProtocolError, match="one kind of share"):
        crowd.receive(both)


def test_no_shares_without_a_quorum_that_agrees():
    crowd = Crowd(4, quorum=3).until("unmask")
    request = crowd.requests[0]
    few = {p: request.agreements[p] for p in (0, 1)}
    with pytest.raises(aggregation.ProtocolError, match="agreements of at least 3 survivors"):
        crowd.answer(0, request._replace(agreements=few))
    for survivors in ((0, 1), (1, 2, 3), (0, 1, 2, 9), (0, 1, 1, 2)):
        with pytest.raises(aggregation.ProtocolError, match="at least 3 of the members"):
            crowd.answer(0, request._replace(survivors=survivors))
    with pytest.raises(aggregation.ProtocolError, match="signature on this message"):
        crowd.answer(0, request._replace(survivors=(0, 1, 2)))  # signed for all four


def test_different_models_are_noticed_by_the_server_and_by_the_parties():
    crowd = Crowd(4, quorum=3).until("masked")
    crowd.models[2] = OTHER
    for p in (0, 1, 3):
        crowd.receive(crowd.answer(p))
    message = crowd.answer(2)
    with pytest.raises(aggregation.ProtocolError, match="party 2 to have the task of this round"):
        crowd.receive(message)
    # A server that lied to party 2 itself, and goes on: the parties do not accept each other's agreements.
    crowd.server = crowd.server._replace(masked={**crowd.server.masked, 2: message.agreement})
    crowd.server, crowd.requests = server.close(crowd.server)
    for p in range(4):
        with pytest.raises(aggregation.ProtocolError, match="for another task"):
            crowd.answer(p)


def test_masks_of_different_tasks_do_not_cancel():
    """The control: were the model left out of the task, the same lie would open a sum."""
    totals = {}
    for bind in (True, False):
        crowd = Crowd(4, quorum=3, bind_model=bind).until("masked")
        crowd.models[2] = OTHER if bind else MODEL
        total = np.zeros(9, np.uint32)
        for p in range(4):
            total += crowd.answer(p).words
            total -= party.seed_stream(crowd.setup, p, crowd.parties[p].key("seed"))
        totals[bind] = bool((total == exact_sum(crowd.words, range(4))).all())
    assert totals == {True: False, False: True}


def test_words_of_a_party_thought_lost_stay_hidden():
    """With the mask secrets of a late party recovered, its words are still under its self mask."""
    crowd = Crowd(4, quorum=3).until("masked")
    late = crowd.answer(3)
    crowd.stage(without=(3,))
    crowd.until("done")
    np.testing.assert_array_equal(server.open_sum(crowd.server), exact_sum(crowd.words, (0, 1, 2)))
    bare = late.words.copy()
    for p in (0, 1, 2):
        peer = crowd.server.advertised[p].mask
        bare -= party.pair_stream(crowd.setup, crowd.server.transcript, MODEL, 3, p, crowd.parties[3].key("mask"), peer)
    assert (bare != crowd.words[3]).all()
    bare -= party.seed_stream(crowd.setup, 3, crowd.parties[3].key("seed"))
    np.testing.assert_array_equal(bare, crowd.words[3])


# The graph


@pytest.mark.parametrize(("n", "degree"), [(5, 4), (6, 9), (11, 4), (64, 16)])
def test_neighbours_are_mutual_and_as_many_as_asked(n, degree):
    graph = neighbours(degree, tuple(range(10, 10 + n)), b"seed")
    assert all(len(set(ring)) == min(degree, n - 1) and u not in ring for u, ring in graph.items())
    assert all(u in graph[v] for u, ring in graph.items() for v in ring)
    if degree < n - 1:
        assert graph != neighbours(degree, tuple(range(10, 10 + n)), b"other seed")


def test_neighbourhood_keeps_its_bounds_by_simulation():
    """At 6 bits failures are frequent enough to count; a much smaller degree must fail the same count."""
    n, bits, trials = 60, 6, 3000
    found = aggregation.neighbourhood(n, 0.2, 0.1, security_bits=bits, correctness_bits=bits)
    assert found.degree < n - 1
    rng = np.random.default_rng(0)

    def failures(k: int, t: int) -> tuple[float, float]:
        unsafe = stuck = 0
        for _ in range(trials):
            order = rng.permutation(n)
            corrupt, gone = np.zeros(n, bool), np.zeros(n, bool)
            corrupt[order[:6]] = True
            gone[rng.permutation(n)[:12]] = True
            around = np.array([[(i + s) % n for s in range(-(k // 2), k // 2 + 1)] for i in range(n)])
            held_by_corrupt = corrupt[around].sum(axis=1) - corrupt
            unsafe += bool((2 * t <= k + 1 + held_by_corrupt)[~corrupt].any())
            stuck += bool(((~gone[around]).sum(axis=1) < t).any())
        return unsafe / trials, stuck / trials

    limit = 2**-bits + 4 * math.sqrt(2**-bits / trials)
    assert max(failures(*found)) <= limit
    assert max(failures(8, 6)) > 4 * limit


def test_neighbourhood_grows_slowly_and_is_full_for_few():
    small, large = (aggregation.neighbourhood(n, 0.05, 0.05) for n in (1_000, 100_000))
    assert small.degree < 100
    assert large.degree < 1.5 * small.degree
    assert aggregation.neighbourhood(5, 0.2, 0.2).degree == 4
    assert aggregation.neighbourhood(1, 0, 0) == (0, 1)
    with pytest.raises(ValueError, match="rates at which a graph exists"):
        aggregation.neighbourhood(10, 0.6, 0.0)
    with pytest.raises(ValueError, match="drop_rate of 0 to 1"):
        aggregation.neighbourhood(10, 1.5, 0.0)


# Bad input


def test_bad_rounds_are_refused():
    updates = updates_of(3)
    for bad, message in (
        (({}, 1), "zero parties"),
        ((updates, 0), "threshold"),
        ((updates, 4), "at most 3 parties"),
        ((updates, 2, {9: "keys"}), "party 9 at stage 'keys'"),
        ((updates, 2, {0: "lunch"}), "stage 'lunch'"),
        (({**updates, 3: np.zeros(5, np.uint32)}, 2), "the same tree from every party"),
        (({p: u.astype(np.float32) for p, u in updates.items()}, 2), "Encode floats"),
    ):
        with pytest.raises(ValueError, match=message):
            aggregation.run_round(*bad)


def test_bad_setups_are_refused():
    crowd = Crowd(3)
    with pytest.raises(ValueError, match="distinct identities"):
        protocol.setup([crowd.setup.roster[0]] * 2, 4)
    with pytest.raises(ValueError, match="distinct identities"):
        protocol.setup([b"short"], 4)
    with pytest.raises(ValueError, match="at most 3 holders"):
        protocol.setup(crowd.setup.roster, 4, neighbourhood=aggregation.Neighbourhood(2, 4))
    with pytest.raises(ValueError, match="an identity on the roster"):
        party.join(crowd.setup, keys.new(), keys.new())
    with pytest.raises(ValueError, match=r"words of uint32\[9\]"):
        crowd.until("masked").words[0] = np.zeros(8, np.uint32)
        crowd.answer(0)
    with pytest.raises(ValueError, match="a round whose last stage is closed"):
        server.open_sum(crowd.server)


def test_secrets_stay_out_of_reprs():
    crowd = Crowd(3).until("masked")
    text = repr(crowd.parties[0]) + repr(crowd.server)
    assert crowd.parties[0].key("seed").to_bytes().hex() not in text
    assert "held" not in text
    assert len(text) < 300
