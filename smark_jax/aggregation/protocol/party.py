r"""A party's side: one function for each stage, from its state and a request to its next state and its answer.

With b_u the party's seed and s_uv the secret it shares with its neighbour v, its words x_u travel as

.. math:: y_u = x_u + PRG(b_u) + \sum_{v > u} PRG(s_{uv}) - \sum_{v < u} PRG(s_{uv}) \pmod{2^{32}}

(Bonawitz et al. 2017, figure 4). Nothing here does input or output, and no state is ever changed: after an error the
former state is still there. Going back to a former state once its answer was sent is the caller's to prevent, above
all before ``unmask``: a second answer about other survivors could give away both of a party's secrets.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric import x25519
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from jaxtyping import UInt32

from smark_jax import _validate, keys
from smark_jax.aggregation import exchange
from smark_jax.aggregation.protocol import messages, sharing
from smark_jax.aggregation.protocol.parameters import Setup, neighbours, refuse
from smark_jax.aggregation.protocol.policy import DEFAULT, Policy

NO_TASK = bytes(32)


class Party(NamedTuple):
    """What a party carries from stage to stage. All of it but the public parts is secret.

    Attributes:
      setup: the round.
      party: its number.
      identity: its Ed25519 private key.
      secret: fresh for this round; its three keys are derived from it.
      stage: what it will answer next.
      advertised: everybody's keys, once it was told.
      transcript: their hash.
      held: by owner, the shares it holds: of the seed and of the mask secret, 32 bytes each.
      members: who shared.
      task: hash of all that its update was made from.
      survivors: what it agreed to, when it was asked to confirm.
      policy: what it insists on.
    """

    setup: Setup
    party: int
    identity: keys.SecretKey
    secret: keys.SecretKey
    stage: str
    advertised: Mapping[int, messages.Keys] = {}
    transcript: bytes = b""
    held: Mapping[int, tuple[bytes, bytes]] = {}
    members: tuple[int, ...] = ()
    task: bytes = b""
    survivors: tuple[int, ...] = ()
    policy: Policy = Policy()

    def __repr__(self) -> str:
        return f"Party({self.party} of {len(self.setup.roster)}, round {self.setup.round}, next: {self.stage!r})"

    @property
    def neighbours(self) -> tuple[int, ...]:
        """With whom it shares masks and secrets."""
        return neighbours(self.setup.degree, tuple(sorted(self.advertised)), self.transcript)[self.party]

    def key(self, purpose: str) -> keys.SecretKey:
        """One of this round's own keys: "channel", "mask" or "seed"."""
        return keys.derive(self.secret, purpose, self.setup.context.hex())


def join(
    setup: Setup, identity: keys.SecretKey, secret: keys.SecretKey, policy: Policy = DEFAULT
) -> tuple[Party, messages.Keys]:
    """Stage "keys": the party draws its keys of this round and advertises the public ones.

    Args:
      setup: the round.
      identity: the party's long-term Ed25519 private key.
      secret: fresh from ``keys.new()`` for this round, and never used again.
      policy: what the party insists on, whatever the setup says.

    Raises:
      ProtocolError: when the setup asks for less than the policy, or makes no sense.
      SmarkError: when the roster does not list the identity.
    """
    policy.check(setup)
    public = messages.identity_key(identity)
    if public not in setup.roster:
        cause = "Register the party's messages.identity_key before the round."
        raise _validate.fail("join", "an identity on the roster", public.hex()[:16] + "...", cause)
    party = setup.roster.index(public)
    state = Party(setup, party, identity, secret, "shares", policy=policy)
    channel, mask = (exchange.public_key(state.key(purpose)) for purpose in ("channel", "mask"))
    unsigned = messages.Keys(party, channel, mask, seed_hash(setup, party, state.key("seed")), b"")
    signature = messages.sign(identity, setup, "keys", b"", party, messages.content(unsigned))
    return state, unsigned._replace(signature=signature)


