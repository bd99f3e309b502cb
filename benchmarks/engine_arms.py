"""The contestants of benchmarks.llumnix_engine: our engine, and transformers' ``generate`` with the same weights.

Each arm measures one thing in one call: the median decode step (ms) of a batch at a context, or one prefill (ms). Both sides
are timed through what a user calls (Engine.step, generate), sampling and bookkeeping included.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from actors.llumnix.engine.config import EngineConfig
from actors.llumnix.engine.engine import Engine
from actors.llumnix.engine.loading import build_model
from actors.llumnix.engine.request import Request, SamplingParams
from actors.llumnix.engine.tokenizer import Tokenizer
from actors.llumnix.engine.weights.source import WeightSource

DECODE_STEPS = 16
"""Steps of one measurement; contexts grow by as many, so prompts are half of that shorter than the context asked for."""


def prompt_of(index: int, length: int, vocab_size: int) -> tuple[int, ...]:
    """A prompt of its own for every index: token ids spread over the vocabulary."""
    generator = torch.Generator().manual_seed(index)
    return tuple(torch.randint(20, vocab_size, (length,), generator=generator).tolist())


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class EngineArm:
    """One Engine over one model."""

    def __init__(self, source: WeightSource, tokenizer: Tokenizer, config: EngineConfig, device: torch.device):
        self.model = build_model(source, config, device)
        num_blocks = (config.kv_memory_mib << 20) // self.model.kv_bytes_per_block()
        self.engine = Engine(config, self.model, tokenizer, "benchmark", self.model.new_kv(num_blocks))
        self._device = device
        self._count = 0

    def _add(self, prompt: tuple[int, ...], max_tokens: int) -> str:
        self._count += 1
        name = f"r{self._count}"
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        self.engine.add_request(Request(name, prompt, sampling, time.time()))
        return name

    def decode_ms(self, batch: int, context: int) -> float:
        """Median decode step of ``batch`` sequences around ``context`` tokens. The prompts are found in the prefix cache
        after the first time."""
        length = context - DECODE_STEPS // 2
        vocab = self.model.config.vocab_size
        names = [self._add(prompt_of(i, length, vocab), DECODE_STEPS + 40) for i in range(batch)]
        while self.engine.step().num_decodes < batch:
            pass
        times = []
        for _ in range(DECODE_STEPS):
            began = time.perf_counter()
            done = self.engine.step()
            times.append(time.perf_counter() - began)
            if done.failure is not None or done.num_decodes != batch:
                raise RuntimeError(f"the engine did not decode {batch} sequences in a step: {done}")
        for name in names:
            self.engine.abort(name)
        self.engine.step()
        return statistics.median(times) * 1e3

    def prefill_ms(self, length: int) -> float:
        """From an added request to its first token, a prompt that was never seen."""
        self._count += 1
        prompt = prompt_of(1_000_000 + self._count, length, self.model.config.vocab_size)
        began = time.perf_counter()
        self._add(prompt, 1)
        while not any(chunk.token_ids for chunk in self.engine.step().chunks):
            pass
        return (time.perf_counter() - began) * 1e3


class GenerateArm:
    """transformers' ``generate``: greedy, with its KV cache; the time of each step is taken inside it."""

    def __init__(self, twin: Any, device: torch.device, implementation: str = "sdpa"):
        twin.set_attn_implementation(implementation)
        self._twin = twin.to(device)
        self._device = device
        self._caches: dict[tuple[int, int], Any] = {}

    @torch.inference_mode()
    def decode_ms(self, batch: int, context: int) -> float:
        """Median time from token to token of a batch around ``context`` tokens; the prompt's cache is made once."""
        length = context - DECODE_STEPS // 2
        vocab = self._twin.config.vocab_size
        ids = torch.tensor([prompt_of(i, length, vocab) for i in range(batch)], device=self._device)
        if (batch, length) not in self._caches:
            self._caches[batch, length] = self._twin(ids[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
        times: list[float] = []

        def clock(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            """A stopping criterion that never stops: called by ``generate`` once per token."""
            _synchronise(self._device)
            times.append(time.perf_counter())
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

        self._generate(
            ids, DECODE_STEPS + 1, past_key_values=copy.deepcopy(self._caches[batch, length]), stopping_criteria=[clock]
        )
        return statistics.median(b - a for a, b in itertools.pairwise(times)) * 1e3

    @torch.inference_mode()
    def prefill_ms(self, length: int) -> float:
        """``generate`` of one token after a prompt."""
        ids = torch.tensor([prompt_of(7, length, self._twin.config.vocab_size)], device=self._device)
        _synchronise(self._device)
        began = time.perf_counter()
        self._generate(ids, 1)
        _synchronise(self._device)
        return (time.perf_counter() - began) * 1e3

    def _generate(self, ids: torch.Tensor, new_tokens: int, stopping_criteria: Any = None, **options: Any) -> None:
        from transformers import StoppingCriteriaList

        self._twin.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=None,
            stopping_criteria=None if stopping_criteria is None else StoppingCriteriaList(stopping_criteria),
            **options,
        )


def read_bandwidth(num_bytes: int = 512 << 20) -> Callable[[], float]:
    """An arm that streams a buffer far larger than any cache once, with torch's quickest reduction, and returns GB/s."""
    buffer = torch.ones(num_bytes // 4)

    def read() -> float:
        began = time.perf_counter()
        buffer.amax()
        return buffer.nbytes / (time.perf_counter() - began) / 1e9

    return read
