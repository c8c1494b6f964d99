"""``smark init``, ``add-model`` and ``customers``."""

import collections
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from smark_jax import _validate
from smark_jax.cli import _common, _names
from smark_jax.cli._common import AsJson, PassphraseFile, VaultPath, say

if TYPE_CHECKING:
    from smark_jax import files

_SHOWN = 50


def init(vault: VaultPath, passphrase_file: PassphraseFile = None, as_json: AsJson = False) -> None:
    """Make a vault: a folder with a new master key, sealed by your passphrase.

    Every secret is derived from that key. Without the passphrase nobody can open the vault, not even you. Keep it, and
    a copy of the folder, in a safe place.
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
        Path, typer.Argument(help="Weights: safetensors, msgpack, npz, ONNX, or an Orbax folder.", show_default=False)
    ],
    chips: Annotated[int, typer.Option(min=1, help="Length of a fingerprint in bits.")] = 304,
    alpha: Annotated[
        float, typer.Option(help="Bound on the probability of a false accusation, in each tracing.")
    ] = 1e-6,
    strength: Annotated[
        float, typer.Option(help="How far a copy's weights move, relative to their layer's RMS.")
    ] = 0.03,
    match: Annotated[
        str | None, typer.Option(help="Mark only leaves whose names match this regular expression.")
    ] = None,
    public: Annotated[
        Path | None,
        typer.Option(
            help="The public weights that the base was trained from. Leaves that training did not change carry nothing."
        ),
    ] = None,
    probes: Annotated[
        Path | None,
        typer.Option(help="npz file with uint8 'images' [N, H, W, C], to make probes from, for tracing by answers."),
    ] = None,
    classes: Annotated[
        int | None, typer.Option(min=2, help="Number of the model's classes; required with --probes.")
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="Choose probes about which the base is undecided. FUNCTION() returns (apply_fn, images) of its "
            "network.",
        ),
    ] = None,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Add a base model. No architecture is needed. Its settings never change afterwards, since they are committed to.

    Only trained weights are marked. Running statistics, counters, position tables and scales of quantisers, which are
    recognised by name and content, are left alone. Anybody who has the base can remove the mark from a copy. If the
    base was trained from public weights, name them by --public, and the weights that everybody has stay unmarked.
    """
    if (probes is None) != (classes is None):
        raise typer.BadParameter("--probes and --classes go together", param_hint="--probes")
    if network is not None and probes is None:
        raise typer.BadParameter("--network goes with --probes", param_hint="--network")
    with _common.desk(vault, passphrase_file) as desk, _common.err.status("reading the base") as status:
        from smark_jax import carriers, files
        from smark_jax.vault import models
        from smark_jax.vault import probes as images_to_ask

        weights = _base(base)
        leaves = weights.leaves
        source = models.Source(base, weights.sha256) if weights.format == "safetensors" else None
        images = images_to_ask.images(probes) if probes else None
        apply_fn = _common.network("network", network)[0] if network else None
        models.refuse_taken(desk, name)
        made = None
        if images is not None:  # before the model is added, so that a failure does not leave a model without its probes
            status.update("making the probes")
            made = images_to_ask.make(desk, name, chips, images, files.nest(leaves), apply_fn)
        model = models.add(
            desk,
            name,
            leaves,
            num_chips=chips,
            alpha=alpha,
            strength=strength,
            match=match,
            public=_base(public).leaves if public else None,
            source=source,
        )
        if made is not None and classes is not None:
            images_to_ask.keep(model, made, classes)
        carrying = carriers.coverage(model.settings.spec, chips)
        unmarked = {path: str(role) for path, role in carriers.roles(files.nest(leaves)).items() if not role.carries}
    if public is None:
        _common.warn(
            "whoever has this base can take the mark out of a copy. If it was trained from public weights, name them "
            "by --public."
        )
    document = {
        "model": name,
        "base": model.settings.base,
        "public": model.settings.public,
        "leaves": len(leaves),
        "weights": sum(leaf.size for leaf in leaves.values()),
        "carrying_leaves": carrying.leaves,
        "carrying_weights": carrying.weights,
        "unmarked": unmarked,
        "num_chips": chips,
        "alpha": alpha,
        "strength": strength,
        "probes": images is not None,
    }
    _common.show(document, as_json, lambda: _say_added(vault, document))


def _say_added(vault: Path, added: Mapping[str, Any]) -> None:
    """Prints how much of an added model carries the mark, and what to do next."""
    say(
        f"{added['model']}: {added['carrying_weights']:,} of {added['weights']:,} weights in "
        f"{added['carrying_leaves']} of {added['leaves']} leaves carry {added['num_chips']} chips; "
        f"alpha {added['alpha']:g}, strength {added['strength']:g}. Base: {added['base']}"
    )
    if added["unmarked"]:
        counts = collections.Counter(added["unmarked"].values())
        say("Left as they are: " + ", ".join(f"{role} ({count})" for role, count in counts.items()))
    say(f"Next: smark issue {vault} {added['model']} CUSTOMER... --out COPIES")


def _base(path: Path) -> "files.Weights":
    """Reads the owner's own file, of any size, or Orbax checkpoint, which has no hash."""
    from smark_jax import files

    if not path.is_dir():
        return files.read(path, max_bytes=max(files.MAX_BYTES, path.stat().st_size if path.is_file() else 0))
    import jax

    with _validate.needs("add-model", "train"):
        import orbax.checkpoint
    try:
        with (
            jax.enable_x64(True),
            orbax.checkpoint.StandardCheckpointer() as checkpointer,
        ):  # without x64, 64-bit leaves would lose precision
            tree = checkpointer.restore(path.absolute())
    except Exception as error:  # orbax raises errors of every type, with long messages
        got = f"one that orbax cannot read ({type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]})"
        cause = "Name the folder that StandardCheckpointer wrote, or convert it to safetensors."
        raise _validate.fail("add-model", f"an Orbax checkpoint in {path}", got, cause) from error
    return files.Weights(files.flatten(tree), "orbax", "")


def customers(
    vault: VaultPath,
    csv: _names.Csv = None,
    column: _names.Column = None,
    heading: _names.Heading = None,
    add: Annotated[list[str] | None, typer.Option(help="Register a customer; repeatable.")] = None,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """List customers, after registering new ones, all or none.

    One registry serves all models; names may be in any script. A CSV file is refused, and nobody is registered, if it
    is not clear which names are meant.
    """
    listed_names = _names.read(csv, column, heading) + (add or [])
    with _common.desk(vault, passphrase_file) as desk:
        from smark_jax.vault import customers as registry
        from smark_jax.vault import store

        new = registry.add(desk, listed_names) if listed_names else []
        listed = registry.registered(desk)
        models = store.licensed_models(desk.connection)
    document = {
        "customers": [{**customer._asdict(), "models": models.get(customer.serial, [])} for customer in listed],
        "added": len(new),
    }

    def words() -> None:
        rows = [
            (str(c.serial), c.name, c.created, ", ".join(models.get(c.serial, [])) or "-") for c in listed[-_SHOWN:]
        ]
        if rows:
            keep = ("customer", "serial", "copies of", "since")
            _common.out.table(("serial", "customer", "since", "copies of"), rows, keep=keep)
        more = f", the last {_SHOWN} shown (--json prints all)" if len(listed) > _SHOWN else ""
        say(f"{len(listed):,} customers{more}; {len(new):,} of them new.")

    _common.show(document, as_json, words)
