"""C4's monitors as real Ray actors over plain worker processes: they survive their deaths, and name and fence a stopped rank."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from actors.c4 import processes
from actors.c4.diagnosis.verdict import FaultKind
from actors.c4.generation import Generation, Worker
from actors.c4.injection.faults import Fault, FaultName
from actors.c4.monitors.settings import MonitorSettings

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

WORKER = """
import sys, time
from pathlib import Path
from actors.c4.recorder.layout import Communicator
from actors.c4.recorder.ring import new_ring
folder, generation, rank = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
ring = new_ring(folder, "story", generation, rank, 2)
group = ring.add_communicator(Communicator("0", "dp", (0, 1)))
print("ready", flush=True)
sequence = 0
while True:
    sequence += 1
    ring.beat()
    op = ring.enter(group, sequence, 1, 1, 4096)
    time.sleep(0.005)
    ring.end(op)
    time.sleep(0.02)
"""


class Job:
    """Two ranks that record and do nothing else."""

    def __init__(self, folder: Path, number: int, node_id: str):
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", WORKER, str(folder), str(number), str(rank)], stdout=subprocess.PIPE, text=True
            )
            for rank in range(2)
        ]
        for process in self.processes:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == "ready"
        self.generation = Generation(
            number, tuple(Worker(rank, node_id, "this host", one.pid) for rank, one in enumerate(self.processes))
        )

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            process.stdout.close()  # type: ignore[union-attr]


@pytest.fixture
def master(ray_local, tmp_path: Path) -> Iterator[Any]:
    from actors.c4.monitors.master import start_master, stop_master

    handle = start_master(
        "story",
        MonitorSettings(injection=True),
        folder=tmp_path / "state",
        ring_folder=tmp_path,
        control_folder=tmp_path,
    )
    yield handle
    stop_master(handle)


def until(what: Callable[[], Any], seconds: float = 60.0) -> Any:
    """The first truthy answer; a master that is being restarted is asked again."""
    import ray

    deadline = time.monotonic() + seconds
    while True:
        try:
            if answer := what():
                return answer
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            pass
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_the_story_of_a_run(master: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import ray

    from actors.c4.monitors.master import MonitorError, find_master, start_master

    def ask(method: str, *arguments: Any) -> Any:
        return ray.get(getattr(master, method).remote(*arguments), timeout=10)

    def all_known() -> Any:
        status = ask("status")
        return status if [row.process for row in status.ranks if row.completed] == ["sleeping"] * 2 else None

    with pytest.raises(MonitorError, match="at work already"):
        start_master("story", folder=tmp_path, ring_folder=tmp_path)
    assert find_master("story")[0] == "story"
    with pytest.raises(MonitorError, match="No training of the name other"):
        find_master("other")

    node_id = ray.get_runtime_context().get_node_id()
    job = Job(tmp_path, 1, node_id)
    after = None
    try:
        ask("begin_generation", job.generation)
        status = until(all_known)
        assert status.nodes[0].agent_errors == 0
        ask("set_quarantine", "some-node", "by hand")

        # An agent dies: it is restarted, and its silence is not taken for a lost node.
        agent = ask("agents")[node_id]
        os.kill(ray.get(agent.pid.remote()), signal.SIGKILL)
        until(lambda: ask("status").nodes[0].agent_restarts == 1)
        until(all_known)
        assert ask("verdicts") == ()

        # The master dies: its successor knows the generation and the quarantine, and finds agents again, unasked.
        before = ask("pid")
        os.kill(before, signal.SIGKILL)
        until(lambda: ask("pid") != before)
        assert ask("generation") == job.generation
        assert ask("quarantine") == {"some-node": "by hand"}
        until(all_known)
        assert ask("verdicts") == ()

        # The verbs find the run by themselves.
        from apps.c4.inject import inject
        from apps.c4.watch import watch
        from apps.program.cli import program

        app = program("c4", "The verbs that look at a running job.")
        app.verb(watch)
        app.verb(inject)
        assert app.run(["watch", "--once"]) == 0
        assert "story: generation 1, 2 ranks, training" in capsys.readouterr().out
        assert app.run(["watch", "--once", "--run", "other"]) == 1
        assert app.run(["inject", "--fault", "sigstop", "--rank", "9"]) == 1
        assert "There is no rank 9: the run story has 2 ranks now." in capsys.readouterr().err

        # A rank is stopped: named, its node isolated, and every worker of the generation killed, the stopped one too.
        said = ask("inject", Fault(FaultName.SIGSTOP, 1))
        assert said == "sigstop at rank 1"
        (first, *_) = ray.get(master.verdicts.remote(0, 30.0), timeout=40)
        assert (first.verdict.kind, first.verdict.culprit.ranks) == (FaultKind.PROCESS_STOPPED, (1,))
        assert first.action == "evict"
        assert node_id in ask("quarantine")
        assert [process.wait(30) for process in job.processes] == [-signal.SIGKILL] * 2
        until(lambda: ask("fences_left") == 0)

        # The next generation begins; the quarantine stays.
        after = Job(tmp_path, 2, node_id)
        ask("begin_generation", after.generation)
        until(all_known)
        assert all(process.poll() is None for process in after.processes)
        assert [one.generation for one in ask("verdicts")] == [1] * len(ask("verdicts"))
    finally:
        job.end()
        if after is not None:
            after.end()


def test_a_fault_is_refused_where_injection_is_not_enabled(ray_local, tmp_path: Path) -> None:
    import ray

    from actors.c4.injection.faults import InjectionError
    from actors.c4.monitors.master import start_master, stop_master

    master = start_master("plain", folder=tmp_path, ring_folder=tmp_path)
    try:
        with pytest.raises(InjectionError, match="not started with fault injection enabled"):
            ray.get(master.inject.remote(Fault(FaultName.SIGSTOP, 0)))
        pid = ray.get(master.pid.remote())
    finally:
        stop_master(master)
    deadline = time.monotonic() + 30
    while processes.look(pid) is not None:
        assert time.monotonic() < deadline, "the master is still there"
        time.sleep(0.1)
