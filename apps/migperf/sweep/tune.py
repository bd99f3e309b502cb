"""The sweep as Ray Tune: a searcher that suggests the next trial, a trainable that measures it, a scheduler that stops it.

The search (search.py), not Tune, knows which point is next and which layout it needs: so trials of one layout follow each
other, and the device is cut as rarely as can be. Trials of one device run one at a time; Ray's resources hold it.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import ConcurrencyLimiter, Searcher

from actors.mig.backends import SliceBackend
from actors.mig.prediction import Measurement
from apps.migperf.sweep.layouts import Layout
from apps.migperf.sweep.process import WorkerSettings
from apps.migperf.sweep.runner import Meter, Rungs, SimulatedTrials, run_trial
from apps.migperf.sweep.search import Choice, Search
from apps.migperf.sweep.store import Store
from apps.migperf.sweep.trial import TrialPoint, TrialResult, from_json, objective, to_json
from apps.program.errors import UserError

logger = logging.getLogger("sextant.migperf.sweep")

RESULT = "trial_result"
"""Key of the result in a report, as a line of JSON: Tune takes nested dictionaries apart."""


@dataclasses.dataclass(frozen=True)
class SweepPlan:
    """What stays the same for all trials."""

    make_backend: Callable[[], SliceBackend]
    rungs: Rungs
    settings: WorkerSettings = dataclasses.field(default_factory=WorkerSettings)
    meter: Meter | None = None
    simulated: tuple[Measurement, ...] = ()
    scheduler: str = "best"
    """``best``: a trial goes on while it may be the best (search.py); ``asha``; ``none``: every trial to its end."""
    seed: int = 0


class DeviceActor:
    """Holds the backend for the sweep: cuts the device, and runs one trial at a time in a process of its own. It is not the
    node's lease actor, because a sweep cuts the device that it measures again and again."""

    def __init__(self, plan: SweepPlan):
        self._plan = plan
        self._backend = plan.make_backend()
        self._running: Any = None
        self._before: Layout = tuple(found.profile for found in self._backend.slices())
        self.layout = self._before
        self.cuts = 0
        self.cut_s = 0.0

    def cuts_so_far(self) -> tuple[int, float]:
        """(how often the device was cut, seconds of that)."""
        return self.cuts, self.cut_s

    def cut(self, layout: Layout) -> None:
        """Makes the device hold a layout."""
        self.stop()
        if sorted(layout) != sorted(self.layout):
            before = time.monotonic()
            self._backend.repartition(layout)
            self.cut_s += time.monotonic() - before
            self.cuts, self.layout = self.cuts + 1, layout

    def begin(self, point: TrialPoint, layout: Layout) -> None:
        """Prepares a trial; ``rung`` runs it."""
        self.cut(layout)
        if self._plan.simulated:
            self._running = SimulatedTrials(self._plan.simulated).run(point, self._plan.rungs, self._plan.seed)
        else:
            self._running = run_trial(point, self._backend, self._plan.rungs, self._plan.settings, self._plan.meter)

    def rung(self) -> TrialResult | None:
        """The result after one rung more; None when there is none left."""
        return None if self._running is None else next(self._running, None)

    def stop(self) -> None:
        """Ends the trial that runs, with its process and its lease."""
        running, self._running = self._running, None
        if running is not None:
            running.close()

    def close(self) -> None:
        """Ends what runs and leaves the device cut as it was found."""
        self.stop()
        try:
            if sorted(self._before) != sorted(self.layout):
                self._backend.repartition(self._before)
        finally:
            self._backend.close()


def trainable(config: Mapping[str, Any]) -> None:
    """One trial: rungs until the last or until the scheduler stops it (Tune then ends this function by an exception)."""
    device, most = config["device"], config["most"]
    point, layout, limit = config["point"], config["layout"], config["limit_ms"]
    ray.get(device.begin.remote(point, layout))
    rung = 0
    while (result := ray.get(device.rung.remote())) is not None:
        rung += 1
        tune.report(
            {
                "rung": rung,
                "objective": objective(result, most, limit),
                "key": point.key,
                "status": result.status,
                RESULT: to_json(result),
            }
        )


