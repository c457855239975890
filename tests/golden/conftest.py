"""The golden directories are written and read with the fault runs' fake daemon."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "e2e"), str(HERE.parent / "faults")]
