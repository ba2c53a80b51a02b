"""A slice of the support table: one model of each kind, and every promise that its row claims."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from catalogue import catalogue

ENTRIES = catalogue()
