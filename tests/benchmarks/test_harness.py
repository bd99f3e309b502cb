"""The benchmark harness: alternation, ratios, targets, the JSON; and that it runs without Ray and rich."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.harness import Benchmark, Samples, Target, alternate, machine, versions

REPOSITORY = Path(__file__).resolve().parents[2]


def test_arms_alternate_and_warm_up_is_thrown_away() -> None:
    order: list[str] = []
    numbers = iter(range(100))

    def arm(name: str) -> float:
        order.append(name)
        return next(numbers)

    samples = alternate({"a": lambda: arm("a"), "b": lambda: arm("b")}, 3, warmup=1, returns_value=True)
    assert "".join(order) == "abbaabba"
    assert samples.values == {"a": (3, 4, 7), "b": (2, 5, 6)}


def test_calls_are_averaged() -> None:
    values = iter([0, 0, 1, 2, 3, 6])
    samples = alternate({"a": lambda: next(values)}, 2, warmup=1, calls=2, returns_value=True)
    assert samples.values["a"] == (1.5, 4.5)


def test_time_is_taken_in_seconds() -> None:
    import time

    samples = alternate({"short": lambda: time.sleep(0.001), "long": lambda: time.sleep(0.02)}, 3)
    assert samples.median("short") >= 0.001
    assert samples.median("long") >= 0.02


def test_ratios_are_taken_round_by_round() -> None:
    """The machine slows down tenfold half-way: the ratio of the medians would say nonsense, the median ratio says 2."""
    slow = Samples({"a": (2.0, 2.0, 20.0, 20.0, 20.0), "b": (1.0, 1.0, 10.0, 10.0, 10.0)})
    ratio = slow.ratio("a", "b")
    assert (ratio.median, ratio.low, ratio.high, ratio.count) == (2.0, 2.0, 2.0, 5)


def test_spread_is_the_interquartile_range_over_the_median() -> None:
    assert Samples({"a": (1.0, 2.0, 3.0, 4.0, 5.0)}).spread("a") == pytest.approx((4 - 2) / 3)
    assert Samples({"a": (1.0,)}).spread("a") == 0


@pytest.mark.parametrize(
    ("better", "value", "met"),
    [
        ("higher", 1.5, "goal"),
        ("higher", 1.3, "must"),
        ("higher", 1.1, "no"),
        ("lower", 0.9, "goal"),
        ("lower", 1.3, "no"),
        ("higher", math.nan, "missing"),
        ("higher", None, "missing"),
    ],
)
def test_targets(better: str, value: float | None, met: str) -> None:
    target = Target("k", 1.2, 1.4) if better == "higher" else Target("k", 1.2, 1.0, "lower")
    assert target.met(value) == met


def run(tmp_path: Path, *arguments: str) -> Benchmark:
    targets = [Target("speed", 1.2, 1.4), Target("errors", 0, 0, "lower", "wrong tokens")]
    return Benchmark("demo", "A demo.", targets, ["--out", str(tmp_path), *arguments])


def test_the_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = run(tmp_path, "--quick")
    assert bench.quick
    bench.figure("speed", 1.3)
    bench.figure("errors", 0)
    bench.figure("beside", math.inf)
    bench.row(context=256, ms=1.5, nothing=math.nan)
    assert bench.finish() == 0
    written = json.loads((tmp_path / "demo.json").read_text())
    assert written["benchmark"] == "demo"
    assert written["figures"] == {"speed": 1.3, "errors": 0, "beside": None}
    assert written["rows"] == [{"context": 256, "ms": 1.5, "nothing": None}]
    assert written["run"]["quick"] is True
    assert written["run"]["command"].startswith("python -m benchmarks.demo --out ")
    assert set(written) >= {"machine", "versions"}
    printed = capsys.readouterr().out
    assert "speed" in printed
    assert "wrong tokens" in printed
    assert "demo.json" in printed


def test_strict_fails_when_a_must_is_missed_or_missing(tmp_path: Path) -> None:
    for figures, code in (({"speed": 1.3, "errors": 0}, 0), ({"speed": 1.1, "errors": 0}, 1), ({"speed": 2.0}, 1)):
        bench = run(tmp_path, "--strict")
        for key, value in figures.items():
            bench.figure(key, value)
        assert bench.finish() == code


def test_a_figure_is_given_once(tmp_path: Path) -> None:
    bench = run(tmp_path)
    bench.figure("speed", 1)
    with pytest.raises(ValueError, match="twice"):
        bench.figure("speed", 2)


def test_further_options(tmp_path: Path) -> None:
    options = {"--model": {"default": "m", "help": "which"}}
    bench = Benchmark("demo", "A demo.", [], ["--out", str(tmp_path), "--model", "x"], options)
    assert bench.arguments.model == "x"


def test_pictures(tmp_path: Path) -> None:
    from apps.program.report import new_figure

    figure, _ = new_figure(2, 1)
    assert run(tmp_path).picture(figure, "load").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "demo_load.png").exists()


def test_machine_and_versions_are_told() -> None:
    assert machine()["cores"] >= 1
    assert machine()["cpu"]
    assert versions()["ray"]


def test_it_runs_without_ray_rich_and_matplotlib(tmp_path: Path) -> None:
    program = f"""
import sys
for name in ("ray", "rich", "matplotlib", "pydantic", "omegaconf", "jinja2", "typer"):
    sys.modules[name] = None
from benchmarks.harness import Benchmark, Target
bench = Benchmark("bare", "Bare.", [Target("x", 1, 2)], ["--out", {str(tmp_path)!r}])
bench.figure("x", 3)
sys.exit(bench.finish())
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "goal" in done.stdout
    assert json.loads((tmp_path / "bare.json").read_text())["figures"] == {"x": 3}


def test_ended_by_a_signal_it_still_cleans_up(tmp_path: Path) -> None:
    program = """
import os, signal, sys, time
from benchmarks.harness import Benchmark
Benchmark("ended", "Ended.", [])
try:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30)
finally:
    print("cleaned up")
"""
    done = subprocess.run(
        [sys.executable, "-c", program, "--out", str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (143, "cleaned up\n"), done.stderr
