"""Traces: files of both shapes, their faults, slices, and generated distributions against scipy and the paper's figures."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from apps.llumnix.trace import (
    PAPER_LENGTHS,
    Arrival,
    Trace,
    TraceError,
    fit_lengths,
    gamma_arrivals,
    generate_trace,
    parse_trace,
    read_trace,
    scale_lengths,
    slice_trace,
    write_trace,
    zipf_lengths,
)

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:46.6805901,7,1
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:16:00,1,2"""


def test_azure_format_keeps_seven_decimals() -> None:
    trace = parse_trace(AZURE, "a.csv")
    assert [one.arrival_s for one in trace] == pytest.approx([0.0, 1e-7, 4.314579, 13.31941], abs=1e-9)
    assert trace.arrivals[1] == Arrival(pytest.approx(1e-7, abs=1e-12), 7, 1)
    assert (trace.arrivals[2].prompt_tokens, trace.arrivals[2].output_tokens) == (396, 109)
    assert trace.origin == "a.csv"


def test_azure_format_with_time_zone_over_midnight() -> None:
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 23:59:59.5+00:00,1,2\n2024-05-11T00:00:00.25Z,3,4\n"
    assert [one.arrival_s for one in parse_trace(text)] == [0.0, 0.75]


@pytest.mark.parametrize("header", ["arrival_s,prompt_tokens,output_tokens", "Arrival, Prompt, Output"])
def test_generic_format_starts_at_zero_and_ignores_blank_lines(header: str) -> None:
    trace = parse_trace(f"{header}\n10.5,3,4\n\n12,5,6\n")
    assert trace.arrivals == (Arrival(0.0, 3, 4), Arrival(1.5, 5, 6))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "empty"),
        ("arrival,prompt,output\n", "has no requests"),
        ("time,prompt,output\n1,2,3\n", "no column for the arrival"),
        ("arrival,prompt,prompt,output\n1,2,2,3\n", "more than one column for the prompt"),
        ("arrival,prompt,output\n1,2\n", "line 2: 2 columns, 3 expected"),
        ("arrival,prompt,output\n0,1,1\n1,x,3\n", "line 3: the number of prompt tokens 'x' is not a number"),
        ("arrival,prompt,output\n0,1.5,1\n", "line 2: the number of prompt tokens must be a whole number"),
        ("arrival,prompt,output\n0,1,0\n", "line 2: the number of output tokens must be a whole number of at least 1"),
        ("arrival,prompt,output\n-1,1,1\n", "line 2: the arrival time -1 must be a finite number"),
        ("arrival,prompt,output\nnan,1,1\n", "must be a finite number"),
        ("arrival,prompt,output\n2,1,1\n1,1,1\n", "line 3: the arrival time 1 is before the previous one"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-13-16 18:15:46.68,1,1\n", "is no date and time"),
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46Z,1,1\n2023-11-16 18:15:47,1,1\n",
            "some have none",
        ),
        ('arrival,prompt,output\n"1,2,3\n', "not a CSV file"),
    ],
)
def test_faults_are_named(text: str, told: str) -> None:
    with pytest.raises(TraceError, match=told):
        parse_trace(text)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="does not exist"):
        read_trace(tmp_path / "none.csv")
    with pytest.raises(TraceError, match="is a folder"):
        read_trace(tmp_path)
    (tmp_path / "bytes.csv").write_bytes(b"arrival,prompt,output\n\xff\xfe,1,1\n")
    with pytest.raises(TraceError, match="not UTF-8"):
        read_trace(tmp_path / "bytes.csv")
    with pytest.raises(TraceError, match="cannot be written"):
        write_trace(tmp_path / "no" / "folder.csv", generate_trace(1, 1.0))


lengths = st.integers(1, 10_000)
arrivals = st.lists(st.tuples(st.floats(0, 1e6), lengths, lengths), min_size=1, max_size=20).map(
    lambda rows: Trace(tuple(Arrival(t - min(rows)[0], p, o) for t, p, o in sorted(rows)))
)


@given(trace=arrivals)
def test_written_traces_read_back_equal(tmp_path_factory: pytest.TempPathFactory, trace: Trace) -> None:
    path = tmp_path_factory.mktemp("trace") / "t.csv"
    write_trace(path, trace)
    assert read_trace(path).arrivals == trace.arrivals


@given(trace=arrivals, context=st.integers(2, 4000), cap=st.none() | st.integers(1, 300))
def test_fitted_lengths_fit_and_are_never_longer(trace: Trace, context: int, cap: int | None) -> None:
    for before, after in zip(trace, fit_lengths(trace, context, max_output=cap), strict=True):
        assert after.prompt_tokens >= 1
        assert after.output_tokens >= 1
        assert after.prompt_tokens + after.output_tokens <= context
        assert after.prompt_tokens <= before.prompt_tokens
        assert after.output_tokens <= min(before.output_tokens, cap or before.output_tokens)
        if before.prompt_tokens + before.output_tokens <= context and cap is None:
            assert after == before


