"""What guidance, the encoder, the co-occurrence table and the loader cost: each against what it stands beside, in one run.

``python -m benchmarks.mcmisp_overhead [--quick]``. Text: docstrings of installed packages. Guidance is measured at its highest
price: every error guided, from the first step on.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from actors.cluster.session import RayConfig, ray_session
from actors.cooccurrence import CooccurrenceSettings, build_table, count_pairs
from actors.cooccurrence.prepass import count_rows
from actors.cooccurrence.service import LocalStore, ShardedStore
from apps.mcmisp.config import Arm
from apps.mcmisp.data.prepare import prepare
from apps.mcmisp.tables import table_of
from apps.mcmisp.training.fit import fit_here
from benchmarks.harness import Benchmark, Target, alternate, print_rows
from benchmarks.mcmisp.backends import largest_difference, prices
from benchmarks.mcmisp.settings import settings
from benchmarks.mcmisp.steps import encoder_arms, loop_of, parameters, timed_step

TARGETS = [
    Target("guidance_overhead_cpu", 1.10, 1.03, "lower", "step guided / plain, seq 128, one thread"),
    Target("rows_vs_maps_max_diff", 1e-5, 1e-5, "lower", "loss and every gradient, float32"),
    Target("rows_flops_fraction", 0.05, 0.02, "lower", "rows / full maps, seq 512, base's heads, 9 % errors"),
    Target("rows_memory_fraction", 0.05, 0.02, "lower", "the same for memory kept for backward"),
    Target("tokens_per_s_vs_transformers_bert", 1.2, 2.0, "higher", "ours / transformers, same size, one thread, bf16"),
    Target("cooccurrence_tokens_per_s", 200e3, 1e6, "higher", "one core, window 8"),
    Target("table_identical_workers_1_2_4", 1, 1, "higher", "the same bits for any number of workers"),
    Target("data_wait_fraction", 0.05, 0.02, "lower", "of a training's time"),
    Target("padding_fraction", 0.01, 0.01, "lower", "of all tokens in rows"),
]


def main() -> int:
    """Runs everything; returns the exit code."""
    parts = {"steps": steps, "backends": backends, "encoder": encoder, "counting": counting, "loader": loader}
    options: dict[str, dict[str, Any]] = {"--only": {"choices": tuple(parts), "help": "one part alone"}}
    bench = Benchmark("mcmisp_overhead", __doc__ or "", TARGETS, options=options)
    config = settings(
        bench.quick,
        model={"size": "nano" if bench.quick else "tiny"},
        training={"evaluate_every": None, "steps": 10_000},
    )
    rows = prepare(config.data, told=bench.say)
    table = table_of(rows, config.cooccurrence)
    for name, part in parts.items():
        if bench.arguments.only in (None, name):
            bench.say(name)
            part(bench, config, rows, table)
    for name in dict.fromkeys(row["part"] for row in bench.rows):
        print_rows(name, [{k: v for k, v in row.items() if k != "part"} for row in bench.rows if row["part"] == name])
    return bench.finish()


def steps(bench: Benchmark, config: Any, rows: Any, table: Any) -> None:
    """A plain step against a guided one, each with its own loop, in alternation; plain against plain is the noise."""
    repeats = 7 if bench.quick else 41
    for what, cpu in (("wall", False), ("processor", True)) if not bench.quick else (("wall", False),):
        arms: dict[str, Arm] = {"plain": "plain", "again": "plain", "guided": "guided"}
        loops = {name: loop_of(config, arm, rows, table) for name, arm in arms.items()}
        samples = alternate({name: timed_step(loop, cpu) for name, loop in loops.items()}, repeats, returns_value=True)
        ratio, noise = samples.ratio("guided", "plain"), samples.ratio("again", "plain")
        if not cpu:
            bench.figure("guidance_overhead_cpu", ratio.median)
            bench.figure("guidance_overhead_noise", noise.median)
        bench.row(
            part="a guided step", clock=what, backend="maps", plain_ms=samples.median("plain") * 1e3,
            guided_over_plain=str(ratio), plain_over_plain=str(noise),
        )  # fmt: skip
    guidance = config.guidance.model_copy(update={"backend": "rows"})
    by_rows = config.model_copy(update={"guidance": guidance})
    loops = {"plain": loop_of(config, "plain", rows, table), "guided": loop_of(by_rows, "guided", rows, table)}
    samples = alternate({name: timed_step(loop, False) for name, loop in loops.items()}, repeats, returns_value=True)
    bench.row(
        part="a guided step", clock="wall", backend="rows", plain_ms=samples.median("plain") * 1e3,
        guided_over_plain=str(samples.ratio("guided", "plain")),
    )  # fmt: skip


def backends(bench: Benchmark, config: Any, rows: Any, table: Any) -> None:
    """Rows against maps: that they are the same, and what they cost at 512 tokens with BERT-base's heads."""
    loss, gradient = largest_difference(config, rows, table)
    bench.figure("rows_vs_maps_max_diff", max(loss, gradient))
    bench.row(part="rows against maps", loss_difference=loss, gradient_difference=gradient)
    price = prices(size=512, heads=12, guided=3, head_dim=64, batch=2 if bench.quick else 8, error_share=0.15 * 0.6)
    bench.figure("rows_flops_fraction", price["rows"].flops / price["maps"].flops)
    bench.figure("rows_memory_fraction", price["rows"].saved_bytes / price["maps"].saved_bytes)
    for name, one in price.items():
        bench.row(part="a layer at 512 tokens", backend=name, mflops=one.flops / 1e6, saved_mib=one.saved_bytes / 2**20)


