"""Which nodes the next generation avoids, and which suspects run again when there is no other room."""

from __future__ import annotations

import pytest

from actors.c4.recovery.placement import NODE_LABEL, NodeRoom, Suspect, excluding, matches, place, workers_that_fit


def rooms(*names: str, workers: int = 1) -> list[NodeRoom]:
    return [NodeRoom(name, workers) for name in names]


def test_with_a_spare_the_quarantined_node_is_avoided() -> None:
    placement = place(rooms("a", "b", "c"), [Suspect("b", "process_dead")], num_workers=2)
    assert placement.possible
    assert placement.excluded == ("b",)
    assert placement.released == ()


def test_without_a_spare_the_least_suspect_node_runs_again_and_says_why() -> None:
    suspects = [
        Suspect("a", "node_lost", strikes=1, whole_node=True),
        Suspect("b", "process_dead", strikes=3),
        Suspect("c", "process_stopped", strikes=1),
    ]
    placement = place(rooms("a", "b", "c", "d"), suspects, num_workers=2)
    assert placement.excluded == ("a", "b")
    [(node, reason)] = placement.released
    assert node == "c"
    assert "room for 1 of 2 workers" in reason
    assert "process_stopped" in reason
    assert place(rooms("a", "b", "c", "d"), suspects, num_workers=4).excluded == ()


def test_a_dead_node_is_never_released() -> None:
    placement = place(rooms("a", "b"), [Suspect("gone", "node_lost"), Suspect("b", "process_dead")], num_workers=2)
    assert placement.excluded == ("gone",)
    assert [node for node, _ in placement.released] == ["b"]


def test_too_small_a_cluster_is_a_sentence() -> None:
    placement = place(rooms("a", "b"), [Suspect("b", "process_dead")], num_workers=3)
    assert not placement.possible
    assert "needs 3 workers" in placement.reason
    assert "room for 2" in placement.reason


def test_room_counts_the_scarcest_resource() -> None:
    assert workers_that_fit({"CPU": 8.0, "GPU": 2.0}, {"CPU": 1.0, "GPU": 1.0}) == 2
    assert workers_that_fit({"CPU": 8.0}, {"CPU": 1.0, "GPU": 1.0}) == 0
    assert workers_that_fit({"CPU": 1.0}, {"CPU": 0.1}) == 10
    assert workers_that_fit({}, {"CPU": 0.0}) > 1000


@pytest.mark.parametrize(
    ("users", "merged"),
    [
        (None, "!in(x,y)"),
        ("!z", "!in(x,y,z)"),
        ("!in(z,x)", "!in(x,y,z)"),
        ("in(w,x)", "in(w)"),
        ("w", "in(w)"),
    ],
)
def test_the_users_selector_is_kept(users: str | None, merged: str) -> None:
    selector = {"zone": "eu", **({NODE_LABEL: users} if users else {})}
    assert excluding(selector, ["x", "y"]) == {"zone": "eu", NODE_LABEL: merged}
    assert excluding(selector, []) == selector


def test_a_selector_that_leaves_no_node_is_a_sentence() -> None:
    with pytest.raises(ValueError, match="is in quarantine"):
        excluding({NODE_LABEL: "x"}, ["x"])


def test_selectors_match_as_rays_do() -> None:
    labels = {"zone": "eu", NODE_LABEL: "n1"}
    for selector, fits in [
        ({"zone": "eu"}, True), ({"zone": "us"}, False), ({"zone": "!us"}, True), ({"zone": "in(us, eu)"}, True),
        ({NODE_LABEL: "!in(n1,n2)"}, False), ({"missing": "x"}, False), ({"missing": "!x"}, True), (None, True),
    ]:  # fmt: skip
        assert matches(labels, selector) is fits, selector
