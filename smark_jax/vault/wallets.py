"""A customer's wallet: its identity, the secret words of its licences, and what it has opened of them.

A wallet is a folder: ``master.key``, which the passphrase opens, and a sealed file for each request. An arbiter has one
too; it holds the key that deposits are sealed to.

The wallet keeps the rules on which the customer's protection rests. It opens one package for a request, and never says
where a damaged one is damaged. It opens no part of a word for a second bundle.
"""

import contextlib
import itertools
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from cryptography.exceptions import InvalidTag

from smark_jax import _documents, _io, _validate, errors, keys, licence
from smark_jax._documents import Hash, Hex
from smark_jax.licence import conviction, documents, packages, requests, transfer
from smark_jax.licence.documents import Challenge, RequestFile, SignedAnswer, SignedOffer, SignedRequest
from smark_jax.vault import bundles, crypto, folder
from smark_jax.vault.documents import Bundle

LICENCES, OPENED, PUBLIC = "licences", "opened.sealed", "public.json"
REQUESTED, RECEIVED, DAMAGED = "requested", "received", "damaged"


class Given(NamedTuple):
    """Parts of a word that were opened, and the bundle that they were opened for."""

    request: Hash
    bundle: Hash
    parts: tuple[int, ...]


class Held(NamedTuple):
    """A request, with its secrets.

    Attributes:
      request: as it was sent.
      pieces: of its deposit.
      scalars: of the choices.
      bits: the word, packed.
      rest: the scalar of the rest's key.
      state: requested, received or damaged.
      package: the digest of the package that was opened or refused, without its time; empty before.
    """

    request: SignedRequest
    pieces: tuple[Hex, ...]
    scalars: Hex
    bits: Hex
    rest: Hash
    state: str
    package: str

    @property
    def secrets(self) -> requests.Secrets:
        """What opens the package and answers disputes."""
        count = self.request.offer.offer.num_segments
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(self.bits), np.uint8), count=count)
        choices = transfer.Choices(bytes.fromhex(self.scalars), 1 - 2 * bits.astype(np.int8))
        return requests.Secrets(choices, bytes.fromhex(self.rest))

    @property
    def file(self) -> RequestFile:
        """The request as it is sent."""
        return RequestFile(self.request, self.pieces)


class Wallet(NamedTuple):
    """An open wallet; no message or repr shows its key."""

    folder: Path
    master: keys.SecretKey

    @property
    def identity(self) -> licence.Identity:
        """Whose wallet it is."""
        return licence.Identity(keys.derive(self.master, "identity"))


def create(place: Path, passphrase: str) -> Wallet:
    """Makes a wallet with a new identity, readable by its owner only; whole or not at all.

    Raises:
      SmarkError: when the passphrase is empty, or the folder holds something.
    """
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        cause = "Name another folder. If it is a wallet of yours, use it as it is."
        raise _validate.fail("wallet", "a new folder for the wallet", f"{place}, which exists already", cause)
    wallet = Wallet(place, keys.new())
    sealed = crypto.seal(wallet.master, passphrase)
    place.absolute().parent.mkdir(parents=True, exist_ok=True)
    with _io.private_files(), _io.renamed(place) as part:
        (part / LICENCES).mkdir(parents=True)
        _io.write(part / PUBLIC, documents.dumps(wallet.identity.public))
        _io.write(part / folder.KEY_FILE, sealed, private=True)
    return wallet


@contextlib.contextmanager
def opened(place: Path, passphrase: str) -> Iterator[Wallet]:
    """Opens a wallet, which no other process may use meanwhile.

    Raises:
      SmarkError: when there is no wallet, the passphrase is wrong, or the key file was changed.
    """
    if not (place / folder.KEY_FILE).is_file() or not (place / LICENCES).is_dir():
        cause = "Is the path right? 'smark licence init' makes a wallet."
        raise _validate.fail("wallet", f"a wallet in {place}", "none there", cause)
    with _io.private_files(), _io.locked(place / "wallet.lock", seconds=60):
        yield Wallet(place, crypto.unseal(place / folder.KEY_FILE, passphrase))


def held(wallet: Wallet) -> list[Held]:
    """All requests, by offer and attempt."""
    found = [_read(wallet, path) for path in sorted((wallet.folder / LICENCES).glob("*.sealed"))]
    return sorted(found, key=lambda one: (one.request.request.offer, one.request.request.attempt))


