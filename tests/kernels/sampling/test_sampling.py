"""C++ and torch sampling against the float64 definition, transformers' processors, and the exact distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from kernels import build
from kernels.sampling import SamplingBatch, SamplingRow, TokenCounts, philox, reference, sample

BACKENDS = [
    pytest.param("cpp", marks=pytest.mark.skipif(not build.load("sampling"), reason="no C++ compiler")),
    "torch",
]


@pytest.fixture(autouse=True)
def _restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@st.composite
def rows(draw, vocab: int):
    tokens = st.integers(0, vocab - 1)
    return SamplingRow(
        temperature=draw(st.sampled_from([0.0, 0.2, 0.7, 1.0, 1.9])),
        top_k=draw(st.sampled_from([0, 1, 2, 20, 700, 10**6])),
        top_p=draw(st.sampled_from([1.0, 0.05, 0.5, 0.9, 0.999])),
        min_p=draw(st.sampled_from([0.0, 0.02, 0.5, 1.0])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3, 0.7])),
        presence_penalty=draw(st.sampled_from([0.0, 0.6, -0.6])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.3, -0.2])),
        seed=draw(st.integers(0, 2**64 - 1)),
        position=draw(st.integers(0, 10**6)),
        num_logprobs=draw(st.sampled_from([-1, 0, 1, 5, 20])),
        counts=TokenCounts(draw(st.lists(tokens, max_size=20)), draw(st.lists(tokens, max_size=20))),
        banned_ids=draw(st.lists(tokens, max_size=2)),
        bias=draw(st.dictionaries(tokens, st.floats(-5, 5, width=32), max_size=3)),
    )


@st.composite
def problems(draw):
    vocab = draw(st.sampled_from([3, 16, 50, 1023, 1024, 1025, 3000]))
    count = draw(st.integers(1, 5))
    seed, spread = draw(st.integers(0, 2**32 - 1)), draw(st.sampled_from([0.3, 1.0, 4.0]))
    logits = spread * torch.randn(count, vocab, generator=torch.Generator().manual_seed(seed))
    if draw(st.booleans()):
        logits = (logits * 2).round() / 2  # many ties
    return logits, [draw(rows(vocab)) for _ in range(count)]


def boundary_distance(logits: np.ndarray, row: SamplingRow, token: int) -> float:
    """How far the uniform number is from making ``token`` the right choice, 0 if it is."""
    p = reference.probabilities(logits, row)
    high = np.cumsum(p)
    u = philox.uniform(row.seed, row.position)
    return max(0.0, high[token] - p[token] - u, u - high[token])


def kept_up_to_rounding(logits: np.ndarray, row: SamplingRow, token: int) -> bool:
    """Whether the token is kept when the cutting limits move by float32's rounding."""
    near = 1e-5
    for factor in (1 - near, 1 + near):
        moved = SamplingRow(
            **{**row.__dict__, "top_p": min(1.0, row.top_p * factor), "min_p": min(1.0, row.min_p * factor)}
        )
        if reference.probabilities(logits, moved)[token] > 0:
            return True
    return False


@pytest.mark.parametrize("backend", BACKENDS)
@given(problem=problems())
@settings(max_examples=80, deadline=None)
def test_equals_the_float64_definition(backend, problem):
    logits, parameters = problem
    before = logits.clone()
    result = sample(logits, SamplingBatch.from_rows(parameters), backend=backend)
    assert torch.equal(logits, before)
    alternatives = max(0, *(min(r.num_logprobs, logits.shape[1]) for r in parameters))
    assert result.top_ids.shape == result.top_logprobs.shape == (len(parameters), alternatives)
    for i, row in enumerate(parameters):
        x, token = logits[i].numpy(), int(result.token_ids[i])
        if np.isneginf(reference.adjusted_logits(x, row)).all():
            assert token == -1
            continue
        expected = reference.sample_row(x, row)
        # Only a uniform number within float32's rounding of a boundary may choose the neighbour.
        if token != expected:
            adjusted = reference.adjusted_logits(x, row)
            tie = abs(adjusted[token] - adjusted[expected]) < 1e-5 and row.has_penalty
            close = boundary_distance(x, row, token) < 1e-5 and kept_up_to_rounding(x, row, token)
            assert tie or close, (token, expected)
        exact = reference.log_softmax(x)
        if row.num_logprobs < 0:
            assert math.isnan(result.logprobs[i])
        else:
            assert abs(result.logprobs[i].item() - exact[token]) < 2e-6 * max(1.0, abs(exact[token]))
        n = max(0, min(row.num_logprobs, len(x)))
        assert result.top_ids[i, :n].tolist() == reference.top(x, n).tolist()
        assert np.allclose(result.top_logprobs[i, :n].numpy(), exact[reference.top(x, n)], atol=2e-6, rtol=2e-6)
        assert (result.top_ids[i, n:] == -1).all() and result.top_logprobs[i, n:].isnan().all()


