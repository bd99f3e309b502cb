"""Command line of the migperf app. ``predict`` needs neither Ray nor a GPU."""

from __future__ import annotations

from apps.program.cli import program

app = program("migperf", "Measure, predict and plan slices of GPUs, with MIG and without.")


def _add_verbs() -> None:
    """The verbs that other modules bring."""
    from apps.migperf.controller import controller
    from apps.migperf.hybrid_command import hybrid
    from apps.migperf.plan import plan
    from apps.migperf.predict import predict
    from apps.migperf.profiles import profiles
    from apps.migperf.report_command import report
    from apps.migperf.share_command import share
    from apps.migperf.sweep_command import sweep

    app.verb(profiles)
    app.verb(plan)
    app.verb(predict)
    app.verb(controller)
    app.verb(sweep)
    app.verb(report)
    app.verb(share)
    app.verb(hybrid)


if __name__ == "__main__":
    _add_verbs()
    app.main()
