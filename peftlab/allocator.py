"""Let the process keep memory that a training step frees: the next step asks for it again.

glibc returns large blocks to the system at once and fetches them anew, zeroed, page by page: on
SmolLM2 some 100,000 page faults per step, a tenth of its CPU time.
"""

import ctypes
import os
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
NEVER_TRIM = 2**31 - 1
LARGEST_KEPT = 2**30, 2**25  # bytes; an older glibc takes no more than the second


def keep_memory() -> None:
    """Set up the allocator of this process, and of its children by environment variables.

    To be called before torch is imported, which reads one of them. Elsewhere than with glibc it
    does nothing.
    """
    if not _is_glibc():
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch: pages of 2 MiB for large tensors
    libc = ctypes.CDLL(None)
    kept = next(size for size in LARGEST_KEPT if libc.mallopt(M_MMAP_THRESHOLD, size))
    libc.mallopt(M_TRIM_THRESHOLD, NEVER_TRIM)
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(kept))
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(NEVER_TRIM))


def give_back() -> None:
    """Return what is free now: what one run of a process needed is not to count for the next."""
    if _is_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def _is_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"
