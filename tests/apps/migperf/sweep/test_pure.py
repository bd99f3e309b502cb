"""Sweeps without processes: loops on a virtual clock, percentiles, layouts, the store, energy, the objective."""

from __future__ import annotations

import dataclasses
import random
import time

import pytest

from actors.mig.backends.cpu import CpuBackend
from actors.mig.backends.simulated import SimBackend
from actors.mig.prediction import Measurement
from apps.migperf.sweep.energy import PowerMeter, Sample, attribute
from apps.migperf.sweep.layouts import corun_layout, cover, group, repartitions
from apps.migperf.sweep.loops import VirtualTime, Window, closed_loop, open_loop
from apps.migperf.sweep.runner import SimulatedTrials
from apps.migperf.sweep.store import Store
from apps.migperf.sweep.trial import (
    FULL,
    TrialPoint,
    TrialResult,
    from_json,
    measurement_cells,
    objective,
    percentile,
    to_json,
)
from apps.program.errors import UserError

POINT = TrialPoint("sim", "A100-80GB", "2g.20gb", "bert_base", "infer", 4, 64)


def test_percentiles_are_nearest_ranks() -> None:
    values = [float(n) for n in range(1, 101)]
    assert [percentile(values, share) for share in (0.5, 0.95, 0.99, 1.0)] == [50, 95, 99, 100]
    assert percentile([7.0], 0.99) == 7


def test_a_closed_loop_runs_for_its_time_and_at_least_three_batches() -> None:
    clock = VirtualTime()
    window = closed_loop(lambda: clock.sleep(0.1), 1.0, clock)
    assert len(window.latencies_ms) in (10, 11)
    assert window.mean_ms == pytest.approx(100)
    assert window.batches_per_s() == pytest.approx(10)
    assert len(closed_loop(lambda: clock.sleep(5.0), 1.0, clock).latencies_ms) == 3


def test_an_open_loop_waits_as_queueing_theory_says() -> None:
    clock = VirtualTime()
    window = open_loop(lambda: clock.sleep(0.01), 60.0, 2000.0, clock)
    assert len(window.latencies_ms) == pytest.approx(120_000, rel=0.01)
    # Pollaczek-Khinchine for M/D/1 at utilisation 0.6.
    assert window.mean_ms == pytest.approx(10 + 0.6 * 10 / (2 * 0.4), rel=0.03)


def test_an_overload_shows_and_drops_what_waited_ten_seconds() -> None:
    clock = VirtualTime()
    window = open_loop(lambda: clock.sleep(0.1), 20.0, 60.0, clock)
    assert window.dropped > 100
    assert max(window.latencies_ms) == pytest.approx(10_100, rel=0.02)
    assert window.batches_per_s() <= 10.001


def test_windows_join() -> None:
    joined = Window((1.0, 3.0), 2.0, 1).joined(Window((5.0,), 1.0, 2))
    assert (joined.mean_ms, joined.seconds, joined.dropped, joined.batches_per_s()) == (3.0, 3.0, 3, 1.0)


def test_the_objective_is_the_whole_device_within_the_limit() -> None:
    result = TrialResult(POINT, "ok", latency_mean_ms=10, latency_p99_ms=20, throughput_per_s=400)
    assert objective(result, 3) == 1200
    assert objective(result, 3, latency_limit_ms=20) == 1200
    assert objective(result, 3, latency_limit_ms=19) == 0
    assert objective(dataclasses.replace(result, status="oom"), 3) == 0


def test_five_profiles_need_few_layouts_and_every_profile_has_one() -> None:
    backend = SimBackend("A100-80GB")
    names = [profile.name for profile in backend.profiles() if profile.name in
             ("1g.10gb", "2g.20gb", "3g.40gb", "4g.40gb", "7g.80gb")]  # fmt: skip
    layouts = cover([FULL, *names], backend.fits)
    assert {name for layout in layouts for name in layout} == set(names)
    assert all(backend.fits(layout) for layout in layouts)
    assert len([layout for layout in layouts if layout]) == 3  # 7g; 4g + 3g; 2g + 1g


def test_trials_of_a_layout_follow_each_other() -> None:
    backend = CpuBackend()
    points = [
        TrialPoint("cpu", "cpu", profile, "minilm", "infer", batch, corun=corun)
        for batch in (1, 2)
        for corun in (False, True)
        for profile in (FULL, "cpu1of7", "cpu2of7", "cpu4of7")
    ]
    groups = group(points, backend)
    assert sorted(point.key for _, members in groups for point in members) == sorted(point.key for point in points)
    assert all(point.profile == FULL or point.profile in layout for layout, members in groups for point in members)
    assert corun_layout("cpu2of7", backend) == ("cpu2of7",) * 3
    assert repartitions([layout for layout, _ in groups]) == len(groups) - 1  # the first needs no slices
    by_point = [next(layout for layout, members in groups if point in members) for point in points]
    assert repartitions(by_point) > 2 * len(groups)


def test_results_survive_a_sweep_that_is_cut_off_in_the_middle_of_a_line(tmp_path) -> None:
    store = Store(tmp_path)
    first = TrialResult(POINT, "ok", 1.0, latency_mean_ms=3.5)
    second = TrialResult(dataclasses.replace(POINT, batch=8), "oom", note="no memory")
    store.add(first)
    with store.path.open("a") as file:
        file.write(to_json(second)[:40])
    assert store.load() == [first]
    store.add(second)
    assert store.load() == [first, second]
    store.write_csv([first, second])
    assert store.table.read_text().startswith(
        "source,gpu,mode,workload,batch,seq,profile,latency_ms,latency_std_ms,gract,fb_mib,oom"
    )


