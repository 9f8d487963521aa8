"""One report of everything that was built for speed and memory: measured, beside what was predicted.

    python bench/report.py OUT              # on a GPU, in less than 9 minutes
    python bench/report.py OUT --cpu        # the same in small, in less than 4 minutes
    python bench/report.py OUT --only roofs step waterfall

OUT gets report.json, report.md and pictures. A section that fails says why in the report and makes the exit status 1;
one that is skipped says why as well.
"""

import os
import sys

if "--cpu" in sys.argv:  # before torch is imported: the library puts models on a GPU wherever it sees one
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

from reporting.run import main

if __name__ == "__main__":
    sys.exit(main())
