"""Time, memory and size of preparing logs of millions of events, and of reading training batches from them.

    python bench/prepare_scale.py --events 2500000 5000000 10000000 --out bench/results/cpu/prepare-scale.json

Every log is drawn: a user for every 50 events, 100,000 items of which some are far more frequent, events in the order
of time with users mixed. Each is prepared by a process of its own, whose peak is the kernel's high-water mark: imports,
heap and pages of mapped files together. It is read from `VmHWM`, which begins anew with a program; `ru_maxrss` begins
at the peak of the process that started it.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from recording import parser_of, record

NUM_ITEMS = 100_000
EVENTS_PER_USER = 50
_CHUNK = 500_000
_BATCHES = 200

_PEAK = """
def peak_bytes():
    with open("/proc/self/status") as status:
        return 1024 * int(next(line for line in status if line.startswith("VmHWM:")).split()[1])
"""

_PREPARE = """
import json, sys, time
from laser_fast.data import PrepareRequest, prepare
from pathlib import Path
imports = peak_bytes()
start = time.perf_counter()
made = prepare(PrepareRequest(out=Path(sys.argv[2]), interactions=Path(sys.argv[1])))
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "peak_bytes": peak_bytes(), "imports_bytes": imports, "users": made.num_users,
                  "items": made.num_items}))
"""

_STREAM = """
import json, sys, time
import numpy as np
from laser_fast.data import PromptLayout, SequenceDataset, TokenizedTexts
from laser_fast.data.streaming import StreamedRows, TokenBudgetLoader
from laser_fast.data.batches import BatchBuilder
imports = peak_bytes()
start = time.perf_counter()
data = SequenceDataset.load(sys.argv[1], verify=False)
opened = time.perf_counter() - start
texts = TokenizedTexts(np.arange(12 * data.num_items, dtype=np.int32), np.arange(data.num_items + 1) * 12)
layout = PromptLayout([1], [2], [3], max_items=10, max_tokens=256)
known = np.ones(data.num_items, dtype=bool)
rows = StreamedRows(data, np.maximum(np.diff(data.offsets) - 2, 0), 10)
loader = iter(TokenBudgetLoader(rows, BatchBuilder(texts, layout, layout, known, 10), 8192))
start, read = time.perf_counter(), 0
for _ in range(int(sys.argv[2])):
    read += len(next(loader))
seconds = time.perf_counter() - start
print(json.dumps({"open_seconds": opened, "batches_per_s": int(sys.argv[2]) / seconds, "rows_per_s": read / seconds,
                  "rows": len(rows), "imports_bytes": imports, "peak_bytes": peak_bytes()}))
"""


def write_log(path: Path, num_events: int) -> None:
    """A CSV of so many events."""
    random = np.random.default_rng(0)
    with path.open("w", encoding="ascii") as file:
        file.write("user_id,item_id,timestamp\n")
        for start in range(0, num_events, _CHUNK):
            count = min(_CHUNK, num_events - start)
            users = random.integers(0, num_events // EVENTS_PER_USER, count)
            items = (random.power(3, count) * NUM_ITEMS).astype(np.int64)
            times = 1_500_000_000 + 3 * np.arange(start, start + count) + random.integers(0, 3000, count)
            rows = zip(users.tolist(), items.tolist(), times.tolist(), strict=True)
            file.write("".join(f"u{user},i{item},{moment}\n" for user, item, moment in rows))


def run(code: str, *arguments: str) -> dict[str, Any]:
    """The JSON that a Python process prints last."""
    done = subprocess.run([sys.executable, "-c", _PEAK + code, *arguments], capture_output=True, text=True, check=True)
    values: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return values


def measure(num_events: int, folder: Path) -> dict[str, Any]:
    """One log: drawn, prepared, read."""
    log, out = folder / "log.csv", folder / "set"
    write_log(log, num_events)
    prepared = run(_PREPARE, str(log), str(out))
    size = sum(file.stat().st_size for file in out.iterdir())
    return {
        "events": num_events,
        "log_bytes": log.stat().st_size,
        "prepared_bytes": size,
        "prepare": prepared,
        "stream": run(_STREAM, str(out), str(_BATCHES)),
    }


def main() -> None:
    """Measure, print, write JSON."""
    parser = parser_of(__doc__)
    parser.add_argument("--events", type=int, nargs="+", default=[2_500_000, 5_000_000, 10_000_000])
    parser.add_argument("--out", help="JSON file to write")
    arguments = parser.parse_args()
    rows = []
    for num_events in arguments.events:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(num_events, Path(folder)))
        prepared, stream = rows[-1]["prepare"], rows[-1]["stream"]
        print(
            f"{num_events:>11,} events: {prepared['seconds']:.1f} s, peak {prepared['peak_bytes'] / 2**30:.2f} GiB, "
            f"{rows[-1]['prepared_bytes'] / 1e6:.0f} MB; streamed {stream['batches_per_s']:.0f} batches/s, "
            f"peak {stream['peak_bytes'] / 2**30:.2f} GiB",
            flush=True,
        )
    facts = {
        "load": os.getloadavg(),
        "time": time.strftime("%Y-%m-%d"),
        "what_grows_in_memory": "ids of the users (a dictionary, a list) and one integer for each; not the events",
        "logs": rows,
    }
    record(arguments.out, facts)


if __name__ == "__main__":
    main()
