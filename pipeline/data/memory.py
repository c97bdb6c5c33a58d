"""How a process keeps the memory of large arrays.

Batches and blocks are tens of megabytes, made and freed without end. glibc gives arrays of that
size back to the system at once, and each new one costs a page fault for every 4 kB of it: a fifth
of the time from Parquet to batch.
"""

import ctypes
from functools import cache

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
LARGEST = 128 * 2**20  # arrays up to this size come from kept memory
OLD_LARGEST = 32 * 2**20  # the most that glibc before 2.35 takes
KEPT = 256 * 2**20  # free memory beyond this is given back


@cache
def keep_freed_memory() -> None:
    """Have this process use the memory of freed arrays again; without glibc nothing happens."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        if not mallopt(M_MMAP_THRESHOLD, LARGEST):
            mallopt(M_MMAP_THRESHOLD, OLD_LARGEST)
        mallopt(M_TRIM_THRESHOLD, KEPT)
