"""A time-stamp authority for tests, by the openssl command."""

import subprocess
from pathlib import Path


def authority(folder: Path, second_certificate: bool = False) -> None:
    """A time-stamp authority of our own, with a fresh key.

    Its answers hold its certificate, and a second, shorter one behind it if asked for: in DER's order of sets that one
    comes first, but an authority may write them as it likes.
    """
    more = "certs=second.pem\n" if second_certificate else ""
    (folder / "tsa.cnf").write_text(
        "[req]\ndistinguished_name=dn\nx509_extensions=ext\nprompt=no\n[dn]\nCN=test\n"
        "[ext]\nextendedKeyUsage=critical,timeStamping\n[tsa]\ndefault_tsa=t\n"
        "[t]\nserial=serial\nsigner_cert=tsa.pem\nsigner_key=tsa.key\nsigner_digest=sha256\n"
        "default_policy=1.2.3.4\ndigests=sha256\nordering=yes\ntsa_name=yes\n" + more
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
    if second_certificate:
        curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", "second.key"]
        arguments = ["-x509", *curve, "-out", "second.pem", "-subj", "/CN=second"]
        subprocess.run(["openssl", "req", *arguments], cwd=folder, check=True, capture_output=True)


def stamp(folder: Path, request: bytes) -> bytes:
    """The authority's answer."""
    (folder / "request.tsq").write_bytes(request)
    arguments = ["-queryfile", "request.tsq", "-out", "answer.tsr", "-config", "tsa.cnf"]
    subprocess.run(["openssl", "ts", "-reply", *arguments], cwd=folder, check=True, capture_output=True)
    return (folder / "answer.tsr").read_bytes()
