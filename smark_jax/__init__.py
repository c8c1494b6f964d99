"""smark_jax: fingerprint every copy of an image classifier, and trace a leaked one.

The modules are the interface; import them, not their contents::

    from smark_jax import carriers, codes, embedding, extraction, keys, tracing

They are loaded when first used, so that ``smark --help`` does not wait for optax or TFDS.
"""

from typing import TYPE_CHECKING

from smark_jax import _lazy

if TYPE_CHECKING:
    from smark_jax import aggregation as aggregation
    from smark_jax import alignment as alignment
    from smark_jax import attacks as attacks
    from smark_jax import blackbox as blackbox
    from smark_jax import carriers as carriers
    from smark_jax import codes as codes
    from smark_jax import data as data
    from smark_jax import embedding as embedding
    from smark_jax import errors as errors
    from smark_jax import extraction as extraction
    from smark_jax import federation as federation
    from smark_jax import files as files
    from smark_jax import keys as keys
    from smark_jax import licence as licence
    from smark_jax import losses as losses
    from smark_jax import models as models
    from smark_jax import parallel as parallel
    from smark_jax import privacy as privacy
    from smark_jax import report as report
    from smark_jax import statistics as statistics
    from smark_jax import tracing as tracing
    from smark_jax import training as training
    from smark_jax import vault as vault

__version__ = "0.1.0"
__all__ = [
    "aggregation",
    "alignment",
    "attacks",
    "blackbox",
    "carriers",
    "codes",
    "data",
    "embedding",
    "errors",
    "extraction",
    "federation",
    "files",
    "keys",
    "licence",
    "losses",
    "models",
    "parallel",
    "privacy",
    "report",
    "statistics",
    "tracing",
    "training",
    "vault",
]

__getattr__ = _lazy.modules(__name__, __all__)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