def test_slice_speed_and_scale() -> None:
    trace = Trace(tuple(Arrival(float(i), 10 * (i + 1), i + 1) for i in range(10)))
    chosen = slice_trace(trace, start=2, limit=3, speed=4.0)
    assert [one.arrival_s for one in chosen] == [0.0, 0.25, 0.5]
    assert [one.prompt_tokens for one in chosen] == [30, 40, 50]
    assert scale_lengths(chosen, 0.1).arrivals[0] == Arrival(0.0, 3, 1)
    assert trace.rate_per_s == pytest.approx(1.0)
    for bad in ({"start": 10}, {"start": -1}, {"limit": 0}, {"speed": 0.0}, {"speed": math.nan}):
        with pytest.raises(TraceError):
            slice_trace(trace, **bad)
    with pytest.raises(TraceError):
        scale_lengths(trace, 0)
    with pytest.raises(TraceError):
        fit_lengths(trace, 1)


# P50, P80, P95, P99 of the paper's distributions, drawn anew by others from the artifact's rule.
RESAMPLED = {"S": (35, 104, 380, 1655), "M": (30, 164, 1277, 4556), "L": (54, 598, 3107, 5267)}


@pytest.mark.parametrize("name", PAPER_LENGTHS)
def test_lengths_have_the_papers_percentiles(name: str) -> None:
    mean, alpha = PAPER_LENGTHS[name]
    drawn = zipf_lengths(mean, alpha, 200_000, np.random.default_rng(3))
    assert np.percentile(drawn, [50, 80, 95, 99]) == pytest.approx(RESAMPLED[name], rel=0.09)
    assert drawn.max() <= 6144
    assert drawn.min() >= 1


@pytest.mark.parametrize("name", PAPER_LENGTHS)
def test_lengths_follow_scipys_bounded_zipf(name: str) -> None:
    mean, alpha = PAPER_LENGTHS[name]
    law = stats.zipfian(alpha, 2 * mean - 1)
    drawn = zipf_lengths(mean, alpha, 100_000, np.random.default_rng(4), cap=10**9)
    k = np.rint(drawn / (mean / law.mean())).astype(int)
    expected = law.pmf(np.arange(1, 21)) * len(k)
    observed = np.array([(k == value).sum() for value in range(1, 21)])
    rest = len(k) - observed.sum()
    assert stats.chisquare([*observed, rest], [*expected, len(k) - expected.sum()]).pvalue > 1e-3
    assert drawn.mean() == pytest.approx(mean, rel=6 * law.std() / law.mean() / math.sqrt(len(k)) + 0.02)


@pytest.mark.parametrize(("rate", "cv"), [(2.0, 1.0), (0.5, 4.0), (30.0, 0.5)])
def test_arrivals_are_a_gamma_renewal_process(rate: float, cv: float) -> None:
    times = gamma_arrivals(rate, cv, 20_001, np.random.default_rng(5))
    gaps = np.diff(times)
    assert times[0] == 0
    # Not a Kolmogorov-Smirnov test: at CV 4 the shortest gaps are lost in the rounding of the times they separate.
    shares = np.array([0.4, 0.1, 0.1, 0.1, 0.1, 0.1, 0.09, 0.01])
    edges = stats.gamma(1 / cv**2, scale=cv**2 / rate).ppf(np.concatenate([[0.0], shares.cumsum()]).clip(0, 1))
    observed = np.histogram(gaps, bins=[-1.0, *edges[1:-1], np.inf])[0]
    assert stats.chisquare(observed, shares * len(gaps)).pvalue > 1e-3
    if cv == 1.0:  # a Poisson process: exponential gaps, counts with variance equal to the mean
        assert stats.kstest(gaps, stats.expon(scale=1 / rate).cdf).pvalue > 1e-3
        counts = np.histogram(times, bins=np.arange(0, times[-1], 5.0))[0]
        assert counts.var() / counts.mean() == pytest.approx(1.0, abs=0.15)


def test_generated_traces_repeat_and_differ_by_seed() -> None:
    first = generate_trace(50, 2.0, prompts="M", outputs="L", cv=2.0, seed=1)
    assert first.arrivals == generate_trace(50, 2.0, prompts="M", outputs="L", cv=2.0, seed=1).arrivals
    assert first.arrivals != generate_trace(50, 2.0, prompts="M", outputs="L", cv=2.0, seed=2).arrivals
    slower = generate_trace(50, 1.0, prompts="M", outputs="L", cv=2.0, seed=1)
    assert [one.prompt_tokens for one in slower] == [one.prompt_tokens for one in first]
    assert slower.duration_s == pytest.approx(2 * first.duration_s)
    assert "M-L" in first.origin
    assert np.allclose(np.diff([one.arrival_s for one in generate_trace(5, 4.0, cv=0)]), 0.25)
    for bad in (
        {"count": 0, "rate_per_s": 1},
        {"count": 1, "rate_per_s": 0},
        {"count": 1, "rate_per_s": 1, "prompts": "X"},
    ):
        with pytest.raises(TraceError):
            generate_trace(**bad)
    with pytest.raises(TraceError):
        generate_trace(1, 1.0, prompts=(0.5, 1.0))


@pytest.mark.shared_data
def test_real_azure_traces() -> None:
    path = Path(__file__).resolve().parents[4] / "shared/data/traces/azure_2023_conv.csv"
    if not path.is_file():
        pytest.skip("../shared/data/traces/azure_2023_conv.csv is not there")
    trace = read_trace(path)
    assert len(trace) == 19_366
    # 18:15:46.6805900 to 19:14:08.4025270, worked by hand
    assert trace.duration_s == pytest.approx(3501.721937, abs=1e-6)
    assert np.mean([one.prompt_tokens for one in trace]) == pytest.approx(1154.697, abs=1e-3)
