"""Sweeps for real: processes in slices, out of memory as a result, and the whole through Ray Tune, cut off and resumed."""

from __future__ import annotations

import functools
import json

import pytest

from actors.mig.backends import BackendError, make_backend
from actors.mig.backends.cpu import CpuBackend
from apps.migperf.__main__ import _add_verbs, app
from apps.migperf.config import MigperfConfig, SweepConfig
from apps.migperf.sweep.process import TrialEnded, TrialProcess
from apps.migperf.sweep.runner import run_trial
from apps.migperf.sweep.store import Store
from apps.migperf.sweep.trial import TrialPoint, TrialResult, to_json
from apps.migperf.sweep_command import make_candidates

TABLE = """source,gpu,mode,workload,batch,seq,profile,latency_ms,latency_std_ms,gract,fb_mib,oom
t,A100-80GB,infer,toy,1,,7g.80gb,5,0.1,,900,0
t,A100-80GB,infer,toy,8,,7g.80gb,8,0.1,,1000,0
t,A100-80GB,infer,toy,64,,7g.80gb,40,0.1,,2000,0
t,A100-80GB,infer,toy,1,,1g.10gb,6,0.1,,700,0
t,A100-80GB,infer,toy,8,,1g.10gb,40,0.1,,900,0
t,A100-80GB,infer,toy,64,,1g.10gb,0,0,,0,1
"""


@pytest.fixture
def backend():
    made = CpuBackend(memory_mib=7 * 600)
    made.repartition(["cpu3of7", "cpu2of7"])
    yield made
    made.close()


def test_a_trial_runs_in_its_slice_rung_by_rung_and_gives_it_back(backend) -> None:
    point = TrialPoint("cpu", backend.device, "cpu3of7", "lstm", "infer", 2, 8, scale=0.05)
    look, whole = list(run_trial(point, backend, (0.1, 0.3)))
    assert (look.status, whole.status) == ("stopped", "ok")
    assert whole.steps > look.steps
    assert whole.latency_p50_ms <= whole.latency_p95_ms <= whole.latency_p99_ms
    assert whole.throughput_per_s == pytest.approx(2 * whole.steps / whole.seconds)
    assert whole.memory_mib > 50
    assert whole.start_s > 0
    assert 0 < whole.achieved_share < 1
    # A co-run needs every slice of the profile; the slice is free again, or this would fail.
    beside = TrialPoint(
        "cpu", backend.device, "cpu3of7", "lstm", "train", 1, 8, rate_per_s=20.0, scale=0.05, corun=True
    )
    (open_,) = run_trial(beside, backend, (0.3,))
    assert open_.status == "ok"
    assert "co-run" in open_.note


def test_too_large_a_batch_is_out_of_memory_and_nothing_worse(backend) -> None:
    point = TrialPoint("cpu", backend.device, "cpu2of7", "lstm", "train", 4096, 512, scale=0.05)
    (result,) = run_trial(point, backend, (0.1,))
    assert (result.status, result.latency_mean_ms) == ("oom", None)
    assert result.note
    assert backend.lease(next(one.uuid for one in backend.slices() if one.profile == "cpu2of7"))


def test_a_process_that_is_killed_or_refused_a_lease_is_a_result(backend) -> None:
    point = TrialPoint("cpu", backend.device, "cpu1of7", "lstm", "infer", 1, 8, scale=0.05)
    (missing,) = run_trial(point, backend, (0.1,))
    assert missing.status == "failed"
    assert "no slice cpu1of7" in missing.note

    def refuse(pid: int):
        raise BackendError("it is gone")

    with pytest.raises(BackendError, match="it is gone"):
        TrialProcess(point, refuse)
    with TrialProcess(point, lambda pid: {}) as process:
        process._process.kill()
        with pytest.raises(TrialEnded, match="SIGKILL") as ended:
            process.wait_ready()
    assert ended.value.status == "oom"


