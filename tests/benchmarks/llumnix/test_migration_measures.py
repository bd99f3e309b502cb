"""What the migration benchmark computes from tokens and times, on hand-worked cases; and that a token protocol error is one."""

from __future__ import annotations

import math

import numpy as np
import pytest

from actors.llumnix.engine.request import SamplingParams, TokenChunk, TokenLogprob
from actors.llumnix.migration.config import MigrationReport
from apps.llumnix.prompts import TokenPrompts
from benchmarks.llumnix.fleet import FleetError, Stream
from benchmarks.llumnix.workload import KINDS, Case, logprob_difference, make_cases, mismatches, with_stop_string
from benchmarks.llumnix_migration import Pauses, handovers, steps_between


def chunk(index: int, tokens: tuple[int, ...], epoch: int = 1, at: float = 0.0, **more: object) -> TokenChunk:
    return TokenChunk("r", epoch, index, tokens, "".join(map(str, tokens)), time=at, **more)  # type: ignore[arg-type]


def test_mismatches_count_positions_and_lengths() -> None:
    assert mismatches([1, 2, 3], [1, 2, 3]) == 0
    assert mismatches([1, 2, 3], [1, 9, 3]) == 1
    assert mismatches([1, 2, 3], [1, 2]) == 1
    assert mismatches([], [5, 6]) == 2


def test_logprob_difference_sees_alternatives_and_their_tokens() -> None:
    one = [TokenLogprob(1, -0.5, ((1, -0.5), (2, -1.0)))]
    assert logprob_difference(one, one) == 0.0
    assert logprob_difference(one, [TokenLogprob(1, -0.5, ((1, -0.5), (2, -1.25)))]) == 0.25
    assert logprob_difference(one, [TokenLogprob(1, -0.5, ((1, -0.5), (3, -1.0)))]) == math.inf
    assert logprob_difference(one, [TokenLogprob(1, -0.5)]) == math.inf
    assert logprob_difference(one, []) == math.inf


def test_cases_cover_every_kind_and_repeat() -> None:
    cases = make_cases(40, 10, TokenPrompts(), seed=1)
    assert cases == make_cases(40, 10, TokenPrompts(), seed=1)
    assert {case.name.split(": ")[1] for case in cases} == set(KINDS)
    assert len({case.prompt for case in cases}) == 40
    shared = [case.prompt[:64] for case in cases if case.prompt[:64] == cases[0].prompt[:64]]
    assert len(shared) == 14  # every third
    assert any(case.sampling.temperature == 0 for case in cases)
    assert any(case.sampling.temperature > 0 and case.sampling.presence_penalty for case in cases)


def test_stop_strings_come_late_in_the_answer() -> None:
    case = Case("x", (1,), SamplingParams(max_tokens=9))
    stopping = with_stop_string(case, "one two three four five six seven eight")
    assert stopping is not None
    word = stopping.sampling.stop[0]
    assert "one two three four five six seven eight".find(word) >= 19
    assert with_stop_string(case, "aa aa aa aa aa") is None
    assert with_stop_string(case, "same same same same") is None


def test_stream_follows_the_token_protocol() -> None:
    stream = Stream("r", (1,), 0, 1)
    stream.add(chunk(0, (5, 6), at=1.0))
    stream.add(chunk(1, (6, 7), epoch=2, at=2.0))  # token 1 is sent again under the new epoch
    stream.add(chunk(3, (9,), epoch=1, at=3.0))  # an old owner
    stream.add(chunk(3, (8,), epoch=2, at=4.0, finish_reason="length"))
    assert stream.tokens == [5, 6, 7, 8]
    assert stream.times == [1.0, 1.0, 2.0, 4.0]
    assert stream.epochs == [1, 1, 2, 2]
    assert (stream.stale_chunks, stream.finish_reason) == (1, "length")
    broken = Stream("r", (1,), 0, 1)
    broken.add(chunk(0, (5,)))
    with pytest.raises(FleetError, match="token 3 came after 1 tokens"):
        broken.add(chunk(3, (8,)))


def report(detached_at: float) -> MigrationReport:
    return MigrationReport(
        "r", 2, "a", "b", "committed", stages=2, bytes=2**20, downtime_ms=4.0, detached_at=detached_at,
        received_at=detached_at + 0.001, copied_at=detached_at + 0.003, attached_at=detached_at + 0.004,
    )  # fmt: skip


def test_pauses_by_hand() -> None:
    """Steps of 20 ms; the move after the third token takes 25 ms, the one after the fifth 27 ms."""
    times = [0.00, 0.02, 0.04, 0.065, 0.085, 0.112, 0.132]
    reports = [report(0.0402), report(0.0851)]
    assert handovers(np.asarray(times), reports) == [2, 4]
    pauses = Pauses(times, reports, step_ms=20.0)
    assert pauses.values == pytest.approx([5.0, 7.0])
    cells = pauses.cells()
    assert cells["pause_ms"] == pytest.approx(6.0)
    assert cells["over_step"] == pytest.approx(0.3)
    assert (cells["send_ms"], cells["copy_ms"], cells["attach_ms"]) == pytest.approx((1.0, 2.0, 1.0))
    assert handovers(np.asarray(times), [report(0.2)]) == []  # it ended before the destination made a token


def test_steps_of_a_phase_leave_out_what_crosses_its_borders() -> None:
    assert list(steps_between([0.0, 1.0, 1.5, 1.75, 3.0], 0.9, 2.0)) == pytest.approx([500.0, 250.0])
