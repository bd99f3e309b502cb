"""The report of a run under C4 holds its verdicts, pictures, evidence and stacks."""

from __future__ import annotations

import json

import numpy as np

from actors.c4.diagnosis.verdict import Culprit, FaultKind, Verdict
from actors.c4.ports import DelayMatrix, MasterStatus, NumberedVerdict, Stack, Wait
from apps.c4.report import Chapter, hot_cells, interruption_rows, verdict_figures, verdict_rows, write_report
from apps.program.run_folder import new_run_folder
from tests.apps.c4.test_story import story


def numbered(number: int, kind: FaultKind, culprit: Culprit, **more) -> NumberedVerdict:
    verdict = Verdict(
        kind, culprit, ("It is 9 times as slow as its like.",), 0.9, onset_s=10.0, found_s=11.5, group="0"
    )
    return NumberedVerdict(number, 1, verdict, "evict", "a hang never ends by itself", 1e9, **more)


def status(ranks: int = 4) -> MasterStatus:
    matrix = np.full((ranks, ranks), np.nan)
    for rank in range(ranks):
        matrix[rank, (rank + 1) % ranks] = 2.0
    delays = (DelayMatrix("0", tuple(range(ranks)), matrix),)
    return MasterStatus("run", 1, ranks, 20.0, "watching", delays=delays, waiting=(Wait(0, 2, "0", 7, 1.0),))


SLOW = Chapter(numbered(1, FaultKind.LINK_SLOW, Culprit(link=(1, 2), nodes=("b", "c"))), status())
STOPPED = Chapter(
    numbered(2, FaultKind.PROCESS_STOPPED, Culprit(ranks=(2,)), stacks=(Stack(2, 77, "File loop.py, line 3"),)),
    status(),
)


def test_a_row_says_class_kind_culprit_and_seconds_to_name() -> None:
    columns, rows = verdict_rows([SLOW, STOPPED])
    first = dict(zip(columns, rows[0], strict=True))
    assert first["class"] == "communication_slow"
    assert first["culprit"] == "link 1->2"
    assert first["onset to name (s)"] == 1.5
    assert rows[1][columns.index("culprit")] == "rank 2"


def test_slow_communication_is_shown_as_a_delay_matrix_and_a_hang_as_who_waits_for_whom() -> None:
    assert [name for name, _, _ in verdict_figures(SLOW)] == ["Delay matrix"]
    assert [name for name, _, _ in verdict_figures(STOPPED)] == ["Waiting chain"]
    assert verdict_figures(Chapter(SLOW.verdict)) == []


def test_hot_cells_are_places_in_the_group() -> None:
    assert hot_cells(SLOW, (0, 1, 2, 3)) == [(1, 2)]
    assert hot_cells(SLOW, (2, 3, 1)) == [(2, 0)]
    assert hot_cells(SLOW, (0, 3)) == []
    sender = Chapter(numbered(3, FaultKind.SENDER_SLOW, Culprit(ranks=(1,))), status())
    receiver = Chapter(numbered(4, FaultKind.RECEIVER_SLOW, Culprit(ranks=(1,))), status())
    assert hot_cells(sender, (0, 1, 2, 3)) == [(1, 2)]
    assert hot_cells(receiver, (0, 1, 2, 3)) == [(0, 1)]


def test_the_report_is_one_file_with_everything(tmp_path) -> None:
    folder = new_run_folder("c4", root=tmp_path)
    path = write_report(folder, story(), [SLOW, STOPPED], title="C4", summary="two faults", extra={"accuracy": 0.9})
    html = (tmp_path / path).read_text()
    assert "It is 9 times as slow as its like." in html
    assert "File loop.py, line 3" in html
    assert html.count("data:image/png;base64,") == 3
    result = json.loads((folder / "result.json").read_text())
    assert result["accuracy"] == 0.9
    assert result["verdicts"][0]["verdict"]["kind"] == "link_slow"
    assert len(result["interruptions"]) == len(interruption_rows(story())[1]) == 1
