"""``smark query``: tracing a suspect that only answers."""

import io
import json
import secrets
import shlex
import subprocess
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from smark_jax.cli import _common, _trace
from smark_jax.cli._common import AsJson, PassphraseFile, VaultPath

if TYPE_CHECKING:
    import numpy as np

_SECONDS = 60
_LARGEST_ANSWER = 1 << 20
_PLACES = ("label", "class", "prediction", "scores")


def query(
    vault: VaultPath,
    name: Annotated[str, typer.Argument(help="The model; it was added with --probes.", show_default=False)],
    target: Annotated[
        str, typer.Argument(help="http(s)://... or a command.", metavar="URL-or-COMMAND", show_default=False)
    ],
    repeats: Annotated[int, typer.Option(min=1, help="Times that each probe is asked.")] = 1,
    field: Annotated[
        str | None, typer.Option(help="Send images as this field of a multipart form, not as the body.")
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="Another level than the committed one.")] = None,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Trace a suspect by its answers alone: every probe is asked, and the labels are read as a fingerprint.

    A URL gets one POST for each image, a PNG; it answers with JSON: a class number, a list of scores, or an object with
    one of these as "label", "class", "prediction" or "scores". A command gets the paths of PNG files on stdin, one a
    line, and prints a class number for each, one a line. Answers are kept in the vault, so that a query that failed
    goes on where it stopped. Copies must have been taught to answer (blackbox.train_copies).
    """
    with _common.desk(vault, passphrase_file) as desk:
        from smark_jax.vault import queries

        asked = len(queries.probes(desk, name)[0]) * repeats
        if target.startswith(("http://", "https://")):
            predict: Any = lambda images: [_post(target, _png(image), field) for image in images]  # noqa: E731
        else:
            predict = lambda images: _run(shlex.split(target), images)  # noqa: E731
        with _common.bar("asking", asked) as done:
            document = queries.query(
                desk, name, target, predict, repeats=repeats, alpha=alpha, batch_size=16, on_answer=done
            )
    _trace.show(document, as_json, vault)


def _png(image: "np.ndarray") -> bytes:
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(content, "PNG")
    return content.getvalue()


def _post(url: str, png: bytes, field: str | None) -> Any:
    """One image's class number or scores, from a service."""
    body, kind = png, "image/png"
    if field is not None:
        edge = f"smark{secrets.token_hex(12)}"
        head = f'--{edge}\r\nContent-Disposition: form-data; name="{field}"; filename="image.png"\r\n'
        body = f"{head}Content-Type: image/png\r\n\r\n".encode() + png + f"\r\n--{edge}--\r\n".encode()
        kind = f"multipart/form-data; boundary={edge}"
    advice = "Is the address right? Run the same command again: answers so far are kept."
    request = urllib.request.Request(url, body, {"Content-Type": kind, "Accept": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS) as response:
            answer = json.loads(response.read(_LARGEST_ANSWER))
    except (urllib.error.URLError, OSError, ValueError, RecursionError) as error:
        raise ValueError(f"query: expected an answer of {url}, but got {error}.\n{advice}") from None
    if isinstance(answer, dict):
        answer = next((answer[place] for place in _PLACES if place in answer), None)
    if isinstance(answer, list) and len(answer) > 1 and all(type(score) in (int, float) for score in answer):
        return answer.index(max(answer))
    if type(answer) is not int:
        raise ValueError(f"query: expected a class number or scores, but got {str(answer)[:60]!r}.\n{advice}")
    return answer


def _run(command: list[str], images: "np.ndarray") -> list[int]:
    """The class numbers that a command prints."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{place:04d}.png" for place in range(len(images))]
        for path, image in zip(paths, images, strict=True):
            path.write_bytes(_png(image))
        lines = "".join(f"{path}\n" for path in paths)
        done = subprocess.run(command, input=lines, capture_output=True, text=True, check=False)
    advice = "It gets paths on stdin, one a line, and prints a class number for each. Answers so far are kept."
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2][-200:]
        got = f"exit code {done.returncode} ({last})"
        raise ValueError(f"query: expected answers of {command[0]}, but got {got}.\n{advice}")
    try:
        return [int(line) for line in done.stdout.split()]
    except ValueError:
        raise ValueError(f"query: expected numbers, but got {done.stdout[:60]!r}.\n{advice}") from None
