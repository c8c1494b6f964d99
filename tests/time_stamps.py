"""A time-stamp authority for tests, by the openssl command."""

import subprocess
from pathlib import Path


def authority(folder: Path) -> None:
    """A time-stamp authority of our own, with a fresh key."""
    (folder / "tsa.cnf").write_text(
        "[req]\ndistinguished_name=dn\nx509_extensions=ext\nprompt=no\n[dn]\nCN=test\n"
        "[ext]\nextendedKeyUsage=critical,timeStamping\n[tsa]\ndefault_tsa=t\n"
        "[t]\nserial=serial\nsigner_cert=tsa.pem\nsigner_key=tsa.key\nsigner_digest=sha256\n"
        "default_policy=1.2.3.4\ndigests=sha256\nordering=yes\ntsa_name=yes\n"
    )
    (folder / "serial").write_text("01")
    arguments = [
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-keyout",
        "tsa.key",
        "-out",
        "tsa.pem",
        "-config",
        "tsa.cnf",
    ]
    subprocess.run(["openssl", "req", *arguments], cwd=folder, check=True, capture_output=True)


def stamp(folder: Path, request: bytes) -> bytes:
    """The authority's answer."""
    (folder / "request.tsq").write_bytes(request)
    arguments = ["-queryfile", "request.tsq", "-out", "answer.tsr", "-config", "tsa.cnf"]
    subprocess.run(["openssl", "ts", "-reply", *arguments], cwd=folder, check=True, capture_output=True)
    return (folder / "answer.tsr").read_bytes()
