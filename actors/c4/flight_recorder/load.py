"""Reads a folder of Flight Recorder dumps into a DumpSet: finds the files, ranks and the run, and warns of what it leaves out.

A dump is recognised by its content; names only tell the rank (the last number: ``_dump_3``, ``nccl_trace_rank_3``). Other
files in the folder, logs among them, are never interpreted.
"""

from __future__ import annotations

import gc
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.c4.flight_recorder.errors import FlightRecorderError, RefusedPickleError, UnreadableDumpError
from actors.c4.flight_recorder.model import DumpSet, RankDump
from actors.c4.flight_recorder.pickles import load_plain_pickle
from actors.c4.flight_recorder.schema import looks_like_dump, members_of, normalise

_NAMED = re.compile(r"(\d+)(?:\.(?:json|pickle|pkl|bin|dump|trace))?$", re.IGNORECASE)
_RANK_KEY = re.compile(r"(?:rank[_ ]?)?(\d+)$", re.IGNORECASE)
_NO_DUMP_SUFFIXES = {
    *(
        ".log",
        ".txt",
        ".md",
        ".csv",
        ".yaml",
        ".yml",
        ".py",
        ".sh",
        ".html",
        ".png",
        ".gz",
        ".xz",
        ".zip",
        ".tar",
        ".out",
        ".err",
    ),
}
_RUN_GAP_NS = 6 * 3600 * 10**9


@dataclass(frozen=True)
class Limits:
    """What is read at most, against files made to exhaust memory."""

    file_bytes: int = 128 << 20
    files: int = 100_000


@dataclass(frozen=True)
class _Raw:
    """A dump whose rank is known."""

    dump: RankDump
    default_world: tuple[int, ...]


def load_folder(folder: Path, limits: Limits = Limits()) -> DumpSet:
    """All dumps of the run in ``folder``; where it holds none itself, those of its subfolders (one a node, or one set).

    Raises:
        FlightRecorderError: there is nothing to diagnose; the text says why.
    """
    warnings: list[str] = []
    sets = _files(folder, limits)
    raws: list[_Raw] = []
    silent: dict[int, str] = {}
    refused: list[str] = []
    broken: list[str] = []
    # Millions of small objects without a cycle among them: the collector would walk them again and again.
    collecting = gc.isenabled()
    gc.disable()
    try:
        for file in sets:
            _read_file(file, folder, limits, raws, silent, refused, broken)
    finally:
        if collecting:
            gc.enable()
    if not raws:
        raise FlightRecorderError(_nothing(folder, refused, broken, silent))
    warnings += [f"Refused {name}; nothing in it was executed." for name in refused[:8]]
    warnings += [f"Left out {name}." for name in broken[:8]]
    if len(refused) + len(broken) > 16:
        warnings.append(f"{len(refused) + len(broken)} files in all were left out.")
    raws = _one_run(raws, warnings)
    dumps = _one_a_rank(raws, warnings)
    return _complete(dumps, raws, silent, warnings)


def from_objects(objects: Mapping[int, Any]) -> DumpSet:
    """A DumpSet of decoded dumps by rank, e.g. gathered live; ``None`` stands for a rank that was asked and gave nothing."""
    raws = [
        _Raw(normalise(root, rank, f"rank {rank}"), _default_world(root))
        for rank, root in objects.items()
        if root is not None
    ]
    if not raws:
        raise FlightRecorderError("There is no dump to diagnose.")
    warnings: list[str] = []
    raws = _one_run(raws, warnings)
    silent = {rank: f"rank {rank}" for rank, root in objects.items() if root is None}
    return _complete(_one_a_rank(raws, warnings), raws, silent, warnings)


def _files(folder: Path, limits: Limits) -> list[Path]:
    if not folder.exists():
        raise FlightRecorderError(f"There is no folder {folder}.")
    if folder.is_file():
        return [folder]
    try:
        own = sorted(_candidates(folder))
        if not own:
            inner = [child for child in sorted(folder.iterdir()) if child.is_dir() and not child.name.startswith(".")]
            found = {child: sorted(_candidates(child, deep=True)) for child in inner}
            found = {child: files for child, files in found.items() if files}
            own = _merge_subfolders(folder, found)
    except OSError as error:
        raise FlightRecorderError(f"The folder {folder} cannot be read: {error.strerror}.") from error
    if not own:
        raise FlightRecorderError(
            f"The folder {folder} holds no Flight Recorder dumps (files such as _dump_0 or rank_0.json)."
        )
    if len(own) > limits.files:
        raise FlightRecorderError(f"The folder {folder} holds {len(own)} files; at most {limits.files} are read.")
    return own


