"""The owner's side of licences: offers, packages for requests, and challenges in a dispute.

The vault keeps every document of a licence in its folder ``licences``, and in the database the hash of each. The
owner's secrets of an offer are derived from the master key.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from smark_jax import _documents, _io, _validate, keys, licence
from smark_jax._documents import Hash
from smark_jax.licence import conviction, documents, group, segments
from smark_jax.licence.documents import Challenge, Earlier, Offer, RequestFile
from smark_jax.vault import _text, bundles, commitments, crypto, folder, issuing, models, store
from smark_jax.vault.customers import Customer
from smark_jax.vault.documents import Bundle

FOLDER = "licences"
OFFER, REQUEST, PACKAGE, CHALLENGE = "offer", "request", "package", "challenge"
SUFFIX = ".package"
MOST_SERVED = 4
"""After so many requests of a customer an owner serves no other: their copies, averaged, dilute its words."""


class Asked(NamedTuple):
    """A dispute: the suspect's verdict and place in it, the request, the parts asked for, and the bundle's digest."""

    verdict: int
    place: int
    request: Hash
    parts: tuple[int, ...]
    bundle: str


class Packed(NamedTuple):
    """A package: for whom, in which file, and its SHA-256."""

    customer: str
    serial: int
    attempt: int
    file: Path
    sha256: str


def offer(
    model: models.OpenModel, customers: Sequence[Customer], num_segments: int, num_parts: int
) -> list[tuple[Customer, bytes]]:
    """Offers of a model to customers, who get a codeword and a commitment if they have none; again, the same offers.

    Args:
      model: of an open vault.
      customers: registered ones.
      num_segments: the choices of each licence.
      num_parts: the disputes that it bears.

    Raises:
      SmarkError: when there are no customers, the model bears fewer choices, or a customer has another offer.
    """
    _validate.positive("licence", "the number of customers", len(customers))
    coordinates = segments.num_coordinates(model.mark)
    segments.check("licence", coordinates, num_segments, num_parts)
    issuing.license_customers(model, customers)
    held = store.licences(model.vault.connection, model.name, [customer.serial for customer in customers])
    found = []
    for customer in customers:
        rows = store.licence_files(model.vault.connection, model.name, customer.serial)
        if any(row.kind == OFFER for row in rows):
            path = _path(model, customer.serial, OFFER, 0)
            content = path.read_bytes()
            made = documents.loads(documents.SignedOffer, content, str(path)).offer
            if (made.num_segments, made.num_parts) != (num_segments, num_parts):
                got = f"{num_segments:,} choices in {num_parts} parts"
                cause = "A customer has one offer of a model, which never changes: state the same numbers again."
                expected = f"the {made.num_segments:,} choices in {made.num_parts} parts of {customer.name}'s offer"
                raise _validate.fail("licence", expected, got, cause)
            found.append((customer, content))
            continue
        number = held[customer.serial].number
        plain = Offer(
            created=_documents.now(),
            model=model.name,
            customer=customer.name,
            serial=customer.serial,
            number=number,
            root=commitments.get(model.vault, model.name, number).root,
            public_key=crypto.public_key(model.vault.master),
            point=group.times_base(licence.scalar(_key(model, customer.serial))).hex(),
            num_segments=num_segments,
            num_parts=num_parts,
        )
        content = documents.dumps(licence.sign_offer(plain, crypto.signing_key(model.vault.master)))
        _keep(model, customer.serial, OFFER, 0, documents.digest(plain), content)
        found.append((customer, content))
    return found


def without_word(model: models.OpenModel, customers: Sequence[Customer]) -> list[str]:
    """The names of customers who also have a copy without a secret word."""
    rows = store.copies(model.vault.connection, model.name, [customer.serial for customer in customers])
    serials = {serial for serial, _ in rows}
    return [customer.name for customer in customers if customer.serial in serials]


def pack(
    model: models.OpenModel,
    requests: Sequence[tuple[str, RequestFile]],
    out: Path,
    *,
    on_step: Callable[[int], None] = lambda count: None,
) -> list[Packed]:
    """Writes a package for each request.

    Args:
      model: of an open vault.
      requests: with the names of their files.
      out: folder for the packages, made if absent.
      on_step: called with the number done.

    Raises:
      SmarkError: when a request is not whole, answers no offer of this model, comes from somebody else than an earlier
        one under the same offer, or is older than one that was served; when two are of the same customer.
    """
    serials = [file.request.offer.offer.serial for _, file in requests]
    if twice := next((i for i, serial in enumerate(serials) if serial in serials[:i]), None):
        cause = "Serve the newest alone: a customer has one copy."
        raise _validate.fail("issue", "one request of each customer", f"another one in {requests[twice][0]}", cause)
    packed = []
    with issuing.alone(model.vault):  # what is checked holds until it is noted
        for name, file in requests:  # all are checked before anything is written
            _check(model, name, file)
        out.mkdir(parents=True, exist_ok=True)
        for done, (_, file) in enumerate(requests):
            on_step(done)
            packed.append(_pack(model, file, out))
    on_step(len(requests))
    return packed


def _pack(model: models.OpenModel, file: RequestFile, out: Path) -> Packed:
    signed = file.request
    about, attempt = signed.offer.offer, signed.request.attempt
    serial, master = about.serial, model.vault.master
    content = licence.package(
        signed,
        model.base,
        model.mark,
        model.words([serial])[0],
        _key(model, serial),
        crypto.signing_key(master),
        strength=store.licences(model.vault.connection, model.name, [serial])[serial].strength,
        write=model.form.make,
        suffix=model.form.suffix,
    )
    rows = store.licence_files(model.vault.connection, model.name, serial)
    if not any((row.kind, row.number) == (REQUEST, attempt) for row in rows):
        _keep(model, serial, REQUEST, attempt, documents.digest(signed.request), documents.dumps(file))
    path = out / _text.file_name(serial, about.customer, SUFFIX)
    _io.write(path, content, private=True)
    sha256 = documents.sha256(content)
    details = {"serial": serial, "attempt": attempt, "sha256": sha256}
    folder.record(model.vault, "package made", {}, model=model.name, **details)
    return Packed(about.customer, serial, attempt, path, sha256)


def _check(model: models.OpenModel, name: str, file: RequestFile) -> None:
    """Refuses a request that is not whole, or that the vault cannot serve."""
    signed = file.request
    licence.check(signed, tuple(map(bytes.fromhex, file.pieces)))
    about, request = signed.offer.offer, signed.request
    rows = store.licence_files(model.vault.connection, model.name, about.serial)
    offers = [row.sha256 for row in rows if row.kind == OFFER]
    if about.model != model.name or request.offer not in offers:
        cause = "Is it for another model or vault? 'smark licence offer' makes the offers that customers answer."
        raise _validate.fail("issue", f"a request under an offer of {model.name}", f"another one in {name}", cause)
    served = {row.number: row.sha256 for row in rows if row.kind == REQUEST}
    if served:
        first = _file(model, about.serial, min(served)).request.request
        if first.identity != request.identity:
            cause = "Somebody else answers under this customer's name: ask the customer for the fingerprint of its key."
            raise _validate.fail("issue", "the key that signed the first request", f"another one in {name}", cause)
        newest = max(served)
        if len({*served, request.attempt}) > MOST_SERVED:
            cause = "Each request that was served is another copy. Find out why packages arrive damaged."
            raise _validate.fail("issue", f"at most {MOST_SERVED} requests of a customer", f"one more in {name}", cause)
        known = served.get(request.attempt, documents.digest(request)) == documents.digest(request)
        if request.attempt < newest or not known:
            cause = "An older request was withdrawn by its customer, or a second one has the same number."
            raise _validate.fail("issue", f"attempt {newest} or a later one", f"attempt {request.attempt}", cause)


def challenges(
    model: models.OpenModel, serials: Sequence[int], suspect: str, num_parts: int, about: tuple[int, int]
) -> list[Challenge]:
    """What to ask of the accused: parts of the word of each request that was served; nothing without a licence.

    A customer who complained of a package that was whole has two copies, and may have leaked either. A dispute about
    the same suspect of the same verdict asks for the same parts again.

    Args:
      model: of an open vault.
      serials: of the accused.
      suspect: the content hash of the suspect.
      num_parts: how many parts of each word to ask for; 0 asks nothing.
      about: the number of the verdict, and the suspect's place in it.

    Raises:
      SmarkError: when fewer parts are left.
    """
    found = []
    for serial, attempt in _served(model, serials) if num_parts else ():
        file = _file(model, serial, attempt)
        digest, num_all = documents.digest(file.request.request), file.request.offer.offer.num_parts
        before = [one for one in asked(model, serial) if one.request == digest]
        same = next((i for i, one in enumerate(before) if (one.verdict, one.place) == about), len(before))
        earlier = tuple(Earlier(part, one.bundle) for one in before[:same] for part in one.parts)
        taken = {one.part for one in earlier}
        left = [part for part in conviction.order(suspect, file.request) if part not in taken]
        if num_parts > len(left):
            cause = "A part that was opened serves no second dispute. Export the owner's own evidence alone: --parts 0."
            raise _validate.fail("evidence", f"{num_parts} part(s) to open", f"{len(left)} left", cause)
        parts = tuple(left[:num_parts])
        own = segments.part_keys(_key(model, serial), digest, num_all)
        pieces = tuple(file.pieces[part] for part in parts) if file.pieces else ()
        found.append(Challenge(file.request, parts, tuple(own[p].to_bytes().hex() for p in parts), earlier, pieces))
    return found


def kept(
    model: models.OpenModel, asking: Sequence[Challenge], bundle: Bundle, content: bytes, about: tuple[int, int]
) -> bytes:
    """Notes which parts a bundle asks for, and keeps it; gives the kept one where the same was asked before.

    An accused answers one bundle, so a second one that asks for the same parts would be refused.

    Args:
      model: of an open vault.
      asking: the challenges.
      bundle: the bundle.
      content: its file's.
      about: the number of its verdict, and the suspect's place.

    Raises:
      SmarkError: when the same dispute asked for other parts, for those of others or under other commitments, or the
        bundle is too large to be read.
    """
    wanted = {documents.digest(one.request.request): one for one in asking}
    serials = {one.request.offer.offer.serial for one in asking}
    before = [one for serial in serials for one in asked(model, serial) if (one.verdict, one.place) == about]
    if before:
        names = {one.bundle for one in before}
        if len(names) > 1 or {one.request: one.parts for one in before} != {d: one.parts for d, one in wanted.items()}:
            cause = "Trace the suspect again for a new dispute, which opens further parts."
            got = "a request for other parts than the bundle that was exported before"
            raise _validate.fail("evidence", "one bundle for each suspect of a verdict", got, cause)
        path = _bundle(model, names.pop())
        numbers = [[item.commitment.number for item in one.chain] for one in (bundles.read(path).bundle, bundle)]
        if numbers[0] != numbers[1]:
            cause = f"It opens words under the commitments from {numbers[0][0]}: state the same --commitment as then."
            raise _validate.fail("evidence", "one bundle for each suspect of a verdict", "other commitments", cause)
        return path.read_bytes()
    if len(content) > bundles.LARGEST:
        cause = "The words of all the accused are too long together: export without asking for them, by --parts 0."
        expected = f"evidence of at most {bundles.LARGEST:,} bytes, which is what is read"
        raise _validate.fail("evidence", expected, f"{len(content):,}", cause)
    digest = bundles.digest(bundle)
    _bundle(model, digest).parent.mkdir(exist_ok=True)
    _io.write(_bundle(model, digest), content, private=True)
    count = {serial: len(asked(model, serial)) for serial in serials}
    rows = []
    for request, one in wanted.items():
        serial = one.request.offer.offer.serial
        count[serial] += 1
        details = _documents.text(Asked(*about, request, one.parts, digest))
        rows.append((model.name, serial, CHALLENGE, count[serial], digest, details))
    folder.record(model.vault, "word challenged", {"licence_files": rows}, model=model.name, bundle=digest)
    return content


def _served(model: models.OpenModel, serials: Sequence[int]) -> list[tuple[int, int]]:
    """Serial and attempt of each request of these customers that was served."""
    rows = [row for serial in serials for row in store.licence_files(model.vault.connection, model.name, serial)]
    return [(row.serial, row.number) for row in rows if row.kind == REQUEST]


def asked(model: models.OpenModel, serial: int) -> list[Asked]:
    """The disputes with a customer, in order."""
    rows = store.licence_files(model.vault.connection, model.name, serial)
    return [_documents.parse(Asked, json.loads(row.details)) for row in rows if row.kind == CHALLENGE]


def _bundle(model: models.OpenModel, digest: str) -> Path:
    return model.vault.folder / FOLDER / f"{digest}.json"


def _key(model: models.OpenModel, serial: int) -> keys.SecretKey:
    """The owner's secret of one customer's offer."""
    return keys.derive(model.vault.master, model.name, "licence", str(serial))


def _file(model: models.OpenModel, serial: int, attempt: int) -> RequestFile:
    path = _path(model, serial, REQUEST, attempt)
    found = documents.loads(RequestFile, path.read_bytes(), str(path))
    rows = store.licence_files(model.vault.connection, model.name, serial)
    known = {row.sha256 for row in rows if (row.kind, row.number) == (REQUEST, attempt)}
    if documents.digest(found.request.request) not in known:
        cause = "Restore the vault's folder from your backup."
        raise _validate.fail("vault", f"the request in {path} as it was served", "another one", cause)
    return found


def _path(model: models.OpenModel, serial: int, kind: str, number: int) -> Path:
    return model.vault.folder / FOLDER / f"{model.name}-{serial}-{kind}-{number}.json"


def _keep(model: models.OpenModel, serial: int, kind: str, number: int, digest: str, content: bytes) -> None:
    path = _path(model, serial, kind, number)
    path.parent.mkdir(exist_ok=True)
    _io.write(path, content, private=True)
    rows = {"licence_files": [(model.name, serial, kind, number, digest, "")]}
    folder.record(model.vault, f"licence: {kind}", rows, model=model.name, serial=serial)
