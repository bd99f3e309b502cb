"""A model small enough to be its own oracle, for tests of everything around the model.

``FakeModel`` really writes token ids and positions into the KV pool through the block table and reads all of the context back
through it; its logits are a hash of what it read. So a wrong block table, a lost block, a stale or doubly owned block, or a
wrong position changes the output. ``expected`` computes the same from the plain list of tokens, with no pool, no batch, no
engine, and finds stop strings in the whole decoded text by brute force.
"""

from __future__ import annotations

import codecs
import hashlib
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import torch

from actors.llumnix.engine.batch import ModelBatch
from actors.llumnix.engine.config import EngineConfig
from actors.llumnix.engine.engine import Engine
from actors.llumnix.engine.request import Request, SamplingParams, TokenChunk, TokenLogprob

BLOCK = 16
VOCAB = 61
EOS = 0
PIECES = ["", "a", "b", "c", "ab", "bc", "abc", " ", "\n", "é", "日", "本", "😀", "x", "y", "z"]


class FakeTokenizer:
    """Byte pieces; some ids are single bytes of a code point, so that text has to wait for the next token."""

    vocab_size = VOCAB
    eos_token_ids = (EOS,)

    def token_bytes(self, token_id: int) -> bytes:
        if token_id < len(PIECES):
            return PIECES[token_id].encode()
        stream = "日😀é".encode()
        return stream[token_id % len(stream) :][: 1 + token_id % 2]

    def decode(self, ids) -> str:
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")


def logits_of(tokens: list[int], positions: list[int]) -> np.ndarray:
    """float32 [VOCAB]: a hash of the visible tokens and positions."""
    digest = hashlib.blake2b(np.array([tokens, positions], dtype=np.int64).tobytes(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "big")).normal(0, 2.5, VOCAB).astype(np.float32)


