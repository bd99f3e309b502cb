"""The door to Ray Train: it says what a new Ray has moved, and sorts what a poll of it shows. Starts no Ray."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import ray.exceptions
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError
from ray.train.v2._internal.execution.failure_handling import FailureDecision, create_failure_policy
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2.api.config import FailureConfig
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from actors.c4 import ray_train
from actors.c4.recovery.failures import Cause, Failure
from actors.c4.recovery.supervisor import C4Error

RESET = RuntimeError("Connection closed by peer")
OWN = ValueError("my own mistake")


def test_this_ray_has_what_the_door_uses() -> None:
    ray_train.verify()


def test_a_ray_that_moved_something_is_named_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(WorkerGroup, "_create_placement_group")
    with pytest.raises(C4Error, match=r"WorkerGroup\._create_placement_group.*actors/c4/ray_train\.py must be adapted"):
        ray_train.verify()


def test_a_ray_that_changed_a_signature_is_named_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WorkerGroup, "poll_status", lambda self: None)
    with pytest.raises(C4Error, match="poll_status .* has no parameter timeout"):
        ray_train.verify()


def test_a_polls_errors_are_sorted_into_raised_and_died() -> None:
    raised, died = ray_train.split_errors(
        {
            0: RESET,
            1: WorkerHealthCheckFailedError("failed", failure=ray.exceptions.ActorDiedError()),
            2: WorkerHealthCheckTimeoutError("late"),
            3: WorkerHealthCheckFailedError("failed", failure=TypeError("cannot pickle a lock")),
        }
    )
    assert sorted(raised) == [0, 3]
    assert sorted(died) == [1, 2]


class Supervising:
    """What the failure policy sees of a supervisor."""

    def __init__(self, give_up: str | None = None):
        self.failures: list[Failure] = []
        self.give_up = give_up

    def failed(self, failure: Failure) -> str | None:
        self.failures.append(failure)
        return None if failure.cause is Cause.LOOP else self.give_up


def policy(max_failures: int, supervisor: Any) -> ray_train.C4FailurePolicy:
    return ray_train.C4FailurePolicy(create_failure_policy(FailureConfig(max_failures=max_failures)), supervisor)


def death() -> WorkerGroupError:
    gone = WorkerHealthCheckFailedError("failed", failure=ray.exceptions.ActorDiedError())
    return WorkerGroupError("gone", {1: gone, 0: RESET})


def test_faults_do_not_use_up_the_users_failures() -> None:
    supervisor = Supervising()
    deciding = policy(1, supervisor)
    assert [deciding.make_decision(death()) for _ in range(5)] == [FailureDecision.RETRY] * 5
    assert {failure.cause for failure in supervisor.failures} == {Cause.DEATH}
    assert deciding.make_decision(WorkerGroupError("x", {1: OWN})) == FailureDecision.RETRY
    assert deciding.make_decision(WorkerGroupError("x", {1: OWN})) == FailureDecision.RAISE


def test_the_loops_own_error_comes_first_and_ends_the_run_within_the_users_budget() -> None:
    error = WorkerGroupError("[Rank 0]: closed\n[Rank 1]: my own mistake", {0: RESET, 1: OWN, 2: RESET})
    assert policy(0, Supervising()).make_decision(error) == FailureDecision.RAISE
    assert list(error.worker_failures) == [1, 0, 2]
    assert str(error).startswith("The training loop raised: rank 1: ValueError: my own mistake")


def test_giving_up_says_why() -> None:
    error = death()
    assert (
        policy(5, Supervising("3 restarts in a row brought no new checkpoint")).make_decision(error)
        == FailureDecision.RAISE
    )
    assert str(error).startswith("3 restarts in a row")


def test_a_sentence_for_the_user_ends_the_run_at_once() -> None:
    decision = policy(5, Supervising()).make_decision(ControllerError(C4Error("Training needs 4 workers")))
    assert decision == FailureDecision.RAISE


def test_ranks_hear_of_disk_and_shares_from_rank_zero_and_paths_stay_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.train.v2._internal.execution.context import TrainContext

    from actors.c4.ray_train_worker import C4TrainContext
    from actors.c4.recovery.shares import SHARES

    sent: list[str] = []

    def agree(self: Any, name: str) -> str:
        sent.append(name)
        return sent[0]  # what rank 0 said

    monkeypatch.setattr(TrainContext, "_sync_checkpoint_dir_name_across_ranks", agree)
    flushed: list[int] = []

    def context(rank: int) -> Any:
        tiers = SimpleNamespace(
            disk_is_due=lambda: True, flush=lambda: flushed.append(rank), target=lambda *where: places.append(where)
        )
        storage = SimpleNamespace(
            storage_filesystem="fs",
            build_checkpoint_path_from_name=lambda name: f"run/{name}",
            make_default_checkpoint_dir_name=lambda: f"made by {rank}",
        )
        made = object.__new__(C4TrainContext)
        made.c4_tiers, made.storage_context = tiers, storage  # type: ignore[assignment]
        made.c4_shares = SimpleNamespace(newest=lambda: (0.5, 1.5))  # type: ignore[assignment]
        made._c4_ours = made._c4_in_memory = True
        made.distributed_context = SimpleNamespace(world_rank=rank)  # type: ignore[assignment]
        return made

    places: list[tuple[str, str]] = []
    try:
        names = [context(rank)._sync_checkpoint_dir_name_across_ranks() for rank in range(2)]
        assert names == ["made by 0", "made by 0"]
        assert places == [("fs", "run/made by 0")] * 2
        assert flushed == [0, 1]
        assert SHARES.of(1) == 1.5
        assert json.dumps(names)  # no separator left in a path
    finally:
        SHARES.set(None)
