"""``smark draw``: commits to the owner's own words, and draws the codewords by a public value that comes later."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from smark_jax import _io, _validate
from smark_jax.cli import _common, _outputs
from smark_jax.cli._common import AsJson, PassphraseFile, VaultPath, say

if TYPE_CHECKING:
    from smark_jax.vault import documents


def draw(
    vault: VaultPath,
    name: _common.ModelName,
    out: Annotated[Path | None, typer.Option(help="Write the draft, to be published.", show_default=False)] = None,
    timestamp_request: Annotated[
        Path | None, typer.Option(help="With --out: write an RFC 3161 request for the draft, to send to an authority.")
    ] = None,
    capacity: Annotated[
        int | None,
        typer.Option(min=1, help="With --out: for how many customers of the vault, at most; 65,536 by default."),
    ] = None,
    token: Annotated[
        Path | None, typer.Option(help="Draw by the authority's answer about the draft (DER).", show_default=False)
    ] = None,
    beacon: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Draw by a public beacon's value from after the draft's publication: 'NAME round NUMBER: HEX'.",
            show_default=False,
        ),
    ] = None,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Draw a model's codewords, so that an arbiter can check that you did not choose them. Do it before the first copy.

    First, --out writes a draft: a commitment to words of your own. Publish it, or have it time-stamped. Then --token or
    --beacon brings a value that you could not foresee, and each codeword becomes your own word XOR a public one.

    Without either option, it says whether the model's words are drawn. A draft covers the vault's first customers, by
    --capacity; the model can be issued to no others.
    """
    _check(vault, out, timestamp_request, capacity, token, beacon, passphrase_file)
    with _common.desk(vault, passphrase_file) as desk:
        from smark_jax.vault import drafts, models, timestamps

        model = models.get(desk, name)
        if out:
            with _common.bar(f"drafting the words of {name}", capacity or drafts.CAPACITY) as done:
                draft = drafts.draft(model, capacity, done)
            _io.write(out, draft.published, private=True)
            if timestamp_request:
                _io.write(timestamp_request, timestamps.request(draft), private=True)
        elif token or beacon:
            drafts.record(
                model, drafts.by_token(model, token.read_bytes()) if token else drafts.by_beacon(beacon or "")
            )
        state = _state(name, drafts.get(model), model.draw)
    state = state._replace(
        draft=str(out) if out else None, timestamp_request=str(timestamp_request) if timestamp_request else None
    )
    _common.show(state, as_json, lambda: _say(vault, state))


def _check(
    vault: Path,
    out: Path | None,
    request: Path | None,
    capacity: int | None,
    token: Path | None,
    beacon: str | None,
    passphrase_file: Path | None,
) -> None:
    """Refuses options that do not go together, and outputs that would overwrite something."""
    if sum(option is not None for option in (out, token, beacon)) > 1:
        raise typer.BadParameter("name one of --out, --token and --beacon: the draft comes first", param_hint="--out")
    if out is None and (request is not None or capacity is not None):
        raise typer.BadParameter("--timestamp-request and --capacity go with --out", param_hint="--out")
    if out is not None:
        _outputs.check("--out", out, (passphrase_file,), vault)
    if request is not None:
        _outputs.check("--timestamp-request", request, (out, passphrase_file), vault)
    if request is not None or token is not None:
        with _validate.needs("draw", "timestamps"):
            import rfc3161_client  # noqa: F401 - checked before the draft is made


class _State(NamedTuple):
    """What ``draw`` states about a model: its draft and what its words were drawn with."""

    model: str
    drawn: bool
    root: str | None
    capacity: int | None
    source: str | None
    draft: str | None = None
    timestamp_request: str | None = None


def _state(name: str, draft: "documents.Draft | None", draw: "documents.Draw | None") -> _State:
    source = None
    if draw and draw.token:
        source = f"time stamp of {draw.token.time}"
    elif draw and draw.beacon:
        source = f"{draw.beacon.name} round {draw.beacon.round}"
    return _State(
        name, draw is not None, draft.root if draft else None, draft.header.capacity if draft else None, source
    )


def _say(vault: Path, state: _State) -> None:
    name = state.model
    if state.drawn:
        say(f"The codewords of {name} are drawn: {state.source}, for {state.capacity:,} customers at most.")
        say(f"Draft, with root {state.root}.")
        say("Keep the draft published, so that an arbiter sees that it came before.")
    elif state.root is None:
        say(f"The codewords of {name} are not drawn: that you did not choose them is taken on your word.")
        say(f"To draw them, before the first copy: smark draw {vault} {name} --out DRAFT.json")
    else:
        where = f" in {state.draft}" if state.draft else ""
        say(f"The draft of {name}{where} covers {state.capacity:,} customers. Its root:")
        say(f"  {state.root}")
        request = f": {state.timestamp_request}" if state.timestamp_request else ""
        say(f"Publish the draft{where}, and then draw, before the first copy:")
        say(f"  send a time-stamp request to an authority{request}; smark draw {vault} {name} --token RESPONSE")
        say(f"  or wait for a beacon's next value: smark draw {vault} {name} --beacon 'NAME round NUMBER: HEX'")
