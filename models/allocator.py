"""Makes glibc keep freed memory for the next buffer, or return it to the system where much was freed for good.

LUA on a CPU allocates and frees buffers of some MiB for every portion of a block, and each request with a latent
several of its size, in the API and in the worker. By default glibc may map each of them anew, page by page: packing a
Redis command of 512 KiB took 0.75 ms, and takes 0.04 ms with this.
"""

import ctypes

# Of <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# Where glibc's own bounds end up when large blocks happen to be freed in the right order (mallopt(3)).
_KEPT_BYTES = 64 << 20
_REUSED_BYTES = 32 << 20


def keep_freed_memory() -> None:
    """Let this process keep up to 64 MiB of freed memory and reuse buffers of up to 32 MiB; no effect without glibc."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        libc.mallopt(_M_MMAP_THRESHOLD, _REUSED_BYTES)


def return_freed_memory() -> None:
    """Return freed memory to the system; no effect without glibc."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
