"""FedAvg without masks, on the masked app's digits: a separate app, since the masked one cannot turn masks off."""

import sys
from pathlib import Path

import experiments.federation

sys.path.insert(0, str(Path(experiments.federation.__file__).parent / "app"))
