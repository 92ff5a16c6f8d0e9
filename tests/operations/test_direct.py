"""Files that are written past the system's cache hold what was written, wherever pieces begin and whatever the disk can do."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from inlay.formats import direct
from inlay.formats.direct import PAGE, Output

SIZE = 40 * PAGE + 123


def without_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "O_DIRECT")


def refused_when_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """As file systems in memory do."""
    opened = os.open

    def refusing(path: Path, flags: int, *more: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no")
        return opened(path, flags, *more)

    monkeypatch.setattr(os, "open", refusing)


def misaligned(written: Callable[..., int], wanted: int) -> Callable[..., int]:
    def pwrite(descriptor: int, data: memoryview, at: int) -> int:
        if len(data) >= PAGE and at % wanted:
            raise OSError(errno.EINVAL, "no")
        return written(descriptor, data, at)

    return pwrite


def refused_when_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a disk with larger blocks would."""
    monkeypatch.setattr(os, "pwrite", misaligned(os.pwrite, 2 * PAGE))
    # Through the cache, all is taken.
    monkeypatch.setattr(Output, "_through_cache", lambda self, view, at: os.lseek(self.cached, at, 0) + os.write(self.cached, view))


def less_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    written = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, at: written(descriptor, data[: len(data) // 2 + 1], at))


@pytest.mark.parametrize("system", [lambda _: None, without_flag, refused_when_opened, refused_when_written, less_at_a_time])
@pytest.mark.parametrize("block", [PAGE, 3 * PAGE, 2**22])
def test_pieces_in_any_order(
    system: Callable[[pytest.MonkeyPatch], None], block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "BLOCK", block)
    content = random.Random(0).randbytes(SIZE)
    other = b"before" + content
    (tmp_path / "source").write_bytes(other)
    ends = [0, 1, 2, 700, PAGE - 1, PAGE, 2 * PAGE, 5 * PAGE + 8, 5 * PAGE + 9, 7 * PAGE - 1, 20 * PAGE, 39 * PAGE + 1, SIZE - 5, SIZE]
    pieces = list(pairwise(ends))
    random.Random(1).shuffle(pieces)
    system(monkeypatch)
    source = os.open(tmp_path / "source", os.O_RDONLY)
    output = Output(tmp_path / "out", SIZE)
    for i, (start, end) in enumerate(pieces):
        if i % 2:
            output.write(content[start:end], start)
        else:
            output.copy(source, 6 + start, end - start, start)
    output.close()
    os.close(source)
    monkeypatch.undo()
    assert (tmp_path / "out").read_bytes() == content


def test_what_is_written_twice_is_the_last(tmp_path: Path) -> None:
    """Through the cache first, where whole pages go past it later, and the other way round."""
    output = Output(tmp_path / "out", 4 * PAGE)
    for at in (100, PAGE + 100):
        output.write(b"a" * 50, at)
    output.write(b"b" * (2 * PAGE), 0)
    output.write(b"c" * 10, 20)
    output.close()
    expected = bytearray(b"b" * (2 * PAGE) + bytes(2 * PAGE))
    expected[20:30] = b"c" * 10
    assert (tmp_path / "out").read_bytes() == expected


def test_a_source_that_ends_too_early(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(bytes(3 * PAGE))
    source = os.open(tmp_path / "source", os.O_RDONLY)
    output = Output(tmp_path / "out", 8 * PAGE)
    for begin in (0, 2 * PAGE + 1):
        with pytest.raises(OSError, match="ends too early"):
            output.copy(source, begin, 4 * PAGE, 0)
    output.leave()
    os.close(source)


def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "full")

    output = Output(tmp_path / "out", 4 * PAGE)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="full"):
        output.write(bytes(2 * PAGE), 0)
    output.leave()


def test_no_file_stays_open(tmp_path: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    for i in range(3):
        output = Output(tmp_path / str(i), PAGE)
        output.write(b"x" * PAGE, 0)
        (output.close if i else output.leave)()
    assert set(os.listdir("/proc/self/fd")) == before