def request(wallet: Wallet, offer: SignedOffer, arbiter: documents.Arbiter | None = None) -> Held:
    """A request under an offer; asking again gives the same one.

    Raises:
      SmarkError: when the offer is unusable, or the licence was requested with another arbiter.
    """
    requests.check_offer(offer)
    mine = [one for one in held(wallet) if one.request.request.offer == documents.digest(offer.offer)]
    if not mine:
        return _add(wallet, offer, arbiter)
    newest, named = mine[-1], mine[-1].request.request.deposit
    if (named.arbiter if named else None) != arbiter:
        got = "another arbiter, or none" if arbiter else "no arbiter, where the request names one"
        cause = "A request is signed once: send the one that you made, or ask the owner for a new offer."
        raise _validate.fail("licence", "the arbiter of your request", got, cause)
    return newest


def _add(wallet: Wallet, offer: SignedOffer, arbiter: documents.Arbiter | None) -> Held:
    """A request with a new word; all words that the same owner let go to waste count as attempts, under any offer.

    So do words of copies of the same model: packages that open to something useless would let an owner try as often.
    """
    about = [(one.request.offer.offer, one.state) for one in held(wallet)]
    mine = [(one.model, state) for one, state in about if one.public_key == offer.offer.public_key]
    wasted = sum(state != RECEIVED or model == offer.offer.model for model, state in mine)
    if wasted >= requests.MOST_ATTEMPTS:
        cause = "Its owner spoils packages until a word suits it, or its files do not survive: buy from somebody else."
        raise _validate.fail(
            "licence", f"at most {requests.MOST_ATTEMPTS} attempts", f"{wasted} words without a copy", cause
        )
    attempt = wasted + 1
    made = licence.request(offer, wallet.identity, attempt, arbiter)
    choices = made.secrets.choices
    new = Held(
        request=made.request,
        pieces=tuple(piece.hex() for piece in made.pieces),
        scalars=choices.scalars.hex(),
        bits=np.packbits(choices.bits).tobytes().hex(),
        rest=made.secrets.rest.hex(),
        state=REQUESTED,
        package="",
    )
    _write(wallet, new)
    return new


def receive(
    wallet: Wallet, content: bytes, where: str, write: Callable[[Path], Path]
) -> tuple[Held, documents.Package]:
    """Opens a package, and writes the copy.

    Args:
      wallet: the customer's.
      content: the package's bytes.
      where: the package's name, for messages.
      write: as for :func:`smark_jax.licence.unpack`.

    Raises:
      SmarkError: when it belongs to no request of this wallet, or another package was opened for its request.
      Damaged: when its owner spoiled it.
    """
    mine, digest = _of_package(wallet, content, where)
    if mine.state == DAMAGED or (mine.state == RECEIVED and mine.package != digest):
        got = "a second package for the same request"
        cause = (
            "A wallet opens one, since an owner could learn choices by sending several. Keep the copy that you have."
        )
        if mine.state == DAMAGED:
            cause = "Yours was damaged: 'smark licence complain' draws a new word and makes a new request."
        raise _validate.fail("licence", "one package for each request", got, cause)
    try:
        head = licence.unpack(content, mine.request, mine.secrets, where, write)
    except packages.Damaged:
        _write(wallet, mine._replace(state=DAMAGED, package=digest))
        raise
    if mine.state == REQUESTED:
        mine = mine._replace(state=RECEIVED, package=digest)
        _write(wallet, mine)
    return mine, head


def complain(wallet: Wallet, content: bytes, where: str) -> Held:
    """A new request with a new word, in place of one whose package is damaged. It tells the owner nothing else.

    Raises:
      SmarkError: when the package is not known to be damaged, or the owner has spoiled too many.
    """
    mine, _ = _of_package(wallet, content, where)
    if mine.state != DAMAGED:
        cause = "Open it first: 'smark licence open'. Only a damaged package is a reason for a new word."
        raise _validate.fail("licence", "a package that is damaged", f"one of a licence that is {mine.state}", cause)
    old = mine.request.request
    later = [one for one in held(wallet) if one.request.request.offer == old.offer]
    if later[-1].request.request.attempt > old.attempt:
        return later[-1]
    return _add(wallet, mine.request.offer, old.deposit.arbiter if old.deposit else None)


class Answers(NamedTuple):
    """What a wallet answers to a bundle.

    Attributes:
      given: the answers.
      lacking: of each customer whose deposit cannot be opened, the name and why.
    """

    given: tuple[SignedAnswer, ...]
    lacking: tuple[tuple[str, str], ...]