@pytest.mark.parametrize("isa", [0, 1, 2])
def test_the_definition_holds_on_every_instruction_set_at_a_real_vocabulary(isa):
    if not build.load("sampling"):
        pytest.skip("no C++ compiler")
    torch.ops.sextant.sampling_set_isa(isa)
    try:
        generator = torch.Generator().manual_seed(0)
        logits = 2.5 * torch.randn(12, 49_152, generator=generator)
        variants = [
            {},
            {"top_p": 0.9},
            {"top_p": 0.9, "temperature": 2.5},
            {"top_k": 50},
            {"top_k": 20_000},
            {"min_p": 0.01},
        ]
        parameters = [
            SamplingRow(**variant, seed=seed, position=9, num_logprobs=5) for variant in variants for seed in (1, 2)
        ]
        result = sample(logits, SamplingBatch.from_rows(parameters), backend="cpp")
        for i, row in enumerate(parameters):
            x = logits[i].numpy()
            token = int(result.token_ids[i])
            assert token == reference.sample_row(x, row) or boundary_distance(x, row, token) < 1e-6
            assert result.top_ids[i].tolist() == reference.top(x, 5).tolist()
            assert abs(result.logprobs[i].item() - reference.log_softmax(x)[token]) < 1e-5
    finally:
        torch.ops.sextant.sampling_set_isa(2)


@pytest.mark.skipif(not build.load("sampling"), reason="no C++ compiler")
@given(problem=problems(), order=st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_bits_do_not_depend_on_batch_or_threads(problem, order):
    logits, parameters = problem
    torch.set_num_threads(1)
    alone = [sample(logits[i : i + 1], SamplingBatch.from_rows([row]), "cpp") for i, row in enumerate(parameters)]
    torch.set_num_threads(2)
    index = list(range(len(parameters))) * 2
    order.shuffle(index)
    together = sample(logits[index], SamplingBatch.from_rows([parameters[i] for i in index]), "cpp")
    for place, i in enumerate(index):
        assert together.token_ids[place] == alone[i].token_ids[0]
        assert torch.equal(together.logprobs[place].view(torch.int32), alone[i].logprobs[0].view(torch.int32))
        n = alone[i].top_ids.shape[1]
        assert torch.equal(together.top_ids[place, :n], alone[i].top_ids[0])
        assert torch.equal(
            together.top_logprobs[place, :n].view(torch.int32), alone[i].top_logprobs[0].view(torch.int32)
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "row",
    [
        SamplingRow(),
        SamplingRow(temperature=0.6, top_k=12),
        SamplingRow(temperature=1.5, top_p=0.8),
        SamplingRow(min_p=0.1),
        SamplingRow(top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.4, counts=TokenCounts([3, 4], [5, 5, 6])),
    ],
)
def test_frequencies_of_the_draw(backend, row):
    """Chi-square against the exact distribution, over many positions of one seed."""
    logits = 2 * torch.randn(1, 40, generator=torch.Generator().manual_seed(3))
    draws = 6000
    batch = SamplingBatch.from_rows([SamplingRow(**{**row.__dict__, "seed": 11, "position": i}) for i in range(draws)])
    tokens = sample(logits.expand(draws, -1), batch, backend=backend).token_ids.numpy()
    p = reference.probabilities(logits[0].numpy(), row)
    observed = np.bincount(tokens, minlength=40)
    assert observed[p == 0].sum() == 0
    common = p * draws >= 5
    expected = np.append(p[common], p[~common].sum()) * draws
    counts = np.append(observed[common], observed[~common].sum())
    if expected[-1] < 1e-9:
        expected, counts = expected[:-1], counts[:-1]
    assert stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue > 1e-3


def processed(name: str, logits: torch.Tensor, tokens: list[int], value: float) -> torch.Tensor:
    processors = pytest.importorskip("transformers.generation.logits_process")
    return getattr(processors, name)(value)(torch.tensor([tokens]), logits.clone())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "name,value,row",
    [
        ("TemperatureLogitsWarper", 0.7, SamplingRow(temperature=0.7)),
        ("TopKLogitsWarper", 9, SamplingRow(top_k=9)),
        ("TopPLogitsWarper", 0.83, SamplingRow(top_p=0.83)),
        ("MinPLogitsWarper", 0.07, SamplingRow(min_p=0.07)),
        ("RepetitionPenaltyLogitsProcessor", 1.3, SamplingRow(repetition_penalty=1.3, counts=TokenCounts([1, 2, 3, 3], [4, 4]))),
    ],
)  # fmt: skip
def test_the_definition_equals_transformers(name, value, row, seed):
    logits = 2 * torch.randn(1, 60, generator=torch.Generator().manual_seed(seed))
    expected = processed(name, logits, [1, 2, 3, 3, 4, 4], value).double().softmax(1)[0].numpy()
    assert np.allclose(reference.probabilities(logits[0].numpy(), row), expected, atol=1e-6)


