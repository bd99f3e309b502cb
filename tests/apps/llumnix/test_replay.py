"""The load generator against a server of known timing: schedule, measures, repeatability, failures, foreign servers."""

from __future__ import annotations

import csv
import io
import itertools
import math
import statistics

import pytest

from apps.llumnix.client import ServerError
from apps.llumnix.prompts import TextPrompts, TokenPrompts
from apps.llumnix.records import ReplayResult, Spread
from apps.llumnix.replay import Load, prepare_trace, run_replay
from apps.llumnix.trace import Arrival, Trace, TraceError, generate_trace, scale_lengths
from apps.program.errors import UserError
from tests.apps.llumnix.fake_server import FakeServer, serving

TRACE = Trace(tuple(Arrival(0.02 * i, 5 + i, 2 + i % 7) for i in range(12)), "by hand")


@pytest.fixture(scope="module")
def answered() -> tuple[FakeServer, ReplayResult]:
    server = FakeServer(step_s=0.01)
    with serving(server) as url:
        return server, run_replay(url, TRACE, Load(TokenPrompts(seed=3), seed=3), name="arm")


def test_every_request_has_its_lengths(answered: tuple[FakeServer, ReplayResult]) -> None:
    server, result = answered
    assert [record.error for record in result.records] == [None] * 12
    assert [record.generated for record in result.records] == [one.output_tokens for one in TRACE]
    assert sorted(len(body["prompt"]) for body in server.bodies) == [one.prompt_tokens for one in TRACE]
    for body in server.bodies:
        assert body["ignore_eos"] is True
        assert body["max_tokens"] == TRACE.arrivals[len(body["prompt"]) - 5].output_tokens
        assert all(1000 <= token < 30_000 for token in body["prompt"])
    assert all(record.cached_tokens == 3 for record in result.records)


def test_latencies_are_those_of_the_server(answered: tuple[FakeServer, ReplayResult]) -> None:
    """Bounds from below are exact (the server sleeps at least so long); order of the moments holds always."""
    for record in answered[1].records:
        assert record.lag_s > -1e-4
        assert record.ttft_s >= record.lag_s + 0.0099
        assert record.e2e_s >= record.lag_s + 0.0099 * record.generated
        assert record.tpot_s == pytest.approx((record.last_s - record.first_s) / (record.generated - 1))
        assert record.longest_gap_s >= 0.999 * record.tpot_s
    summary = answered[1].summary()
    assert summary.ttft_s.mean == pytest.approx(statistics.mean(record.ttft_s for record in answered[1].records))
    assert summary.generated_tokens == sum(one.output_tokens for one in TRACE)


def test_server_counts_and_history_are_read(answered: tuple[FakeServer, ReplayResult]) -> None:
    server, result = answered
    summary = result.summary()
    assert summary.preemptions == 24  # two a request, by the fake
    assert summary.migrations == len(server.migrations) > 0
    assert summary.migration_downtime_ms.p50 == 1.5
    assert result.history.instance_ids == ["replica-0", "replica-1"]
    moved = {one.request_id for one in result.history.migrations}
    known = {record.request_id for record in result.records}
    assert {stay.request_id for stay in result.history.stays} == known
    for request_id in known:
        stays = [stay for stay in result.history.stays if stay.request_id == request_id]
        assert len(stays) == (2 if request_id in moved else 1)
        assert all(one.end_s == other.begin_s for one, other in itertools.pairwise(stays))


def test_table_has_a_line_a_request(answered: tuple[FakeServer, ReplayResult]) -> None:
    lines = list(csv.DictReader(io.StringIO(answered[1].csv())))
    assert [int(line["index"]) for line in lines] == list(range(12))
    assert float(lines[3]["ttft_s"]) == pytest.approx(answered[1].records[3].ttft_s, abs=1e-6)


def test_same_seed_same_requests_other_seed_other_requests() -> None:
    def bodies(seed: int) -> list[str]:
        server = FakeServer(step_s=0.0)
        with serving(server) as url:
            run_replay(url, TRACE, Load(TokenPrompts(seed), seed))
        return sorted(str(body) for body in server.bodies)

    first = bodies(1)
    assert first == bodies(1)
    assert first != bodies(2)