def share(state: Party, request: messages.ShareRequest) -> tuple[Party, messages.Shares]:
    """Stage "shares": checks everybody's keys, and gives each neighbour a share of the seed and of the mask secret.

    Raises:
      ProtocolError: when fewer than the quorum advertised, a signature is wrong, or keys repeat.
    """
    expect(state, "shares")
    setup, advertised = state.setup, dict(request.advertised)
    check_advertised(setup, advertised)
    own = advertised.get(state.party)
    if own is None or own.mask != exchange.public_key(state.key("mask")):
        raise refuse("share", f"party {state.party}'s own keys in the list", "none or others", "Is the server honest?")
    bound = messages.transcript(setup, advertised)
    state.policy.check_graph(setup, bound, tuple(sorted(advertised)), advertised)
    state = state._replace(advertised=advertised, transcript=bound, stage="masked")
    holders = tuple(sorted((state.party, *state.neighbours)))
    if len(holders) < setup.threshold:
        cause = "Too few parties answered in time."
        raise refuse("share", f"at least {setup.threshold} holders of shares", str(len(holders)), cause)
    pieces = [sharing.split(state.key(purpose), setup.threshold, len(holders)) for purpose in ("seed", "mask")]
    given = dict(zip(holders, zip(*pieces, strict=True), strict=True))
    sealed = {v: _channel(state, state.party, v).encrypt(bytes(12), b"".join(given[v]), None) for v in state.neighbours}
    unsigned = messages.Shares(state.party, sealed, b"")
    return state._replace(held={state.party: given[state.party]}), _signed(state, "shares", unsigned)


def mask(
    state: Party, request: messages.MaskRequest, words: UInt32[np.ndarray, " num_words"], task: bytes = NO_TASK
) -> tuple[Party, messages.Masked]:
    """Stage "masked": opens the shares it was sent, and sends its words under the masks of all who shared.

    Args:
      state: the party.
      request: what the server relays.
      words: the party's input, as from :func:`smark_jax.aggregation.encode`, flattened.
      task: SHA-256 of all that the update was made from: model, configuration, format. Masks of parties with different
        tasks do not cancel. Where the setup does not bind the model, leave the model's values out of it.

    Raises:
      ProtocolError: when fewer than the quorum shared, or a share was altered, missing or meant for somebody else.
      SmarkError: when the words are not as many uint32 as the setup says.
    """
    expect(state, "masked")
    setup = state.setup
    words = np.asarray(words)
    if words.shape != (setup.num_words,) or words.dtype != np.uint32:
        cause = "Encode the update and flatten it: aggregation.encode, then one vector."
        raise _validate.fail("mask", f"words of uint32[{setup.num_words}]", f"{words.dtype}{list(words.shape)}", cause)
    members = tuple(sorted(request.members))
    expected = set(members) & set(state.neighbours)
    inside = state.party in members and set(members) <= set(state.advertised)
    if len(set(members)) < max(len(members), setup.quorum) or not inside:
        got = f"{len(members)} of {len(state.advertised)} who advertised"
        cause = "Too many parties dropped out, or the server left some out."
        raise refuse("mask", f"at least {setup.quorum} members, this party among them", got, cause)
    if set(request.sealed) != expected:
        cause = "The server withheld or invented shares."
        raise refuse("mask", f"shares of {sorted(expected)}", f"shares of {sorted(request.sealed)}", cause)
    state.policy.check_graph(setup, state.transcript, tuple(sorted(state.advertised)), members)
    held = dict(state.held)
    for v in sorted(expected):
        try:
            both = _channel(state, v, state.party).decrypt(bytes(12), request.sealed[v], None)
        except InvalidTag:
            cause = "It was altered on the way, replayed, or sealed for somebody else."
            raise refuse("mask", f"a share that party {v} sealed", "another ciphertext", cause) from None
        held[v] = both[: sharing.SHARE_BYTES], both[sharing.SHARE_BYTES :]
    total = words + seed_stream(setup, state.party, state.key("seed"))
    for v in sorted(expected):
        peer = state.advertised[v].mask
        total += pair_stream(setup, state.transcript, task, state.party, v, state.key("mask"), peer)
    state = state._replace(held=held, members=members, task=task, stage="unmask")
    unsigned = messages.Masked(state.party, total, task, _agreement(state, members), b"")
    return state, _signed(state, "masked", unsigned)


