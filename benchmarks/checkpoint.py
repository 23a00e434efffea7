"""The checkpoint that benchmarks of the real engine share: that of tools/make_moe.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from make_moe import VOCAB, make

__all__ = ["VOCAB", "make"]
