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
