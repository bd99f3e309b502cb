"""The real model on the real kernels: a request's logits, tokens, text and logprobs are the same bits however it is run.

Alone, in a batch, with chunked prefill, with a prefix hit, preempted and recomputed, migrated between engines, on one thread or
two. Compared are the raw logits of every sampled position, byte by byte.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import pytest
import torch

from actors.llumnix.engine.config import EngineConfig
from actors.llumnix.engine.engine import Engine
from actors.llumnix.engine.loading import ModelLoadError, load_model
from tests.actors.llumnix.engine.fakes import Client, assert_clean, make_request, run
from tests.actors.llumnix.engine.test_migration_hooks import migrate

TEXTS = [
    "The quick brown fox jumps over the lazy dog. " * 4,
    "Once upon a time, in a village between two rivers, there lived a clockmaker who",
    "The quick brown fox jumps over the lazy dog. " * 4 + "Then it",
    "def fibonacci(n):\n    ",
]
SAMPLING = [
    {"temperature": 0.0, "logprobs": 2},
    {"temperature": 1.0, "seed": 7, "top_p": 0.95, "logprobs": 0},
    {"temperature": 0.9, "seed": 8, "top_k": 50, "repetition_penalty": 1.2, "frequency_penalty": 0.3, "logprobs": 0},
    {
        "temperature": 0.7,
        "seed": 9,
        "min_p": 0.05,
        "presence_penalty": 0.5,
        "stop": ("\n\n\n", "return  "),
        "logprobs": 1,
    },
]
MAX_TOKENS = 14


@pytest.fixture(scope="module", params=["int8", "bf16", "fp32"])
def loaded(request):
    try:
        model, tokenizer = load_model(EngineConfig(dtype=request.param, kernels="cpp", device="cpu", max_model_len=512))
    except ModelLoadError as error:
        pytest.skip(str(error))
    return model, tokenizer


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Bench:
    """Engines over one loaded model, with every logits row that was sampled from on record."""

    def __init__(self, loaded):
        self.model, self.tokenizer = loaded
        self.client = Client()
        self.logits: dict[tuple[str, int], str] = {}
        self.requests = [
            make_request(f"r{i}", self.tokenizer.encode(text), arrival=float(i), max_tokens=MAX_TOKENS, **sampling)
            for i, (text, sampling) in enumerate(zip(TEXTS, SAMPLING, strict=True))
        ]

    def engine(self, blocks: int = 64, **settings) -> Engine:
        config = EngineConfig(**({"dtype": self.model.dtype, "max_model_len": 512, "watermark": 0.0} | settings))
        engine = Engine(config, self.model, self.tokenizer, "e", self.model.new_kv(blocks))
        draw = engine.sampler.sample

        def record(logits, sequences):
            for row, seq in zip(logits, sequences, strict=True):
                key, digest = (seq.request_id, len(seq.tokens)), hashlib.sha256(row.contiguous().numpy()).hexdigest()
                assert self.logits.setdefault(key, digest) == digest, f"{key} gives other logits when run again"
            return draw(logits, sequences)

        engine.sampler.sample = record
        return engine

    def outcome(self):
        results = {r.request_id: self.client.result(r.request_id) for r in self.requests}
        tops = {r.request_id: [c.logprobs for c in self.client.chunks[r.request_id]] for r in self.requests}
        return results, tops, self.logits


@pytest.fixture(scope="module")
def alone(loaded):
    """What every other way of running is compared with: one request at a time, the whole prompt in one step, no cache."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    bench = Bench(loaded)
    for request in bench.requests:
        engine = bench.engine(prefix_caching=False)
        engine.add_request(request)
        run(engine, bench.client)
    torch.set_num_threads(before)
    results, _, _ = outcome = bench.outcome()
    assert all(len(result.token_ids) > 3 for result in results.values())
    assert len({tuple(result.token_ids) for result in results.values()}) == len(results)
    return outcome


def batch(bench: Bench, **settings) -> Engine:
    engine = bench.engine(**settings)
    for request in bench.requests:
        engine.add_request(request)
    run(engine, bench.client)
    assert_clean(engine)
    return engine


def in_a_batch(bench: Bench) -> None:
    batch(bench, prefix_caching=False)


def in_chunks(bench: Bench) -> None:
    batch(bench, max_batched_tokens=7, prefix_caching=False)


def with_a_prefix_hit(bench: Bench) -> None:
    engine = bench.engine()
    for request in reversed(bench.requests):
        engine.add_request(request)
        run(engine, bench.client)
    assert bench.client.chunks["r0"][0].cached_tokens >= 32
    assert_clean(engine)


def preempted(bench: Bench) -> None:
    longest = max(len(request.prompt_token_ids) for request in bench.requests)
    engine = batch(bench, blocks=(longest + MAX_TOKENS) // 16 + 3, max_batched_tokens=32)
    assert engine.scheduler.num_preemptions > 0


def on_two_threads(bench: Bench) -> None:
    torch.set_num_threads(2)
    batch(bench, max_batched_tokens=40)


def migrated(bench: Bench) -> None:
    """Every request moves to the other engine after every few steps, while it decodes or prefills."""
    engines = [bench.engine(max_batched_tokens=24), bench.engine(max_batched_tokens=24)]
    for request in bench.requests:
        engines[0].add_request(request)
    hops = dict.fromkeys((request.request_id for request in bench.requests), 0)
    for _ in range(200):
        for here, there in (engines, engines[::-1]):
            if here.has_work():
                bench.client.take(here.step().chunks)
            for name in [candidate.request_id for candidate in here.migration_candidates()]:
                if (here.num_steps + int(name[1])) % 3 == 0:
                    hops[name] += migrate(name, here, there, sum(hops.values()) + 1, bench.client, steps=0)
        if not any(engine.has_work() for engine in engines):
            break
    assert min(hops.values()) >= 3, hops
    assert_clean(*engines)


@pytest.mark.parametrize("way", [in_a_batch, in_chunks, with_a_prefix_hit, preempted, on_two_threads, migrated])
def test_same_bits(loaded, alone, way: Callable[[Bench], None]):
    bench = Bench(loaded)
    way(bench)
    results, tops, logits = bench.outcome()
    want_results, want_tops, want_logits = alone
    assert results == want_results
    assert tops == want_tops
    assert logits == want_logits