class FakeModel:
    """See the module's docstring. ``fail_at`` makes the n-th forward raise."""

    numerics = "fake"
    eos_token_ids = (EOS,)

    def __init__(self, context: int = 1024):
        self.config = SimpleNamespace(max_position_embeddings=context, vocab_size=VOCAB)
        self.forwards = 0
        self.tokens_run = 0
        self.fail_at: int | None = None
        self.nan_after: list[int] | None = None
        self.max_batch = 0

    def new_kv(self, num_blocks: int) -> torch.Tensor:
        return torch.zeros(num_blocks, 1, 2, 1, BLOCK)

    def forward(self, batch: ModelBatch, kv: torch.Tensor) -> torch.Tensor:
        self.forwards += 1
        if self.forwards == self.fail_at:
            raise RuntimeError("the fake model was told to fail")
        num_seqs = len(batch.context_len_S)
        self.max_batch = max(self.max_batch, num_seqs)
        assert batch.token_ids_T.dtype == batch.logits_rows_R.dtype == torch.int64
        assert batch.positions_T.dtype == batch.query_start.dtype == torch.int32
        assert batch.context_len_S.dtype == batch.block_table_SN.dtype == torch.int32
        assert batch.block_table_SN.is_contiguous()
        assert batch.query_start[0] == 0 and batch.query_start[-1] == len(batch.token_ids_T) == len(batch.positions_T)
        self.tokens_run += len(batch.token_ids_T)
        table = batch.block_table_SN.numpy()
        wanted = {int(row): i for i, row in enumerate(batch.logits_rows_R)}
        assert list(wanted) == sorted(wanted)
        out = np.zeros((len(wanted), VOCAB), dtype=np.float32)
        pool = kv.numpy()
        spans = list(zip(batch.query_start[:-1].tolist(), batch.query_start[1:].tolist(), strict=True))
        for s, (start, end) in enumerate(spans):
            positions = batch.positions_T[start:end].tolist()
            context = int(batch.context_len_S[s])
            assert positions == list(range(context - (end - start), context))
            assert not table[s, -(-context // BLOCK) :][table[s, -(-context // BLOCK) :] >= len(pool)].any()
            for t, p in zip(range(start, end), positions, strict=True):
                pool[table[s, p // BLOCK], 0, 0, 0, p % BLOCK] = float(batch.token_ids_T[t])
                pool[table[s, p // BLOCK], 0, 1, 0, p % BLOCK] = p
        for s, (start, end) in enumerate(spans):
            for t in range(start, end):
                if t in wanted:
                    p = int(batch.positions_T[t])
                    slots = [(table[s, i // BLOCK], i % BLOCK) for i in range(p + 1)]
                    tokens = [int(pool[b, 0, 0, 0, i]) for b, i in slots]
                    out[wanted[t]] = logits_of(tokens, [int(pool[b, 0, 1, 0, i]) for b, i in slots])
                    if self.nan_after is not None and tokens[: len(self.nan_after)] == self.nan_after:
                        out[wanted[t]] = np.nan
        return torch.from_numpy(out)


def reference_draw(
    logits: np.ndarray, tokens: list[int], num_prompt: int, sampling: SamplingParams
) -> tuple[int, float]:
    """One token and its logprob in float64: penalties, min_tokens, temperature, top-k, (seed, position) hash as the draw."""
    if np.isnan(logits).any():
        return -1, float("nan")
    x = logits.astype(np.float64)
    seen, output = set(tokens), tokens[num_prompt:]
    for token in seen:
        x[token] = x[token] / sampling.repetition_penalty if x[token] > 0 else x[token] * sampling.repetition_penalty
    for token in set(output):
        x[token] -= sampling.presence_penalty + sampling.frequency_penalty * output.count(token)
    if len(output) < sampling.min_tokens:
        x[[*sampling.stop_token_ids, *([] if sampling.ignore_eos else [EOS])]] = -np.inf
    logprob = x - x.max() - np.log(np.exp(x - x.max()).sum())
    if sampling.temperature == 0:
        token = int(x.argmax())
        return token, float(logprob[token])
    y = x / sampling.temperature
    if sampling.top_k:
        y[y < np.sort(y)[-sampling.top_k]] = -np.inf
    p = np.exp(y - y.max())
    digest = hashlib.blake2b(f"{sampling.seed}/{len(tokens)}".encode(), digest_size=8).digest()
    u = int.from_bytes(digest, "big") / 2**64
    token = min(int(np.searchsorted(np.cumsum(p / p.sum()), u, side="right")), VOCAB - 1)
    return token, float(logprob[token])


class ReferenceSampler:
    """``Sampler`` by ``reference_draw``, row by row."""

    def sample(self, logits, sequences):
        drawn = [
            reference_draw(row, list(seq.tokens), seq.num_prompt, seq.sampling)
            for row, seq in zip(logits.numpy(), sequences, strict=True)
        ]
        reported = [TokenLogprob(token, logprob) for token, logprob in drawn]
        wanted = [seq.sampling.logprobs is not None for seq in sequences]
        return [t for t, _ in drawn], [lp if want else None for lp, want in zip(reported, wanted, strict=True)]


def make_engine(
    blocks: int = 64, context: int = 1024, name: str = "e0", reference_sampler: bool = True, **settings
) -> Engine:
    """An engine over a fake model with ``blocks`` KV blocks."""
    settings = {"max_num_seqs": 8, "max_batched_tokens": 48, "watermark": 0.0, "dtype": "fp32"} | settings
    model = FakeModel(context)
    engine = Engine(EngineConfig(**settings), model, FakeTokenizer(), name, model.new_kv(blocks))
    if reference_sampler:
        engine.sampler = ReferenceSampler()
    return engine


@dataclass
class Result:
    token_ids: list[int]
    text: str
    finish_reason: str | None
    stop_reason: str | int | None
    logprobs: list[float]


def expected(request: Request) -> Result:
    """The request's outcome by definition: one token after the other from the whole list, text searched as a whole."""
    sampling, tokenizer = request.sampling, FakeTokenizer()
    tokens, num_prompt = list(request.prompt_token_ids), len(request.prompt_token_ids)
    logprobs: list[float] = []
    unchecked = 0
    while True:
        token, logprob = reference_draw(logits_of(tokens, list(range(len(tokens)))), tokens, num_prompt, sampling)
        tokens.append(token)
        logprobs.append(logprob)
        output = tokens[num_prompt:]
        is_eos = token == EOS and not sampling.ignore_eos
        if (is_eos or token in sampling.stop_token_ids) and len(output) > sampling.min_tokens:
            shown = output if sampling.include_stop_str_in_output else output[:-1]
            return Result(output, tokenizer.decode(shown), "stop", None if is_eos else token, logprobs)
        raw = b"".join(map(tokenizer.token_bytes, output))
        final = len(output) >= sampling.max_tokens
        text = raw.decode("utf-8", "replace") if final else _complete(raw)
        if len(output) <= sampling.min_tokens:
            unchecked = len(text)
        found = first_stop(text, sampling.stop, unchecked)
        if found is not None:
            end, stop = found
            cut = end if sampling.include_stop_str_in_output else end - len(stop)
            return Result(output, text[:cut], "stop", stop, logprobs)
        if final:
            return Result(output, text, "length", None, logprobs)


def _complete(raw: bytes) -> str:
    """Decoded without a last code point that more bytes may complete."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(raw)


def first_stop(text: str, stops: tuple[str, ...], start: int = 0) -> tuple[int, str] | None:
    """(end, stop string) of the match in ``text[start:]`` that ends first; the longest of several."""
    for end in range(start + 1, len(text) + 1):
        hits = [stop for stop in stops if text[start:end].endswith(stop)]
        if hits:
            return end, max(hits, key=len)
    return None


class Client:
    """Puts chunks together as an ingress does, strictly: no gaps, no repetition, nothing after the end."""

    def __init__(self) -> None:
        self.chunks: dict[str, list[TokenChunk]] = {}

    def take(self, chunks: list[TokenChunk]) -> None:
        for chunk in chunks:
            mine = self.chunks.setdefault(chunk.request_id, [])
            assert not mine or mine[-1].finish_reason is None, f"{chunk.request_id} goes on after its end"
            have = mine[0].index + sum(len(c.token_ids) for c in mine) if mine else chunk.index
            assert chunk.index == have, f"{chunk.request_id}: index {chunk.index}, have {have}"
            assert not mine or chunk.epoch >= mine[-1].epoch
            mine.append(chunk)

    def finished(self, request_id: str) -> bool:
        chunks = self.chunks.get(request_id)
        return bool(chunks) and chunks[-1].finish_reason is not None

    def result(self, request_id: str) -> Result:
        chunks = self.chunks[request_id]
        return Result(
            [t for c in chunks for t in c.token_ids],
            "".join(c.text for c in chunks),
            chunks[-1].finish_reason,
            chunks[-1].stop_reason,
            [lp.logprob for c in chunks for lp in c.logprobs or ()],
        )


def run(engine: Engine, client: Client, max_steps: int = 5000) -> None:
    """Step until there is no work."""
    for _ in range(max_steps):
        if not engine.has_work():
            return
        client.take(engine.step().chunks)
    raise AssertionError(f"still {engine.requests()} after {max_steps} steps")


def check(request: Request, client: Client) -> None:
    """The client's view equals the definition."""
    want, got = expected(request), client.result(request.request_id)
    if request.sampling.logprobs is None:
        want = replace(want, logprobs=[])
    assert got == want, f"{request}\n got {got}\nwant {want}"


def assert_clean(*engines: Engine) -> None:
    """Nothing is referenced, reserved, held or leaked."""
    for engine in engines:
        audit = engine.audit()
        assert audit.leaked == 0, audit.problems
        assert (audit.referenced, audit.sequences, audit.reservations, audit.holds) == (0, 0, 0, 0), audit
        assert audit.free + audit.cached == audit.total
        assert not engine.requests() and engine.scheduler.slots_taken == 0


def copy_blocks(src: Engine, src_ids, dst: Engine, dst_ids) -> None:
    """What a transport does."""
    assert len(src_ids) == len(dst_ids)
    dst.kv[list(dst_ids)] = src.kv[list(src_ids)]


def make_request(name: str, prompt, epoch: int = 0, priority: int = 0, arrival: float = 0.0, **sampling) -> Request:
    params = SamplingParams(**({"temperature": 0.0, "max_tokens": 24} | sampling))
    return Request(name, tuple(prompt), params, arrival, epoch=epoch, priority=priority, ingress_id="ingress")
