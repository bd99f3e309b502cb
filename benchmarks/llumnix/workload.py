"""Requests that use all that a migration must carry: sampling, penalties, stop strings, logprobs, shared prefixes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from actors.llumnix.engine.request import SamplingParams, TokenLogprob
from apps.llumnix.prompts import Prompts

KINDS: dict[str, SamplingParams] = {
    "greedy": SamplingParams(temperature=0.0, ignore_eos=True),
    "greedy, repetition penalty": SamplingParams(temperature=0.0, repetition_penalty=1.3, ignore_eos=True),
    "sampled": SamplingParams(temperature=1.0, ignore_eos=True),
    "sampled, top-p": SamplingParams(temperature=0.8, top_p=0.9, ignore_eos=True),
    "sampled, top-k and min-p": SamplingParams(temperature=1.2, top_k=40, min_p=0.02, ignore_eos=True),
    "sampled, presence and frequency penalties": SamplingParams(
        temperature=0.9, presence_penalty=0.7, frequency_penalty=0.4, ignore_eos=True
    ),
    "sampled, all penalties, top-k, top-p": SamplingParams(
        temperature=0.9, top_k=60, top_p=0.95, repetition_penalty=1.1, presence_penalty=0.3, frequency_penalty=0.2,
        ignore_eos=True,
    ),
    "sampled, ends by itself": SamplingParams(temperature=0.7, top_p=0.95),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One request to be run twice, migrated and not."""

    name: str
    prompt: tuple[int, ...]
    sampling: SamplingParams


def make_cases(count: int, output_tokens: int, prompts: Prompts, seed: int = 0) -> list[Case]:
    """``count`` cases, the kinds in turn; prompts have 12 to 99 tokens, a third of them behind one common beginning of 64
    tokens (prefix cache hits)."""
    rng = np.random.Generator(np.random.Philox(seed))
    common = tuple(prompts.make(count, 64))
    kinds = list(KINDS)
    cases = []
    for index in range(count):
        kind = kinds[index % len(kinds)]
        own = tuple(prompts.make(index, int(rng.integers(12, 100))))
        sampling = dataclasses.replace(
            KINDS[kind], seed=seed * 1_000_003 + index, max_tokens=output_tokens, logprobs=(2, 0, 5)[index % 3]
        )
        cases.append(Case(f"{index}: {kind}", (common + own) if index % 3 == 0 else own, sampling))
    return cases


def with_stop_string(case: Case, text: str) -> Case | None:
    """The case with a stop string that its own answer ``text`` reaches late (past three quarters); None if it has none."""
    words = [word for word in text[3 * len(text) // 4 :].split() if len(word) >= 3 and word in text]
    for word in words:
        if text.find(word) >= len(text) // 2:  # nowhere earlier, so that there is time for the hops
            sampling = dataclasses.replace(
                case.sampling, stop=(word, "\x00never"), include_stop_str_in_output=bool(len(word) % 2)
            )
            return Case(f"{case.name}, stop string", case.prompt, sampling)
    return None


def mismatches(expected: Sequence[int], got: Sequence[int]) -> int:
    """Positions at which two token sequences differ, missing and surplus ones included."""
    same = sum(a == b for a, b in zip(expected, got, strict=False))
    return max(len(expected), len(got)) - same


def logprob_difference(expected: Sequence[TokenLogprob], got: Sequence[TokenLogprob]) -> float:
    """Largest absolute difference of reported log-probabilities, alternatives included; inf when they are of other tokens."""
    if len(expected) != len(got):
        return float("inf")
    worst = 0.0
    for one, other in zip(expected, got, strict=True):
        pairs = [((one.token_id, one.logprob), (other.token_id, other.logprob)), *zip(one.top, other.top, strict=False)]
        if len(one.top) != len(other.top) or any(a[0] != b[0] for a, b in pairs):
            return float("inf")
        worst = max(worst, *(abs(a[1] - b[1]) for a, b in pairs))
    return worst
