"""What nvidia-smi says of the first GPU, without a context of the device."""

import subprocess
from collections.abc import Sequence

_ASKING_S = 30.0
_FIELDS = {"device": "name", "capability": "compute_cap", "memory": "memory.total", "driver": "driver_version"}


def device() -> dict[str, str | None]:
    """Name, capability, memory and driver of the first GPU; None where nvidia-smi says nothing."""
    words = ["nvidia-smi", f"--query-gpu={','.join(_FIELDS.values())}", "--format=csv,noheader"]
    try:
        said = subprocess.run(words, capture_output=True, text=True, timeout=_ASKING_S, check=False)
    except (OSError, subprocess.TimeoutExpired):  # not there, or it hangs: no reason to measure nothing
        return dict.fromkeys(_FIELDS)
    values: Sequence[str] = said.stdout.splitlines()[0].split(", ") if said.returncode == 0 and said.stdout else ()
    return dict(zip(_FIELDS, values, strict=True)) if len(values) == len(_FIELDS) else dict.fromkeys(_FIELDS)
