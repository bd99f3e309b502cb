"""One shard of the counts: adds each delta once, keeps a journal on disk, publishes numbered snapshots. No Ray."""

from __future__ import annotations

from pathlib import Path

from actors.cooccurrence.count import PairCounts, decayed, merge
from actors.cooccurrence.errors import CooccurrenceError
from actors.cooccurrence.table import read_arrays, write_arrays

COMPACT_AFTER = 32


class CountShardCore:
    """Counts of the pairs whose first word falls to this shard.

    A delta has a name; a name that was added before is ignored, so a caller that does not know whether it arrived sends it again.
    With ``folder`` a delta is on disk before it is acknowledged, and a shard made anew over the folder goes on where that ended.
    """

    def __init__(self, folder: Path | None = None):
        self._folder = folder
        self._base = PairCounts.empty()
        self._parts: list[PairCounts] = []
        self._applied: set[str] = set()
        self._snapshots: dict[int, PairCounts] = {}
        self._files = self._published = 0
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._recover(folder)

    def add(self, name: str, delta: PairCounts) -> bool:
        """Whether it was new."""
        if name in self._applied:
            return False
        if self._folder is not None:
            self._write(self._folder / f"delta-{self._files:08d}.npz", delta, {"name": name})
            self._files += 1
        self._parts.append(delta)
        self._applied.add(name)
        if len(self._parts) >= COMPACT_AFTER:
            self._compact()
        return True

    def missing(self, names: list[str]) -> list[str]:
        """Those that have not been added."""
        return [name for name in names if name not in self._applied]

    def counts(self) -> PairCounts:
        """Everything added so far."""
        self._compact()
        return self._base

    def snapshot(self, number: int, names: list[str], decay: float = 1.0) -> PairCounts:
        """The counts at snapshot ``number``: exactly the deltas before it and ``names``. Asked again, the same again.

        Afterwards the counts are multiplied by ``decay``.

        Raises:
            CooccurrenceError: a named delta is not there yet, or a later snapshot was published already.
        """
        if number in self._snapshots:
            return self._snapshots[number]
        newest = max(self._snapshots, default=0)
        if number <= newest:
            raise CooccurrenceError(f"Snapshot {number} is gone: the shard has published {newest}.")
        absent = self.missing(names)
        if absent:
            raise CooccurrenceError(f"Snapshot {number} waits for {len(absent)} deltas, such as {absent[0]}.")
        self._compact()
        published = self._base
        self._snapshots = {number: published}
        if self._folder is not None:
            self._write(self._folder / f"snapshot-{number:08d}.npz", published, {"number": number, "decay": decay})
        self._base, self._published = decayed(published, decay), number
        if self._folder is not None:
            self._write_base()
            for old in sorted(self._folder.glob("snapshot-*.npz"))[:-1]:
                old.unlink()
        return published

    def _compact(self) -> None:
        if self._parts:
            self._base = merge([self._base, *self._parts])
            self._parts = []
            if self._folder is not None:
                self._write_base()

    def _write_base(self) -> None:
        if self._folder is None:
            return
        deltas = sorted(self._folder.glob("delta-*.npz"))
        # The base names what it holds: a crash between this and the next lines leaves deltas that are known to be in it.
        self._write(self._folder / "base.npz", self._base, self._about())
        for path in deltas:
            path.unlink()

    def _about(self) -> dict[str, object]:
        return {"applied": sorted(self._applied), "files": self._files, "published": self._published}

    def _recover(self, folder: Path) -> None:
        if (folder / "base.npz").exists():
            self._base, about = self._read(folder / "base.npz")
            self._applied, self._files = set(about["applied"]), int(about["files"])
            self._published = int(about["published"])
        for path in sorted(folder.glob("snapshot-*.npz")):
            counts, about = self._read(path)
            self._snapshots = {int(about["number"]): counts}
            if int(about["number"]) > self._published:  # ended between writing the snapshot and the base after it
                self._base, self._published = decayed(counts, float(about["decay"])), int(about["number"])
        for path in sorted(folder.glob("delta-*.npz")):
            delta, about = self._read(path)
            self._files = max(self._files, int(path.stem.split("-")[1]) + 1)
            if about["name"] not in self._applied:
                self._parts.append(delta)
                self._applied.add(about["name"])

    @staticmethod
    def _write(path: Path, counts: PairCounts, about: dict[str, object]) -> None:
        write_arrays(path, {**about, "units": counts.units}, {"keys": counts.keys, "counts": counts.counts})

    @staticmethod
    def _read(path: Path) -> tuple[PairCounts, dict]:
        about, arrays = read_arrays(path, "part of a count's journal")
        return PairCounts(arrays["keys"], arrays["counts"], int(about["units"])), about
