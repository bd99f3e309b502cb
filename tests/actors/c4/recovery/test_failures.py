"""What ended a generation, out of what a poll shows."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from actors.c4.recovery.failures import Cause, classify, is_communication, needs_a_closer_look

RESET = RuntimeError("[/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3781")
OWN = ValueError("labels must be below 10")


@pytest.mark.parametrize(
    "error",
    [
        RESET,
        dist.DistBackendError("NCCL communicator was aborted on rank 3"),
        ConnectionResetError(104, "Connection reset by peer"),
        RuntimeError("Timed out waiting 1800000ms for recv operation to complete"),
    ],
)
def test_an_echo_of_a_peers_failure_is_recognised(error: BaseException) -> None:
    assert is_communication(error)


@pytest.mark.parametrize(
    "error",
    [
        OWN,
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x3 and 5x2)"),
        KeyError("timeout"),
        ZeroDivisionError(),
    ],
)
def test_an_error_of_the_loop_is_no_echo(error: BaseException) -> None:
    assert not is_communication(error)


def test_the_loops_own_error_is_the_cause_whatever_its_peers_say() -> None:
    failure = classify({0: RESET, 1: OWN, 2: RESET}, {})
    assert failure.cause is Cause.LOOP
    assert failure.ranks == (1,)
    assert "labels must be below 10" in failure.text


def test_a_dead_process_is_the_cause_of_its_peers_errors() -> None:
    failure = classify({0: RESET, 1: RESET}, {3: "the process is gone", 2: "the process is gone"})
    assert failure.cause is Cause.DEATH
    assert failure.ranks == (2, 3)


def test_only_echoes_call_for_a_second_look_and_then_count_as_communication() -> None:
    assert needs_a_closer_look({0: RESET}, {})
    assert not needs_a_closer_look({0: RESET, 1: OWN}, {})
    assert not needs_a_closer_look({0: RESET}, {1: "gone"})
    assert not needs_a_closer_look({}, {})
    assert classify({0: RESET}, {}).cause is Cause.COMMUNICATION
