"""The loop's thread: calls between steps, nothing vanishes, a failure reaches everybody."""

from __future__ import annotations

import queue
import threading
import time

import pytest

from actors.llumnix.engine.loop import EngineLoop, EngineStopped
from tests.actors.llumnix.engine.fakes import Client, assert_clean, check, make_engine, make_request


class Harness:
    def __init__(self, **settings):
        self.engine = make_engine(**settings)
        self.chunks: queue.Queue = queue.Queue()
        self.loads: list = []
        self.failures: list[BaseException] = []
        self.loop = EngineLoop(self.engine, self.chunks.put, self.loads.append, self.failures.append).start()

    def wait_for_end(self, client: Client, request_ids) -> None:
        while not all(client.finished(r) for r in request_ids):
            client.take(self.chunks.get(timeout=20))


@pytest.fixture
def harness():
    made = Harness()
    yield made
    made.loop.stop()


def test_requests_run_and_loads_are_pushed(harness):
    requests = [make_request(f"r{i}", range(1, 30), seed=i, temperature=1.0) for i in range(5)]
    client = Client()
    for request in requests:
        assert harness.loop.submit(lambda r=request: harness.engine.add_request(r)).result(20) is None
    harness.wait_for_end(client, [r.request_id for r in requests])
    for request in requests:
        check(request, client)
    steps = [load.step for load in harness.loads]
    assert steps == sorted(steps) and harness.loads
    harness.loop.stop()
    assert_clean(harness.engine)
    assert not harness.failures


def test_calls_run_on_the_loops_thread_in_order(harness):
    seen = []
    futures = [harness.loop.submit(lambda i=i: seen.append((i, threading.current_thread().name))) for i in range(50)]
    for future in futures:
        future.result(20)
    assert [i for i, _ in seen] == list(range(50)) and {name for _, name in seen} == {"engine-e0"}


def test_a_call_gets_its_own_exception_and_the_loop_goes_on(harness):
    with pytest.raises(ZeroDivisionError):
        harness.loop.submit(lambda: 1 // 0).result(20)
    assert harness.loop.submit(lambda: 7).result(20) == 7
    assert harness.loop.alive and not harness.failures


def test_a_call_between_steps_of_a_busy_engine(harness):
    """While one request decodes, every call sees the engine between two steps: computed + 1 == tokens."""
    harness.loop.submit(
        lambda: harness.engine.add_request(make_request("r", [1], max_tokens=300, ignore_eos=True))
    ).result(20)
    while True:
        status = harness.loop.submit(lambda: harness.engine.status("r")).result(20)
        if status is None:
            break
        assert status.num_computed_tokens in (0, status.num_tokens - 1)


def test_abort_chunk_of_an_idle_engine_is_delivered(harness):
    def add_and_abort():
        harness.engine.add_request(make_request("r", [1, 2, 3]))
        return harness.engine.abort("r")

    assert harness.loop.submit(add_and_abort).result(20)
    assert [c.finish_reason for c in harness.chunks.get(timeout=20)] == ["abort"]


def test_a_failing_model_reaches_requests_futures_and_the_owner():
    harness = Harness()
    harness.engine.model.fail_at = 2
    harness.loop.submit(lambda: harness.engine.add_request(make_request("r", [1, 2, 3], ignore_eos=True))).result(20)
    client = Client()
    harness.wait_for_end(client, ["r"])
    assert client.chunks["r"][-1].finish_reason == "error"
    harness.loop._thread.join(20)
    assert [str(f) for f in harness.failures] == ["the fake model was told to fail"] == [str(harness.loop.failure)]
    with pytest.raises(EngineStopped, match="told to fail") as stopped:
        harness.loop.submit(lambda: None).result(20)
    assert stopped.value.__cause__ is harness.loop.failure
    assert not harness.loop.alive


def test_open_calls_fail_when_the_loop_fails():
    harness = Harness()

    def break_callback(_):
        raise RuntimeError("nobody can take chunks")

    gate = threading.Event()
    harness.loop._on_chunks = break_callback
    blocked = harness.loop.submit(gate.wait)
    harness.loop.submit(lambda: harness.engine.add_request(make_request("r", [1])))
    gate.set()
    assert blocked.result(20)
    harness.loop._thread.join(20)
    with pytest.raises(EngineStopped, match="nobody can take chunks"):
        harness.loop.submit(lambda: 1).result(20)
    assert len(harness.failures) == 1


def test_stop_joins_and_fails_what_is_open():
    harness = Harness()
    gate = threading.Event()
    harness.loop.submit(gate.wait)
    late = harness.loop.submit(lambda: 1)
    stopper = threading.Thread(target=harness.loop.stop)
    gate_opener = threading.Timer(0.05, gate.set)
    gate_opener.start()
    stopper.start()
    stopper.join(20)
    assert not harness.loop.alive and not harness.failures
    try:
        assert late.result(20) == 1
    except EngineStopped:
        pass
    with pytest.raises(EngineStopped, match="has stopped"):
        harness.loop.submit(lambda: 1).result(20)


def test_stop_before_start():
    loop = EngineLoop(make_engine(), lambda chunks: None)
    future = loop.submit(lambda: 1)
    loop.stop()
    with pytest.raises(EngineStopped):
        future.result(20)


def test_blocked_by_a_migration_the_loop_neither_spins_nor_sleeps_for_ever():
    harness = Harness(blocks=6)
    engine = harness.engine
    harness.loop.submit(lambda: engine.reserve("guest", 5)).result(20)
    request = make_request("r", range(1, 40), ignore_eos=True)
    harness.loop.submit(lambda: engine.add_request(request)).result(20)
    time.sleep(0.1)
    assert engine.num_steps == 0 and len(harness.loads) < 10
    harness.loop.submit(lambda: engine.cancel_reservation("guest")).result(20)
    client = Client()
    harness.wait_for_end(client, ["r"])
    check(request, client)
    harness.loop.stop()
    assert_clean(engine)
