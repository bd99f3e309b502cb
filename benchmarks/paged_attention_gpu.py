"""Paged attention in Triton on a GPU: is it right, and how fast beside torch's attention over contiguous memory?

``python -m benchmarks.paged_attention_gpu [--quick] [--flex]``. Every kernel runs inside a CUDA graph, as in a decode step, so
that launch overhead is left out on both sides. Contiguous attention reads no block table and needs no copies: it is the bound
that paging is measured against, not a replacement. Without a GPU it says so and ends with 0. Needs no Ray.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from benchmarks.harness import Benchmark, Samples, Target, alternate, print_rows
from kernels.paged_attention import BLOCK_SIZE, paged_attention, reference

TARGETS = [
    Target("max_error_fp32", 1e-5, 3e-6, "lower", "against float64, worst shape"),
    Target("max_error_bf16", 3e-2, 1e-2, "lower", "against float64, worst shape"),
    Target("decode_bit_mismatches", 0, 0, "lower", "outputs of a decode that change with its batch"),
    Target("decode_vs_contiguous_sdpa_worst", 0.8, 1.2, "higher", "torch SDPA / paged, worst context and batch"),
    Target("prefill_vs_contiguous_sdpa_worst", 0.4, 0.7, "higher", "torch SDPA / paged, worst length"),
]
MODELS = {"llama-8b": (32, 8, 128), "smollm2-135m": (9, 3, 64)}
"""(query heads, KV heads, head_dim)"""


@dataclass(frozen=True)
class Case:
    """S sequences of equal context whose last ``tokens`` positions are queried, paged and contiguous."""

    q: torch.Tensor
    kv_layer: torch.Tensor
    block_table_SN: torch.Tensor
    query_start: torch.Tensor
    context_len_S: torch.Tensor
    q_SHTD: torch.Tensor
    k_SHND: torch.Tensor
    v_SHND: torch.Tensor
    tokens: int
    context: int

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5

    def paged(self, deterministic: bool = False) -> torch.Tensor:
        longest = 1 if self.tokens == 1 else None
        return paged_attention(
            self.q,
            self.kv_layer,
            self.block_table_SN,
            self.query_start,
            self.context_len_S,
            self.scale,
            backend="triton",
            max_query_len=longest,
            max_context_len=self.context,
            deterministic=deterministic,
        )

    def contiguous(self) -> torch.Tensor:
        causal = self.tokens == self.context and self.tokens > 1
        return F.scaled_dot_product_attention(self.q_SHTD, self.k_SHND, self.v_SHND, is_causal=causal, enable_gqa=True)


def make_case(
    sequences: int, context: int, tokens: int, shape: tuple[int, int, int], dtype: torch.dtype, seed: int = 0
) -> Case:
    """Random keys and values, the same in the pool (blocks in random order) and in contiguous tensors."""
    heads, kv_heads, head_dim = shape
    generator = torch.Generator("cuda").manual_seed(seed)
    columns = -(-context // BLOCK_SIZE)
    blocks = sequences * columns
    pool = torch.zeros(blocks, 1, 2, kv_heads, head_dim * BLOCK_SIZE, dtype=dtype, device="cuda")
    for layer in pool.unbind(0):
        layer.normal_(generator=generator)
    kv_layer = pool[:, 0]
    table = torch.randperm(blocks, device="cuda", generator=generator).int().view(sequences, columns)
    gathered = [reference.gather(kv_layer, row, context) for row in table]
    q = torch.randn(sequences * tokens, heads, head_dim, device="cuda", generator=generator).to(dtype)
    return Case(
        q=q,
        kv_layer=kv_layer,
        block_table_SN=table,
        query_start=torch.arange(0, sequences * tokens + 1, tokens, dtype=torch.int32, device="cuda"),
        context_len_S=torch.full((sequences,), context, dtype=torch.int32, device="cuda"),
        q_SHTD=q.view(sequences, tokens, heads, head_dim).transpose(1, 2).contiguous(),
        k_SHND=torch.stack([k for k, _ in gathered]).contiguous(),
        v_SHND=torch.stack([v for _, v in gathered]).contiguous(),
        tokens=tokens,
        context=context,
    )


def captured(run: Callable[[], torch.Tensor], calls: int) -> Callable[[], float]:
    """``calls`` runs in one CUDA graph; the returned function replays it and gives microseconds per run."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles outside the capture
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()

    def measure() -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) * 1e3 / calls

    return measure


def compare(arms: dict[str, Callable[[], torch.Tensor]], repeats: int, calls: int) -> Samples:
    return alternate({name: captured(run, calls) for name, run in arms.items()}, repeats, returns_value=True)


