"""Traces of requests (arrival time, prompt tokens, output tokens): read, written, sliced, scaled and generated.

What ``replay`` sends and ``demo`` shows. Generated traces have the length distributions and arrival processes of the Llumnix
paper's evaluation (OSDI 2024, section 6.1, and the generator of its artifact).
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

from apps.program.errors import UserError

PAPER_LENGTHS: dict[str, tuple[int, float]] = {"S": (128, 2.0), "M": (256, 1.5), "L": (512, 1.15)}
"""The paper's short, medium and long distribution: (mean in tokens, Zipf exponent)."""
PAPER_CAP = 6144
"""Longest generated length in tokens."""

_COLUMNS = {
    "arrival": ("timestamp", "arrival_s", "arrival", "arrival_time", "arrived_at", "time_s"),
    "prompt": ("contexttokens", "prompt_tokens", "prompt", "num_prefill_tokens", "input_tokens", "request tokens"),
    "output": ("generatedtokens", "output_tokens", "output", "num_decode_tokens", "response tokens"),
}
_CLOCK = re.compile(r"(\d{4}-\d{2}-\d{2}[ T]\d{2}:\d{2}:\d{2})(\.\d+)?(Z|[+-]\d{2}:?\d{2})?")


class TraceError(UserError):
    """A trace that cannot be read or made; says in a sentence what is wrong and where."""


@dataclass(frozen=True)
class Arrival:
    """One request of a trace. ``arrival_s`` counts seconds from the trace's beginning."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Trace:
    """Requests in the order in which they arrive; ``origin`` says in words where they come from."""

    arrivals: tuple[Arrival, ...]
    origin: str = "trace"

    def __len__(self) -> int:
        return len(self.arrivals)

    def __iter__(self) -> Iterator[Arrival]:
        return iter(self.arrivals)

    @property
    def duration_s(self) -> float:
        """Seconds from the first arrival to the last."""
        return self.arrivals[-1].arrival_s - self.arrivals[0].arrival_s if self.arrivals else 0.0

    @property
    def rate_per_s(self) -> float:
        """Mean arrival rate, requests per second; nan for fewer than two requests."""
        return (len(self) - 1) / self.duration_s if self.duration_s > 0 else math.nan

    @property
    def arrival_cv(self) -> float:
        """Coefficient of variation (standard deviation / mean) of the times between arrivals; 1 for Poisson arrivals."""
        gaps = np.diff([one.arrival_s for one in self.arrivals])
        return float(gaps.std() / gaps.mean()) if len(gaps) > 1 and gaps.mean() > 0 else math.nan


# ---- files


def read_trace(path: str | Path) -> Trace:
    """A trace from a CSV file with a header line.

    Known column names (case does not matter): Azure's ``TIMESTAMP,ContextTokens,GeneratedTokens`` with date and time to any
    number of decimals, and ``arrival_s,prompt_tokens,output_tokens`` (or ``arrival,prompt,output``) with seconds. Times become
    seconds from the first request on.

    Raises:
        TraceError: names the file, the line and what is wrong there.
    """
    file = Path(path).expanduser()
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise TraceError(f"The trace {file} does not exist.") from None
    except IsADirectoryError:
        raise TraceError(f"The trace {file} is a folder, not a CSV file.") from None
    except UnicodeDecodeError as error:
        raise TraceError(f"The trace {file} is not UTF-8 text (byte {error.start}).") from None
    except OSError as error:
        raise TraceError(f"The trace {file} cannot be read: {error.strerror or error}.") from error
    return parse_trace(text, str(file))


def parse_trace(text: str, name: str = "trace") -> Trace:
    """As ``read_trace``, from the text of a CSV file; ``name`` stands for it in errors."""
    try:
        rows = csv.reader(io.StringIO(text), strict=True)
        header = next(rows, None)
        if header is None:
            raise TraceError(f"The trace {name} is empty: a header line is expected.")
        places = _find_columns(header, name)
        arrivals: list[Arrival] = []
        first: tuple[datetime, float] | None = None
        for row in rows:
            if not any(cell.strip() for cell in row):
                continue
            where = f"{name}, line {rows.line_num}"
            if len(row) <= max(places.values()):
                raise TraceError(f"{where}: {len(row)} columns, {len(header)} expected.")
            stamp = row[places["arrival"]].strip()
            if (clock := _CLOCK.fullmatch(stamp)) is not None:
                moment = _moment(clock, where)
                first = first or moment
                at = _seconds_between(first, moment, where)
            else:
                at = _number(stamp, "arrival time", where)
            if arrivals and at < arrivals[-1].arrival_s:
                raise TraceError(f"{where}: the arrival time {stamp} is before the previous one; sort the trace by it.")
            lengths = (_length(row[places[key]], key, where) for key in ("prompt", "output"))
            arrivals.append(Arrival(at, *lengths))
    except csv.Error as error:
        raise TraceError(f"The trace {name} is not a CSV file: {error}.") from error
    if not arrivals:
        raise TraceError(f"The trace {name} has no requests.")
    return Trace(_from_zero(arrivals), name)


def write_trace(path: str | Path, trace: Trace) -> None:
    """``trace`` as ``arrival_s,prompt_tokens,output_tokens``; ``read_trace`` gives the same requests back.

    Raises:
        TraceError: the file cannot be written.
    """
    lines = ["arrival_s,prompt_tokens,output_tokens"]
    lines += [f"{one.arrival_s!r},{one.prompt_tokens},{one.output_tokens}" for one in trace]
    try:
        Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise TraceError(f"The trace {path} cannot be written: {error.strerror or error}.") from error


def _find_columns(header: Sequence[str], name: str) -> dict[str, int]:
    names = [cell.strip().lower() for cell in header]
    places = {}
    for key, known in _COLUMNS.items():
        found = [index for index, cell in enumerate(names) if cell in known]
        if len(found) != 1:
            problem = "has no column" if not found else "has more than one column"
            raise TraceError(
                f"The trace {name} {problem} for the {key}; expected TIMESTAMP,ContextTokens,GeneratedTokens or "
                f"arrival_s,prompt_tokens,output_tokens, found {','.join(header)[:120]}."
            )
        places[key] = found[0]
    return places


def _moment(clock: re.Match[str], where: str) -> tuple[datetime, float]:
    """(whole second, fraction): a datetime has 6 decimals, Azure's traces have 7."""
    try:
        whole = datetime.fromisoformat(clock[1] + (clock[3] or ""))
    except ValueError as error:
        raise TraceError(f"{where}: {clock[0]!r} is no date and time: {error}.") from None
    return whole, float("0" + (clock[2] or ".0"))