def _candidates(folder: Path, deep: bool = False) -> Iterator[Path]:
    for path in folder.rglob("*") if deep else folder.iterdir():
        if path.name.startswith(".") or path.suffix.lower() in _NO_DUMP_SUFFIXES or not path.is_file():
            continue
        if _NAMED.search(path.name) or path.suffix.lower() in (".json", ".pkl", ".pickle"):
            yield path


def _merge_subfolders(folder: Path, found: dict[Path, list[Path]]) -> list[Path]:
    """One set spread over a folder a node has every rank once; several sets repeat ranks and must be told apart by the user."""
    ranks = Counter(_rank_in_name(file) for files in found.values() for file in files)
    if len(found) > 1 and any(count > 1 for rank, count in ranks.items() if rank is not None):
        names = ", ".join(child.name for child in list(found)[:6])
        raise FlightRecorderError(f"The folder {folder} holds several sets of dumps ({names}): name one of them.")
    return [file for files in found.values() for file in files]


def _rank_in_name(path: Path) -> int | None:
    match = _NAMED.search(path.name)
    return int(match.group(1)) if match is not None and len(match.group(1)) < 9 else None


def _read_file(
    file: Path,
    folder: Path,
    limits: Limits,
    raws: list[_Raw],
    silent: dict[int, str],
    refused: list[str],
    broken: list[str],
) -> None:
    """Adds what ``file`` holds to one of the lists; an empty file tells that its rank began a dump and wrote nothing."""
    name = str(file.relative_to(folder)) if file != folder else file.name
    rank = _rank_in_name(file)
    try:
        size = file.stat().st_size
        if size > limits.file_bytes:
            raise UnreadableDumpError(f"it is larger than {limits.file_bytes >> 20} MiB")
        data = file.read_bytes()
        if not data.strip():
            if rank is not None:
                silent[rank] = name
            broken.append(f"{name}: it is empty")
            return
        root = _decode(data)
        found = list(_by_rank(root, rank))
        if not found:
            broken.append(f"{name}: it holds no Flight Recorder dump")
            return
        for number, dump in found:
            raws.append(_Raw(normalise(dump, number, name), _default_world(dump)))
    except RefusedPickleError as error:
        refused.append(f"{name}: {error}")
    except UnreadableDumpError as error:
        broken.append(f"{name}: {error}")
    except OSError as error:
        broken.append(f"{name}: it cannot be read ({error.strerror})")


