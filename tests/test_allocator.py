"""Memory that was freed is there for the next step: no page is fetched twice."""

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
if sys.argv[1] == "kept":
    from peftlab.allocator import keep_memory
    keep_memory()
import torch
torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**24)  # 64 MiB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's malloc")
def test_freed_memory_is_kept():
    def faults(mode):
        command = [sys.executable, "-c", FAULTS, mode]
        # without what another test's command has set for its children
        plain = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "THP_"))}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=plain)
        return int(done.stdout)

    assert faults("kept") < faults("plain") / 10 > 1_000


PEAKS = """
from peftlab.allocator import keep_memory
keep_memory()
import torch
from peftlab.memory import peak_bytes, reset_peak
cpu = torch.device("cpu")
held = [torch.ones(2**20) for _ in range(64)]  # of 4 MiB, every other one freed
del held[::2]
large = torch.ones(2**26)  # 256 MiB
first = peak_bytes(cpu)
del large
reset_peak(cpu)
before = peak_bytes(cpu)
kept = torch.ones(2**24)  # 64 MiB
print(first, before, peak_bytes(cpu))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's malloc")
def test_what_an_earlier_run_has_freed_is_not_in_the_peak_of_the_next():
    command = [sys.executable, "-c", PEAKS]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    first, before, after = map(int, done.stdout.split())
    assert first - before > 0.9 * (256 + 128) * 2**20
    assert 0.9 * 64 * 2**20 < after - before < 1.2 * 64 * 2**20
