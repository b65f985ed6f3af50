"""Which parameter-efficient fine-tuning method is best, once all are tuned equally hard."""

import os

# Before torch loads OpenMP: spinning threads make two processes on one machine 5-20x slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