def _seconds_between(first: tuple[datetime, float], moment: tuple[datetime, float], where: str) -> float:
    try:
        return round((moment[0] - first[0]).total_seconds() + (moment[1] - first[1]), 9)
    except TypeError:
        raise TraceError(f"{where}: some times have a time zone and some have none.") from None


def _number(text: str, what: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise TraceError(f"{where}: the {what} {text[:60]!r} is not a number.") from None
    if not math.isfinite(value) or value < 0:
        raise TraceError(f"{where}: the {what} {text[:60]} must be a finite number that is not negative.")
    return value


def _length(text: str, key: str, where: str) -> int:
    value = _number(text.strip(), f"number of {key} tokens", where)
    if value != int(value) or value < 1:
        raise TraceError(
            f"{where}: the number of {key} tokens must be a whole number of at least 1, not {text.strip()}."
        )
    return int(value)


def _from_zero(arrivals: Sequence[Arrival]) -> tuple[Arrival, ...]:
    if not arrivals:
        return ()
    origin = arrivals[0].arrival_s
    return tuple(dataclasses.replace(one, arrival_s=one.arrival_s - origin) for one in arrivals)


# ---- slices


def slice_trace(trace: Trace, *, start: int = 0, limit: int | None = None, speed: float = 1.0) -> Trace:
    """``limit`` requests from the ``start``-th on, arriving ``speed`` times as fast, the first at 0 s.

    Raises:
        TraceError: nothing is left, or a value makes no sense.
    """
    if start < 0 or (limit is not None and limit < 1):
        raise TraceError(f"start={start} must be at least 0 and limit={limit} at least 1.")
    if not (speed > 0 and math.isfinite(speed)):
        raise TraceError(f"speed={speed} must be a positive number.")
    chosen = trace.arrivals[start : None if limit is None else start + limit]
    if not chosen:
        raise TraceError(f"The trace has {len(trace)} requests: none is left from start={start} on.")
    scaled = [dataclasses.replace(one, arrival_s=one.arrival_s / speed) for one in _from_zero(chosen)]
    return Trace(tuple(scaled), trace.origin)


def scale_lengths(trace: Trace, factor: float) -> Trace:
    """Every prompt and output ``factor`` times as long, at least one token each: real proportions for a small machine."""
    if not (factor > 0 and math.isfinite(factor)):
        raise TraceError(f"The length scale {factor} must be a positive number.")
    scaled = (
        Arrival(one.arrival_s, max(1, round(one.prompt_tokens * factor)), max(1, round(one.output_tokens * factor)))
        for one in trace
    )
    return Trace(tuple(scaled), trace.origin)


def fit_lengths(
    trace: Trace, max_model_len: int, max_prompt: int | None = None, max_output: int | None = None
) -> Trace:
    """The trace with lengths cut so that each prompt and output together fit ``max_model_len`` tokens.

    The output is cut to ``max_output`` and to half the context, the prompt to ``max_prompt`` and what is left.

    Raises:
        TraceError: a cap leaves no room for one token of each.
    """
    if max_model_len < 2 or min(max_prompt or 1, max_output or 1) < 1:
        raise TraceError(f"No request fits: context {max_model_len}, prompt cap {max_prompt}, output cap {max_output}.")
    longest_prompt = min(max_prompt or max_model_len, max_model_len - 1)
    longest_output = min(max_output or max_model_len, max_model_len - 1)
    fitted = []
    for one in trace:
        prompt, output = min(one.prompt_tokens, longest_prompt), min(one.output_tokens, longest_output)
        if prompt + output > max_model_len:
            output = min(output, max(max_model_len // 2, max_model_len - prompt))
            prompt = min(prompt, max_model_len - output)
        fitted.append(Arrival(one.arrival_s, prompt, output))
    return Trace(tuple(fitted), trace.origin)


# ---- generator


def zipf_lengths(mean: float, alpha: float, count: int, rng: np.random.Generator, cap: int = PAPER_CAP) -> np.ndarray:
    """``count`` lengths in tokens (int64): a Zipf law bounded to 1..2*mean-1, rescaled so that its mean is ``mean``.

    P(k) ~ k**-alpha; every k is multiplied by mean / E[k], rounded, and cut to ``cap`` (which lowers the mean of very long
    distributions a little). Source: generator of the Llumnix artifact (``osdi24ae``).

    Raises:
        TraceError: mean below 1, negative alpha or cap below 1.
    """
    if not (mean >= 1 and alpha >= 0 and cap >= 1 and math.isfinite(mean) and math.isfinite(alpha)):
        raise TraceError(f"A length distribution needs mean >= 1, alpha >= 0 and cap >= 1, not {mean}, {alpha}, {cap}.")
    k = np.arange(1, max(2, round(2 * mean)), dtype=np.float64)
    weight = k**-alpha
    probability = weight / weight.sum()
    drawn = rng.choice(k, size=count, p=probability)
    return np.clip(np.rint(drawn * (mean / (k * probability).sum())), 1, cap).astype(np.int64)


def gamma_arrivals(rate_per_s: float, cv: float, count: int, rng: np.random.Generator) -> np.ndarray:
    """``count`` arrival times in seconds (float64), the first at 0, of a Gamma renewal process.

    Times between arrivals have mean 1/rate and coefficient of variation ``cv``: shape 1/cv**2, scale cv**2/rate. ``cv`` 1 is a
    Poisson process, 0 a regular one. Source: Llumnix paper, section 6.1.

    Raises:
        TraceError: rate not positive or cv negative.
    """
    if not (rate_per_s > 0 and cv >= 0 and math.isfinite(rate_per_s) and math.isfinite(cv)):
        raise TraceError(f"Arrivals need a positive rate and a cv of at least 0, not {rate_per_s} and {cv}.")
    if cv == 0:
        gaps = np.full(max(count - 1, 0), 1 / rate_per_s)
    else:
        gaps = rng.gamma(1 / cv**2, cv**2 / rate_per_s, size=max(count - 1, 0))
    return np.concatenate([np.zeros(min(count, 1)), np.cumsum(gaps)])


def generate_trace(
    count: int,
    rate_per_s: float,
    *,
    prompts: str | tuple[float, float] = "S",
    outputs: str | tuple[float, float] = "S",
    cv: float = 1.0,
    cap: int = PAPER_CAP,
    seed: int = 0,
) -> Trace:
    """A trace of ``count`` requests; lengths are one of ``PAPER_LENGTHS`` or (mean, alpha).

    The same arguments give the same trace; lengths do not change with the rate or the cv.

    Raises:
        TraceError: a value out of range, or an unknown distribution.
    """
    if count < 1:
        raise TraceError(f"A trace needs at least one request, not {count}.")
    streams = [np.random.Generator(np.random.Philox(key=[seed, stream])) for stream in range(3)]
    times = gamma_arrivals(rate_per_s, cv, count, streams[0])
    prompt = zipf_lengths(*_distribution(prompts), count, streams[1], cap)
    output = zipf_lengths(*_distribution(outputs), count, streams[2], cap)
    arrivals = tuple(Arrival(float(t), int(p), int(o)) for t, p, o in zip(times, prompt, output, strict=True))
    kind = f"{prompts if isinstance(prompts, str) else 'own'}-{outputs if isinstance(outputs, str) else 'own'}"
    process = "Poisson" if cv == 1 else f"Gamma (CV {cv:g})"
    origin = f"generated ({kind} lengths, {process} arrivals at {rate_per_s:g}/s, seed {seed})"
    return Trace(arrivals, origin)


def _distribution(chosen: str | tuple[float, float]) -> tuple[float, float]:
    if not isinstance(chosen, str):
        return chosen
    if chosen.upper() not in PAPER_LENGTHS:
        raise TraceError(f"There is no length distribution {chosen!r}; known: {', '.join(PAPER_LENGTHS)}.")
    return PAPER_LENGTHS[chosen.upper()]
