"""The documents of licences: what is hashed and signed, and what is refused."""

import licence_reference as reference
import pytest
from licences import ARBITER, BUNDLE, CUSTOMER, MALLORY, SUSPECT, challenge, offer

from smark_jax import errors, licence
from smark_jax.licence import documents, group, requests
from smark_jax.licence.documents import Deposit

NEUTRAL = (1).to_bytes(32, "little").hex()


@pytest.fixture(scope="module")
def made():
    return licence.request(offer(), CUSTOMER, 1, ARBITER.public)


def signed_by(identity, terms, request):
    """A request that another customer signs as its own."""
    request = request._replace(identity=identity.public.identity)
    return licence.SignedRequest(terms, request, documents.sign(identity.signing, request))


def refused(call, *args, match=None, kind=errors.SmarkError):
    with pytest.raises(kind, match=match) as caught:
        call(*args)
    assert str(caught.value).count("expected ") == 1, str(caught.value)


def test_an_arbiter_opens_no_deposit_for_a_stranger_who_copied_it(made):
    """The owner holds all sealed parts. Under a request of a friend's they must tell the arbiter nothing."""
    copied = signed_by(MALLORY, made.request.offer, made.request.request)
    licence.check(copied, made.pieces)
    asked = challenge(copied, made.pieces)
    licence.check_challenge(asked, SUSPECT)
    refused(licence.answer_deposit, asked, BUNDLE, ARBITER, match="deposit that opens")


def test_keys_under_which_anybody_can_sign_are_refused(made):
    """With the neutral element as key, R = sB is a signature of every message; the owner could answer, too."""
    scalar = (5).to_bytes(32, "little")
    forged = (group.times_base(scalar) + scalar).hex()
    request = made.request.request._replace(identity=NEUTRAL)
    refused(licence.check, licence.SignedRequest(made.request.offer, request, forged), match="customer signed")
    terms = made.request.offer.offer._replace(public_key=NEUTRAL)
    refused(licence.check_offer, licence.SignedOffer(terms, forged), match="owner signed")


@pytest.mark.parametrize("pieces", [(), ("00" * 32,) * 7, ("00" * 32,) * 9])
def test_a_deposit_has_all_parts(made, pieces):
    request = made.request.request._replace(deposit=Deposit(ARBITER.public, pieces))
    signed = signed_by(CUSTOMER, made.request.offer, request)
    refused(licence.check, signed, match="deposit of 8 parts")
    refused(licence.check_challenge, challenge(signed), SUSPECT, match="deposit of 8 parts")


@pytest.mark.parametrize("fields", [{"deposits": "00" * 32}, {"deposits": "01" + "00" * 31}, {"identity": NEUTRAL}])
def test_a_deposit_is_to_keys_that_can_open_it_and_sign(made, fields):
    nobody = ARBITER.public._replace(**fields)
    request = made.request.request._replace(deposit=Deposit(nobody, made.request.request.deposit.pieces))
    refused(licence.check, signed_by(CUSTOMER, made.request.offer, request), match="keys that open deposits")
    refused(licence.request, made.request.offer, CUSTOMER, 1, nobody, match="keys that open deposits")


_EIGHTH = reference.decode(bytes.fromhex("c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a"))
NO_POINTS = {
    "the neutral element": NEUTRAL,
    "order 2": "ec" + "ff" * 30 + "7f",
    "order 4": "00" * 32,
    "order 4 with the sign": "00" * 31 + "80",
    "order 8": reference.encode(_EIGHTH).hex(),
    "1 as 2^255 - 18": "ee" + "ff" * 30 + "7f",
    "1 with the sign": "01" + "00" * 30 + "80",
    "off the curve": "02" + "00" * 31,
    "ones": "ff" * 32,
    "mixed order": reference.encode(reference.add(reference.BASE, _EIGHTH)).hex(),
    "a point less": "",
    "half a point": "58" * 16,
}


@pytest.mark.parametrize("name", NO_POINTS)
def test_what_is_no_point_of_the_group_is_refused_wherever_it_stands(made, name):
    """Another order would tell a customer's choice to an owner, or an owner's scalar modulo 8 to a customer."""
    text, plain, terms = NO_POINTS[name], made.request.request, made.request.offer
    assert text == "" or not reference.is_point(bytes.fromhex(text).ljust(32, b"\0"))
    points = plain.points[: 64 * 5] + text + plain.points[64 * 6 :]
    refused(licence.check, signed_by(CUSTOMER, terms, plain._replace(points=points)), match="points")
    if len(text) == 64:
        refused(licence.check, signed_by(CUSTOMER, terms, plain._replace(rest=text)), match="points of the group")
        refused(licence.check_offer, offer(point=text), match="point of the group")
        forged = offer(public_key=text)
        refused(licence.check_offer, forged, match="owner signed")


