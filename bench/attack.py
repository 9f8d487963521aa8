"""Attacks on what the library promises, counted: kills, damages, mutated inputs, calls, threads, starts, full disks.

    python bench/attack.py OUT                    # everything, in 14 minutes on two cores
    python bench/attack.py OUT --seed 1 --only kills threads
    python bench/attack.py OUT --rehearse         # everything once; no figure is kept
    python bench/attack.py --table                # the table of docs/reliability.md, from bench/results/cpu/attack.json

OUT, a new folder, gets attack.json: on what, when and by which command it was made, and a line for every attack with
what was tried, how it ended and what was lost. Nothing needs a GPU, nothing is downloaded. What is drawn follows from
the seed; at which instruction a kill strikes and how threads take turns does not.
The exit status is 1 if anything was lost.
"""

import sys

from attacking.run import main

if __name__ == "__main__":
    sys.exit(main(__doc__))
