"""``smark issue``: writes a copy for each customer."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from smark_jax import _io, _validate
from smark_jax.cli import _common, _licence, _names, _outputs
from smark_jax.cli._common import AsJson, PassphraseFile, VaultPath, say

if TYPE_CHECKING:
    from smark_jax.vault import Vault, issuing, trials
    from smark_jax.vault.customers import Customer
    from smark_jax.vault.models import OpenModel

_SHOWN = 10


def issue(
    vault: VaultPath,
    name: _common.ModelName,
    out: Annotated[Path, typer.Option(help="Folder for the copies; made if absent.", show_default=False)],
    customers: _names.Customers = None,
    csv: _names.Csv = None,
    column: _names.Column = None,
    heading: _names.Heading = None,
    everybody: Annotated[bool, typer.Option("--all", help="Issue to all registered customers.")] = False,
    request: Annotated[
        list[Path] | None,
        typer.Option(help="A customer's licence request; repeatable. Writes packages in place of copies."),
    ] = None,
    strength: Annotated[float | None, typer.Option(help="Strength of these copies; by default the model's.")] = None,
    teach: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="Teach copies to answer the model's probes. FUNCTION() returns (apply_fn, training_images) of the "
            "base's network; images are uint8 and need no labels.",
        ),
    ] = None,
    network: _common.Network = None,
    images: _common.Images = None,
    timestamp_request: Annotated[
        Path | None, typer.Option(help="Write an RFC 3161 request for the commitment, to send to an authority.")
    ] = None,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Issue a model: write one copy per customer, named by serial and customer, in the form of the base.

    To complete a run that was killed, repeat the command. A customer who has a copy gets the same one again. Before the
    first new copy is written, a commitment to all customers' codewords is made: publish its root, or have it
    time-stamped, before you hand the copies over. With --teach a copy takes longer, and 'smark query' can trace it.

    A copy differs from the base's file only in the bytes of its carrying leaves. With --network, by default that of
    --teach, each copy is run on up to 256 images before it is written: what it costs is printed, and a copy that
    answers NaN is not written. Its customer keeps the serial.

    With --request, the customer gets a package in place of a copy: see 'smark licence'.
    """
    _outputs.check("--out", out, vault=vault, folder=True)
    if request:
        others = (customers, csv, everybody, strength, teach, network, images, timestamp_request)
        _licence.pack(vault, name, request, out, passphrase_file, as_json, alone=not any(others))
        return
    if timestamp_request:
        _outputs.check("--timestamp-request", timestamp_request, (csv, passphrase_file), vault)
        with _validate.needs("issue", "timestamps"):
            import rfc3161_client  # noqa: F401 - checked now; it writes the request after the copies
    names = [*(customers or []), *_names.read(csv, column, heading)]
    with _common.desk(vault, passphrase_file) as desk:
        from smark_jax.vault import commitments, evidence, issuing, models, openings, probes, timestamps, trials
        from smark_jax.vault import customers as registry

        model = models.get(desk, name)
        if not names and not everybody:
            raise typer.BadParameter("name customers, or pass --csv or --all", param_hint="CUSTOMER")
        # Load networks first: if one fails, no customer must have been registered.
        teaching = trials.network(*_common.network("teach", teach)) if teach else None
        runs = _common.runnable(network, images, model.base_file) or teaching
        spared = model.settings.shape.images if model.settings.shape else 0
        trial = trials.Running(runs, model.base, spared) if runs else None
        known = _everybody(desk, model) if everybody else []
        chosen = registry.resolve(desk, list(dict.fromkeys(names))) if names else []
        everyone = sorted(set(chosen) | set(known))
        waiting = lambda: _common.err.print("another smark issues from this vault; waiting for it")  # noqa: E731
        seen = len(openings.published(desk.connection, name))
        _warn_before(model, evidence.exports(desk, name), seen, teach is None and probes.there(model))
        with _common.bar(f"issuing {name}", len(everyone)) as done:
            copies = 0

            def finished(count: int) -> None:
                nonlocal copies
                copies = count
                done(count)

            share = lambda part: done(copies + part)  # noqa: E731
            teacher = probes.teacher(model, *teaching[:2], on_share=share) if teaching else None
            settings = {"strength": strength, "teach": teacher, "trial": trial}
            issued = issuing.issue(model, everyone, out, **settings, on_copy=finished, on_wait=waiting)
        _warn(model, issued)
        path = commitments.file(desk, issued.commitment)
        if timestamp_request:
            _io.write(timestamp_request, timestamps.request(issued.commitment), private=True)
    made, wanted = issued.commitment, str(timestamp_request) if timestamp_request else None
    report = _Report(
        model=name,
        out=str(out),
        customers=len(everyone),
        licensed=issued.new,
        written=issued.written,
        files=tuple(map(str, issued.files)),
        commitment=_Commitment(made.number, made.root, made.header.created, str(path)),
        trial=issued.trial,
        timestamp_request=wanted,
    )
    _common.show(report, as_json, lambda: _say(vault, issued, report))


