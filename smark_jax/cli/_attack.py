"""``smark attack``: damages a copy as a leaker might, to find out whether it can still be traced."""

from pathlib import Path
from typing import Annotated

import typer

from smark_jax import _validate
from smark_jax.cli import _common, _outputs
from smark_jax.cli._common import AsJson, say


def attack(
    copy: Annotated[Path, typer.Argument(help="A copy, in any format.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="The safetensors file to write.", show_default=False)],
    mix: Annotated[
        list[Path] | None, typer.Option(help="First average with this other copy, as a coalition would; repeatable.")
    ] = None,
    prune: Annotated[float | None, typer.Option(help="Set this share of each kernel's weights to zero.")] = None,
    quantise: Annotated[int | None, typer.Option(help="Round each kernel to this many bits.")] = None,
    noise: Annotated[float | None, typer.Option(help="Add noise of this strength, relative to a leaf's RMS.")] = None,
    cast: Annotated[str | None, typer.Option(help="Round to this type and back, such as bfloat16.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the noise.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Damage a copy as a leaker would, and write it; several attacks are applied in the order of the options here."""
    chosen = {"mix": mix, "prune": prune, "quantise": quantise, "noise": noise, "cast": cast}
    done = [name for name, value in chosen.items() if value is not None]
    if not done:
        raise typer.BadParameter("name at least one attack: " + ", ".join(f"--{name}" for name in chosen))
    _outputs.check("OUT", out, (copy, *(mix or [])))
    with _common.err.status("reading the copy"):
        import jax

        from smark_jax import _io, attacks, files
        from smark_jax.aggregation import stack

        with jax.enable_x64(True):  # so that 64-bit leaves keep their precision
            copies = [
                jax.tree.map(jax.numpy.asarray, files.nest(files.read(path).leaves)) for path in (copy, *(mix or []))
            ]
            forms = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in copies]
            for path, form in zip(mix or (), forms[1:], strict=True):
                if form != forms[0]:
                    got = f"leaves of other names, shapes or types in {path}"
                    cause = "Name copies of one model with --mix."
                    raise _validate.fail("attack", f"the leaves of {copy}", got, cause)
            tree = attacks.average(stack(copies)) if mix else copies[0]
            if prune is not None:
                tree = attacks.prune(tree, prune)
            if quantise is not None:
                tree = attacks.quantise(tree, quantise)
            if noise is not None:
                tree = attacks.add_noise(tree, jax.random.key(seed), noise)
            if cast is not None:
                tree = attacks.cast(tree, cast)
        with _io.private_files():  # the result is still a customer's copy
            sha256 = files.write(out, tree)
    document = {"out": str(out), "sha256": sha256, "attacks": done}
    _common.show(document, as_json, lambda: say(f"{out}: {', '.join(done)}"))