def check(bench: Benchmark) -> None:
    """Errors against float64 over shapes and dtypes, and whether a decode's bits change with its batch."""
    mismatches = 0
    for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items():
        worst = 0.0
        for shape in [*MODELS.values(), (8, 1, 80), (16, 16, 64)]:
            for context, tokens in ((700, 1), (700, 100), (16, 16), (257, 1)):
                case = make_case(3, context, tokens, shape, dtype, seed=context)
                arguments = (case.q.double(), case.kv_layer, case.block_table_SN, case.query_start, case.context_len_S)
                exact = reference.paged_attention(*arguments, case.scale)
                for deterministic in (False, True):
                    got = case.paged(deterministic)
                    worst = max(worst, (got.double() - exact).abs().max().item())
                if tokens == 1:
                    last = slice(2, 3)
                    alone = paged_attention(
                        case.q[last],
                        case.kv_layer,
                        case.block_table_SN[last],
                        case.query_start[:2],
                        case.context_len_S[last],
                        case.scale,
                        backend="triton",
                        max_query_len=1,
                    )
                    mismatches += int((alone != case.paged()[last]).sum())
        bench.figure(f"max_error_{name}", worst)
    bench.figure("decode_bit_mismatches", mismatches)


def time_decode(bench: Benchmark, repeats: int) -> None:
    contexts = (256, 1024, 4096) if bench.quick else (256, 1024, 4096, 16384)
    worst = float("inf")
    for model, shape in MODELS.items():
        for context in contexts:
            for batch in (1, 8, 64):
                case = make_case(batch, context, 1, shape, torch.bfloat16)
                arms: dict[str, Callable[[], torch.Tensor]] = {"paged": case.paged, "sdpa": case.contiguous}
                if bench.arguments.flex:
                    arms["flex"] = flex(case)
                samples = compare(arms, repeats, calls=20)
                ratio = samples.ratio("sdpa", "paged").median
                worst = min(worst, ratio)
                kv_bytes = case.k_SHND.nbytes + case.v_SHND.nbytes
                bench.row(
                    what="decode",
                    model=model,
                    context=context,
                    batch=batch,
                    sdpa_over_paged=ratio,
                    flex_over_paged=samples.ratio("flex", "paged").median if "flex" in arms else None,
                    deterministic_over_paged=None,
                    paged_us=samples.median("paged"),
                    paged_gb_per_s=kv_bytes / samples.median("paged") / 1e3,
                )
        bench.say(f"decode of {model} measured")
    bench.figure("decode_vs_contiguous_sdpa_worst", worst)


def time_prefill(bench: Benchmark, repeats: int) -> None:
    worst, cost = float("inf"), 0.0
    for model, shape in MODELS.items():
        for length in (512, 2048) if bench.quick else (512, 2048, 8192):
            case = make_case(1, length, length, shape, torch.bfloat16)
            arms: dict[str, Callable[[], torch.Tensor]] = {
                "paged": case.paged,
                "sdpa": case.contiguous,
                "deterministic": lambda case=case: case.paged(True),  # type: ignore[misc]
            }
            samples = compare(arms, repeats, calls=3)
            ratio = samples.ratio("sdpa", "paged").median
            slower = samples.ratio("deterministic", "paged").median
            worst, cost = min(worst, ratio), max(cost, slower)
            bench.row(
                what="prefill",
                model=model,
                context=length,
                batch=1,
                sdpa_over_paged=ratio,
                flex_over_paged=None,
                deterministic_over_paged=slower,
                paged_us=samples.median("paged"),
                paged_gb_per_s=None,
            )
        bench.say(f"prefill of {model} measured")
    bench.figure("prefill_vs_contiguous_sdpa_worst", worst)
    bench.figure("prefill_deterministic_cost_worst", cost)


def flex(case: Case) -> Callable[[], torch.Tensor]:
    """torch's flex_attention, compiled, over the contiguous tensors."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(case.q_SHTD, case.k_SHND, case.v_SHND, enable_gqa=True)


def main() -> int:
    """Runs everything; returns the exit code."""
    flag = {"--flex": {"action": "store_true", "help": "time torch's flex_attention as well (compiles every shape)"}}
    bench = Benchmark(
        "paged_attention_gpu", "Paged attention in Triton against float64 and torch SDPA.", TARGETS, options=flag
    )
    if not torch.cuda.is_available():
        print("skipped: this benchmark needs a CUDA GPU and there is none here")
        return 0
    try:
        import triton
    except ImportError:
        print("skipped: Triton is not installed (pip install 'sextant[gpu]')")
        return 0
    bench.say(f"{torch.cuda.get_device_name()}, Triton {triton.__version__}")
    check(bench)
    repeats = 7 if bench.quick else 21
    time_decode(bench, repeats)
    time_prefill(bench, repeats)
    print_rows("paged attention", bench.rows)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
