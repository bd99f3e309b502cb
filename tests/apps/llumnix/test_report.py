"""The report of replays: a valid HTML file that loads nothing, pictures that draw what they are given, tables that add up."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from apps.llumnix.history import History, Migration, Sample, Stay, Totals, parse_history
from apps.llumnix.pictures import downtime_figure, latency_figure, load_figure, residence_figure
from apps.llumnix.records import ReplayResult, RequestRecord
from apps.llumnix.report import count_rows, latency_rows, print_summaries, write_report
from apps.program.run_folder import new_run_folder

T0 = 1_700_000_000.0


def result(name: str, slow: float, moved: bool) -> ReplayResult:
    records = tuple(
        RequestRecord(
            index=i, request_id=f"r{i}", prompt_tokens=10, output_tokens=5, generated=5, due_s=0.5 * i, sent_s=0.5 * i + 0.001,
            first_s=0.5 * i + 0.2 * slow, last_s=0.5 * i + slow, longest_gap_s=0.3 * slow,
            error="No <instance> & more." if i == 7 else None,
        )
        for i in range(8)
    )  # fmt: skip
    samples = tuple(
        Sample(T0 + 0.25 * step, f"long-name-{i}", 10 * step, 100, step % 4, i * (5 if moved else 1), 1.0, 20.0, 0)
        for step in range(9) for i in range(2)
    )  # fmt: skip
    stays = [Stay(f"r{i}", "long-name-0", T0 + 0.5 * i, T0 + 0.5 * i + slow, "dispatch") for i in range(8)]
    migrations = ()
    if moved:
        stays.append(Stay("r2", "long-name-1", T0 + 1.5, T0 + 1.0 + slow, "migration"))
        migrations = (
            Migration("r2", "long-name-0", "long-name-1", T0 + 1.5, True, "committed", 1.25, 2, 9, 6_635_520),
            Migration("r3", "long-name-0", "long-name-1", T0 + 1.6, False, "no room", 0.0, 0, 0, 0),
        )
    return ReplayResult(
        name=name, origin="generated", prompts="seeded token ids", seed=0, started_at=T0, duration_s=8.0, records=records,
        totals=Totals(3, len(migrations), 0), history=History(samples, tuple(stays), migrations),
        error_samples=("No <instance> & more.",),
    )  # fmt: skip


class _Page(HTMLParser):
    VOID = frozenset({"meta", "img", "br", "link", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if tag == "img" and name == "src":
                self.images.append(value or "")
            if name in ("src", "href") and not (value or "").startswith(("data:", "#")):
                self.loads.append(f"{tag} {value}")
        if tag in ("script", "link"):
            self.loads.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag


def test_report_is_whole_and_loads_nothing(tmp_path: Path) -> None:
    folder = new_run_folder("llumnix", tmp_path)
    arms = [result("without migration", 2.0, False), result("with migration", 1.0, True)]
    path = write_report(folder, arms, title="Llumnix: demo", transcript="you> <b>hi</b>", extra={"match": True})
    text = Path(path).read_text()
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert page.loads == []
    assert len(page.images) == 4
    assert all(image.startswith("data:image/png;base64,iVBOR") for image in page.images)
    assert "url(" not in text
    assert "&lt;b&gt;hi&lt;/b&gt;" in text
    assert "No &lt;instance&gt; &amp; more." in text
    names = {one.name for one in folder.path.iterdir()}
    assert {"report.html", "result.json", "load.png", "residence.png", "migration_pause.png"} <= names
    assert {"requests_1_without_migration.csv", "requests_2_with_migration.csv"} <= names
    told = json.loads((folder / "result.json").read_text())
    assert told["match"] is True
    assert told["arms"][1]["summary"]["e2e_s"]["p50"] == pytest.approx(1.0)
    assert told["arms"][0]["summary"]["errors"] == 1
    assert told["arms"][1]["migrations"][0]["downtime_ms"] == 1.25


def test_tables_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    arms = [result("without", 2.0, False), result("with", 1.0, True)]
    columns, rows = latency_rows(arms)
    assert columns == ["latency", "without", "with", "ratio"]
    by_name = {row[0]: row[1:] for row in rows}
    assert by_name["end to end, P99 (s)"] == pytest.approx([2.0, 1.0, 2.0])
    assert by_name["time per output token, mean (ms)"] == pytest.approx([400.0, 200.0, 2.0])
    assert {row[0]: row[1:] for row in count_rows(arms)[1]}["errors"] == [1, 1]
    assert latency_rows(arms[:1])[0] == ["latency", "without"]
    print_summaries(arms)
    assert "end to end, P99 (s)" in capsys.readouterr().out


def test_pictures_draw_the_data() -> None:
    arms = [result("without", 2.0, False), result("with", 1.0, True)]
    load = load_figure(arms)
    blocks = load.axes[0].get_lines()[1]
    assert list(blocks.get_xdata()) == pytest.approx([0.25 * step for step in range(9)])
    assert list(blocks.get_ydata()) == pytest.approx([10.0 * step for step in range(9)])
    for axis in load.axes:  # nothing is cut off, in no column
        assert axis.get_ylim()[1] >= max(max(line.get_ydata(), default=0) for line in axis.get_lines())
    cdf = latency_figure(arms).axes[2].get_lines()[0]
    assert cdf.get_ydata()[-1] == 100
    assert len(cdf.get_xdata()) == 8  # seven answered requests, and the step up from zero
    marks = [
        line
        for line in residence_figure(arms).axes[1].get_lines()
        if line.get_marker() == "|" and len(line.get_xdata())
    ]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in marks] == [(pytest.approx(1.5), 2)]
    histogram = downtime_figure(arms)
    assert histogram is not None
    assert sum(patch.get_height() for patch in histogram.axes[0].patches) == 1
    assert downtime_figure(arms[:1]) is None


def test_every_axis_is_labelled() -> None:
    arms = [result("without", 2.0, False), result("with", 1.0, True)]
    figures = [load_figure(arms), residence_figure(arms), latency_figure(arms), downtime_figure(arms)]
    for figure in figures:
        assert figure is not None
        assert any(axis.get_ylabel() for axis in figure.axes)
        assert all(re.search(r"\((s|ms)\)", axis.get_xlabel()) for axis in figure.axes if axis.get_xlabel())
        assert any(axis.get_xlabel() for axis in figure.axes)


def test_a_run_without_answers_still_reports(tmp_path: Path) -> None:
    nan = math.nan
    record = RequestRecord(0, "", 3, 4, 0, 0.0, 0.1, nan, nan, nan, error="No instance is ready.")
    lost = ReplayResult(
        "replay", "generated", "ids", 0, T0, 1.0, (record,), None, History(), ("No instance is ready.",)
    )
    folder = new_run_folder("llumnix", tmp_path)
    write_report(folder, [lost], title="Llumnix: replay")
    told = json.loads((folder / "result.json").read_text())
    assert told["arms"][0]["summary"]["ttft_s"]["p99"] is None


def test_history_of_a_request_that_still_runs() -> None:
    told = {
        "placements": [
            {"at": 2.0, "request_id": "a", "instance_id": "y", "cause": "migration"},
            {"at": 1.0, "request_id": "a", "instance_id": "x", "cause": "dispatch"},
            {"at": 3.0, "request_id": "b", "instance_id": "x", "cause": "dispatch"},
            {"at": 4.0, "request_id": "b", "instance_id": None, "cause": "end"},
        ],
        "migrations": [
            {"request_id": None, "source": "x", "destination": "y", "ended_at": 2.0, "committed": False,
             "outcome": "the source died", "report": None}
        ],
    }  # fmt: skip
    history = parse_history(told)
    assert history.stays == (
        Stay("a", "x", 1.0, 2.0, "dispatch"), Stay("a", "y", 2.0, 4.0, "migration"), Stay("b", "x", 3.0, 4.0, "dispatch"),
    )  # fmt: skip
    assert history.migrations[0].committed is False
    assert math.isnan(history.migrations[0].downtime_ms)
