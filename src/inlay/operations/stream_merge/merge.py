"""Running a merge that is planned."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import torch

from ...formats.streaming import Writing
from .folder import check_space, working_folder, write_others
from .journal import Journal
from .plan import Plan
from .writing import Writer


class StreamMerge(Plan):
    __doc__ = Plan.__doc__

    def check_space(self, out: Path) -> None:
        """
        Raises:
            OSError: the output does not fit on the disk.
        """
        check_space(out, self.size)

    def fingerprint(self) -> int:
        """Of everything that the output depends on."""
        files = [[f, (s := (self.folder / f).stat()).st_size, s.st_mtime_ns] for f in self.checkpoint.files]
        config = zlib.crc32((self.folder / "config.json").read_bytes())
        how = None if self.combining is None else self.combining.fingerprint()
        parts = [files, config, str(self.out_dtype), self.base_dtype, how, [a.fingerprint() for a in self.adapters]]
        return zlib.crc32(json.dumps(parts).encode(), zlib.crc32(b"".join(s.header for s in self.shards.values())))

    @torch.no_grad()
    def run(
        self, out: str | Path, progress: Callable[[int], object] = lambda _: None, examine: Callable[[Path], object] = lambda _: None
    ) -> Path:
        """Write the merged model. The folder appears whole; what was finished before an interruption is kept and not done again.

        Args:
            out: the folder, which must not exist.
            progress: called with numbers of bytes that have been written since the last time.
            examine: called with the finished folder before it gets its name; an error that it raises undoes the merge.

        Raises:
            ValueError: the folder exists, or a weight would not be finite.
            OSError: there is no room on the disk.
        """
        out = Path(out)
        if out.exists():
            raise ValueError(f"{out} exists already; name a new folder.")
        self.check_space(out)
        folder = working_folder(out)
        journal = Journal(folder, self, self.fingerprint())
        for name in journal.finished:
            progress(self.shards[name].size - len(self.shards[name].header))
        try:
            with self.files, Writing() as writing:
                Writer(self, writing, progress).write(journal)
        except (ValueError, TypeError):
            # It would not come out otherwise the next time.
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            for shard in self.shards.values():
                shard.leave()
        write_others(self, folder)
        try:
            examine(folder)
        except Exception:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        # Until here an interruption loses nothing.
        journal.close()
        folder.rename(out)
        return out
