"""The scheduler's view: epochs never repeat, dispatched requests count before a load shows them, requests are found where
they are, and every way a migration ends leaves one owner."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.llumnix.load import InstanceLoad, RequestLoad
from actors.llumnix.ports import DispatchRequest, InstanceInfo
from actors.llumnix.view import PENDING_S, ClusterView


class Clock:
    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now

    def wall_us(self):
        return int(self.now * 1e6)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def view(clock):
    view = ClusterView(clock.monotonic, clock.wall_us)
    for name in ("a", "b"):
        view.register(info(name), f"handle-{name}")
    return view


def info(name, numerics="n"):
    return InstanceInfo(name, "node", 1, "m", numerics, 512, 16, 64, address=name.encode())


def load(name, step=1, running=(), waiting=(), migrating=(), free=60):
    def entries(ids):
        return tuple(RequestLoad(r, 1, 0, 10, 0.0) for r in ids)

    return InstanceLoad(name, step, 64, free, 16, entries(running), entries(waiting), migrating=tuple(migrating))


def wanted(name, tokens=40, **kwargs):
    return DispatchRequest(name, "ingress", tokens, 0, 0.0, **kwargs)


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=50))
def test_epochs_grow_even_when_the_clock_stands_or_goes_back(steps):
    clock = Clock()
    view, last = ClusterView(clock.monotonic, clock.wall_us), 0
    for step in steps:
        clock.now += step
        epoch = view.issue_epoch()
        assert epoch > last
        last = epoch
    later = ClusterView(clock.monotonic, lambda: last + 1)  # restarted, its clock past every epoch issued
    assert later.issue_epoch() > last


def test_registering_again_is_no_news_and_leaving_is(view):
    version = view.version
    assert not view.register(info("a"), "handle-a")
    assert view.version == version
    assert view.remove("a") and not view.remove("a")
    assert view.version == version + 1 and view.handle("a") is None and view.instance_ids == ["b"]


def test_a_load_of_an_unknown_instance_asks_it_to_register(view):
    assert view.push(load("a")) and not view.push(load("z"))


def test_an_older_load_never_replaces_a_newer_one(view):
    view.push(load("a", step=5, running=["r"]))
    view.push(load("a", step=4))
    assert view.locate("r") == "a"


def test_a_dispatched_request_counts_as_waiting_until_the_load_shows_it(view, clock):
    placement = view.place(wanted("r", tokens=40), "a")
    [one, other] = view.loads()
    assert [r.request_id for r in one.waiting] == ["r"] and other.waiting == ()
    assert one.waiting[0].blocks == 3  # 41 tokens in blocks of 16
    assert view.locate("r") == "a" and placement.epoch == int(clock.now * 1e6)
    view.push(load("a", running=["r"]))
    assert view.loads()[0].waiting == ()
    view.push(load("a", step=2))
    assert view.locate("r") is None


def test_a_request_that_ended_before_any_load_showed_it_counts_only_for_a_while(view, clock):
    view.place(wanted("r"), "a")
    clock.now += PENDING_S + 0.1
    assert view.loads()[0].waiting == () and view.locate("r") is None


def test_a_request_in_hand_over_is_still_located(view):
    view.push(load("a", running=["r"]))
    order = view.order("r", "a", "b")
    view.push(load("a", step=2, migrating=["r"]))
    assert view.locate("r") == "a"
    view.push(load("a", step=3))
    assert view.locate("r") == "a"  # the order is still open
    view.order_ended(order, "committed", True, "r")
    assert view.locate("r") is None  # it was never placed here: only a load can tell
    view.push(load("b", running=["r"]))
    assert view.locate("r") == "b"


def test_a_committed_migration_moves_a_known_request(view):
    view.place(wanted("r"), "a")
    view.push(load("a", running=["r"]))
    order = view.order(None, "a", "b")
    assert (view.outgoing("a"), view.incoming("b"), view.incoming("a")) == (1, 1, 0)
    view.push(load("a", step=2))
    record = view.order_ended(order, "committed", True, "r")
    assert record.request_id == "r" and record.committed
    assert view.locate("r") == "b" and view.requests()[0]["migrations"] == 1
    assert (view.outgoing("a"), view.incoming("b")) == (0, 0)
    assert [(p.request_id, p.instance_id, p.cause) for p in view.placements] == [
        ("r", "a", "dispatch"),
        ("r", "b", "migration"),
    ]
    view.forget(["r"])
    assert view.placements[-1].instance_id is None and view.requests() == []


def test_reclaim_revokes_at_the_destination_under_a_newer_epoch(view):
    placed = view.place(wanted("r"), "a")
    order = view.order("r", "a", "b")
    epoch, revoke_at = view.reclaim("r", order.epoch)
    assert revoke_at == "b" and epoch > order.epoch > placed.epoch
    # The migration's late "committed" must not take the request away from its new owner.
    view.order_ended(order, "committed", True, "r")
    assert view.requests()[0]["epoch"] == epoch and view.near("r") == "a"


def test_reclaim_is_refused_for_an_aborted_or_newly_owned_request(view):
    order = view.order("r", "a", "b")
    view.place(wanted("r"), "b")  # continued elsewhere meanwhile
    assert view.reclaim("r", order.epoch) == (None, None)
    fenced = view.abort("s")
    assert view.reclaim("s", fenced - 1) == (None, None)


def test_reclaim_after_a_restart_revokes_everywhere(view, clock):
    failed = view.issue_epoch() + 10**12  # issued by a scheduler whose clock was ahead
    epoch, revoke_at = view.reclaim("r", failed)
    assert epoch > failed and revoke_at is None


def test_an_abort_fences_every_order_given_before(view):
    view.place(wanted("r"), "a")
    order = view.order("r", "a", "b")
    assert view.abort("r") > order.epoch
    assert not view.known("r")


def test_requests_move_only_between_equal_numerics(view):
    view.register(info("c", numerics="other"), "handle-c")
    assert view.may_migrate("a", "b") and not view.may_migrate("a", "c") and not view.may_migrate("a", "a")
    assert not view.may_migrate("a", "z")


def test_samples_hold_what_the_policy_says(view, clock):
    view.push(load("a", running=["r"], free=10))
    view.sample(lambda load: float(load.free_blocks))
    assert [(s.instance_id, s.used_blocks, s.running, s.freeness) for s in view.samples] == [
        ("a", 54, 1, 10.0),
        ("b", 0, 0, 64.0),
    ]
