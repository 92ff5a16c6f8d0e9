"""Files that are written at random and past the system's cache.

What is written once and not read soon would only push other files out of it, and each of its pages costs the processor time.
"""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

# Where pieces begin that go to the disk by themselves: a multiple of every disk's blocks.
PAGE = 4096
# How many bytes go to the disk at once.
BLOCK = 2**22


class Output:
    """A new file. Whole pages of what is written go to the disk, the ends of each piece through the cache; all of it, where the system
    or the disk knows no other way. One thread may write at a time.

    Args:
        size: how long the file will be.
    """

    def __init__(self, file: Path, size: int) -> None:
        self.cached = os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        os.truncate(self.cached, size)
        self.direct = _past_the_cache(file)
        # Memory that begins at a page, which is what disks take.
        self.pages = memoryview(mmap.mmap(-1, BLOCK))

    def write(self, data: bytes | memoryview, at: int) -> None:
        view = memoryview(data).cast("B")
        start, end = _whole_pages(at, len(view))
        self._through_cache(view[:start], at)
        for done in range(start, end, BLOCK):
            piece = view[done : min(end, done + BLOCK)]
            self.pages[: len(piece)] = piece
            self._pages(len(piece), at + done)
        self._through_cache(view[end:], at + end)

    def copy(self, source: int, begin: int, nbytes: int, at: int) -> None:
        """Write ``nbytes`` of another file, from ``begin`` on.

        Raises:
            OSError: it ends earlier.
        """
        start, end = _whole_pages(at, nbytes)
        self._through_cache(_read(source, start, begin), at)
        for done in range(start, end, BLOCK):
            size = min(BLOCK, end - done)
            _read_into(source, self.pages[:size], begin + done)
            self._pages(size, at + done)
        self._through_cache(_read(source, nbytes - end, begin + end), at + end)

    def close(self) -> None:
        """On the disk, for good."""
        os.fsync(self.cached)
        self.leave()

    def leave(self) -> None:
        for descriptor in {self.cached, self.direct} - {None}:
            os.close(descriptor)  # type: ignore[arg-type]

    def _pages(self, size: int, at: int) -> None:
        if self.direct is not None:
            try:
                if os.pwrite(self.direct, self.pages[:size], at) == size:
                    return
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                os.close(self.direct)
                self.direct = None
        self._through_cache(self.pages[:size], at)

    def _through_cache(self, view: memoryview, at: int) -> None:
        done = 0
        while done < len(view):
            done += os.pwrite(self.cached, view[done:], at + done)


def _past_the_cache(file: Path) -> int | None:
    try:
        return os.open(file, os.O_WRONLY | os.O_DIRECT)
    except (AttributeError, OSError):
        return None


def _whole_pages(at: int, nbytes: int) -> tuple[int, int]:
    """Where the first whole page of a piece begins and the last one ends, from the piece's own beginning."""
    start = min(nbytes, -at % PAGE)
    return start, start + (nbytes - start) // PAGE * PAGE


def _read(source: int, nbytes: int, start: int) -> memoryview:
    made = memoryview(bytearray(nbytes))
    _read_into(source, made, start)
    return made


def _read_into(source: int, view: memoryview, start: int) -> None:
    done = 0
    while done < len(view):
        got = os.preadv(source, [view[done:]], start + done)
        if not got:
            raise OSError("A file of the base ends too early; copy or download it again.")
        done += got
