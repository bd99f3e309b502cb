"""The serving engine: requests in, tagged chunks of tokens out, one ``step()`` at a time. No Ray, no threads, no clock but
for measuring; ``EngineLoop`` drives it, and every method is called on the loop's thread between steps.

A request's tokens depend on nothing but the request: logits are the same bits in any batch (the model's promise), and the
random number of a token is a function of (seed, position in the sequence).
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict, deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from actors.llumnix.engine.batch_builder import BatchBuilder
from actors.llumnix.engine.block_manager import BlockAudit, BlockManager, root_hash
from actors.llumnix.engine.config import EngineConfig
from actors.llumnix.engine.migration_hooks import EngineError, MigrationHooks
from actors.llumnix.engine.request import FinishReason, Request, RequestError, TokenChunk, TokenLogprob
from actors.llumnix.engine.sampler import Sampler
from actors.llumnix.engine.sampling_params import validate, validate_length
from actors.llumnix.engine.scheduler import Plan, Scheduler
from actors.llumnix.engine.sequence import Sequence, SequenceState
from actors.llumnix.load import InstanceLoad, RequestLoad

if TYPE_CHECKING:
    import torch

__all__ = ["Engine", "EngineError", "StepOutput"]

log = logging.getLogger(__name__)

MAX_FENCES = 8192
"""Ended requests whose epoch is remembered, so that what was on its way in when they ended is refused."""
EVERY_EPOCH = (1 << 63) - 1
"""Above every epoch that a scheduler issues (integers throughout: a float would round epochs of nanoseconds)."""
STEP_WINDOW = 33
"""Decode steps in the moving median."""


@dataclass(frozen=True)
class StepOutput:
    """What one step did. ``failure`` is set if the model or the sampler raised: every request was then ended with an error."""

    chunks: list[TokenChunk]
    num_tokens: int = 0
    num_sequences: int = 0
    num_decodes: int = 0
    num_preempted: int = 0
    duration_s: float = 0.0
    failure: Exception | None = None


class Engine(MigrationHooks):
    """One instance's requests, KV blocks and batches over one model.

    ``kv`` is the pool ``[num_blocks, layers, 2, kv_heads, head_dim * block_size]``; its first dimension says how many
    blocks there are.
    """

    def __init__(self, config: EngineConfig, model: Any, tokenizer: Any, instance_id: str, kv: torch.Tensor):
        self.config = config
        self.model = model
        self.tokenizer = tokenizer
        self.instance_id = instance_id
        self.kv = kv
        self.block_size = config.block_size
        self.blocks = BlockManager(kv.shape[0], config.block_size, config.watermark, config.prefix_caching)
        self.kv_tokens = self.blocks.num_blocks * config.block_size
        """Tokens that all KV memory holds."""
        self.max_model_len = min(config.max_model_len, model.config.max_position_embeddings)
        self.vocab_size: int = model.config.vocab_size
        self.max_blocks = -(-min(self.max_model_len, self.kv_tokens) // config.block_size)
        self.scheduler = Scheduler(
            self.blocks, config.max_num_seqs, config.max_batched_tokens, root_hash(str(model.numerics))
        )
        self.sampler = Sampler(self.scheduler.max_num_seqs, self.vocab_size)
        self.eos_token_ids = frozenset(model.eos_token_ids)
        self.draining = False
        """Takes no migration in; told to the scheduler in the load."""
        self.num_steps = 0
        self._sequences: dict[str, Sequence] = {}
        self._detached: dict[str, Sequence] = {}
        self._fences: OrderedDict[str, int] = OrderedDict()
        """Request -> newest epoch that was ended here."""
        self._chunks: list[TokenChunk] = []
        """Made between steps."""
        self._builder = BatchBuilder(config.max_batched_tokens, self.scheduler.max_num_seqs, self.max_blocks)
        self._token_bytes: dict[int, bytes] = {}
        self._decode_ms: deque[float] = deque(maxlen=STEP_WINDOW)
        self._waiting_load: tuple[int, tuple[RequestLoad, ...]] = (-1, ())

    # ---- requests --------------------------------------------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        """Queue a request. RequestError if it can never be served, or if it was aborted before it arrived.

        A request that comes with output tokens (continued from a journal) goes on after them; if they already end it,
        it ends at once with an empty last chunk.
        """
        self.check_request(request)
        if request.epoch <= self._fences.get(request.request_id, -1):
            raise RequestError(f"request {request.request_id} was aborted before it arrived")
        known = self._sequences.get(request.request_id)
        if known is not None:
            if known.epoch >= request.epoch:
                raise RequestError(f"request {request.request_id} is already being served", "request_id")
            self._forget(known)
        seq = Sequence(request, self.eos_token_ids, self.max_blocks)
        for n, token_id in enumerate(request.output_token_ids, start=1):
            text, reason, stop = self._advance_text(seq, token_id, n)
            if reason is not None:
                if n == seq.num_output:
                    self._chunks.append(self._chunk(seq, (), text, reason, stop))
                    return
                raise RequestError(f"output_token_ids go on after the end of the request at token {n}")
        self._sequences[seq.request_id] = seq
        self.scheduler.add(seq)

    def check_request(self, request: Request) -> None:
        """Raise RequestError, naming the parameter, if the request can never be served by this engine."""
        validate(request.sampling, self.vocab_size)
        validate_length(len(request.prompt_token_ids), request.sampling.max_tokens, self.max_model_len, self.kv_tokens)
        for ids, what in ((request.prompt_token_ids, "prompt"), (request.output_token_ids, "output_token_ids")):
            if ids and not (min(ids) >= 0 and max(ids) < self.vocab_size):
                raise RequestError(f"{what} holds a token id outside 0 ... {self.vocab_size - 1}", what)
        if len(request.output_token_ids) > request.sampling.max_tokens:
            raise RequestError("output_token_ids has more tokens than max_tokens", "max_tokens")

    def abort(self, request_id: str, up_to_epoch: int | None = None) -> bool:
        """End a request and free its blocks; True if it was here.

        With ``up_to_epoch`` only an owner of that epoch or older is ended, and silently: another instance may own the
        request under a newer one. Without, every epoch is ended and a last chunk says ``abort``. Either way what still
        arrives under an epoch ended here (``add_request``, ``attach``, ``reattach``) is refused.
        """
        seq = self._end(request_id, EVERY_EPOCH if up_to_epoch is None else up_to_epoch)
        if seq is not None and up_to_epoch is None and seq.state is not SequenceState.DETACHED:
            self._chunks.append(self._chunk(seq, (), "", "abort"))
        return seq is not None

    def abort_ingress(self, ingress_id: str) -> int:
        """End all requests of an ingress that is gone, without last chunks; returns how many there were."""
        mine = self.requests(ingress_id)
        for request_id in mine:
            self._end(request_id, EVERY_EPOCH)
        return len(mine)

    def _end(self, request_id: str, epoch: int) -> Sequence | None:
        """Fence ``epoch`` and older; the sequence that was ended by it, if any."""
        self._fences[request_id] = max(epoch, self._fences.pop(request_id, -1))
        if len(self._fences) > MAX_FENCES:
            self._fences.popitem(last=False)
        seq = self._sequences.get(request_id)
        if seq is None or seq.epoch > epoch:
            return None
        if seq.state is not SequenceState.DETACHED:  # A detached one ends at reattach (refused) or at release.
            self._forget(seq)
        return seq

    def requests(self, ingress_id: str | None = None) -> tuple[str, ...]:
        """Ids of the requests here, or of those whose tokens go to one ingress."""
        return tuple(i for i, s in self._sequences.items() if ingress_id is None or s.request.ingress_id == ingress_id)

    def has_work(self) -> bool:
        """Whether a step would do something (or wait for blocks that migrations hold)."""
        return bool(self.scheduler.running or self.scheduler.waiting or self._chunks)

    def take_chunks(self) -> list[TokenChunk]:
        """Chunks made since the last step (aborts, requests that ended at once)."""
        chunks, self._chunks = self._chunks, []
        return chunks

    # ---- one step --------------------------------------------------------------------------------------------------

    def step(self) -> StepOutput:
        """Run one batch. Does nothing but hand out chunks if no sequence can run."""
        start = time.monotonic()
        plan = self.scheduler.schedule()
        if not plan.sequences:
            return StepOutput(self.take_chunks(), num_preempted=plan.num_preempted)
        rows = [seq for seq, num in zip(plan.sequences, plan.counts, strict=True) if seq.num_uncomputed == num]
        try:
            logits = self.model.forward(self._builder.build(plan), self.kv)
            tokens, logprobs = self.sampler.sample(logits, rows) if rows else ([], [])
        except Exception as error:
            log.exception("engine %s: a step of %d tokens failed", self.instance_id, plan.num_tokens)
            return self._fail_all(error, plan)
        done = self.scheduler.postprocess(plan, tokens)
        now = time.monotonic()
        for seq, token_id, logprob in zip(done, tokens, logprobs, strict=True):
            self._emit(seq, token_id, logprob, now)
        duration_s = time.monotonic() - start
        self.num_steps += 1
        if plan.num_decodes == len(plan.sequences):
            self._decode_ms.append(duration_s * 1e3)
        return StepOutput(
            self.take_chunks(),
            plan.num_tokens,
            len(plan.sequences),
            plan.num_decodes,
            plan.num_preempted,
            duration_s,
        )

    def _emit(self, seq: Sequence, token_id: int, logprob: TokenLogprob | None, now: float) -> None:
        """Chunk for one new token; whatever goes wrong here is this request's own trouble."""
        try:
            if token_id < 0:
                raise ValueError("the model's logits are not numbers, so no token can be chosen")
            text, reason, stop = self._advance_text(seq, token_id, seq.num_output)
            reported = None if logprob is None else (logprob,)
            chunk = self._chunk(seq, (token_id,), text, reason, stop, reported, now=now)
        except Exception as error:
            log.exception("engine %s: request %s failed", self.instance_id, seq.request_id)
            seq.tokens.pop()
            self._fail(seq, f"internal error: {error}")
            return
        self._chunks.append(chunk)
        if reason is not None:
            self._forget(seq)

    def _advance_text(self, seq: Sequence, token_id: int, n: int) -> tuple[str, FinishReason | None, str | int | None]:
        """Text that the ``n``-th output token makes final, and whether and why the request ends with it."""
        sampling = seq.sampling
        check = n > sampling.min_tokens
        if token_id in seq.stop_token_ids and check:
            text = ""
            if sampling.include_stop_str_in_output:
                text, _ = seq.text.push(self._bytes_of(token_id), check_stop=False)
            stop_id = None if token_id in self.eos_token_ids and not sampling.ignore_eos else token_id
            return text + seq.text.finish(check_stop=False)[0], "stop", stop_id
        text, stop = seq.text.push(self._bytes_of(token_id), check)
        if stop is not None:
            return text, "stop", stop
        if n >= sampling.max_tokens:
            rest, stop = seq.text.finish(check)
            return text + rest, "length" if stop is None else "stop", stop
        return text, None, None

    def _bytes_of(self, token_id: int) -> bytes:
        known = self._token_bytes.get(token_id)
        if known is None:
            known = self._token_bytes[token_id] = self.tokenizer.token_bytes(token_id)
        return known

    def _chunk(
        self,
        seq: Sequence,
        token_ids: tuple[int, ...],
        text: str,
        reason: FinishReason | None = None,
        stop: str | int | None = None,
        logprobs: tuple[TokenLogprob, ...] | None = None,
        error: str | None = None,
        now: float | None = None,
    ) -> TokenChunk:
        return TokenChunk(
            seq.request_id,
            seq.epoch,
            seq.num_output - len(token_ids),
            token_ids,
            text,
            seq.request.ingress_id,
            logprobs,
            reason,
            stop,
            error,
            seq.num_prompt,
            seq.cached_tokens,
            seq.num_preemptions,
            time.monotonic() if now is None else now,
        )

    def _forget(self, seq: Sequence) -> None:
        """The request has no business here any more: out of batch or queue, blocks freed."""
        self.scheduler.leave(seq)
        self.scheduler.drop_blocks(seq)
        del self._sequences[seq.request_id]
        self._detached.pop(seq.request_id, None)
        self._count_slots()

    def _fail(self, seq: Sequence, message: str) -> None:
        self._chunks.append(self._chunk(seq, (), "", "error", error=message))
        self._forget(seq)

    def _fail_all(self, error: Exception, plan: Plan) -> StepOutput:
        """The batch's state is unknown: no request may go on from it."""
        for seq in list(self._sequences.values()):
            self._fail(seq, f"the instance failed in a step: {error}")
        return StepOutput(self.take_chunks(), plan.num_tokens, len(plan.sequences), failure=error)

    # ---- what others see -------------------------------------------------------------------------------------------

    @property
    def step_ms(self) -> float:
        """Moving median of the pure decode steps; 0 before the first."""
        times = sorted(self._decode_ms)
        return times[len(times) // 2] if times else 0.0

    def load(self) -> InstanceLoad:
        """This instance's load, for the scheduler."""
        scheduler, size = self.scheduler, self.block_size
        if self._waiting_load[0] != scheduler.waiting_version:
            self._waiting_load = (scheduler.waiting_version, tuple(s.load(size) for s in scheduler.waiting))
        return InstanceLoad(
            instance_id=self.instance_id,
            step=self.num_steps,
            total_blocks=self.blocks.num_blocks,
            free_blocks=self.blocks.num_available,
            block_size=size,
            running=tuple([s.load(size) for s in (*scheduler.running, *self._detached.values())]),
            waiting=self._waiting_load[1],
            reserved_blocks=self.blocks.num_reserved,
            migrating=tuple({*self.blocks.holding, *self.blocks.reserving, *self._detached}),
            draining=self.draining,
            preemptions=scheduler.num_preemptions,
            step_ms=self.step_ms,
            timestamp=time.time(),
        )

    def audit(self) -> BlockAudit:
        """Every block accounted for, also against the requests that this engine knows."""
        audit = self.blocks.audit()
        strays = [f"blocks of unknown request {owner}" for owner in self.blocks.tables if owner not in self._sequences]
        strays += [
            f"request {seq.request_id} and the block manager disagree about its block table"
            for seq in self._sequences.values()
            if seq.block_table != self.blocks.tables.get(seq.request_id, [])
        ]
        return replace(audit, leaked=audit.leaked + len(strays), problems=audit.problems + tuple(strays))
