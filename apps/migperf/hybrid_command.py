"""The verb ``hybrid``: training and serving share a device whose partition follows the load, simulated or live on CPU shares."""

from __future__ import annotations

from typing import Any

import numpy as np

from actors.mig.backends import BackendError
from actors.mig.hybrid.load import DiurnalLoad
from apps.migperf.config import HybridConfig, MigperfConfig
from apps.migperf.hybrid_study import Study, run_study
from apps.program.errors import UserError
from apps.program.report import PALETTE, Report, new_figure, print_table
from apps.program.run_folder import new_run_folder


def hybrid(config: MigperfConfig) -> None:
    """Let the partition follow a diurnal load; compare the training done with the best partition that never changes."""
    wanted = config.hybrid
    folder = new_run_folder("migperf", config=config)
    page = Report(
        "MIGPerf: hybrid orchestration", "Training and serving share a device whose partition follows the load."
    )
    if wanted.live:
        from apps.migperf.hybrid_live import LiveConfig, run_live

        try:
            live = run_live(LiveConfig(day_s=min(wanted.day_s, 60.0), seed=wanted.seed))
        except BackendError as error:
            raise UserError(str(error)) from error
        columns = ["arm", "training steps", "requests", "attainment", "P99 (ms)", "re-cuts", "seconds of re-cutting"]
        rows: list[list[Any]] = [
            [arm.name, arm.trained, arm.requests, arm.attainment, arm.p99_ms, arm.recuts, arm.recut_s]
            for arm in live.arms
        ]
        print_table(columns, rows, "Live on CPU shares: an analogue, no MIG numbers")
        page.add_table("Live on CPU shares (an analogue)", columns, rows)
        folder.write_result({"arms": live.arms, "gain": live.gain, "limit_ms": live.limit_ms})
    else:
        study = run_study(wanted)
        columns = ["arm", "training samples/s", "attainment", "P99 (ms)", "re-cuts"]
        limit = wanted.latency_limit_ms
        rows = [
            [f"best static ({study.static.layout})", study.static_day.trained / wanted.day_s,
             study.static_day.attainment(limit), study.static_day.p99_ms, 0],
            ["follows the load", study.moving_day.trained / wanted.day_s, study.moving_day.attainment(limit),
             study.moving_day.p99_ms, len(study.moving_day.recuts)],
        ]  # fmt: skip
        print_table(
            columns, rows, f"{wanted.gpu}: {wanted.serve} served, {wanted.train} trained: gain {study.gain:.2f}"
        )
        page.add_table("Against the best static partition", columns, rows)
        page.add_figure("The day", _picture(wanted, study), "Dots: re-cuts, at the capacity that they lead to.")
        folder.write_result(
            {
                "gain": study.gain,
                "attainment": study.moving_day.attainment(limit),
                "static_attainment": study.static_day.attainment(limit),
                "recuts": study.moving_day.recuts,
            }
        )
    print(page.write(folder))


def _picture(wanted: HybridConfig, study: Study) -> Any:
    figure, axes = new_figure(9, 3.8)
    load = DiurnalLoad(wanted.night_per_s, wanted.peak_per_s, wanted.day_s)
    times = np.linspace(0, wanted.day_s, 400)
    axes.plot(times, [load.rate_per_s(float(at)) for at in times], color=PALETTE[0], label="load (requests/s)")
    capacity = {offer.layout: offer.capacity_per_s for offer in study.offers}
    recuts = study.moving_day.recuts
    if recuts:
        ends = [*[r.at_s for r in recuts[1:]], wanted.day_s]
        for recut, end in zip(recuts, ends, strict=True):
            axes.plot([recut.at_s, end], [capacity[recut.layout]] * 2, color=PALETTE[1])
        axes.plot(
            [r.at_s for r in recuts], [capacity[r.layout] for r in recuts], "o", color=PALETTE[1], label="capacity"
        )
    axes.axhline(study.static.capacity_per_s, color=PALETTE[7], linestyle="--", label="best static")
    axes.set_xlabel("seconds")
    axes.legend(fontsize=8)
    return figure
