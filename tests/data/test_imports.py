"""The data room stands apart: it needs neither torch nor transformers."""

import os
import subprocess
import sys


def test_importing_the_room_imports_no_torch() -> None:
    code = (
        "import sys, laser_fast.data; print(sorted({'torch', 'transformers', 'triton', 'pandas'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"