def confirm(state: Party, request: messages.ConfirmRequest) -> tuple[Party, messages.Confirm]:
    """Stage "confirm": agrees, once, to a set of survivors smaller than the members.

    Raises:
      ProtocolError: when the survivors are fewer than the quorum, no members, or lack the party itself; or when it
        agreed to others before.
    """
    expect(state, "unmask")
    survivors = _survivors(state, "confirm", request.survivors)
    if state.survivors not in ((), survivors):
        raise refuse("confirm", f"the survivors {state.survivors}", str(survivors), "The server changed its mind.")
    state = state._replace(survivors=survivors)
    return state, messages.Confirm(state.party, _agreement(state, survivors))


def unmask(state: Party, request: messages.UnmaskRequest) -> tuple[Party, messages.Reveal]:
    """Stage "unmask": once a quorum agrees on the survivors, reveals one kind of share for each member, never both.

    Raises:
      ProtocolError: when fewer than the quorum agreed on these survivors and on this party's task, or when this party
        agreed to others or has answered before.
    """
    expect(state, "unmask")
    survivors = _survivors(state, "unmask", request.survivors)
    if state.survivors not in ((), survivors):
        raise refuse("unmask", f"the survivors {state.survivors}", str(survivors), "The server changed its mind.")
    agreed = set(request.agreements) & set(survivors)
    if len(agreed) < state.setup.quorum:
        cause = "Too many parties dropped out."
        raise refuse("unmask", f"agreements of at least {state.setup.quorum} survivors", str(len(agreed)), cause)
    digest = messages.agreement_content(state.task, survivors)
    for party in sorted(agreed):
        messages.verify(state.setup, "agreement", state.transcript, party, digest, request.agreements[party])
    gone = set(state.members) - set(survivors)
    seeds = {v: seed for v, (seed, _) in state.held.items() if v in survivors}
    secrets = {v: secret for v, (_, secret) in state.held.items() if v in gone}
    done = state._replace(stage="done", held={}, secret=keys.from_bytes(bytes(32)))
    return done, _signed(state, "unmask", messages.Reveal(state.party, seeds, secrets, b""))


def check_advertised(setup: Setup, advertised: Mapping[int, messages.Keys]) -> None:
    """Refuses a list of keys that is too short, wrongly signed or repeats keys."""
    if len(advertised) < setup.quorum:
        cause = "Too few parties answered in time."
        raise refuse("keys", f"keys of at least {setup.quorum} parties", str(len(advertised)), cause)
    for party, item in advertised.items():
        if item.party != party:
            raise refuse("keys", f"party {party}'s keys", f"party {item.party}'s", "Were they exchanged?")
        messages.verify(setup, "keys", b"", party, messages.content(item), item.signature)
    public = [key for item in advertised.values() for key in (item.channel, item.mask)]
    if len(set(public)) < len(public):
        raise refuse("keys", "keys of its own from each party", "the same key twice", "Somebody copied a key.")


def check_keys(item: messages.Keys, others: Mapping[int, messages.Keys]) -> None:
    """Refuses keys that no party would exchange with: everybody would have to leave the round because of one."""
    for public in (item.channel, item.mask):
        _exchange(keys.new(), public)
    taken = {key for other in others.values() for key in (other.channel, other.mask)}
    if item.channel == item.mask or taken & {item.channel, item.mask}:
        raise refuse("keys", f"keys of its own from party {item.party}", "the same key twice", "Somebody copied a key.")