def _everybody(desk: "Vault", model: "OpenModel") -> "list[Customer]":
    """All registered customers but those with an offer of a licence; says how many these are."""
    from smark_jax.vault import customers as registry
    from smark_jax.vault import issuing

    offered = issuing.to_request(model)
    if offered:
        _common.warn(
            f"{len(offered):,} customers have an offer of a licence and are left out: --request makes their copies."
        )
    return [customer for customer in registry.registered(desk) if customer.serial not in offered]


class _Commitment(NamedTuple):
    """The commitment to the customers' codewords, and its file for publication."""

    number: int
    root: str
    created: str
    file: str


class _Report(NamedTuple):
    """What ``issue`` states about its copies."""

    model: str
    out: str
    customers: int
    licensed: int
    written: int
    files: tuple[str, ...]
    commitment: _Commitment
    trial: "trials.Trial | None"
    timestamp_request: str | None


def _warn_before(model: "OpenModel", exports: Sequence[str], seen: int, untaught: bool) -> None:
    """Warns of reasons for which the owner may want to stop; ``seen`` is how many pieces of the carrier are opened."""
    name = model.settings.name
    if seen and (secret := (of := model.mark.carrier.num_pieces) - seen) > 0:
        _common.warn(
            f"evidence opened {seen} of the {of} pieces of this model's carrier to everybody who saw it: new copies "
            f"rest on the other {secret}."
        )
    elif exports:
        _common.warn(
            f"evidence of {exports[-1]} opened this model's carrier to everybody who saw it; add the model under "
            "another name for new customers."
        )
    if untaught:
        _common.warn(f"{name} has probes, but without --teach its copies cannot be traced by their answers.")


def _warn(model: "OpenModel", issued: "issuing.Issued") -> None:
    """Warns of problems that make these copies of little use."""
    from smark_jax.vault import models

    settings, customers = model.settings, issued.commitment.header.customers
    if issued.unfit:
        leaf, role = next(iter(issued.unfit.items()))
        _common.warn(
            f"{settings.name} was added by an older version and marks {len(issued.unfit)} leaves that should stay as "
            f"they are, such as {leaf} ({role}): copies may answer wrongly. Add the base again under another name, and "
            "issue from that; copies of this one are still traced."
        )
    if settings.num_chips < (fewest := models.fewest_chips(settings.alpha, customers)):
        _common.warn(
            f"{settings.name} has {settings.num_chips} chips, but accusing one of {customers:,} customers at alpha "
            f"{settings.alpha:g} takes {fewest}: no copy can be traced."
        )


def _say(vault: Path, issued: "issuing.Issued", report: _Report) -> None:
    """Prints what was issued, and what to do next."""
    commitment = issued.commitment
    say(f"{report.customers:,} copies in {report.out}, {issued.written:,} of them written now:")
    for file in issued.files[:_SHOWN]:
        say(f"  {file.name}")
    if len(issued.files) > _SHOWN:
        say(f"  and {len(issued.files) - _SHOWN:,} more")
    if issued.trial:
        say(_answered(issued.trial))
        _costs(issued.trial)
    if issued.trial and issued.written < report.customers:
        say("Copies that existed already were not run. To run one, move its file away, and issue it again.")
    elif not issued.written:
        say("All of them existed already, and were not run.")
    elif not issued.trial:
        say("They were not run: with --network, issue says what each copy costs, and refuses one that answers NaN.")
    say(f"Commitment {commitment.number} to {commitment.header.customers:,} customers; publish its root:")
    say(f"  {commitment.root}")
    say(f"  or the file {report.commitment.file}")
    if report.timestamp_request:
        say(
            f"Time-stamp request: {report.timestamp_request}. Then: smark evidence timestamp {vault} "
            f"{report.model} {commitment.number} RESPONSE"
        )


def _costs(trial: "trials.Trial") -> None:
    """A table of what copies cost, those that agree least first."""
    known = trial.accuracy is not None
    worst = sorted(trial.each, key=lambda one: (one.agreement, -one.kl))[:_SHOWN]
    rows = [
        (
            one.customer,
            f"{one.agreement:.1%}",
            f"{one.kl:.2g}",
            f"{one.change:.2%}",
            *([f"{one.accuracy:.1%}"] if known else []),
        )
        for one in worst
    ]
    columns = ("copy of", "same answer", "KL in nats", "change of logits", *(["accuracy"] if known else []))
    keep = ("same answer", "copy of", *columns[2:])
    _common.out.table(columns, rows, keep=keep, figures=columns[1:])
    if len(trial.each) > _SHOWN:
        say(f"The {_SHOWN} of {len(trial.each):,} copies that agree least; --json prints all.")


def _answered(trial: "trials.Trial") -> str:
    """A sentence on how the copies that were run answered."""
    text = f"The new copies were run on {trial.images} images: all outputs are finite, and {trial.agreement:.1%} "
    text += f"of the classes are the base's ({trial.least:.1%} in the copy that agrees least)"
    if trial.accuracy is not None:
        text += f"; accuracy {trial.accuracy:.3f}, the base's {trial.base_accuracy:.3f}"
    return f"{text}."
