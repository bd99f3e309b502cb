"""The lease table: one holder a slice, deaths and vanished slices end leases, sentences say what happened."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.mig.backends import BackendError, DeviceSlice, SliceInUse, SliceVanished
from actors.mig.lease.names import node_resources, resource_name
from actors.mig.lease.table import Holder, LeaseTable


def mig(uuid: str, profile: str = "1g.10gb") -> DeviceSlice:
    return DeviceSlice(uuid, "mig", "H100", profile)


def filled(*slices: DeviceSlice) -> LeaseTable:
    table = LeaseTable()
    table.refresh(slices)
    return table


def test_names_of_resources() -> None:
    assert resource_name("mig", "1g.10gb") == "mig_1g_10gb"
    assert resource_name("mig", "1g.10gb+me") == "mig_1g_10gb_me"
    assert node_resources([mig("a"), mig("b"), mig("c", "3g.40gb")]) == {"mig_1g_10gb": 2.0, "mig_3g_40gb": 1.0}
    with pytest.raises(ValueError, match="no name of a profile"):
        resource_name("mig", "+")


def test_each_worker_gets_a_slice_of_its_own_until_there_is_none() -> None:
    table = filled(mig("a"), mig("b"))
    one, two = table.take("mig_1g_10gb", Holder(1, 0)), table.take("mig_1g_10gb", Holder(2, 0))
    assert {one.slice.uuid, two.slice.uuid} == {"a", "b"}
    with pytest.raises(SliceInUse, match=r"leased: a by process 1, b by process 2"):
        table.take("mig_1g_10gb", Holder(3, 0))
    table.give_back(one.number)
    assert table.take("mig_1g_10gb", Holder(3, 0)).slice.uuid == "a"


def test_a_process_sees_one_slice_alone() -> None:
    table = filled(mig("a"), mig("b"))
    table.take("mig_1g_10gb", Holder(1, 0))
    with pytest.raises(SliceInUse, match="holds slice a already"):
        table.take("mig_1g_10gb", Holder(1, 0))


def test_a_dead_holder_loses_its_slice_and_a_late_release_is_told() -> None:
    table = filled(mig("a"))
    held = table.take("mig_1g_10gb", Holder(1, 0))
    (ended,) = table.bury([1, 99])
    assert (ended.held, ended.why) == (held, "holder died")
    assert [found.uuid for found in table.free] == ["a"]
    with pytest.raises(BackendError, match="is over: holder died"):
        table.give_back(held.number)


def test_a_vanished_slice_ends_its_lease_and_cannot_be_had() -> None:
    table = filled(mig("a"), mig("b", "3g.40gb"))
    held = table.take("mig_1g_10gb", Holder(1, 0))
    (ended,) = table.refresh([mig("b", "3g.40gb")])
    assert ended.why == "slice vanished"
    with pytest.raises(SliceVanished, match="cut anew while it was leased"):
        table.give_back(held.number)
    with pytest.raises(SliceVanished, match="no slice mig_1g_10gb .* it has mig_3g_40gb"):
        table.take("mig_1g_10gb", Holder(2, 0))


@settings(max_examples=200)
@given(st.lists(st.tuples(st.sampled_from(["take", "back", "bury", "cut"]), st.integers(0, 5)), max_size=40))
def test_no_slice_ever_has_two_holders(operations: list[tuple[str, int]]) -> None:
    table = filled(mig("a"), mig("b"), mig("c"))
    model: dict[str, int] = {}  # uuid -> pid
    for what, number in operations:
        if what == "take":
            try:
                held = table.take("mig_1g_10gb", Holder(number, 0))
            except BackendError:
                continue
            assert held.slice.uuid not in model and number not in model.values()
            model[held.slice.uuid] = number
        elif what == "back" and table.held:
            ended = table.give_back(table.held[number % len(table.held)].number)
            del model[ended.held.slice.uuid]
        elif what == "bury":
            table.bury([number])
            model = {uuid: pid for uuid, pid in model.items() if pid != number}
        elif what == "cut":
            kept = [mig(uuid) for n, uuid in enumerate("abc") if n != number]
            table.refresh(kept)
            model = {uuid: pid for uuid, pid in model.items() if uuid in {one.uuid for one in kept}}
        assert {held.slice.uuid: held.holder.pid for held in table.held} == model
