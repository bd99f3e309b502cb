"""Command line of the c4 app: diagnose, inject, watch, demo, simulate, month."""

from __future__ import annotations

from apps.c4.demo import demo
from apps.c4.diagnose import diagnose
from apps.c4.inject import inject
from apps.c4.watch import watch
from apps.program.cli import program

app = program("c4", "Find the faulty part of a training job, isolate it, and be training again in seconds.")
app.verb(diagnose)
app.verb(demo)
app.verb(inject)
app.verb(watch)


if __name__ == "__main__":
    app.main()
