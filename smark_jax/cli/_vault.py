"""``smark init``, ``add-model`` and ``customers``."""

from pathlib import Path
from typing import Annotated, Any

import rich.markup
import rich.table
import typer

from smark_jax import _validate
from smark_jax.cli import _common, _names
from smark_jax.cli._common import AsJson, PassphraseFile, VaultPath, say

_SHOWN = 50


def init(vault: VaultPath, passphrase_file: PassphraseFile = None, as_json: AsJson = False) -> None:
    """Make a vault: a folder with a new master key, sealed by your passphrase.

    Every secret comes from that key. Nobody can open the vault without the passphrase, you neither: keep it, and a copy
    of the folder, in a safe place.
    """
    secret = _common.passphrase(passphrase_file, new=True)
    from smark_jax.vault import crypto, folder

    if len(secret) < crypto.SHORTEST_PASSPHRASE:
        _common.warn(
            f"a passphrase of {len(secret)} characters can be guessed; take {crypto.SHORTEST_PASSPHRASE} or more."
        )
    with _common.err.status("making the vault"):
        folder.create(vault, secret)

    def words() -> None:
        say(f"A new vault is in {vault}. Back up the whole folder, and keep the passphrase apart from it.")
        say(f"Next: smark add-model {vault} NAME BASE")

    _common.show({"vault": str(vault)}, as_json, words)


def add_model(
    vault: VaultPath,
    name: Annotated[str, typer.Argument(help="A short name of your choice.", show_default=False)],
    base: Annotated[
        Path, typer.Argument(help="Weights: safetensors, msgpack, npz, or an Orbax folder.", show_default=False)
    ],
    chips: Annotated[int, typer.Option(min=1, help="Length of a fingerprint in bits.")] = 304,
    alpha: Annotated[
        float, typer.Option(help="Bound on the probability of accusing anybody innocent, in each tracing.")
    ] = 1e-6,
    strength: Annotated[
        float, typer.Option(help="How far a copy's weights move, relative to their layer's root mean square.")
    ] = 0.03,
    match: Annotated[str | None, typer.Option(help="Mark only leaves whose names match this expression.")] = None,
    probes: Annotated[
        Path | None,
        typer.Option(help="npz with uint8 'images' [N, H, W, C], for tracing by answers: probes are made from them."),
    ] = None,
    classes: Annotated[int | None, typer.Option(min=2, help="Classes of the model, along with --probes.")] = None,
    network: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="Take as probes what the base is undecided about. FUNCTION() returns (apply_fn, images) of its "
            "network.",
        ),
    ] = None,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Add a base model. No architecture is needed; its settings are fixed from here on, since they are committed to."""
    if (probes is None) != (classes is None):
        raise typer.BadParameter("--probes and --classes go together", param_hint="--probes")
    if network is not None and probes is None:
        raise typer.BadParameter("--network goes with --probes", param_hint="--network")
    with _common.desk(vault, passphrase_file) as desk, _common.err.status("reading the base") as status:
        from smark_jax.vault import models, queries

        leaves = _base(base)
        images = queries.images(probes) if probes else None
        apply_fn = _common.network("network", network)[0] if network else None
        model = models.add(desk, name, leaves, num_chips=chips, alpha=alpha, strength=strength, match=match)
        if images is not None and classes is not None:
            status.update("making the probes")
            queries.add_probes(desk, model, images, classes, apply_fn)
    document = {
        "model": name,
        "base": model.base,
        "leaves": len(leaves),
        "carrying_leaves": len(model.spec.leaves),
        "carrying_weights": model.spec.num_weights,
        "num_chips": chips,
        "alpha": alpha,
        "strength": strength,
        "probes": images is not None,
    }

    def words() -> None:
        say(
            f"{name}: {model.spec.num_weights:,} weights in {len(model.spec.leaves)} of {len(leaves)} leaves carry "
            f"{chips} chips; alpha {alpha:g}, strength {strength:g}. Base: {model.base}"
        )
        say(f"Next: smark issue {vault} {name} CUSTOMER... --out COPIES")

    _common.show(document, as_json, words)


def _base(path: Path) -> dict[str, Any]:
    """The owner's own file, of any size, or Orbax checkpoint."""
    from smark_jax import files

    if not path.is_dir():
        return files.read(path, max_bytes=max(files.MAX_BYTES, path.stat().st_size if path.is_file() else 0)).leaves
    import orbax.checkpoint

    try:
        with orbax.checkpoint.StandardCheckpointer() as checkpointer:
            tree = checkpointer.restore(path.absolute())
    except Exception as error:  # orbax raises of every kind, and at length
        got = f"one that orbax cannot read ({type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]})"
        cause = "Name the folder that StandardCheckpointer wrote, or convert it to safetensors."
        raise _validate.fail("add-model", f"an Orbax checkpoint in {path}", got, cause) from error
    return files.flatten(tree)


def customers(
    vault: VaultPath,
    csv: _names.Csv = None,
    column: _names.Column = None,
    heading: _names.Heading = None,
    add: Annotated[list[str] | None, typer.Option(help="Register a customer; may be repeated.")] = None,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """List customers, or register new ones first, all or none.

    One registry serves all models; names are text of any script. Where a CSV file leaves doubt which names are meant,
    it is refused, and nobody is registered.
    """
    listed_names = _names.read(csv, column, heading) + (add or [])
    with _common.desk(vault, passphrase_file) as desk:
        from smark_jax.vault import customers as registry

        new = registry.add(desk, listed_names) if listed_names else []
        listed = registry.registered(desk)
        rows = desk.connection.execute("SELECT serial, model FROM licences ORDER BY model")
        models: dict[int, list[str]] = {}
        for serial, model in rows:
            models.setdefault(serial, []).append(model)
    document = {
        "customers": [{**customer._asdict(), "models": models.get(customer.serial, [])} for customer in listed],
        "added": len(new),
    }

    def words() -> None:
        table = rich.table.Table("serial", "customer", "since", "copies of")
        for customer in listed[-_SHOWN:]:
            copies = ", ".join(models.get(customer.serial, [])) or "-"
            table.add_row(str(customer.serial), rich.markup.escape(customer.name), customer.created, copies)
        if listed:
            _common.out.print(table)
        more = f", the last {_SHOWN} shown (--json prints all)" if len(listed) > _SHOWN else ""
        say(f"{len(listed):,} customers{more}; {len(new):,} of them new.")

    _common.show(document, as_json, words)
