"""What of a merge is finished, noted beside it, so that it can go on after it was interrupted."""

from __future__ import annotations

import json
import shutil
from dataclasses import astuple
from pathlib import Path

from ...formats.folder import write_json
from ...formats.streaming import Shard
from .plan import Plan, Rounding

NAME = ".inlay-merge.json"


class Journal:
    """
    Args:
        folder: where the merge is written before it is complete. What is in there of another merge, or unfinished, goes.
        fingerprint: of everything that the output depends on.

    Attributes:
        finished: checksums of the shards that are written, by their names.
    """

    def __init__(self, folder: Path, plan: Plan, fingerprint: int) -> None:
        self.file, self.plan, self.fingerprint = folder / NAME, plan, fingerprint
        self.finished: dict[str, int] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for name, shard in plan.shards.items():
            shard.file = folder / name
        self._read()
        for path in folder.iterdir():
            if path.name not in self.finished:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._write()

    def _read(self) -> None:
        try:
            found = json.loads(self.file.read_text(encoding="utf-8"))
            if found["fingerprint"] != self.fingerprint:
                return
            whole = {name: check for name, check in found["finished"].items() if self.plan.shards[name].is_whole(check)}
            rounding = {name: Rounding(*numbers) for name, numbers in found["rounding"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return
        self.finished, self.plan.rounding = whole, rounding

    def _write(self) -> None:
        rounding = {name: astuple(r) for name, r in self.plan.rounding.copy().items()}
        write_json(self.file, {"fingerprint": self.fingerprint, "finished": self.finished, "rounding": rounding})

    def note(self, shard: Shard) -> None:
        """A shard is on the disk, for good."""
        self.finished[shard.file.name] = shard.check()
        self._write()

    def close(self) -> None:
        self.file.unlink()