def seed_stream(setup: Setup, party: int, seed: keys.SecretKey) -> UInt32[np.ndarray, " num_words"]:
    """PRG(b_u): the words that hide a party until its seed is recovered."""
    key = keys.derive(seed, "self mask", setup.context.hex(), str(party))
    return exchange.stream(key, setup.round, setup.num_words)


def pair_stream(
    setup: Setup, bound: bytes, task: bytes, party: int, other: int, own: keys.SecretKey, peer: bytes
) -> UInt32[np.ndarray, " num_words"]:
    """What ``party`` adds for its neighbour ``other``: PRG(s_uv), negative where the other's number is smaller.

    Args:
      setup: the round.
      bound: the transcript of keys.
      task: hash of the task; masks of parties with different ones do not cancel.
      party: whose sign it is.
      other: the neighbour.
      own: the party's X25519 private mask key.
      peer: the neighbour's public one.
    """
    shared = _exchange(own, peer)
    pair = f"{min(party, other)}-{max(party, other)}"
    key = keys.derive(shared, "pair mask", setup.context.hex(), bound.hex(), task.hex(), pair)
    stream = exchange.stream(key, setup.round, setup.num_words)
    return stream if other > party else np.negative(stream)


def seed_hash(setup: Setup, party: int, seed: keys.SecretKey) -> bytes:
    """Commitment to a seed, by which a wrongly recovered one is noticed."""
    return bytes.fromhex(keys.commitment(keys.derive(seed, "commitment", setup.context.hex(), str(party))))


def expect(state: Party, stage: str) -> None:
    """Refuses a request for another stage than the one that the party answers next."""
    if state.stage != stage:
        cause = "Each stage is answered once and in order; was the request repeated?"
        raise refuse(f"party {state.party}", f"a request for stage {state.stage!r}", f"one for {stage!r}", cause)


def _survivors(state: Party, who: str, survivors: tuple[int, ...]) -> tuple[int, ...]:
    survivors = tuple(sorted(survivors))
    inside = state.party in survivors and set(survivors) <= set(state.members)
    if len(set(survivors)) < max(len(survivors), state.setup.quorum) or not inside:
        expected = f"at least {state.setup.quorum} of the members {state.members}, this party among them"
        raise refuse(who, expected, str(survivors), "Too many parties dropped out, or the server left some out.")
    state.policy.check_graph(state.setup, state.transcript, tuple(sorted(state.advertised)), survivors)
    return survivors


def _signed(state: Party, kind: str, message: Any) -> Any:
    digest = messages.content(message)
    return message._replace(
        signature=messages.sign(state.identity, state.setup, kind, state.transcript, state.party, digest)
    )


def _agreement(state: Party, survivors: tuple[int, ...]) -> bytes:
    digest = messages.agreement_content(state.task, survivors)
    return messages.sign(state.identity, state.setup, "agreement", state.transcript, state.party, digest)


def _channel(state: Party, sender: int, receiver: int) -> ChaCha20Poly1305:
    """Authenticated encryption from sender to receiver; each key seals one message, so its nonce may be zero."""
    peer = state.advertised[receiver if sender == state.party else sender].channel
    shared = _exchange(state.key("channel"), peer)
    labels = ("channel", state.setup.context.hex(), state.transcript.hex(), str(sender), str(receiver))
    return ChaCha20Poly1305(keys.derive(shared, *labels).to_bytes())


def _exchange(own: keys.SecretKey, peer: bytes) -> keys.SecretKey:
    private = x25519.X25519PrivateKey.from_private_bytes(own.to_bytes())
    try:
        return keys.from_bytes(private.exchange(x25519.X25519PublicKey.from_public_bytes(peer)))
    except ValueError:
        raise refuse(
            "keys", "a valid X25519 public key", peer.hex()[:16] + "...", "Somebody sent a weak key."
        ) from None