def encoder(bench: Benchmark, config: Any, rows: Any, table: Any) -> None:
    """A training step of ours against transformers' BERT of the same size."""
    import torch

    torch.set_num_threads(1)
    size, batch, repeats = config.model.size, 32, 5 if bench.quick else 31
    for family in ("modern", "classic"):
        samples = alternate(encoder_arms(rows, size, batch, family), repeats, returns_value=True)
        ratio = samples.ratio("theirs", "ours")
        if family == "modern":
            bench.figure("tokens_per_s_vs_transformers_bert", ratio.median)
            bench.figure("tokens_per_s", batch * rows.manifest.row_tokens / samples.median("ours"))
        ours, theirs = parameters(size, rows.manifest.vocab_size)
        bench.row(
            part="encoder against transformers", family=family, parameters=ours if family == "modern" else theirs,
            transformers_parameters=theirs, ours_ms=samples.median("ours") * 1e3,
            transformers_ms=samples.median("theirs") * 1e3, speed=str(ratio),
        )  # fmt: skip


def counting(bench: Benchmark, config: Any, rows: Any, table: Any) -> None:
    """Counting on one core, and the table for one, two and four workers."""
    lexicon, options = rows.tokenizer().lexicon, CooccurrenceSettings()
    count = min(len(rows), 4096)
    ids, document = rows.read(0, count)
    times = []
    for _ in range(3 if bench.quick else 9):
        began = time.perf_counter()
        counted = count_pairs(ids, document, lexicon, options)
        times.append(time.perf_counter() - began)
    bench.figure("cooccurrence_tokens_per_s", counted.units / sorted(times)[len(times) // 2])
    part = _Part(rows, 512 if bench.quick else len(rows))
    expected = build_table(count_rows(part, lexicon, options, LocalStore(lexicon.size)), lexicon, options)
    same = True
    with ray_session(RayConfig(address="local", num_cpus=8, log_to_driver=False)):
        for workers in (1, 2, 4):
            store = ShardedStore.start(lexicon.size, shards=2)
            began = time.perf_counter()
            try:
                counts = count_rows(
                    part, lexicon, options, store, workers=workers, rows_per_task=max(1, len(part) // 8)
                )
            finally:
                store.close()
            built = build_table(counts, lexicon, options)
            same &= built.version == expected.version
            bench.row(
                part="the table",
                workers=workers,
                version=built.version,
                seconds=time.perf_counter() - began,
                pairs=built.pairs,
            )
    bench.figure("table_identical_workers_1_2_4", float(same))


def loader(bench: Benchmark, config: Any, rows: Any, table: Any) -> None:
    """How long a training of the smallest size, the hardest to feed, waits for its rows."""
    steps = 20 if bench.quick else 200
    training = config.training.model_copy(update={"steps": steps, "report_every": steps, "evaluation_rows": 1})
    nano = config.model.model_copy(update={"size": "nano"})
    trained = fit_here(config.model_copy(update={"training": training, "model": nano}).for_arm("plain"), rows, None)
    bench.figure("data_wait_fraction", trained.wait_fraction)
    bench.figure("padding_fraction", rows.manifest.padding_fraction)
    bench.row(part="loader", size="nano", step_ms=trained.step_s * 1e3, rows=len(rows), padding=rows.manifest.padding)


class _Part:
    """The first rows of a corpus; picklable."""

    def __init__(self, rows: Any, count: int):
        self._rows, self._count = rows, min(count, len(rows))

    def __len__(self) -> int:
        return self._count

    def read(self, start: int, stop: int) -> Any:
        return self._rows.read(start, stop)


if __name__ == "__main__":
    sys.exit(main())
