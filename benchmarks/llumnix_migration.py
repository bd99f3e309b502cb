"""Live migration on real instances: are tokens exact, does anything leak, how long is the pause, what does it cost the others?

``python -m benchmarks.llumnix_migration [--quick]``: two and three engine actors (processes of one thread each) on a Ray of its
own, same-host shared memory, no Serve in between. Pauses are gaps between a request's tokens at the instances' own clocks.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from actors.cluster.session import RayConfig, ray_session
from actors.llumnix.engine.config import EMBEDDED_MODEL, EngineConfig
from actors.llumnix.engine.loading import load_tokenizer
from actors.llumnix.engine.request import SamplingParams
from actors.llumnix.migration.config import MigrationReport
from apps.llumnix.prompts import TextPrompts
from apps.program.report import PALETTE, new_figure
from benchmarks.harness import Benchmark, Samples, Target, print_rows
from benchmarks.llumnix.fleet import Fleet, Stream
from benchmarks.llumnix.workload import Case, logprob_difference, make_cases, mismatches, with_stop_string

TARGETS = [
    Target("token_mismatches", 0, 0, "lower", "tokens that differ from the unmigrated run"),
    Target("requests", 100, 1000, "higher", "requests compared with at least 3 hops"),
    Target("logprob_max_abs_diff", 0, 0, "lower", "of tokens and alternatives"),
    Target("leaked_blocks", 0, 0, "lower", "after everything ended, all instances"),
    Target("downtime_over_step_p50", 1.0, 0.2, "lower", "pause / median decode step, worst context, free destination"),
    Target("downtime_slope", 1.5, 1.2, "lower", "pause at 4,096 / at 256 tokens"),
    Target("recompute_over_migration_4096", 50, 500, "higher", "pause of stop-and-recompute / of migration"),
    Target("bystander_slowdown", 1.15, 1.03, "lower", "decode step of others, during / without"),
]
CONTEXTS = (256, 1024, 4096)
MIN_HOPS = 3


def main() -> int:
    """Runs everything; returns the exit code."""
    options: dict[str, dict[str, Any]] = {
        "--dtype": {"choices": ("fp32", "bf16", "int8"), "default": "bf16", "help": "weights of the instances"},
        "--only": {"choices": ("exact", "downtime", "bystanders"), "help": "one part alone"},
    }
    bench = Benchmark("llumnix_migration", __doc__ or "", TARGETS, options=options)
    only = bench.arguments.only
    with ray_session(RayConfig(address="local", num_cpus=4, log_to_driver=False, object_store_memory_mib=100)):
        if only in (None, "exact"):
            asyncio.run(exactness(bench))
        if only in (None, "downtime", "bystanders"):
            asyncio.run(timing(bench, only))
    for part in dict.fromkeys(row["part"] for row in bench.rows):
        print_rows(part, [{k: v for k, v in row.items() if k != "part"} for row in bench.rows if row["part"] == part])
    return bench.finish()


def engine_config(bench: Benchmark, **changes: Any) -> EngineConfig:
    """One thread, the embedded model."""
    return EngineConfig(dtype=bench.arguments.dtype, threads=1, device="cpu", **changes)


# ---- exactness


async def exactness(bench: Benchmark) -> None:
    """Every case alone and unmigrated, then many at once while they hop; nothing may differ."""
    count, output = (100, 22) if bench.quick else (1000, 40)
    bench.say(f"starting 3 instances ({bench.arguments.dtype})")
    async with Fleet(engine_config(bench, kv_memory_mib=256, max_num_seqs=16), 3) as fleet:
        plain = make_cases(count, output, TextPrompts(load_tokenizer(EMBEDDED_MODEL)))
        bench.say(f"{len(plain)} requests alone, unmigrated")
        alone = await run_alone(fleet, plain, bench)
        derived = [with_stop_string(case, stream.text) for case, stream in zip(plain, alone, strict=True)]
        stopping = [case for case in derived if case is not None][: count // 6]
        bench.say(f"{len(stopping)} more with stop strings from their own answers, alone")
        cases = [*plain, *stopping]
        references = [*alone, *await run_alone(fleet, stopping, bench)]
        bench.say(f"{len(cases)} requests, many at once, hopping")
        hopped, failed = await run_hopping(fleet, cases, bench)
        leaked, audits = await fleet.leaked_blocks()
    differing = [mismatches(a.tokens, b.tokens) for a, b in zip(references, hopped, strict=True)]
    texts = sum(
        (a.text, a.finish_reason, a.stop_reason) != (b.text, b.finish_reason, b.stop_reason)
        for a, b in zip(references, hopped, strict=True)
    )
    counted = [stream for stream in hopped if stream.hops >= MIN_HOPS]
    bench.figure("token_mismatches", sum(differing))
    bench.figure("requests", len(counted))
    bench.figure("hops", sum(stream.hops for stream in hopped))
    bench.figure(
        "logprob_max_abs_diff",
        max(logprob_difference(a.logprobs, b.logprobs) for a, b in zip(references, hopped, strict=True)),
    )
    bench.figure("leaked_blocks", leaked)
    bench.figure("text_or_finish_mismatches", texts)
    bench.figure("stopped_by_string", sum(isinstance(stream.stop_reason, str) for stream in hopped))
    bench.row(part="exactness", what="requests run twice", count=len(cases))
    bench.row(part="exactness", what="tokens compared", count=sum(len(stream.tokens) for stream in references))
    bench.row(part="exactness", what="migrations that did not commit", count=sum(failed.values()), note=str(failed))
    bench.row(part="exactness", what="stale chunks dropped by epoch", count=sum(s.stale_chunks for s in hopped))
    bench.row(part="exactness", what="preemptions", count=sum(s.preemptions for s in hopped))
    for number, audit in enumerate(audits):
        told = f"{audit['free']} free + {audit['cached']} cached of {audit['total']}"
        bench.row(part="exactness", what=f"blocks of instance {number}", count=audit["total"], note=told)


async def run_alone(fleet: Fleet, cases: Sequence[Case], bench: Benchmark) -> list[Stream]:
    """Each case as the only request of its instance."""
    done: dict[int, Stream] = {}

    async def worker(instance: int) -> None:
        for index in range(instance, len(cases), fleet.count):
            case = cases[index]
            stream = await fleet.add(f"alone-{case.name}", case.prompt, case.sampling, instance)
            done[index] = await stream.wait()
            if len(done) % 100 == 0:
                bench.say(f"  {len(done)} of {len(cases)}")

    async with asyncio.TaskGroup() as group:
        for instance in range(fleet.count):
            group.create_task(worker(instance))
    return [done[index] for index in range(len(cases))]


async def run_hopping(fleet: Fleet, cases: Sequence[Case], bench: Benchmark) -> tuple[list[Stream], dict[str, int]]:
    """All cases, 4 an instance at a time, each moved on as soon as its last move ended; also the moves that did not commit."""
    room = asyncio.Semaphore(4 * fleet.count)  # an instance sends 4 migrations out at once and takes 4 in
    failed: dict[str, int] = {}
    ended = 0

    async def one(index: int, case: Case) -> Stream:
        nonlocal ended
        async with room:
            stream = await fleet.add(f"hop-{case.name}", case.prompt, case.sampling, index % fleet.count)
            await stream.wait_for(1)
            hops = MIN_HOPS + index % 2
            while stream.hops < hops and not stream.finished:
                to = (stream.at + 1 + (index + stream.hops) % (fleet.count - 1)) % fleet.count
                report = await fleet.migrate(stream, to)
                if not report.committed:
                    why = report.reason or report.outcome
                    failed[why] = failed.get(why, 0) + 1
                    await asyncio.sleep(0.01)
            await stream.wait()
            ended += 1
            if ended % 100 == 0:
                bench.say(f"  {ended} of {len(cases)}")
            return stream

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(index, case)) for index, case in enumerate(cases)]
    return [task.result() for task in tasks], failed


# ---- pauses


async def timing(bench: Benchmark, only: str | None) -> None:
    """Two instances without prefix cache, so that every move copies every block."""
    bench.say("starting 2 instances without prefix cache")
    config = engine_config(bench, kv_memory_mib=768, prefix_caching=False, max_batched_tokens=512)
    async with Fleet(config, 2, poll_s=0.02) as fleet:
        warm = await fleet.add("warm", random_prompt(64, 0), sampling(16), 0)
        await warm.wait()
        warm = await fleet.add("warm-2", random_prompt(64, 0), sampling(16), 1)
        await warm.wait()
        if only in (None, "downtime"):
            await downtimes(fleet, bench)
        if only in (None, "bystanders"):
            await bystanders(fleet, bench)


def random_prompt(tokens: int, seed: int) -> list[int]:
    """Seeded token ids."""
    return np.random.Generator(np.random.Philox(seed)).integers(1000, 30_000, size=tokens).tolist()


def sampling(max_tokens: int) -> SamplingParams:
    """Greedy, exactly so many tokens."""
    return SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=max_tokens)


async def downtimes(fleet: Fleet, bench: Benchmark) -> None:
    """Pause of the migrated request per context, free and busy destination; stop-and-recompute at the longest."""
    hops = 12 if bench.quick else 40
    measured: dict[str, Pauses] = {}
    pauses: dict[int, list[float]] = {}
    step_ms: dict[int, float] = {}
    recompute_ms = float("nan")
    for number, context in enumerate(
        (*CONTEXTS, CONTEXTS[0])
    ):  # the shortest again, so that a drift shows and evens out
        longest = context == CONTEXTS[-1]
        bench.say(f"pause at {context} tokens, free destination: {hops} hops" + (", then recompute" if longest else ""))
        live, recompute = await measure_pauses(fleet, context, hops, (1 if bench.quick else 5) if longest else 0)
        bench.row(
            part="pause", what=f"{context}, free" + (" (again)" if number == len(CONTEXTS) else ""), **live.cells()
        )
        measured[f"{context:,}" + ("\nagain" if number == len(CONTEXTS) else "")] = live
        pauses[context] = [*pauses.get(context, ()), *live.values]
        step_ms[context] = min(step_ms.get(context, live.step_ms), live.step_ms)
        if recompute is not None:
            bench.row(part="pause", what=f"{context}, recompute", **recompute.cells())
            recompute_ms = recompute.pause_ms
    pause = {context: statistics.median(values) for context, values in pauses.items()}
    over_step = {context: pause[context] / step_ms[context] for context in CONTEXTS}
    bench.figure("downtime_over_step_p50", max(over_step.values()))
    bench.figure("downtime_slope", pause[CONTEXTS[-1]] / pause[CONTEXTS[0]])
    bench.figure("recompute_over_migration_4096", recompute_ms / pause[CONTEXTS[-1]])

    bench.say("pause at 1024 tokens while both instances serve 4 others")
    others = [await fleet.add(f"other-{i}", random_prompt(256, 50 + i), sampling(2000), i % 2) for i in range(8)]
    for stream in others:
        await stream.wait_for(2)
    live, _ = await measure_pauses(fleet, 1024, hops)
    bench.row(part="pause", what="1024, busy", **live.cells())
    measured["1,024\nbusy"] = live
    bench.figure("downtime_over_step_p50_busy", live.pause_ms / live.step_ms)
    for stream in others:
        await fleet.abort(stream)
    draw_pauses(bench, measured)


def draw_pauses(bench: Benchmark, measured: Mapping[str, Pauses]) -> None:
    """Every pause as a dot over its context, beside the decode step it is measured against."""
    figure, axis = new_figure(7.0, 3.8)
    rng = np.random.default_rng(0)
    for place, one in enumerate(measured.values()):
        spread = place + rng.uniform(-0.12, 0.12, len(one.values))
        dots = axis.plot(spread, np.maximum(one.values, 0.1), "o", ms=4, alpha=0.6, color=PALETTE[0], mew=0)[0]
        median = axis.hlines(one.pause_ms, place - 0.25, place + 0.25, color=PALETTE[0], lw=2.5)
        step = axis.hlines(one.step_ms, place - 0.25, place + 0.25, color=PALETTE[3], lw=2.5, ls="--")
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_xticks(range(len(measured)), list(measured))
    axis.set_xlabel("context (tokens); busy: both instances serve 4 others")
    axis.set_ylabel("time (ms)")
    names = ["pause of one migration", "median pause", "median decode step"]
    figure.legend([dots, median, step], names, loc="outside upper right", ncols=3, frameon=False)
    bench.picture(figure, "pauses")


class Pauses:
    """Pauses of one request's hops, in ms: by its tokens' times, and as the migrator itself reports them."""

    def __init__(self, times: Sequence[float], reports: Sequence[MigrationReport], step_ms: float):
        self.step_ms, self.reports = step_ms, reports
        at = np.asarray(times)
        gaps = np.diff(at) * 1e3
        self.values = [float(gaps[i]) - step_ms for i in handovers(at, reports)]
        self.pause_ms = statistics.median(self.values)

    def cells(self) -> dict[str, Any]:
        """A row of details, medians but for ``max_ms``; ``migrator_ms`` is the pause as the migrator reports it, ``send``,
        ``copy`` and ``attach`` its parts: from the source's last step to COMMIT's arrival, the last byte, the running set."""

        def parts(name: str, since: str) -> float:
            values = [(getattr(one, name) - getattr(one, since)) * 1e3 for one in self.reports]
            return statistics.median(values)

        return {
            "count": len(self.values),
            "pause_ms": self.pause_ms,
            "max_ms": max(self.values),
            "step_ms": self.step_ms,
            "over_step": self.pause_ms / self.step_ms,
            "migrator_ms": statistics.median(one.downtime_ms for one in self.reports),
            "send_ms": parts("received_at", "detached_at"),
            "copy_ms": parts("copied_at", "received_at"),
            "attach_ms": parts("attached_at", "copied_at"),
            "mib": statistics.median(one.bytes / 2**20 for one in self.reports),
            "stages": statistics.median(one.stages for one in self.reports),
        }


def handovers(times: np.ndarray, reports: Sequence[MigrationReport]) -> list[int]:
    """Index of the gap in ``times`` that each migration made: before it the last token of the source, whose step ended when
    the report says that the request was detached."""
    found = [int(np.searchsorted(times, (report.detached_at or 0.0) + 1e-3)) - 1 for report in reports]
    return [i for i in found if 0 <= i < len(times) - 1]


async def measure_pauses(fleet: Fleet, context: int, hops: int, recomputes: int = 0) -> tuple[Pauses, Pauses | None]:
    """One request of ``context`` tokens, moved back and forth ``hops`` times live, then ``recomputes`` times by stopping it and
    prefilling it again, with some steps in between."""
    tokens = (hops + recomputes) * 40 + 100
    stream = await fleet.add(f"pause-{context}-{time.time_ns()}", random_prompt(context, context), sampling(tokens), 0)
    await stream.wait_for(10)
    for number in range(hops + recomputes):
        while stream.hops == number and not stream.finished:
            await fleet.migrate(stream, 1 - stream.at, "live" if number < hops else "recompute")
            await stream.wait_for(len(stream.tokens) + 8)
    await fleet.abort(stream)
    gaps = np.diff(stream.times) * 1e3
    normal = np.ones(len(gaps), dtype=bool)
    normal[handovers(np.asarray(stream.times), stream.reports)] = False
    step_ms = float(np.median(gaps[normal]))
    live = Pauses(stream.times, stream.reports[:hops], step_ms)
    return live, Pauses(stream.times, stream.reports[hops:], step_ms) if recomputes else None


# ---- the others


async def bystanders(fleet: Fleet, bench: Benchmark) -> None:
    """Decode steps of 4 requests an instance in alternating phases: two more requests swap places all the time, or stay."""
    rounds, phase_s = (3, 2.5) if bench.quick else (12, 5.0)
    bench.say(f"bystanders: {2 * rounds} phases of {phase_s} s")
    watched = [await fleet.add(f"watched-{i}", random_prompt(256, 70 + i), sampling(4000), i % 2) for i in range(8)]
    movers = [await fleet.add(f"mover-{i}", random_prompt(1024, 90 + i), sampling(4000), i) for i in range(2)]
    for stream in (*watched, *movers):
        await stream.wait_for(2)
    medians: dict[str, list[float]] = {"moving": [], "still": []}
    means: dict[str, list[float]] = {"moving": [], "still": []}
    for number in range(rounds):
        for mode in ("moving", "still") if number % 2 == 0 else ("still", "moving"):
            began = time.monotonic()
            if mode == "moving":
                await asyncio.gather(*[keep_moving(fleet, stream, began + phase_s) for stream in movers])
            else:
                await asyncio.sleep(phase_s)
            await asyncio.sleep(3 * fleet.poll_s + 0.1)
            of_instances = [steps_between(watched[i].times, began, began + phase_s) for i in range(2)]
            medians[mode].append(statistics.mean(float(np.median(steps)) for steps in of_instances))
            means[mode].append(statistics.mean(float(np.mean(steps)) for steps in of_instances))
    for stream in (*watched, *movers):
        await fleet.abort(stream)
    ratio = Samples({mode: tuple(values) for mode, values in medians.items()}).ratio("moving", "still")
    of_means = Samples({mode: tuple(values) for mode, values in means.items()}).ratio("moving", "still")
    moves = sum(stream.hops for stream in movers)
    bench.figure("bystander_slowdown", ratio.median)
    bench.row(
        part="bystanders",
        what="5 requests each",
        moves=moves,
        step_ms=statistics.median(medians["still"]),
        moving_step_ms=statistics.median(medians["moving"]),
        ratio=str(ratio),
        ratio_of_means=str(of_means),
        moves_per_s=moves / (rounds * phase_s),
    )


async def keep_moving(fleet: Fleet, stream: Stream, until: float) -> None:
    """Move ``stream`` to the other instance again and again."""
    while time.monotonic() < until:
        report = await fleet.migrate(stream, 1 - stream.at)
        if not report.committed:
            await asyncio.sleep(0.005)


def steps_between(times: Sequence[float], begin: float, end: float) -> np.ndarray:
    """Gaps in ms between a request's tokens that began and ended in the interval."""
    inside = np.asarray([at for at in times if begin <= at <= end])
    return np.diff(inside) * 1e3


if __name__ == "__main__":
    sys.exit(main())
