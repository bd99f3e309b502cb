"""The report of a run under C4: a table of faults, the timeline, and for each verdict its evidence and its picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from actors.c4.diagnosis.verdict import FaultClass
from actors.c4.ports import MasterStatus, NumberedVerdict
from apps.c4.pictures import delay_matrix_figure, timeline_figure, waiting_chain_figure
from apps.c4.story import Story
from apps.program.report import Report, print_table
from apps.program.run_folder import RunFolder


@dataclass(frozen=True)
class Chapter:
    """A named fault and what the master saw when it was named."""

    verdict: NumberedVerdict
    status: MasterStatus | None = None


def verdict_rows(chapters: Sequence[Chapter]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of the table of verdicts."""
    rows: list[list[Any]] = []
    for chapter in chapters:
        one, verdict = chapter.verdict, chapter.verdict.verdict
        rows.append(
            [one.number, verdict.fault_class.value, verdict.kind.value, str(verdict.culprit), verdict.confidence,
             round(verdict.detection_s, 2), one.action, one.reason]
        )  # fmt: skip
    return ["no.", "class", "kind", "culprit", "confidence", "onset to name (s)", "decision", "because"], rows


def interruption_rows(story: Story) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of the table of restarts: from fault to training again."""
    rows: list[list[Any]] = [
        [stop.what, stop.detection_s, stop.restarted_at_s - stop.fault_at_s, stop.recovery_s, stop.steps_repeated]
        for stop in story.interruptions()
    ]
    return ["fault", "named after (s)", "workers again after (s)", "first new step after (s)", "steps repeated"], rows


def print_summary(story: Story, chapters: Sequence[Chapter]) -> None:
    """Both tables on the terminal; the decisions' reasons stand in the report."""
    columns, rows = verdict_rows(chapters)
    print_table(columns[:-1], [row[:-1] for row in rows], title="Verdicts")
    print_table(*interruption_rows(story), title="From fault to training again")


def write_report(
    folder: RunFolder,
    story: Story,
    chapters: Sequence[Chapter],
    *,
    title: str,
    summary: str,
    extra: dict[str, Any] | None = None,
) -> str:
    """Writes pictures, report.html and result.json into the run folder; returns the path of the HTML file.

    Raises:
        UserError: the folder cannot be written.
    """
    report = Report(title, summary)
    report.add_table("Verdicts", *verdict_rows(chapters), caption="Seconds from the onset that the records show.")
    if story.steps or story.moments:
        told = "Shaded: from the fault to the first step that had not been done before."
        report.add_figure("Timeline", timeline_figure(story), told, name="timeline")
    report.add_table("From fault to training again", *interruption_rows(story))
    for chapter in chapters:
        one, verdict = chapter.verdict, chapter.verdict.verdict
        heading = f"Verdict {one.number}: {verdict.kind.value} of {verdict.culprit}"
        report.add_text(heading, "\n\n".join(verdict.evidence) or "No evidence was kept.")
        for name, figure, caption in verdict_figures(chapter):
            report.add_figure(f"{name} at verdict {one.number}", figure, caption)
        for stack in one.stacks:
            report.add_code(f"Stacks of rank {stack.rank} (pid {stack.pid})", stack.text)
    folder.write_result(
        {
            "verdicts": [chapter.verdict for chapter in chapters],
            "interruptions": story.interruptions(),
            "moments": story.moments,
            "steps": story.steps,
        }
        | (extra or {})
    )
    return report.write(folder)


def verdict_figures(chapter: Chapter) -> list[tuple[str, Figure, str]]:
    """(name, picture, caption): the delay matrix for slowness of communication, else who waits for whom."""
    verdict, status = chapter.verdict.verdict, chapter.status
    if status is None:
        return []
    if verdict.fault_class is FaultClass.COMMUNICATION_SLOW:
        return [
            (
                "Delay matrix",
                delay_matrix_figure(matrix.ms_per_mib / 1e3, hot_cells(chapter, matrix.ranks), f"Group {matrix.group}"),
                "Row: who sends; column: who receives; places are those of the group.",
            )
            for matrix in status.delays
            if not verdict.group or matrix.group == verdict.group
        ]
    waits = [(wait.rank, wait.on) for wait in status.waiting]
    if not waits or status.world_size > 64:
        return []
    culprits = list(verdict.culprit.ranks)
    return [
        (
            "Waiting chain",
            waiting_chain_figure(waits, culprits, status.world_size),
            "An arrow points to who is awaited.",
        )
    ]


def hot_cells(chapter: Chapter, ranks: Sequence[int]) -> list[tuple[int, int]]:
    """Cells of the delay matrix of a group of ``ranks`` that the verdict names, as places in the group."""
    culprit = chapter.verdict.verdict.culprit
    place = {rank: index for index, rank in enumerate(ranks)}
    if culprit.link is not None:
        source, destination = (place.get(rank) for rank in culprit.link)
        return [] if source is None or destination is None else [(source, destination)]
    matrix = None
    if chapter.status is not None:
        matrix = next((one.ms_per_mib for one in chapter.status.delays if tuple(one.ranks) == tuple(ranks)), None)
    if matrix is None:
        return []
    named = [place[rank] for rank in culprit.ranks if rank in place]
    sends = chapter.verdict.verdict.kind.value == "sender_slow"
    cells = zip(*np.nonzero(~np.isnan(matrix)), strict=True)
    return [(int(row), int(column)) for row, column in cells if (row if sends else column) in named]
