"""One operation and the lazy names of an installed wheel, run from outside the clone."""

import sys
from pathlib import Path

import torch

import laser_fast
import laser_fast.kernels
from laser_fast.ops import backends, inject_prefix_kv

place = Path(laser_fast.__file__).resolve()
if not place.is_relative_to(Path(sys.prefix).resolve()):
    sys.exit(f"smoke: laser_fast must come from the wheel, got {place}")
for file in ("py.typed", "presets/movielens-100k.yaml"):
    if not (place.parent / file).is_file():
        sys.exit(f"smoke: {file} is missing from the wheel")
for name in laser_fast.__all__:
    getattr(laser_fast, name)
text, prefix = torch.zeros(3, 1, 2), torch.ones(1, 1, 1, 2)
key, _, offsets = inject_prefix_kv(text, text, prefix, prefix, torch.tensor([0, 1, 3], dtype=torch.int32))
if key[:, 0, 0].tolist() != [1, 0, 1, 0, 0] or offsets.tolist() != [0, 2, 5]:
    sys.exit(f"smoke: inject_prefix_kv gives {key[:, 0, 0].tolist()}, {offsets.tolist()}")
print(f"smoke: laser_fast {laser_fast.__version__}, compiled library: {backends.load_native().level}")
