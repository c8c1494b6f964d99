"""Runs only apps that this client's operator has pinned, optionally under the mod installed here.

Flower's SuperLink delivers the ClientApp, including its mods, and the SuperNode runs it. So anybody who controls the
SuperLink can deliver an app without :func:`~smark_jax.federation.masked_mod`, or one that reads this client's disk. No
mod helps against that: the client must decide which code it runs. ::

    flwr build                                                   # the operator builds the app from reviewed sources
    python -m smark_jax.federation guard guarded publisher.app.1-0-0.1a2b3c4d.fab
    PATH="$PWD/guarded:$PATH" flower-supernode ...

The folder then holds a ``flwr-clientapp`` that the SuperNode finds first. Before unpacking a bundle, it compares the
bundle's SHA-256 with the pinned ones, and answers any other bundle with an error. Flower's commands for other kinds of
delivered code get stand-ins of the same names beside it, which run nothing.
"""

import hashlib
import shlex
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from smark_jax import _validate
from smark_jax.federation.mod import masked_mod

_COMMAND = "flwr-clientapp"


def write(folder: Path, bundles: Collection[Path], *, add_mod: bool = False) -> Path:
    """Writes the ``flwr-clientapp`` of a client that runs these bundles and no others.

    Args:
      folder: created if absent; put it first in PATH.
      bundles: the ``.fab`` files that the operator has reviewed.
      add_mod: whether to run apps under this installation's masked_mod; for bundles without a mod of their own.
    """
    from flwr.supercore.constant import TaskType

    pinned = sorted(hashlib.sha256(bundle.read_bytes()).hexdigest() for bundle in bundles)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _COMMAND
    path.write_text(
        f"#!/bin/sh\nexec {shlex.quote(sys.executable)} -P -c "
        f'{shlex.quote(f"from smark_jax.federation import guard; guard.main({pinned}, {add_mod})")} "$@"\n'
    )
    path.chmod(0o755)
    for command in {str(kind) for kind in TaskType} - {_COMMAND}:
        other = folder / command
        other.write_text(
            f"#!/bin/sh\necho '{command} is refused: this client runs pinned ClientApps only' >&2\nexit 1\n"
        )
        other.chmod(0o755)
    return path


def main(pinned: Collection[str], add_mod: bool) -> None:
    """Runs Flower's ``flwr-clientapp``, with the same command line, but only for pinned bundles."""
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp
    from flwr.supernode.runtime import run_clientapp

    sys.argv[0] = _COMMAND
    install(run_clientapp, frozenset(pinned), add_mod)
    flwr_clientapp()


def install(runtime: Any, pinned: Collection[str], add_mod: bool) -> None:
    """Installs the checks in the Flower module that fetches, unpacks, loads and runs an app.

    Args:
      runtime: ``flwr.supernode.runtime.run_clientapp``.
      pinned: SHA-256 of each bundle, in hexadecimal.
      add_mod: as for :func:`write`.

    Raises:
      SmarkError: when this version of Flower lacks the functions to hook; nothing runs then.
    """
    hooks = ("install_from_fab", "get_load_client_app_fn")
    if not all(hasattr(runtime, hook) for hook in hooks):
        cause = "Install the version of flwr that smark-jax asks for: pip install 'smark-jax[flower]'"
        raise _validate.fail("guard", f"{hooks} in {runtime.__name__}", "another version of Flower", cause)
    unpack, loader = runtime.install_from_fab, runtime.get_load_client_app_fn

    def guarded_unpack(bundle: bytes, *args: Any, **options: Any) -> Any:
        _check(hashlib.sha256(bundle).hexdigest(), pinned)
        return unpack(bundle, *args, **options)

    def guarded_loader(*args: Any, **options: Any) -> Callable[..., Any]:
        load = loader(*args, **options)

        def load_known(fab_id: str, fab_version: str, fab_hash: str) -> Any:
            _check(fab_hash, pinned)  # the folder that is loaded is named by this hash
            if any(part in ("", ".", "..") for part in fab_id.split("/")) or "/" in fab_version:
                cause = "The server states a version that leads out of the folder of apps."
                raise _validate.fail("guard", "a version that is not a path", repr(fab_version), cause)
            app = load(fab_id, fab_version, fab_hash)
            return _under_the_mod(app) if add_mod else app

        return load_known

    runtime.install_from_fab, runtime.get_load_client_app_fn = guarded_unpack, guarded_loader


def _check(found: str, pinned: Collection[str]) -> None:
    if found not in pinned:
        cause = "Read its sources, build it yourself and pin it: python -m smark_jax.federation guard FOLDER APP.fab"
        raise _validate.fail("guard", "an app that this client's operator pinned", f"one of SHA-256 {found}", cause)


def _under_the_mod(app: ClientApp) -> Callable[[Message, Context], Message]:
    def run(message: Message, context: Context) -> Message:
        return masked_mod(message, context, app)

    return run