def _decode(data: bytes) -> Any:
    head = data[:64].lstrip()
    if head[:1] in (b"{", b"[") or head[:3] == b"\xef\xbb\xbf":
        try:
            return json.loads(data.decode("utf-8-sig"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UnreadableDumpError("it is truncated or no JSON") from error
        except (RecursionError, MemoryError, ValueError) as error:
            raise UnreadableDumpError("its JSON is out of all proportion") from error
    return load_plain_pickle(data)


def _by_rank(root: Any, named: int | None) -> Iterator[tuple[int, Any]]:
    """(rank, dump) of a file: one dump, or several by rank (a mapping, or a list of dumps that carry their rank)."""
    if looks_like_dump(root):
        rank = _rank_in_content(root, named)
        if rank is None:
            raise UnreadableDumpError("neither its name nor its content tells its rank")
        yield rank, root
    elif isinstance(root, Mapping):
        inner = root.get("ranks") if isinstance(root.get("ranks"), Mapping) else root
        for key, value in inner.items():  # type: ignore[union-attr]
            match = _RANK_KEY.match(str(key))
            if match is not None and len(match.group(1)) < 9 and looks_like_dump(value):
                yield int(match.group(1)), value
    elif isinstance(root, list):
        for value in root:
            if looks_like_dump(value) and (rank := _rank_in_content(value, None)) is not None:
                yield rank, value


def _rank_in_content(root: Any, named: int | None) -> int | None:
    """The rank by the dump itself: a field, or the only rank that belongs to all of its groups; else the name's."""
    if isinstance(root, Mapping):
        for key in ("global_rank", "rank"):
            value = root.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
                return value
    groups = list(members_of(root)[0].values())
    common = set(groups[0]).intersection(*groups[1:]) if groups else set()
    if len(common) == 1 and (named is None or named not in common):
        return next(iter(common))
    return named


def _default_world(root: Any) -> tuple[int, ...]:
    """The ranks of the largest group, which is the default group where that is recorded."""
    groups = members_of(root)[0]
    return max(groups.values(), key=len, default=())


def _one_run(raws: list[_Raw], warnings: list[str]) -> list[_Raw]:
    """Leaves the dumps of one run: of the world that most of them name, and not hours older than the rest."""
    worlds = Counter(raw.default_world for raw in raws if raw.default_world)
    if len(worlds) > 1:
        # Members of different groups of one job have different largest groups where the default group is not recorded.
        sizes: dict[int, int] = defaultdict(int)
        for world, count in worlds.items():
            sizes[len(world)] += count
        if _disagree(list(worlds)):
            (best, votes), *_ = sorted(worlds.items(), key=lambda item: (-item[1], -len(item[0])))
            others = [raw for raw in raws if raw.default_world and raw.default_world != best]
            if len(others) >= votes:
                raise FlightRecorderError(
                    "The folder mixes dumps of different runs ("
                    + ", ".join(f"{sizes[size]} of {size} ranks" for size in sorted(sizes, reverse=True))
                    + "): put each run into a folder of its own."
                )
            warnings.append(
                f"Left out {_names(others)}: of another run ({len(others[0].default_world)} ranks; this one has {len(best)})."
            )
            raws = [raw for raw in raws if not raw.default_world or raw.default_world == best]
    times = sorted(raw.dump.newest_ns for raw in raws if raw.dump.newest_ns)
    if times:
        middle = times[len(times) // 2]
        old = [raw for raw in raws if raw.dump.newest_ns and abs(raw.dump.newest_ns - middle) > _RUN_GAP_NS]
        if old and len(old) * 2 < len(raws):
            warnings.append(f"Left out {_names(old)}: hours apart from the other dumps, so of another run.")
            raws = [raw for raw in raws if raw not in old]
    return raws


def _disagree(worlds: list[tuple[int, ...]]) -> bool:
    """Two worlds that overlap without being equal cannot both be the largest group of one job's members."""
    largest = max(worlds, key=len)
    return any(world != largest and set(world) & set(largest) for world in worlds)


def _one_a_rank(raws: list[_Raw], warnings: list[str]) -> dict[int, RankDump]:
    by_rank: dict[int, list[RankDump]] = defaultdict(list)
    for raw in raws:
        by_rank[raw.dump.rank].append(raw.dump)
    dumps = {}
    for rank, several in sorted(by_rank.items()):
        several.sort(key=lambda dump: (dump.newest_ns, dump.last_record))
        dumps[rank] = several[-1]
        if len(several) > 1:
            warnings.append(f"Rank {rank} has {len(several)} dumps; took the newest, {several[-1].source}.")
    return dumps


def _complete(dumps: dict[int, RankDump], raws: list[_Raw], silent: dict[int, str], warnings: list[str]) -> DumpSet:
    named = {rank for dump in dumps.values() for ranks in dump.group_ranks.values() for rank in ranks}
    world = tuple(sorted(named | dumps.keys() | {rank for rank in silent if not named or rank in named}))
    outside = sorted(rank for rank in dumps if named and rank not in named)
    if outside:
        warnings.append(f"{_ranks(outside)} left dumps but belong to no group that the dumps name; left out.")
        for rank in outside:
            del dumps[rank]
        world = tuple(rank for rank in world if rank not in outside)
    missing = [rank for rank in world if rank not in dumps]
    if missing:
        warnings.append(f"No usable dump of {_ranks(missing)} (of {len(world)} ranks).")
    empty = {rank for rank, dump in dumps.items() if dump.is_silent}
    begun = frozenset(rank for rank in silent if rank in world) | empty
    return DumpSet(
        dumps=dumps,
        world=world,
        silent=frozenset(missing) | empty,
        empty=begun - (dumps.keys() - empty),
        warnings=tuple(warnings),
    )


def _nothing(folder: Path, refused: list[str], broken: list[str], silent: dict[int, str]) -> str:
    if refused:
        return f"Nothing in {folder} can be used: refused {refused[0]}. Nothing was executed."
    if broken:
        more = f", and {len(broken) - 1} more" if len(broken) > 1 else ""
        return f"Nothing in {folder} can be used: {broken[0]}{more}."
    return f"The folder {folder} holds no Flight Recorder dumps."


def _names(raws: list[_Raw]) -> str:
    names = [raw.dump.source for raw in raws]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:12]) + (f" and {len(ranks) - 12} more" if len(ranks) > 12 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"