def test_presence_and_frequency_penalties_by_hand():
    """OpenAI: logit - count * frequency - (count > 0) * presence, over the output alone. Repetition comes first, as in vLLM."""
    counts = TokenCounts([0, 1], [1, 2, 2, 2])
    row = SamplingRow(presence_penalty=0.5, frequency_penalty=0.25, counts=counts)
    got = reference.adjusted_logits(np.array([1.0, 2.0, -3.0, 4.0]), row)
    assert got.tolist() == [1.0, 2.0 - 0.25 - 0.5, -3.0 - 0.75 - 0.5, 4.0]
    both = SamplingRow(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25, counts=counts)
    got = reference.adjusted_logits(np.array([1.0, 2.0, -3.0, 4.0]), both)
    assert got.tolist() == [0.5, 1.0 - 0.75, -6.0 - 1.25, 4.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_the_lowest_id(backend):
    logits = torch.zeros(1, 5000)
    logits[0, [70, 4000, 1100]] = 3.0
    greedy = sample(logits, SamplingBatch.from_rows([SamplingRow(temperature=0, num_logprobs=4)]), backend)
    assert greedy.token_ids.tolist() == [70]
    assert greedy.top_ids.tolist() == [[70, 1100, 4000, 0]]
    many = [SamplingRow(top_k=2, seed=s) for s in range(50)]
    assert set(sample(logits.repeat(50, 1), SamplingBatch.from_rows(many), backend).token_ids.tolist()) == {70, 1100}
    signed = torch.tensor([[-0.0, 0.0, -1.0]])
    assert sample(signed, SamplingBatch.from_rows([SamplingRow(temperature=0)]), backend).token_ids.tolist() == [0]
    one = [SamplingRow(top_k=1, seed=s) for s in range(5)]
    assert set(sample(signed.repeat(5, 1), SamplingBatch.from_rows(one), backend).token_ids.tolist()) == {0}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", [0, 15, 16, 1000, 2047, 2060])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_row_gets_no_token_and_harms_no_other(backend, place, value):
    logits = torch.randn(3, 2061, generator=torch.Generator().manual_seed(0))
    rows_ = [SamplingRow(seed=1), SamplingRow(temperature=0), SamplingRow(top_k=5)]
    clean = sample(logits, SamplingBatch.from_rows(rows_), backend).token_ids
    logits[1, place] = value
    got = sample(logits, SamplingBatch.from_rows(rows_), backend).token_ids
    assert got.tolist() == [clean[0], -1, clean[2]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_banned_tokens_are_never_chosen(backend):
    logits = torch.tensor([[9.0, 1.0, 0.0]])
    for temperature in (0.0, 1.0):
        row = SamplingRow(temperature=temperature, banned_ids=[0], bias={0: 5.0, 2: 3.0}, num_logprobs=0)
        batch = SamplingBatch.from_rows([row])
        result = sample(logits, batch, backend)
        assert result.token_ids.item() != 0
    all_banned = SamplingBatch.from_rows([SamplingRow(banned_ids=[0, 1, 2])])
    assert sample(logits, all_banned, backend).token_ids.tolist() == [-1]


@given(st.lists(st.integers(0, 9)), st.lists(st.integers(0, 9), max_size=200))
def test_token_counts_follow_from_the_tokens(prompt, output):
    grown, rebuilt = TokenCounts(prompt), TokenCounts(prompt, output)
    for token in output:
        grown.append(token)
    expected = {token: output.count(token) for token in {*prompt, *output}}
    for counts in (grown, rebuilt):
        assert dict(zip(counts.ids.tolist(), counts.output_counts.tolist(), strict=True)) == expected
    assert grown.ids.tolist() == rebuilt.ids.tolist()


@pytest.mark.parametrize(
    "row,word",
    [
        (SamplingRow(temperature=-1), "temperature"),
        (SamplingRow(temperature=math.nan), "temperature"),
        (SamplingRow(top_p=0.0), "top_p"),
        (SamplingRow(top_p=1.1), "top_p"),
        (SamplingRow(min_p=2.0), "min_p"),
        (SamplingRow(top_k=-1), "top_k"),
        (SamplingRow(repetition_penalty=0.0), "repetition_penalty"),
        (SamplingRow(presence_penalty=math.inf), "presence_penalty"),
        (SamplingRow(frequency_penalty=1.0), "counts"),
        (SamplingRow(num_logprobs=-2), "num_logprobs"),
        (SamplingRow(bias={0: math.nan}), "bias"),
    ],
)
def test_values_out_of_range_are_named(row, word):
    with pytest.raises(ValueError, match=word):
        SamplingBatch.from_rows([row])


@pytest.mark.skipif(not build.load("sampling"), reason="no C++ compiler")
def test_calls_that_do_not_fit_are_refused():
    batch = SamplingBatch.from_rows([SamplingRow()])
    with pytest.raises(ValueError, match="rows"):
        sample(torch.zeros(2, 5), batch)
    with pytest.raises(ValueError, match="float32"):
        sample(torch.zeros(1, 5, dtype=torch.float64), batch, "cpp")
    for outside in (5, -1):
        with pytest.raises(IndexError, match="vocabulary"):
            sample(torch.zeros(1, 5), SamplingBatch.from_rows([SamplingRow(bias={outside: 1.0})]), "cpp")
    assert sample(torch.zeros(0, 5), SamplingBatch.from_rows([]), "cpp").token_ids.shape == (0,)
