"""Parts, what is whole, and the memory and disk tiers, against files that are cut, damaged, missing or full."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pyarrow.fs as pafs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.c4.recovery import disk
from actors.c4.recovery.memory import REPORTS, PartFolder
from actors.c4.recovery.parts import (
    Part,
    PartError,
    PartId,
    Version,
    pack,
    read_directory,
    unpack,
    whole_versions,
    write_files,
)


def part(rank: int = 0, world_size: int = 1, number: int = 1, generation: int = 1, **files: bytes) -> Part:
    return Part(PartId(Version(generation, number), rank, world_size), files, {"random": b"state"})


def packed(one: Part) -> bytes:
    return b"".join(bytes(piece) for piece in pack(one))


@given(st.dictionaries(st.text("abc/._é", min_size=1, max_size=8), st.binary(max_size=200), max_size=4))
def test_what_is_packed_comes_out(files: dict[str, bytes]) -> None:
    one = part(rank=2, world_size=5, number=7)
    one = Part(one.id, files, one.extra)
    out = unpack(packed(one))
    assert out.id == one.id
    assert {path: bytes(data) for path, data in out.files.items()} == files
    assert bytes(out.extra["random"]) == b"state"


def test_any_single_damaged_byte_and_any_cut_is_noticed() -> None:
    data = packed(part(**{"model.pt": bytes(range(50))}))
    for at in range(len(data)):
        broken = bytearray(data)
        broken[at] ^= 0x40
        with pytest.raises(PartError):
            unpack(bytes(broken))
    for length in range(len(data)):
        with pytest.raises(PartError):
            unpack(data[:length])


def test_a_path_that_leads_out_of_the_checkpoint_is_refused(tmp_path: Path) -> None:
    for path in ("../escaped", "/tmp/escaped", "a/../../escaped"):
        with pytest.raises(PartError, match="leads out"):
            write_files(Part(part().id, {path: b"x"}, {}), tmp_path / "inside")
    assert not list(tmp_path.rglob("escaped"))


def inventory(*parts: tuple[int, int, int, int]) -> list[PartId]:
    return [PartId(Version(generation, number), rank, world) for generation, number, rank, world in parts]


def test_only_versions_of_which_every_rank_is_somewhere_are_whole() -> None:
    choices = whole_versions(
        {
            "a": inventory((1, 5, 0, 3), (1, 6, 0, 3), (1, 4, 0, 3)),
            "b": inventory((1, 5, 1, 3), (1, 5, 0, 3), (1, 4, 1, 3)),
            "c": inventory((1, 5, 2, 3), (1, 6, 2, 3), (1, 4, 2, 3)),
        }
    )
    assert [str(choice.version) for choice in choices] == [str(Version(1, 5)), str(Version(1, 4))]
    assert choices[0].holders == (("a", "b"), ("b",), ("c",))


def test_a_newer_generation_wins_over_a_larger_number_and_worlds_never_mix() -> None:
    newer = whole_versions({"a": inventory((2, 3, 0, 1), (1, 9, 0, 1))})
    assert newer[0].version == Version(2, 3)
    assert whole_versions({"a": inventory((1, 1, 0, 2), (1, 1, 1, 3))}) == []


@given(st.data())
def test_losing_one_of_the_two_nodes_that_hold_a_part_leaves_the_version_whole(data: st.DataObject) -> None:
    world = data.draw(st.integers(2, 6))
    holders: dict[str, list[PartId]] = {f"n{node}": [] for node in range(world)}
    for rank in range(world):
        one = PartId(Version(1, 1), rank, world)
        holders[f"n{rank}"].append(one)
        holders[f"n{(rank + 1) % world}"].append(one)
    del holders[f"n{data.draw(st.integers(0, world - 1))}"]
    assert [choice.version for choice in whole_versions(holders)] == [Version(1, 1)]


def test_memory_keeps_the_newest_versions_and_forgets_the_rest(tmp_path: Path) -> None:
    folder = PartFolder(tmp_path, "run", "node", REPORTS)
    for number in range(1, 6):
        folder.store(part(number=number, m=b"x" * number))
        folder.prune(rank=0, keep=2)
    assert {one.version.number for one in folder.inventory()} == {4, 5}
    assert bytes(unpack(folder.read(part(number=5).id)).files["m"]) == b"xxxxx"
    folder.prune_before(Version(1, 5))
    assert {one.version.number for one in folder.inventory()} == {5}


def test_a_damaged_or_half_written_file_in_memory_is_no_part(tmp_path: Path) -> None:
    folder = PartFolder(tmp_path, "run", "node", REPORTS)
    folder.store(part(m=b"12345"))
    path = folder.path(part().id)
    (path.parent / f".{path.name}.99.tmp").write_bytes(b"half")
    assert folder.inventory() == [part().id]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(PartError):
        folder.read(part().id)


def test_a_full_memory_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = PartFolder(tmp_path, "run", "node", REPORTS)
    folder.store(part(number=1, m=b"old"))

    def no_room(file: object, piece: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("actors.c4.recovery.memory._write_all", no_room)
    with pytest.raises(OSError, match="No space"):
        folder.store(part(number=2, m=b"new"))
    assert [one.version.number for one in folder.inventory()] == [1]
    assert not list(tmp_path.rglob("*.tmp"))


def written(tmp_path: Path, world: int) -> tuple[pafs.FileSystem, str]:
    local, folder = pafs.LocalFileSystem(), str(tmp_path / "checkpoint")
    disk.begin(local, folder)
    for rank in range(world):
        data = np.random.default_rng(rank).bytes(1000)
        disk.write_part(local, folder, part(rank, world, **{f"shards/{rank}.pt": data}))
    return local, folder


def test_a_directory_on_disk_is_whole_when_all_ranks_wrote_it(tmp_path: Path) -> None:
    local, folder = written(tmp_path, world=3)
    assert disk.is_whole(local, folder)
    files = read_directory(Path(folder))
    assert files["shards/1.pt"] == np.random.default_rng(1).bytes(1000)


@pytest.mark.parametrize(
    "hurt", ["manifest_missing", "file_missing", "file_cut", "byte_flipped", "manifest_cut", "only_begun"]
)
def test_a_directory_with_anything_wrong_is_not_chosen(tmp_path: Path, hurt: str) -> None:
    local, folder = written(tmp_path, world=2)
    shard, manifest = Path(folder) / "shards/1.pt", Path(folder) / disk.MANIFESTS / "rank-000001.json"
    if hurt == "manifest_missing":
        manifest.unlink()
    elif hurt == "file_missing":
        shard.unlink()
    elif hurt == "file_cut":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif hurt == "byte_flipped":
        shard.write_bytes(b"\x00" + shard.read_bytes()[1:])
    elif hurt == "manifest_cut":
        manifest.write_text(manifest.read_text()[:-3])
    else:
        for path in itertools.chain(Path(folder).glob("shards/*"), Path(folder).glob(".c4/*.json")):
            path.unlink()
    assert not disk.is_whole(local, folder)


def test_a_directory_that_ray_train_wrote_itself_counts_and_a_missing_one_does_not(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "model.pt").write_bytes(b"x")
    assert disk.is_whole(pafs.LocalFileSystem(), str(tmp_path / "theirs"))
    assert not disk.is_whole(pafs.LocalFileSystem(), str(tmp_path / "nothing"))
