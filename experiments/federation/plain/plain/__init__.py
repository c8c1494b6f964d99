"""FedAvg without masks, on the masked app's digits: an app of its own, since the masked one has no door for it."""

import sys
from pathlib import Path

import experiments.federation

sys.path.insert(0, str(Path(experiments.federation.__file__).parent / "app"))
