"""Torch's idle threads sleep, instead of looking for work on processors that kernels' threads and servers could use.

OpenMP reads its settings when torch is loaded, so this is imported before it, and `quire` before `torch` by those who
want it. Whoever has set the variable keeps what they set.
"""

import os
import sys

if "torch" not in sys.modules:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