class SearchInTune(Searcher):
    """``Search`` as a searcher of Tune. Results are kept as trials end; what the store has already is not run again."""

    def __init__(self, search: Search, device: Any, store: Store, say: Callable[[str], None] = logger.info):
        super().__init__(metric="objective", mode="max")
        self.search, self._device, self._store, self._say = search, device, store, say
        self._running: dict[str, Choice] = {}
        self._last: dict[str, TrialResult] = {}
        self._held: Layout = ()

    def suggest(self, trial_id: str) -> Any:
        if self._running:
            return None
        choice = self.search.next(self._held)
        if choice is None:
            return Searcher.FINISHED
        self._running[trial_id] = choice
        candidate = choice.candidate
        self._held = candidate.layout
        self._say(f"{candidate.point.key}: {choice.why}")
        return {
            "device": self._device,
            "point": candidate.point,
            "layout": candidate.layout,
            "most": candidate.most,
            "limit_ms": self.search.latency_limit_ms,
        }

    def goes_on(self, trial_id: str, result: TrialResult) -> bool:
        choice = self._running.get(trial_id)
        return choice is None or choice.full or self.search.goes_on(result)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if RESULT in result:  # the note that a function has ended has none
            self._last[trial_id] = from_json(result[RESULT])

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        choice = self._running.pop(trial_id, None)
        if choice is None:
            return
        if result is not None:
            self.on_trial_result(trial_id, result)  # a trial that is stopped ends here alone
        found = self._last.pop(trial_id, None)
        if found is None:
            found = TrialResult(choice.candidate.point, "failed", note="The trial's actor ended without a result.")
        self.search.tell(found)
        self._store.add(found)
        # The device is free only when the trial's process has ended, stopped trials included.
        ray.get(self._device.stop.remote())

    def save(self, checkpoint_path: str) -> None:
        """The store is what lasts; Tune's own checkpoint of the searcher is empty."""
        from pathlib import Path

        Path(checkpoint_path).write_text("")

    def restore(self, checkpoint_path: str) -> None:
        raise UserError("A sweep goes on from its trials (sweep --resume FOLDER), not from Tune's checkpoint.")


class MayBeBest(FIFOScheduler):
    """Stops a trial after its first look unless it may be the best of its question."""

    def __init__(self, searcher: SearchInTune):
        super().__init__()
        self._searcher = searcher

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if RESULT not in result:
            return TrialScheduler.CONTINUE
        found = from_json(result[RESULT])
        if found.status == "stopped" and not self._searcher.goes_on(trial.trial_id, found):
            return TrialScheduler.STOP
        return TrialScheduler.CONTINUE


@dataclasses.dataclass(frozen=True)
class SweepOutcome:
    """What a sweep did."""

    results: tuple[TrialResult, ...]
    repartitions: int
    repartition_s: float
    pruned: Mapping[str, str]


def run_sweep(
    search: Search, plan: SweepPlan, store: Store, say: Callable[[str], None] = logger.info
) -> SweepOutcome:  # fmt: skip
    """Runs the search to its end in the Ray that this process is connected to.

    Raises:
        BackendError: the backend cannot be opened, or the device cannot be cut; what was measured is in the store.
    """
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Tune's own tables would bury ours
    for result in store.load():
        search.tell(result)
    device = ray.remote(DeviceActor).options(num_cpus=0).remote(plan)
    try:
        _get(device.cuts_so_far.remote())  # an error of the backend comes here, as its own sentence
        searcher = SearchInTune(search, device, store, say)
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"cpu": 0.5}),
            tune_config=tune.TuneConfig(
                search_alg=ConcurrencyLimiter(searcher, max_concurrent=1),
                scheduler=_scheduler(plan, searcher),
                num_samples=4 * len(search.candidates) + 4,
                metric="objective",
                mode="max",
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(storage_path=str(store.path.parent.resolve()), name="tune", verbose=0),
        )
        if search.next() is not None:
            tuner.fit()
        cuts, cut_s = _get(device.cuts_so_far.remote())
    finally:
        try:
            ray.get(device.close.remote(), timeout=60)
        except ray.exceptions.RayError as error:
            logger.warning("the sweep's device actor did not close: %s", error)
        ray.kill(device)
    store.write_csv(search.done.values())
    return SweepOutcome(tuple(search.done.values()), cuts, cut_s, dict(search.pruned))


def _scheduler(plan: SweepPlan, searcher: SearchInTune) -> TrialScheduler:
    if plan.scheduler == "asha":
        return ASHAScheduler(time_attr="rung", max_t=len(plan.rungs), grace_period=1, reduction_factor=2)
    return MayBeBest(searcher) if plan.scheduler == "best" else FIFOScheduler()


def _get(reference: Any) -> Any:
    from actors.mig.backends import BackendError

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, BackendError):
            raise error.cause from None
        raise
    except ray.exceptions.RayActorError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise BackendError(lines[-1]) from error
