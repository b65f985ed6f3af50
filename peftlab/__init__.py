"""Which parameter-efficient fine-tuning method is best, once all are tuned equally hard."""

import os

# Before torch loads OpenMP, unless the user has said how its threads wait for each other. If they
# never spin, they must be woken for each of a step's thousands of meetings, a seventh of its time;
# if for milliseconds, two processes on the same cores are 5-20x slower. So: for some 80 µs.
if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
    os.environ["GOMP_SPINCOUNT"] = "3000"

__version__ = "0.1.0"
