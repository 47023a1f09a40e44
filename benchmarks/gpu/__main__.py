"""``python benchmarks/gpu``: see :mod:`gpu.command`."""

import importlib.util
import os
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[1]

sys.path[0] = str(BENCHMARKS)  # this folder is a package there
if importlib.util.find_spec("fastclust") is None:  # not installed: a dry run in a built checkout
    sys.path.insert(0, str(BENCHMARKS.parent))
    os.environ["PYTHONPATH"] = os.pathsep.join([sys.path[0], os.environ.get("PYTHONPATH", "")])

from gpu.command import main  # noqa: E402 - found by the lines above

sys.exit(main())