def test_a_line_that_is_no_result_is_told(tmp_path) -> None:
    Store(tmp_path).path.write_text('{"point": 3}\n')
    with pytest.raises(UserError, match="no result of a trial"):
        Store(tmp_path).load()
    assert from_json(to_json(TrialResult(POINT, "ok"))) == TrialResult(POINT, "ok")


def test_the_table_is_one_that_predict_reads(tmp_path) -> None:
    from apps.migperf.measurements import read_table

    results = [
        TrialResult(POINT, "ok", latency_mean_ms=10.0, latency_std_ms=1.0, memory_mib=900.0),
        TrialResult(dataclasses.replace(POINT, batch=512), "oom"),
    ]
    Store(tmp_path).write_csv(results)
    table = read_table(Store(tmp_path).table)
    assert [(row.batch, row.latency_ms, bool(row.oom)) for row in table.rows] == [(4, 10.0, False), (512, None, True)]
    cpu = measurement_cells(TrialResult(dataclasses.replace(POINT, backend="cpu"), "ok"))
    assert cpu["gpu"].startswith("cpu:")  # an analogue never looks like a GPU's row


def test_energy_is_divided_without_a_remainder() -> None:
    rng = random.Random(0)
    samples, counter = [], 0.0
    for step in range(100):
        power = 100 + rng.random() * 200
        if samples:
            counter += (power + samples[-1].power_w) / 2 * 0.1
        samples.append(Sample(0.1 * step, power, {"a": rng.random(), "b": rng.random()}, counter))
    parts = attribute(samples, {"a": 3 / 7, "b": 2 / 7}, idle_w=90)
    assert parts is not None
    assert parts.error == pytest.approx(0, abs=1e-9)
    assert sum(parts.slices_j.values()) + parts.unattributed_j == pytest.approx(counter)
    assert parts.slices_j["a"] > parts.slices_j["b"]
    wrong = [dataclasses.replace(sample, counter_j=1.05 * sample.counter_j) for sample in samples]
    assert attribute(wrong, {"a": 1.0}, 90).error == pytest.approx(0.05 / 1.05)


def test_an_idle_slice_pays_for_its_still_share_alone() -> None:
    samples = [Sample(t, 300.0, {"busy": 1.0, "idle": 0.0}) for t in (0.0, 10.0)]
    parts = attribute(samples, {"busy": 0.5, "idle": 0.25}, idle_w=80)
    assert parts.slices_j == pytest.approx({"busy": 10 * (40 + 220), "idle": 10 * 20})
    assert parts.unattributed_j == pytest.approx(10 * 20)
    assert attribute(samples[:1], {"busy": 1.0}, 80) is None
    with pytest.raises(ValueError, match="between 0 and 1 in sum"):
        attribute(samples, {"a": 0.8, "b": 0.8}, 80)


class Board:
    """NVML's part for power: 200 W, a counter of millijoules."""

    class NVMLError(Exception):
        pass

    def __init__(self, library: bool = True):
        self.library, self.open, self.began = library, 0, time.monotonic()

    def nvmlInit(self):
        if not self.library:
            raise self.NVMLError("NVML Shared Library Not Found")
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetPowerUsage(self, handle):
        return 200_000

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        return int((time.monotonic() - self.began) * 200_000)

    def nvmlDeviceGetUtilizationRates(self, handle):
        return type("Rates", (), {"gpu": 50})()


def test_the_board_s_calls_are_nvml_s() -> None:
    import inspect

    import pynvml

    for name, function in vars(Board).items():
        if name.startswith("nvml"):
            real = list(inspect.signature(getattr(pynvml, name)).parameters)
            assert list(inspect.signature(function).parameters)[1:] == real or name == "nvmlInit"
    assert issubclass(pynvml.NVMLError, Exception)


def test_the_meter_samples_until_it_is_stopped_and_says_what_it_lacks() -> None:
    board = Board()
    samples = PowerMeter(0, interval_s=0.005, module=board).start()
    deadline = time.monotonic() + 20
    while not samples._samples and time.monotonic() < deadline:
        time.sleep(0.005)
    found = samples.stop()
    assert len(found) >= 2
    assert board.open == 0
    assert {sample.power_w for sample in found} == {200.0}
    assert found[0].activity == {"": 0.5}
    absent = PowerMeter(0, module=Board(library=False)).start()
    assert absent.stop() == []
    assert "NVML does not start" in absent.why


def test_simulated_trials_draw_from_the_table_and_say_what_is_missing() -> None:
    rows = [
        Measurement("A100-80GB", "infer", "bert_base", "2g.20gb", 4, 64, latency_ms=20.0, latency_std_ms=1.0),
        Measurement("A100-80GB", "infer", "bert_base", "1g.10gb", 4, 64, oom=True),
        Measurement("A100-80GB", "infer", "bert_base", "7g.80gb", 4, 64, latency_ms=8.0),
    ]
    trials = SimulatedTrials(rows)
    look, whole = list(trials.run(POINT, (1.0, 4.0)))
    assert (look.status, whole.status) == ("stopped", "ok")
    assert whole.latency_mean_ms == pytest.approx(20, rel=0.02)
    assert whole.throughput_per_s == pytest.approx(200, rel=0.03)
    assert whole.steps > look.steps
    (out,) = trials.run(dataclasses.replace(POINT, profile="1g.10gb"), (1.0,))
    assert out.status == "oom"
    (between,) = trials.run(dataclasses.replace(POINT, profile="4g.40gb"), (1.0,))
    assert 8 < between.latency_mean_ms < 20
    (unknown,) = trials.run(dataclasses.replace(POINT, workload="gpt9"), (1.0,))
    assert unknown.status == "failed"
    assert "Nothing is known of 'gpt9'" in unknown.note
