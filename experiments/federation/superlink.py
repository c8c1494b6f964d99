"""A ``flower-superlink`` that delivers a publisher's signature with each bundle.

Flower's SuperNodes verify such signatures with ``--trusted-entities``. For apps that are published on Flower's Hub,
they come from there; for an app that is submitted from a folder, SuperLink has none. Here they are read from a file.
"""

import base64
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

_ENTITY = "fpk_loopback"
_SIGNATURES = "SMARK_LOOPBACK_SIGNATURES"


def sign(folder: Path, bundles: Iterable[bytes]) -> dict[str, str]:
    """Draws a publisher's key and signs bundles: ``trusted.yaml`` for SuperNodes, ``signatures.json`` for SuperLink.

    Returns:
      What SuperLink's environment needs.
    """
    key = ed25519.Ed25519PrivateKey.generate()
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    (folder / "trusted.yaml").write_text(yaml.safe_dump({_ENTITY: public.decode()}))
    signed = {}
    for bundle in bundles:
        digest, now = hashlib.sha256(bundle).digest(), int(time.time())
        signature = base64.urlsafe_b64encode(key.sign(now.to_bytes(8, "big") + digest)).decode()
        record = json.dumps({"signed_at": now, "signature": signature})
        signed[digest.hex()] = {"valid_license": "Valid", _ENTITY: record}
    (folder / "signatures.json").write_text(json.dumps(signed))
    return {_SIGNATURES: str(folder / "signatures.json")}


def main() -> None:
    """The command, with its own options."""
    from flwr.superlink.cli import flower_superlink
    from flwr.superlink.servicer.control import control_handlers

    signed = json.loads(Path(os.environ[_SIGNATURES]).read_text())
    plain = control_handlers.__dict__["Fab"]

    def with_signatures(hash_str: str, content: bytes, verifications: dict[str, str]) -> object:
        return plain(hash_str, content, verifications or signed.get(hash_str, {}))

    control_handlers.__dict__["Fab"] = with_signatures
    sys.argv[0] = "flower-superlink"
    flower_superlink()


if __name__ == "__main__":
    main()
