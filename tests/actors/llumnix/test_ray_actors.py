"""Engine actors and the scheduler as plain Ray actors, without Serve, with the real model: what only separate processes show.

Oracles: block accounts of the instances; the text of an undisturbed request.
"""

from __future__ import annotations

import asyncio
import time
import uuid

import pytest

from actors.llumnix.engine.config import EngineConfig
from actors.llumnix.engine.request import Request, SamplingParams
from actors.llumnix.migration.config import MigrationConfig
from actors.llumnix.settings import InstanceSettings, SchedulerAddress, SchedulerSettings

pytestmark = pytest.mark.timeout(400)
ENGINE = EngineConfig(kv_memory_mib=48, max_model_len=512, threads=1, device="cpu")


class Cluster:
    """Two engine actors and a scheduler with its real migration loop, all found by name."""

    def __init__(self):
        import ray

        from actors.llumnix.instance import start_engine_actor
        from actors.llumnix.scheduler import SCHEDULER_OPTIONS, Scheduler

        name = f"scheduler-{uuid.uuid4().hex[:8]}"
        self.address = SchedulerAddress(name, "", "tests")
        self.scheduler = (
            ray.remote(Scheduler)
            .options(name=name, namespace="tests", **SCHEDULER_OPTIONS)
            .remote(SchedulerSettings(interval_ms=20, migration=False))
        )
        settings = InstanceSettings(poll_timeout_s=0.5, ingress_timeout_s=1.5, heartbeat_s=0.3)
        self.engines = {
            f"i{n}": start_engine_actor(f"i{n}", ENGINE, settings, MigrationConfig(), self.address) for n in range(2)
        }
        self.infos = dict(zip(self.engines, ray.get([e.start.remote() for e in self.engines.values()]), strict=True))
        self.until(lambda: len(self.status()["instances"]) == 2)

    def status(self):
        import ray

        return ray.get(self.scheduler.status.remote())

    def audits(self):
        import ray

        return ray.get([engine.audit.remote() for engine in self.engines.values()])

    def nothing_held(self) -> bool:
        audits = self.audits()
        assert not any(audit["leaked"] for audit in audits), audits
        return all(not audit["requests"] and not audit["referenced"] for audit in audits)

    @staticmethod
    def until(condition, timeout=60.0):
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, "the condition did not come true in time"
            time.sleep(0.05)

    def close(self):
        import ray

        for actor in (*self.engines.values(), self.scheduler):
            ray.kill(actor)


@pytest.fixture(scope="module")
def cluster(ray_local, smollm2_gguf):
    cluster = Cluster()
    yield cluster
    cluster.close()


def request(name, max_tokens, prompt=tuple(range(100, 140)), epoch=1, ingress="somebody"):
    sampling = SamplingParams(temperature=0.7, seed=11, max_tokens=max_tokens, ignore_eos=True)
    return Request(name, prompt, sampling, time.time(), epoch=epoch, ingress_id=ingress)


def test_an_ingress_that_stops_polling_loses_its_requests_and_frees_their_blocks(cluster):
    import ray

    engine = cluster.engines["i0"]
    assert ray.get(engine.add_request.remote(request("left-alone", 440, ingress="dead-ingress"))) is None
    cluster.until(lambda: "left-alone" in cluster.audits()[0]["requests"], 10)
    cluster.until(cluster.nothing_held, 60)
    cluster.until(lambda: cluster.audits()[0]["unacked_chunks"] == 0, 30)


def test_a_request_that_can_never_be_served_is_refused_with_its_parameter(cluster):
    import ray

    refusal = ray.get(cluster.engines["i0"].add_request.remote(request("huge", 5000)))
    assert refusal.param == "max_tokens" and "5000" in refusal.message


def test_an_abort_that_overtakes_its_request_still_holds(cluster):
    import ray

    engine = cluster.engines["i1"]
    epoch = time.time_ns() // 1000
    assert ray.get(engine.abort.remote("late", epoch)) is False
    refusal = ray.get(engine.add_request.remote(request("late", 10, epoch=epoch)))
    assert "aborted before it arrived" in refusal.message
    assert ray.get(engine.add_request.remote(request("late", 10, epoch=epoch + 1))) is None
    ray.get(engine.abort.remote("late", epoch + 1))
    cluster.until(cluster.nothing_held)


def test_the_scheduler_moves_requests_off_a_full_instance_by_itself_and_the_texts_stay_the_same(cluster):
    """Fill one instance behind the scheduler's back: its periodic pairing must move requests to the empty one.

    Four requests grow to 16 blocks each of 68: for their last 47 tokens the instance's freeness is below the threshold of 3.
    """
    from actors.llumnix.frontend import Frontend
    from actors.llumnix.ray_ports import RayInstance, RayScheduler

    async def texts(prefix: str, migrate: bool) -> list[str]:
        scheduler = RayScheduler(cluster.address)
        await scheduler.call("set_policy", None, migrate)
        frontend = Frontend(scheduler, RayInstance, ingress_id=f"{prefix}-ingress")
        frontend.start()
        try:
            first = request(f"{prefix}-0", 245, tuple(range(200, 210)))
            [stream] = await frontend.submit([first])
            streams = [stream]
            for n in range(1, 4):  # the same instance as the first, whatever the policy would say
                other = request(f"{prefix}-{n}", 245, tuple(range(200 + 10 * n, 210 + 10 * n)))
                added = frontend._open(other)
                await frontend._place(added, near=f"{prefix}-0")
                streams.append(added)

            async def read(one):
                return "".join([delta.text async for delta in one])

            return list(await asyncio.gather(*map(read, streams)))
        finally:
            await frontend.stop()

    undisturbed = asyncio.run(texts("still", migrate=False))
    before = cluster.status()["counts"]["migrated"]
    moved = asyncio.run(texts("moved", migrate=True))
    assert cluster.status()["counts"]["migrated"] > before
    assert moved == undisturbed
    cluster.until(cluster.nothing_held)
    records = [m for m in cluster.status()["migrations"] if m["committed"]]
    assert records and all(record["report"]["downtime_ms"] > 0 for record in records)


def test_a_failed_engine_ends_its_process_and_the_scheduler_hears_of_it_at_once(cluster):
    import ray

    engine = cluster.engines["i1"]
    ray.get(engine.__ray_call__.remote(lambda actor: actor._engine_loop.submit(_raise_fatal).exception()))
    cluster.until(lambda: [i["instance_id"] for i in cluster.status()["instances"]] == ["i0"], 30)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(engine.ping.remote())


def _raise_fatal():
    raise SystemExit("a fault injected by a test")