def test_arrivals_do_not_wait_for_completions() -> None:
    """The server answers nothing before it has all requests: a generator that waited for an answer would never send the last."""
    server = FakeServer(step_s=0.001, hold_until=len(TRACE))
    with serving(server) as url:
        result = run_replay(url, TRACE, Load(TokenPrompts(), timeout_s=30.0))
    assert all(record.error is None for record in result.records)
    last_due = TRACE.arrivals[-1].arrival_s
    for record in result.records:  # and the wait of the first counts in its latency
        assert record.ttft_s >= last_due - record.due_s


def test_failures_are_recorded_and_the_rest_goes_on() -> None:
    server = FakeServer(step_s=0.001, fail_every=4)
    with serving(server) as url:
        result = run_replay(url, TRACE, Load(TokenPrompts()))
    failed = [record for record in result.records if record.error]
    assert len(failed) == 3
    assert all(record.error == "No instance is ready." and math.isnan(record.ttft_s) for record in failed)
    assert result.error_samples == ("No instance is ready.",)
    summary = result.summary()
    assert (summary.requests, summary.errors, summary.ttft_s.count) == (12, 3, 9)


def test_a_stream_that_breaks_off_is_an_error() -> None:
    server = FakeServer(step_s=0.001, cut_every=6)
    with serving(server) as url:
        result = run_replay(url, TRACE, Load(TokenPrompts()))
    assert sum(record.error == "The stream broke off before its end mark." for record in result.records) == 2


def test_another_server_gives_latencies_only() -> None:
    with serving(FakeServer(step_s=0.001, sextant=False)) as url:
        result = run_replay(url, TRACE, Load(TokenPrompts()))
    summary = result.summary()
    assert summary.errors == 0
    assert summary.preemptions is None
    assert summary.migrations is None
    assert result.history.samples == ()


def test_faults_are_told_before_anything_is_sent() -> None:
    with pytest.raises(UserError, match="cannot be reached"):
        run_replay("http://127.0.0.1:9", TRACE, Load(TokenPrompts()))
    with pytest.raises(UserError, match="http://"):
        run_replay("127.0.0.1:8000", TRACE, Load(TokenPrompts()))
    server = FakeServer()
    with serving(server) as url, pytest.raises(TraceError, match="longest sequence 1024"):
        run_replay(url, Trace((Arrival(0.0, 1000, 100),)), Load(TokenPrompts()))
    assert server.bodies == []
    assert issubclass(ServerError, UserError)


def test_spread_by_hand() -> None:
    spread = Spread.of([4.0, 1.0, math.nan, 2.0, 3.0])
    assert (spread.count, spread.mean, spread.p50, spread.max) == (4, 2.5, 2.5, 4.0)
    assert spread.p99 == pytest.approx(1 + 3 * 0.99)
    assert Spread.of([]).count == 0
    assert math.isnan(Spread.of([]).p99)


def test_prepared_traces_fit_the_context() -> None:
    trace = prepare_trace(None, limit=40, length_scale=0.5, max_model_len=200, seed=5)
    assert len(trace) == 40
    assert all(one.prompt_tokens + one.output_tokens <= 200 for one in trace)
    whole = generate_trace(40, 1.0, seed=5)
    assert scale_lengths(whole, 0.5).arrivals[0].prompt_tokens == trace.arrivals[0].prompt_tokens


class _Letters:
    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())


def test_text_prompts_have_their_length_and_differ_within_a_block() -> None:
    prompts = TextPrompts(_Letters(), seed=7)
    made = [prompts.make(index, 400) for index in range(20)]
    assert all(len(prompt) == 400 for prompt in made)
    assert len({tuple(prompt[:16]) for prompt in made}) == 20
    assert made[3] == TextPrompts(_Letters(), seed=7).make(3, 400)
    assert bytes(made[0]).decode().startswith("Note 0 of series 7. ")
    assert len(prompts.make(0, 1)) == 1
