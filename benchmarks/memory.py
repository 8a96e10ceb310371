"""Peak memory of one run in this process; it needs no package but torch, so that a peer's process can use it too."""
import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch


class OnDevice(Protocol):
    "What is asked of the options."
    device: str  # cpu or cuda


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


_mapped_from = 2**25  # bytes: 32 MiB is where glibc's own adaptation ends in a program like this one


def _map_blocks_from(size: int) -> None:
    "Sets glibc's M_MMAP_THRESHOLD."
    global _mapped_from
    _mapped_from = size
    ctypes.CDLL(None).mallopt(-3, size)
    ctypes.CDLL(None).mallopt(-1, 2 * size)  # M_TRIM_THRESHOLD, as in that adaptation


@contextmanager
def clean_heap(options: OnDevice) -> Iterator[None]:
    """Gives every block of 64 KiB or more a mapping of its own while it lasts: for runs before a measured one.

    A run without it leaves free blocks in the heap, which malloc hands out again and does not give back: the next
    `PeakMemory` would count what has long been freed, a quarter too much or more.
    """
    if options.device != "cpu" or not sys.platform.startswith("linux"):
        yield
        return
    before = _mapped_from
    _map_blocks_from(2**16)
    try:
        yield
    finally:
        _map_blocks_from(before)


class PeakMemory:
    """MiB by which memory rises above what was held at `start`; `stop` gives None where the system does not tell.

    On a GPU the allocator of torch counts. On Linux the kernel does: free memory is given back (malloc_trim), the high-water
    mark of the process is reset (5 into /proc/self/clear_refs), and the mark after the run is compared with the resident memory
    before it. This counts what kernels allocate inside, too. In between every block of 64 KiB or more is mapped on its own, so
    that it is gone when it is freed: holes in the heap do not count. Run the same thing once before, so that libraries are loaded
    and gradients exist: then the difference is activations and temporary buffers.
    """

    def __init__(self, options: OnDevice):
        self.on_gpu, self.known = options.device != "cpu", sys.platform.startswith("linux")

    def start(self) -> "PeakMemory":
        gc.collect()
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        elif self.known:
            self.outside = _mapped_from
            _map_blocks_from(2**16)
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self.before = _resident("VmRSS")
        return self

    def stop(self) -> float | None:
        if self.on_gpu:
            torch.cuda.synchronize()
            return (torch.cuda.max_memory_allocated() - self.before) / 2**20
        if not self.known:
            return None
        _map_blocks_from(self.outside)
        return (_resident("VmHWM") - self.before) / 2**20
