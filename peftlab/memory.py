"""Peak memory of this process, or of the GPU it works on."""

import contextlib
import resource
import sys
from pathlib import Path

import torch

from peftlab.allocator import give_back


def reset_peak(device: torch.device) -> None:
    """Forget the peak so far (loading a model may have needed more than training it)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    give_back()
    with contextlib.suppress(OSError):  # not Linux, or not allowed: the peak is the process's
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Peak since `reset_peak`: allocated on the GPU, or resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
