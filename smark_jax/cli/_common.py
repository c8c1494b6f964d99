"""What the vault commands share: options, the passphrase, progress bars, and the printing of results."""

import contextlib
import getpass
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

import typer
import typer.core

from smark_jax import _documents, _foreign, _validate
from smark_jax.cli._console import Console, progress

if TYPE_CHECKING:
    from smark_jax import vault
    from smark_jax.vault import trials
    from smark_jax.vault.reading import Aligner

VARIABLE = "SMARK_PASSPHRASE"

VaultPath = Annotated[Path, typer.Argument(help="The vault's folder.", metavar="VAULT", show_default=False)]
ModelName = Annotated[str, typer.Argument(help="The model.", show_default=False)]
PassphraseFile = Annotated[
    Path | None,
    typer.Option(
        "--passphrase-file",
        help=f"File whose first line is the passphrase. Without it: the variable {VARIABLE}, or a prompt.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON; progress goes to stderr.")]
Align = Annotated[
    str | None,
    typer.Option(
        metavar="MODULE:FUNCTION",
        help="Undo rewrites first. FUNCTION() returns (apply_fn, example_images) of the base's network; MODULE is "
        "looked for in the current folder too.",
    ),
]

Network = Annotated[
    str | None,
    typer.Option(
        "--network",
        metavar="MODULE:FUNCTION",
        help="Run the base's network. FUNCTION() returns (apply_fn, images) or (apply_fn, images, labels); MODULE is "
        "looked for in the current folder too. A file that holds the network, such as ONNX, will do, with --images; "
        "where the base is one, --images alone will do.",
    ),
]
Images = Annotated[
    Path | None,
    typer.Option(
        help="npz file with 'images' in the form that the network takes, and optionally 'labels'. It replaces the "
        "images of --network."
    ),
]

VerdictNumber = Annotated[
    int, typer.Argument(min=1, max=2**63 - 1, help="The verdict's number, as printed by trace.", show_default=False)
]

out = Console()
err = Console(stderr=True)


class Command(typer.core.TyperCommand):
    """A command whose arguments keep their help: typer 0.20 loses it under click 8.5."""

    def __init__(self, name: str | None, **settings: Any) -> None:
        super().__init__(name, **settings)
        stated = get_type_hints(inspect.unwrap(settings["callback"]), include_extras=True)
        for parameter in self.params:
            if isinstance(parameter, typer.core.TyperArgument) and not parameter.help:
                _, described = get_args(stated[str(parameter.name)])
                parameter.help = described.help


def passphrase(file: Path | None, *, new: bool = False) -> str:
    """Gets the passphrase from a file, the environment or a prompt, never from an argument, which other users can see.

    The variable is removed from the environment, so that no child process inherits it.
    """
    from_variable = os.environ.pop(VARIABLE, None)
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:  # raised without its cause, which would show part of the file
            advice = "Is it the file that holds the passphrase? Save it as plain text."
            raise _validate.fail("vault", f"text in UTF-8 in {file}", "other bytes", advice) from None
        found = lines[0] if lines else ""
    elif from_variable is not None:
        found = from_variable
    elif sys.stdin.isatty():
        found = getpass.getpass("Passphrase of the vault: ")
        if new and found != getpass.getpass("The same again: "):
            raise _validate.fail("init", "the same passphrase twice", "two different ones", "Try again.")
    else:
        advice = f"Set {VARIABLE}, or name a file with --passphrase-file."
        raise _validate.fail("vault", "a passphrase", "no terminal to ask for it", advice)
    if not found:
        raise _validate.fail("vault", "a passphrase", "an empty one", "Choose a sentence that nobody guesses.")
    try:
        found.encode()
    except UnicodeEncodeError:  # raised without its cause, which would show the passphrase
        advice = "Is the terminal, or whatever sets the variable, in another encoding? Use UTF-8."
        raise _validate.fail("vault", "a passphrase in UTF-8", "other bytes", advice) from None
    return found


@contextlib.contextmanager
def desk(folder: Path, file: Path | None) -> Iterator["vault.Vault"]:
    """Opens the vault in a folder, and checks it."""
    secret = passphrase(file)
    with err.status("opening and checking the vault") as status:
        from smark_jax import vault

        with vault.opened(folder, secret) as opened:
            status.stop()
            yield opened


