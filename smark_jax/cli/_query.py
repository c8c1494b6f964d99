"""``smark query``: traces a suspect that can only be queried."""

import io
import json
import secrets
import shlex
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from smark_jax import _validate
from smark_jax.cli import _common, _trace
from smark_jax.cli._common import AsJson, PassphraseFile, VaultPath

if TYPE_CHECKING:
    import numpy as np

_SECONDS = 60
_BATCH = 16  # probes per call; answers are saved after each call
_LARGEST_ANSWER = 1 << 20
_PLACES = ("label", "class", "prediction", "scores")


def query(
    vault: VaultPath,
    name: Annotated[str, typer.Argument(help="The model; it was added with --probes.", show_default=False)],
    target: Annotated[
        str, typer.Argument(help="http(s)://... or a command.", metavar="URL-or-COMMAND", show_default=False)
    ],
    num_probes: Annotated[
        int | None,
        typer.Option(
            "--probes",
            min=1,
            help="Number of probes to ask. With a larger number, an earlier query of the same target continues. The "
            "default is enough for a copy that answers nine probes of ten as it was taught.",
        ),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Set aside earlier answers of this target, and ask other probes.")
    ] = False,
    allow_seen: Annotated[
        bool,
        typer.Option(
            "--allow-seen", help="Reuse probes that were shown before if too few are left; the verdict says so."
        ),
    ] = False,
    max_age: Annotated[float, typer.Option(min=0, help="Days after which an earlier answer no longer counts.")] = 7.0,
    repeats: Annotated[int, typer.Option(min=1, help="How often each probe is asked.")] = 1,
    field: Annotated[
        str | None, typer.Option(help="Send images as this field of a multipart form, not as the body.")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Bound on the probability of a false accusation, if not the committed one.")
    ] = None,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Trace a suspect by its answers alone: ask it probes, and read the labels as a fingerprint.

    A URL gets one POST per image, a PNG, and must answer with JSON: a class number, a list of scores, or an object with
    one of these as "label", "class", "prediction" or "scores". A command gets the paths of PNG files on stdin, one per
    line, and must print a class number for each. Copies must have been taught to answer ('smark issue --teach').

    Each query asks probes that nobody was shown before, while there are any left: anybody who has seen a probe may have
    asked an innocent customer's service about it. Answers are kept in the vault, so that the same command resumes a
    query that stopped.
    """
    with _common.desk(vault, passphrase_file) as desk:
        from smark_jax.vault import models, queries

        model = models.get(desk, name)
        if target.startswith(("http://", "https://")):
            predict: Any = lambda images: [_post(target, _png(image), field) for image in images]  # noqa: E731
        else:
            predict = lambda images: _run(_command(target), images)  # noqa: E731
        ready = queries.prepare(
            model, target, predict, num_probes=num_probes, fresh=fresh, allow_seen=allow_seen, max_age=max_age
        )
        if ready.kept:
            _common.warn(
                f"continues with {ready.kept} answers that {target} gave since {ready.since}; --fresh starts again."
            )
        with _common.bar("asking", len(ready.probes) * repeats) as done:
            found = queries.ask(ready, predict, repeats=repeats, alpha=alpha, batch_size=_BATCH, on_answer=done)
    _trace.show(found, as_json, vault)


def _command(command: str) -> list[str]:
    """Splits a command line into words as a shell does."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        got = f"{command!r} ({error})"
        raise _validate.fail("query", "a command", got, "Is a quote left open?") from error
    if not words:
        raise _validate.fail("query", "a URL or a command", "an empty text", "Name what to ask.")
    return words


def _png(image: "np.ndarray") -> bytes:
    with _validate.needs("query", "query"):
        from PIL import Image

    content = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(content, "PNG")
    return content.getvalue()


def _post(url: str, png: bytes, field: str | None) -> Any:
    """Sends one image to a service and returns its class number."""
    import http.client  # here and not above: every command imports this module
    import urllib.request

    body, kind = png, "image/png"
    if field is not None:
        edge = f"smark{secrets.token_hex(12)}"
        head = f'--{edge}\r\nContent-Disposition: form-data; name="{field}"; filename="image.png"\r\n'
        body = f"{head}Content-Type: image/png\r\n\r\n".encode() + png + f"\r\n--{edge}--\r\n".encode()
        kind = f"multipart/form-data; boundary={edge}"
    advice = "Is the address right? Run the same command again: answers so far are kept."
    try:
        request = urllib.request.Request(url, body, {"Content-Type": kind, "Accept": "application/json"})
        with urllib.request.urlopen(request, timeout=_SECONDS) as response:
            content = response.read(_LARGEST_ANSWER)
            if response.length:  # a number that is cut short is another number
                raise http.client.IncompleteRead(content, response.length)
        answer = json.loads(content)
    except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:  # URLError is an OSError
        raise _validate.fail("query", f"an answer from {url}", str(getattr(error, "reason", error)), advice) from error
    if isinstance(answer, dict):
        answer = next((answer[place] for place in _PLACES if place in answer), None)
    if isinstance(answer, list) and len(answer) > 1 and all(type(score) in (int, float) for score in answer):
        return answer.index(max(answer))
    if type(answer) is not int:
        raise _validate.fail("query", "a class number or scores", f"{str(answer)[:60]!r}", advice)
    return answer


def _run(command: list[str], images: "np.ndarray") -> list[int]:
    """Runs a command on images and returns the class numbers that it prints."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{place:04d}.png" for place in range(len(images))]
        for path, image in zip(paths, images, strict=True):
            path.write_bytes(_png(image))
        lines = "".join(f"{path}\n" for path in paths)
        try:
            done = subprocess.run(command, input=lines, capture_output=True, text=True, check=False)
        except (OSError, ValueError) as error:
            advice = "Is its name right? A URL begins with http."
            raise _validate.fail("query", "a command that runs", str(error), advice) from error
    advice = "It gets paths on stdin, one per line, and prints a class number for each. Answers so far are kept."
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2][-200:]
        got = f"exit code {done.returncode}" + (f" ({last})" if last else "")
        raise _validate.fail("query", f"answers from {command[0]}", got, advice)
    try:
        return [int(line) for line in done.stdout.split()]
    except ValueError as error:
        raise _validate.fail("query", "class numbers", f"{done.stdout[:60]!r}", advice) from error
