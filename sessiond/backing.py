"""Memory that a session's KV lies in: the process's own, or the pages of a file one tier down.

A file's pages are mapped while a step reads them and let go again (`release`): the kernel keeps as many of them in its
page cache as nothing else wants, and reads the others from disk. The file has no name; it goes with the process.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sessiond.errors import DiskFull

_MADV_POPULATE_WRITE = 23  # Linux 5.14; not in Python's mmap


class Backing:
    """`nbytes` of zeros: address space whose pages are taken as they are written."""

    def __init__(self, nbytes: int, folder: Path | None = None) -> None:
        """With a `folder`, of a file there, whose disk space is taken at once. Raises DiskFull, OSError."""
        self.in_file = folder is not None
        self.is_huge = False
        if folder is not None:
            with _nameless(folder, nbytes) as file:
                self.memory = mmap.mmap(file, nbytes, flags=mmap.MAP_SHARED)
            return
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        self.memory = mmap.mmap(-1, nbytes, flags=flags)
        if (option := getattr(mmap, "MADV_NOHUGEPAGE", None)) is not None:
            # Where the kernel gives huge pages unasked, one token would take one in every layer and head.
            with contextlib.suppress(OSError):
                self.memory.madvise(option)

    def use_huge_pages(self) -> None:
        """Take memory in huge pages: what is reserved then counts whole."""
        option = getattr(mmap, "MADV_HUGEPAGE", None)
        if option is None or self.in_file:
            return
        with contextlib.suppress(OSError):  # a hint: without it, pages are small
            self.memory.madvise(option)
            self.is_huge = True

    def populate(self, start: int, end: int) -> bool:
        """Map the pages of bytes [start, end) in one call instead of a fault each. A hint; False if not possible."""
        start = start // mmap.PAGESIZE * mmap.PAGESIZE
        end = min(-(-end // mmap.PAGESIZE) * mmap.PAGESIZE, len(self.memory))
        try:
            self.memory.madvise(_MADV_POPULATE_WRITE, start, end - start)
        except (OSError, ValueError):
            return False
        return True

    def release(self, start: int, end: int) -> None:
        """Bytes [start, end) of a file leave this process's memory, what was written to them for the page cache."""
        if self.in_file:
            first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
            last = end // mmap.PAGESIZE * mmap.PAGESIZE
            if first < last:
                self.memory.madvise(mmap.MADV_DONTNEED, first, last - first)


def files_supported() -> bool:
    """Whether this system can set a file's space aside: a page that found none when written would end the process."""
    return hasattr(os, "posix_fallocate") and hasattr(mmap, "MADV_DONTNEED")


@contextlib.contextmanager
def _nameless(folder: Path, nbytes: int) -> Iterator[int]:
    """A file without a name that has its disk space. A mapping outlives it."""
    with tempfile.TemporaryFile(prefix="exact-", dir=folder) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, nbytes)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskFull(f"{folder} has no room for {nbytes} bytes of KV", needed_bytes=nbytes) from error
            raise
        yield file.fileno()
