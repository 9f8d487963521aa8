"""One run that measures everything there is to measure on a GPU, in ten items, each line kept the moment it ends.

    python3 bench/gpu_run.py OUT                  # as much as fits into 14 minutes
    python3 bench/gpu_run.py OUT --items 1-7 --minutes 6
    python3 bench/gpu_run.py OUT --rehearse       # every item in small on the CPU; no figure is kept
    python3 bench/gpu_run.py OUT --table          # what OUT holds, as Markdown

OUT gets results.jsonl, a line for everything measured, and what the items said. The run may be killed at any moment:
the same command goes on with the lines that are missing. Nothing is downloaded; what is not installed is skipped by
name.
The exit status is 0 unless the run itself broke: a measurement that fails is a line that says so.
"""

import sys

from gpu.run import main

if __name__ == "__main__":
    sys.exit(main())
