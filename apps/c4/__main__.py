"""Command line of the c4 app: diagnose, demo, watch, inject, simulate, month, paths, lab."""

from __future__ import annotations

from apps.program.cli import program

app = program("c4", "Find the faulty part of a training job, isolate it, and be training again in seconds.")


def _add_verbs() -> None:
    """Each verb stands in a module of its own."""
    from apps.c4.demo import demo
    from apps.c4.diagnose import diagnose
    from apps.c4.inject import inject
    from apps.c4.month import month
    from apps.c4.paths.verbs import lab, paths
    from apps.c4.simulate import simulate
    from apps.c4.watch import watch

    for verb in (diagnose, demo, watch, inject, simulate, month, paths, lab):
        app.verb(verb)


if __name__ == "__main__":
    _add_verbs()
    app.main()
