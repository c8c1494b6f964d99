"""The checks of drawn codewords: draft, public value, and each opened word; and what is taken on trust about them."""

import numpy as np

from smark_jax import errors
from smark_jax.vault import drafts, merkle, versions
from smark_jax.vault._checks import DRAWN, Checks, Fails, fails, refuse, require
from smark_jax.vault.documents import Bundle, Draft, Drawn, DrawNamed, Opened


def check(checks: Checks, bundle: Bundle) -> None:
    """Checks that the opened codewords are those that the public value drew from the draft; nothing without a draw.

    Raises:
      MissingExtra: when the draft's time stamp cannot be read here.
    """
    drawn, named = bundle.drawn, bundle.header.draw
    if not drawn and not named and not any(opened.own for opened in bundle.opened):
        return
    draft, value, words = DRAWN
    with checks.check(draft, f"root {named.root if named else ''}, with the settings of the commitment"):
        if not named:
            raise Fails("the commitment names no draft: codewords were not drawn from it")
        if not drawn:
            raise Fails("the commitment names a draft, which is not in the bundle")
        _check_draft(bundle, drawn.draft, named)
    if not drawn or not named:
        return
    with checks.check(value, _source(drawn)):
        _check_value(bundle, drawn, named)
    with checks.check(words, f"{len(bundle.opened)} opened, each the own word of the draft XOR the public word"):
        for opened in bundle.opened:
            _check_word(bundle, drawn, opened)


def _check_draft(bundle: Bundle, draft: Draft, named: DrawNamed) -> None:
    """Requires the draft that the commitment names, made for the same settings."""
    header = bundle.header
    leads = merkle.proves(drafts.header_leaf(draft.header), 0, draft.header.capacity + 1, draft.header_path, draft.root)
    require(leads, "its header does not lead to its root")
    require(draft.root == named.root, "the commitment names another draft")
    ours, theirs = header._replace(versions=header.algorithms)._asdict(), draft.header._asdict()
    other = [name for name in theirs if name in ours and name != "created" and ours[name] != theirs[name]]
    require(not other, f"it was made for another model: {', '.join(other)}")


def _check_value(bundle: Bundle, drawn: Drawn, named: DrawNamed) -> None:
    """Requires the value that the commitment names, from a source that it follows from, and before any time stamp."""
    draw = drawn.draw
    require(draw.key.to_bytes().hex() == named.value, "the commitment names another value")
    try:
        wrong = drafts.wrong(drawn.draft, draw)
    except errors.MissingExtra:
        raise
    except errors.SmarkError as error:
        raise fails(error) from None
    refuse(wrong)
    earliest = draw.token.time if draw.token else ""
    for item in bundle.chain:
        early = [stamp.time for stamp in item.timestamps if stamp.time < earliest]
        require(not early, f"commitment {item.commitment.number} was stamped before the draft that it names")


def _check_word(bundle: Bundle, drawn: Drawn, opened: Opened) -> None:
    """Requires that an opened codeword is the own word under the draft's root, XOR the public word of its serial."""
    leaf, own, header = opened.leaf, opened.own, bundle.header
    size = -(-header.num_chips // 8)
    if not own:
        raise Fails(f"the own word of {leaf.customer!r} was not opened")
    require(len(leaf.word) == len(own.word) == 2 * size, "a word has the wrong length")
    draft = drawn.draft
    require(leaf.serial < draft.header.capacity, f"the serial of {leaf.customer!r} is beyond the draft's")
    hashed = drafts.leaf(leaf.serial, bytes.fromhex(own.salt), bytes.fromhex(own.word))
    there = merkle.proves(hashed, leaf.serial + 1, draft.header.capacity + 1, own.path, draft.root)
    require(there, f"the own word of {leaf.customer!r} is not under the draft's root")
    code = versions.CODES[header.algorithms.code]
    public = np.packbits(np.asarray(code.words(drawn.draw.key, [leaf.serial], header.num_chips))[0] < 0)
    issued = np.frombuffer(bytes.fromhex(own.word), np.uint8) ^ public
    require(
        issued.tobytes() == bytes.fromhex(leaf.word), f"the word of {leaf.customer!r} was not drawn: another follows"
    )


def _source(drawn: Drawn) -> str:
    """Where the public value came from, in words."""
    token, beacon = drawn.draw.token, drawn.draw.beacon
    if token:
        return f"the signature of a time stamp of the draft, {token.time}"
    return f"of {beacon.name!r}, round {beacon.round!r}" if beacon else "of an unnamed source"


def statements(bundle: Bundle) -> tuple[str, ...]:
    """What an arbiter takes on trust about how codewords came about."""
    if not bundle.drawn:
        return ("that codewords were drawn at random, and neither chosen nor drawn again until one fitted",)
    token, beacon = bundle.drawn.draw.token, bundle.drawn.draw.beacon
    source = "that the source of the public value is as stated"
    if token:
        source = (
            f"that the time stamp of the draft, {token.time}, has the authority's own signature, which nobody could "
            "foresee: check it by 'openssl ts -verify'"
        )
    elif beacon:
        source = (
            f"that {beacon.name!r} published this value as its round {beacon.round!r}, after the draft was published, "
            "and that nobody could foresee it"
        )
    return (
        source,
        "that the owner tried no other drafts and values before these: q tries multiply p-values by q at most",
    )
