"""The files of bench/ can be imported, as its own scripts import them."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))