@contextlib.contextmanager
def bar(text: str, total: int) -> Iterator[Callable[[float], None]]:
    """Shows a progress bar on stderr; yields a function to call with the number done."""
    with progress(err, transient=True) as bars:
        task = bars.add_task(text, total=total, note="")
        yield lambda done: bars.update(task, completed=done)


def before_training(parties: int) -> None:
    """Asks JAX for one CPU device per party, before it computes anything."""
    import jax

    from smark_jax import parallel

    try:
        jax.config.update("jax_num_cpu_devices", parties)
    except RuntimeError:  # JAX has computed already: use the devices that there are
        parallel.devices(parties)


def show(document: Any, as_json: bool, otherwise: Callable[[], None]) -> None:
    """Prints a result: as one JSON document, or in words."""
    if as_json:
        print(_foreign.dumps(_documents.plain(document)))
    else:
        otherwise()


def say(text: str) -> None:
    """Prints one line of a result, as plain text and unwrapped."""
    out.say(text)


def warn(text: str) -> None:
    """A warning on stderr."""
    err.say(f"warning: {text}", style="yellow")


def below(log10_p: float) -> str:
    """A p-value in words: ``below 1e-89``."""
    import math

    return f"below 1e{math.floor(log10_p) + 1}" if log10_p < 0 else "1"


def aligner(name: str | None) -> "Aligner | None":
    """The aligner that ``--align MODULE:FUNCTION`` names."""
    if name is None:
        return None
    from smark_jax.vault.reading import Aligner

    return Aligner(name, *network("align", name)[:2])


def runnable(name: str | None, images: Path | None, base: Path) -> "trials.Network | None":
    """The network that ``--network`` names, or the base's file holds, with the images of ``--images`` or its own.

    Returns:
      None without ``--network`` and ``--images``.
    """
    if name is None and images is None:
        return None
    from smark_jax import errors, files
    from smark_jax.vault import image_files, trials

    given = image_files.read(images) if images else ()
    if name is None:
        try:
            return trials.network(files.network(base, max_bytes=files.ANY_SIZE).apply_fn, *given)
        except errors.Unreadable as error:
            wrong = "--images goes with --network where the base's file holds no network, as ONNX does"
            raise typer.BadParameter(wrong, param_hint="--images") from error
    if not Path(name).is_file():
        apply_fn, *own = network("network", name, alone=bool(given))
        return trials.network(apply_fn, *(given or own))
    if not given:
        raise typer.BadParameter(f"name images with --images: {name} holds none", param_hint="--network")
    return trials.network(files.network(name).apply_fn, *given)


def network(option: str, name: str, *, alone: bool = False) -> tuple[Any, ...]:
    """Calls an option's MODULE:FUNCTION, which returns a base's network, images and, optionally, their labels.

    With ``alone``, it may also return the network without images.
    """
    module, colon, function = name.partition(":")
    advice = "FUNCTION() returns the base's network and images; MODULE is looked for in the current folder too."
    if not (module and colon and function):
        raise _validate.fail(f"--{option}", f"MODULE:FUNCTION for --{option}", repr(name), advice)
    sys.path.insert(0, str(Path.cwd()))
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
            found = getattr(importlib.import_module(module), function)()
        if alone and not isinstance(found, tuple):
            return (found,)
    except (Exception, SystemExit) as error:  # the user's code may end in any way
        got = f"{type(error).__name__}: {error}"
        raise _validate.fail(f"--{option}", f"{name} to return a network and images", got, advice) from error
    finally:
        sys.path.pop(0)
    if not isinstance(found, tuple | list) or len(found) < 2:
        if callable(found):
            advice = f"Name images with --images, or return both from {function}()." if option == "network" else advice
        got = "the network alone" if callable(found) else f"a {type(found).__name__}"
        raise _validate.fail(f"--{option}", f"{name} to return a network and images", got, advice)
    return tuple(found[:3])


def pairs(values: list[str] | None) -> dict[str, str]:
    """Parses the ``--map BASE=SUSPECT`` options."""
    given = {}
    for value in values or []:
        ours, equals, theirs = value.partition("=")
        if not (ours and equals and theirs):
            raise typer.BadParameter(f"expected BASE=SUSPECT, got {value!r}", param_hint="--map")
        given[ours] = theirs
    return given