@pytest.mark.parametrize(
    "fields", [{"attempt": 0}, {"offer": "00" * 32}, {"points": ""}, {"rest": CUSTOMER.public.deposits}]
)
def test_other_requests_are_refused(made, fields):
    refused(licence.check, signed_by(CUSTOMER, made.request.offer, made.request.request._replace(**fields)))


def test_a_point_that_comes_twice_is_refused(made):
    points = made.request.request.points
    twice = made.request.request._replace(points=points[:64] * 2 + points[128:])
    refused(licence.check, signed_by(CUSTOMER, made.request.offer, twice), match="all different")


@pytest.mark.parametrize("attempt", [0, -1, True, 1.5, "1"])
def test_a_customer_counts_its_words_from_one(attempt):
    refused(licence.request, offer(), CUSTOMER, attempt, match="attempt")


@pytest.mark.parametrize(
    ("number", "parts", "ok"),
    [
        *((64, 1, True), (64, 64, True), (63, 1, False), (72, 8, True), (68, 8, False), (512, 256, True)),
        *((1024, 512, False), (65536, 8, True), (65544, 8, False), (2**62, 8, False), (0, 8, False)),
        *((64, 0, False), (64, 2**62, False)),
    ],
)
def test_numbers_of_choices_and_parts(number, parts, ok):
    if ok:
        licence.check_offer(offer(number, parts))
    else:
        refused(licence.check_offer, offer(number, parts), match="in equal parts")


def opened(answer, **fields):
    """The answer with its first part's openings changed."""
    first, *others = answer.opened
    return answer._replace(opened=(first._replace(**fields), *others))


def flipped(text, bit):
    content = bytearray.fromhex(text)
    content[bit // 8] ^= 128 >> bit % 8
    return content.hex()


def test_openings_with_a_chip_or_a_scalar_changed_do_not_fit():
    """Twelve choices a part: the last four bits of two bytes are padding, and must be zero."""
    made = licence.request(offer(96), CUSTOMER)
    asked = challenge(made.request)
    plain = licence.answer(asked, BUNDLE, made.secrets.choices, CUSTOMER).answer
    (one,) = plain.opened

    def read(**fields):
        answer = opened(plain, **fields)
        signed = documents.SignedAnswer(answer, documents.sign(CUSTOMER.signing, answer))
        return licence.opened_word(asked, signed, BUNDLE)

    assert len(read()[one.part]) == 12
    for bit in range(16):
        refused(lambda bit=bit: read(bits=flipped(one.bits, bit)), match="openings of the points")
    order = 2**252 + 27742317777372353535851937790883648493
    scalar = int.from_bytes(bytes.fromhex(one.scalars)[:32], "little")
    for other in (scalar + 1, scalar + order, 0):
        text = other.to_bytes(32, "little").hex() + one.scalars[64:]
        refused(lambda text=text: read(scalars=text), match="openings of the points")
    for fields in ({"bits": ""}, {"bits": one.bits + "00"}, {"scalars": ""}, {"scalars": one.scalars[:-2]}):
        refused(lambda fields=fields: read(**fields), match="openings of the points")


def test_a_false_deposit_is_shown_by_the_arbiters_answer(made, monkeypatch):
    """Whoever deposits openings of other points, or a part of them, is found out by anybody."""
    true = requests.openings
    cuts = {
        "other": lambda text: bytes([text[0] ^ 1]) + text[1:],
        "short": lambda text: text[:40],
        "none": lambda text: b"",
    }
    for cut in cuts.values():
        monkeypatch.setattr(requests, "openings", lambda choices, numbers, cut=cut: cut(true(choices, numbers)))
        false = licence.request(offer(), CUSTOMER, 1, ARBITER.public)
        licence.check(false.request, false.pieces)
        asked = challenge(false.request, false.pieces)
        licence.check_challenge(asked, SUSPECT)
        answer = licence.answer_deposit(asked, BUNDLE, ARBITER)
        refused(licence.opened_word, asked, answer, BUNDLE, match="deposit that does not fit")
    monkeypatch.undo()
    asked = challenge(made.request, made.pieces)
    honest = licence.answer_deposit(asked, BUNDLE, ARBITER)
    own = licence.answer(asked, BUNDLE, made.secrets.choices, CUSTOMER)
    ours, theirs = (licence.opened_word(asked, one, BUNDLE) for one in (own, honest))
    assert ours.keys() == theirs.keys() and all((ours[part] == theirs[part]).all() for part in ours)
    lied = opened(honest.answer, bits=flipped(honest.answer.opened[0].bits, 0))
    lied = documents.SignedAnswer(lied, documents.sign(ARBITER.signing, lied))
    refused(licence.opened_word, asked, lied, BUNDLE, match="the openings that the customer deposited")