def answer(wallet: Wallet, bundle: Path) -> Answers:
    """The openings that a bundle asks of this wallet: of its own words, or of words deposited with it.

    Asking again with the same bundle gives the same openings. A deposit that cannot be opened does not keep others from
    being opened.

    Raises:
      SmarkError: when the bundle is not genuine, asks nothing of this wallet, or asks for a part that was
        opened before.
    """
    signed = bundles.read(bundle)
    if not bundles.genuine(signed):
        cause = "It was changed after its owner signed it: ask for it again."
        raise _validate.fail("licence", "a bundle that its owner signed", "another signature", cause)
    digest, own = bundles.digest(signed.bundle), {documents.digest(one.request.request): one for one in held(wallet)}
    found, lacking, failed = {}, [], None
    for challenge in _asked(wallet, signed.bundle, own):
        name = documents.digest(challenge.request.request)
        try:
            if name in own:
                made = conviction.answer(challenge, digest, own[name].secrets.choices, wallet.identity)
            else:
                made = conviction.answer_deposit(challenge, digest, wallet.identity)
            found[Given(name, digest, challenge.parts)] = made
        except errors.SmarkError as error:
            lacking.append((challenge.request.offer.offer.customer, error.desk))
            failed = error
    if failed and not found:
        raise failed
    _open_once(wallet, tuple(found))
    return Answers(tuple(found.values()), tuple(lacking))


def _asked(wallet: Wallet, bundle: Bundle, own: Collection[str]) -> list[Challenge]:
    """What a bundle asks of this wallet, checked before anything is opened."""
    found: dict[str, Challenge] = {}
    for challenge in bundle.licences or ():
        name, deposit = documents.digest(challenge.request.request), challenge.request.request.deposit
        deposited = bool(deposit) and deposit.arbiter == wallet.identity.public and bool(challenge.pieces)
        if name not in own and not deposited:
            continue
        if name in found:
            cause = "Its owner tries several keys at one word: a bundle of smark asks for each word once."
            raise _validate.fail("licence", "a bundle that asks for each word once", "one that asks twice", cause)
        conviction.check_challenge(challenge, bundle.suspect.content)
        if challenge.request.offer.offer.public_key != bundle.header.public_key:
            cause = "Another owner made this bundle: it cannot ask for openings of your licence."
            raise _validate.fail("licence", "a bundle of the owner who licensed you", "another key", cause)
        found[name] = challenge
    if not found:
        cause = "Only the accused's wallet, or that of the arbiter whom its request names, can answer."
        raise _validate.fail("licence", "a bundle that asks something of this wallet", "another bundle", cause)
    return list(found.values())


def _open_once(wallet: Wallet, new: Sequence[Given]) -> None:
    """Notes that parts are opened for a bundle; refuses parts that were opened for another one."""
    path, known = wallet.folder / OPENED, given(wallet)
    for one, other in itertools.product(known, new):
        again = set(one.parts) & set(other.parts)
        if one.request == other.request and one.bundle != other.bundle and again:
            got = f"part {min(again)}, which was opened for the bundle {one.bundle[:16]}..."
            cause = (
                "Its owner knows that part by now, and could build a suspect that fits. It must ask for another part."
            )
            raise _validate.fail("licence", "parts of the word that nobody has seen", got, cause)
    if added := [one for one in new if one not in known]:
        _io.write(path, _seal(wallet, path, _documents.canonical((*known, *added))), private=True)


def given(wallet: Wallet) -> Sequence[Given]:
    """What this wallet has opened, in order."""
    path = wallet.folder / OPENED
    return _documents.parse(tuple[Given, ...], json.loads(_unseal(wallet, path))) if path.exists() else ()


def _of_package(wallet: Wallet, content: bytes, where: str) -> tuple[Held, str]:
    """The request that a package answers, and the package's digest."""
    named, digest = packages.named(content, where)
    for one in held(wallet):
        if documents.digest(one.request.request) == named:
            return one, digest
    cause = "Is it another customer's, or for another wallet of yours?"
    raise _validate.fail("licence", "a package for a request of this wallet", f"one for {named[:16]}...", cause)


def _write(wallet: Wallet, one: Held) -> None:
    path = wallet.folder / LICENCES / f"{one.request.request.offer}-{one.request.request.attempt}.sealed"
    _io.write(path, _seal(wallet, path, _documents.canonical(one)), private=True)


def _read(wallet: Wallet, path: Path) -> Held:
    return _documents.parse(Held, json.loads(_unseal(wallet, path)))


def _seal(wallet: Wallet, path: Path, content: bytes) -> bytes:
    return keys.seal(keys.derive(wallet.master, "wallet"), content, path.name.encode())


def _unseal(wallet: Wallet, path: Path) -> bytes:
    try:
        return keys.unseal(keys.derive(wallet.master, "wallet"), path.read_bytes(), path.name.encode())
    except InvalidTag:
        cause = "Something changed it: restore the wallet's folder from your backup."
        raise _validate.fail("wallet", f"{path} as smark wrote it", "another content", cause) from None