def test_a_sweep_through_ray_tune_cuts_rarely_and_goes_on_where_it_was_cut_off(ray_local, tmp_path) -> None:
    from apps.migperf.sweep.search import Costs, Search
    from apps.migperf.sweep.tune import SweepPlan, run_sweep
    from apps.migperf.sweep_command import simulated_rows

    table = tmp_path / "table.csv"
    table.write_text(TABLE)
    config = SweepConfig(
        backend="sim", gpu="A100-80GB", profiles=("7g.80gb", "1g.10gb"), workloads=("toy",), batches=(1, 8, 64),
        sequences=(), measurements=str(table), scheduler="best",
    )  # fmt: skip
    backend = make_backend("sim", gpu="A100-80GB")
    candidates = make_candidates(config, backend)
    make = functools.partial(make_backend, "sim", gpu="A100-80GB")
    plan = SweepPlan(make, (0.2, 0.8), simulated=tuple(simulated_rows(config)), scheduler="asha")
    store = Store(tmp_path)
    before = TrialResult(candidates[0].point, "ok", latency_mean_ms=1e6, throughput_per_s=1.0)
    store.add(before)  # as a sweep that was cut off left it
    outcome = run_sweep(Search(candidates, Costs(), guided=False), plan, store)
    assert {result.point for result in outcome.results} == {candidate.point for candidate in candidates}
    assert before in outcome.results  # not measured again
    assert outcome.repartitions == 2
    assert [r.point.key for r in outcome.results if r.status == "oom"] == ["sim/A100-80GB/1g.10gb/toy/infer/b64"]
    assert not [r for r in outcome.results if r.status == "failed"]
    lines = [line for line in store.path.read_text().splitlines() if line]
    assert len(lines) == len(candidates)
    assert store.table.exists()

    fresh = tmp_path / "guided"
    fresh.mkdir()
    guided = Search(candidates, Costs())
    run_sweep(guided, SweepPlan(make, (0.2, 0.8), simulated=plan.simulated), Store(fresh))
    found = guided.best(candidates[0].point.question)
    assert found is not None
    assert (found[0].point.profile, found[0].point.batch) == ("7g.80gb", 64)


def call(*arguments: str) -> int:
    if not app.typer.registered_commands:
        _add_verbs()
    return app.run(list(arguments))


def test_a_dry_run_lists_the_trials_and_mistakes_are_sentences(capsys, tmp_path) -> None:
    assert call("sweep", "--dry-run", "sweep.backend=sim", "sweep.gpu=A30", "sweep.workloads=[bert_base]") == 0
    out = capsys.readouterr().out
    assert "re-partitions cover them all" in out
    assert "4g.24gb" in out
    for arguments, sentence in (
        (["sweep", "--dry-run", "sweep.backend=sim", "sweep.gpu=V100"], "No MIG table"),
        (["sweep", "--dry-run", "sweep.profiles=[1g.10gb]"], "has no profile '1g.10gb'"),
        (["sweep", "--dry-run", "sweep.workloads=[gpt9]"], "no workload 'gpt9'"),
        (["sweep", "--dry-run", "sweep.backend=green"], "no CUDA driver"),
        (["sweep", "--dry-run", "sweep.backend=green", "sweep.gpu=A100"], "number of a GPU"),
        (["sweep", "--resume", str(tmp_path / "none")], "There is no run folder"),
        (["report", str(tmp_path)], "There are no trials"),
        (["share", "share.profile=cpu4of7"], "do not fit"),
        (["hybrid"], "The simulation needs latencies"),
    ):
        assert call(*arguments) != 0, arguments
        assert sentence in capsys.readouterr().err, arguments


def test_a_report_draws_trials_beside_published_ones(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("SEXTANT_RUNS", str(tmp_path / "runs"))
    store = Store(tmp_path)
    for batch in (1, 8):
        point = TrialPoint("cpu", "cpu-2-cores", "cpu2of7", "toy", "infer", batch)
        store.add(TrialResult(point, "ok", 1, 1, 9, 5.0 * batch, 0.1, 5, 6, 7, 200.0, energy_j=2.0, energy_error=0.01))
    published = tmp_path / "published.csv"
    published.write_text(TABLE)
    assert call("report", str(tmp_path), "--published", str(published)) == 0
    (folder,) = [path for path in (tmp_path / "runs" / "migperf").iterdir() if not path.is_symlink()]
    html = (folder / "report.html").read_text()
    assert "analogue" in html
    assert (folder / "inference_toy.png").stat().st_size > 1000
    assert (folder / "measurements.csv").read_text().count("\n") == 3


def test_configurations_are_whole(tmp_path) -> None:
    config = MigperfConfig()
    assert json.loads(to_json(TrialResult(TrialPoint("a", "b", "c", "d", "infer", 1), "ok")))["status"] == "ok"
    assert config.sweep.backend == "cpu"
