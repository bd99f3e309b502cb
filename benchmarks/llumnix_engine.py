"""Speed of the serving engine: decode, prefill and attention against transformers and torch, in one run on one machine.

    python -m benchmarks.llumnix_engine [--quick] [--threads 2] [--device cpu|cuda] --out DIR

The rival is transformers' ``generate`` (fp32, the same weights, as many threads), measured in alternation with ours.
Ratios are rival / ours, so above 1 is faster. Runs without Ray.
"""

from __future__ import annotations

import inspect
import math
import sys
import tarfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from actors.llumnix.engine.batch import ModelBatch
from actors.llumnix.engine.config import EngineConfig
from actors.llumnix.engine.loading import ModelLoadError, load_tokenizer, open_weights
from actors.llumnix.engine.model import Model
from actors.llumnix.engine.tokenizer import Tokenizer
from benchmarks.engine_arms import EngineArm, GenerateArm, read_bandwidth
from benchmarks.engine_attention import compare_attention
from benchmarks.harness import REPOSITORY, Benchmark, Samples, Target, alternate, print_rows
from benchmarks.transformers_twin import transformers_twin
from kernels.linear import Kind

CONTEXT = 256
DTYPES: tuple[Kind, ...] = ("fp32", "bf16", "int8")
BATCHES = (1, 16)
PERPLEXITY_TOKENS = 1536
TARGETS = [
    Target("decode_b1_fp32", 1.2, 1.4, meaning="generate fp32 / ours, decode step at context 256"),
    Target("decode_b16_fp32", 1.4, 1.8),
    Target("decode_b1_bf16", 1.9, 2.5),
    Target("decode_b16_bf16", 2.6, 3.5),
    Target("decode_b1_int8", 3.2, 4.5),
    Target("decode_b16_int8", 2.6, 3.5),
    Target("int8_perplexity_ratio", 1.06, 1.03, better="lower", meaning="perplexity int8 / fp32"),
    Target("prefill512_bf16", 2, 3, meaning="generate fp32 / ours, 512 tokens to the first token"),
    Target("decode_b1_bandwidth_fraction_fp32", 0.65, 0.85, meaning="weight bytes / step / streaming-read bandwidth"),
    Target("decode_b1_bandwidth_fraction_int8", 0.5, 0.75),
    Target("attention_vs_contiguous_sdpa_worst", 1, 1.5, meaning="torch SDPA on contiguous K, V / ours, worst case"),
]


def perplexity_text(tokenizer: Tokenizer) -> tuple[str, list[int]]:
    """(what it is, token ids): the beginning of Moby Dick where the shared data is, else docstrings of Python's library.

    Not Emma: the strength of the int8 path's equalisation was chosen on Emma and on docstrings.
    """
    archive = REPOSITORY.parent / "shared" / "data" / "text" / "gutenberg.tar.xz"
    if archive.is_file():
        with tarfile.open(archive) as tar:
            member = tar.extractfile("gutenberg/melville-moby_dick.txt")
            if member is not None:
                text = member.read(20_000).decode("utf-8", "ignore")
                return "Moby Dick (Melville), its beginning", tokenizer.encode(text)[:PERPLEXITY_TOKENS]
    import argparse
    import collections
    import subprocess

    docs = [inspect.getdoc(m) or "" for m in (argparse, collections, subprocess)]
    docs += [
        inspect.getdoc(f) or "" for m in (argparse, collections, subprocess) for f in vars(m).values() if callable(f)
    ]
    return "docstrings of Python's library", tokenizer.encode("\n\n".join(docs))[:PERPLEXITY_TOKENS]


def perplexity(model: Model, token_ids: list[int], chunk: int = 256) -> float:
    """exp of the mean negative log-likelihood of tokens 1 ... n-1, each given all before it, through the paged cache."""
    num_blocks = -(-len(token_ids) // 16)
    kv = model.new_kv(num_blocks)
    table = torch.arange(num_blocks, dtype=torch.int32)[None]
    total = 0.0
    for start in range(0, len(token_ids) - 1, chunk):
        ids = token_ids[start : min(start + chunk, len(token_ids) - 1)]
        end = start + len(ids)
        batch = ModelBatch(
            torch.tensor(ids),
            torch.arange(start, end, dtype=torch.int32),
            torch.tensor([0, len(ids)], dtype=torch.int32),
            torch.tensor([end], dtype=torch.int32),
            table,
            torch.arange(len(ids)),
        )
        targets = torch.tensor(token_ids[start + 1 : end + 1])
        logits = model.forward(batch, kv).double().cpu()
        total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
    return math.exp(total / (len(token_ids) - 1))


def report(bench: Benchmark, what: str, samples: Samples, ours: list[str], rival: str, **labels: object) -> None:
    """A row for each arm: median, spread, and the ratio to the rival."""
    for arm in [rival, *ours]:
        ratio = samples.ratio(rival, arm)
        bench.row(
            what=what,
            **labels,
            arm=arm,
            ms=round(samples.median(arm), 2),
            spread_percent=round(100 * samples.spread(arm), 1),
            rival_over_this=round(ratio.median, 3),
            low=round(ratio.low, 3),
            high=round(ratio.high, 3),
            rounds=ratio.count,
        )


def run_cpu(bench: Benchmark) -> None:
    """All figures of the table, on the CPU."""
    threads: int = bench.arguments.threads
    torch.set_num_threads(threads)
    device = torch.device("cpu")
    source = open_weights(bench.arguments.model)
    tokenizer = load_tokenizer(bench.arguments.model)
    rounds = 5 if bench.quick else 15
    bench.say(f"{bench.arguments.model}, {threads} threads: loading our engines and transformers")
    engines = {}
    for dtype in DTYPES:
        config = EngineConfig(
            bench.arguments.model, dtype, device="cpu", threads=threads, max_batched_tokens=512, kv_memory_mib=448
        )
        engines[dtype] = EngineArm(source, tokenizer, config, device)
        bench.row(what="engine", arm=dtype, path=engines[dtype].model.path, numerics=engines[dtype].model.numerics)
    generate = GenerateArm(transformers_twin(source), device)

    steps: dict[int, Samples] = {}
    for batch in BATCHES:
        bench.say(f"decode steps, batch {batch}, context {CONTEXT}")
        arms: dict[str, Callable[[], float]] = {"generate": partial(generate.decode_ms, batch, CONTEXT)}
        arms |= {d: partial(engines[d].decode_ms, batch, CONTEXT) for d in DTYPES}
        if batch == 1:
            arms["read"] = read_bandwidth()
        steps[batch] = alternate(arms, rounds, returns_value=True)
        report(bench, "decode", steps[batch], list(DTYPES), "generate", batch=batch, context=CONTEXT, threads=threads)
        for dtype in DTYPES:
            bench.figure(f"decode_b{batch}_{dtype}", steps[batch].ratio("generate", dtype).median)

    bandwidth = max(steps[1].values["read"])  # What the memory can do: noise only ever takes away.
    bench.row(what="streaming read", threads=threads, gb_per_s=round(bandwidth, 2))
    for dtype in DTYPES:
        gb_per_s = engines[dtype].model.weight_bytes / steps[1].median(dtype) / 1e6
        bench.figure(f"decode_b1_bandwidth_fraction_{dtype}", gb_per_s / bandwidth)

    bench.say("prefill of 512 tokens")
    arms = {"generate": partial(generate.prefill_ms, 512)}
    arms |= {d: partial(engines[d].prefill_ms, 512) for d in DTYPES}
    prefill = alternate(arms, 3 if bench.quick else 9, returns_value=True)
    report(bench, "prefill", prefill, list(DTYPES), "generate", batch=1, context=512, threads=threads)
    for dtype in DTYPES:
        bench.figure(f"prefill512_{dtype}", prefill.ratio("generate", dtype).median)

    name, token_ids = perplexity_text(tokenizer)
    bench.say(f"perplexity over {len(token_ids)} tokens of: {name}")
    values = {dtype: perplexity(engines[dtype].model, token_ids) for dtype in DTYPES}
    for dtype, value in values.items():
        bench.row(what="perplexity", arm=dtype, text=name, tokens=len(token_ids), perplexity=round(value, 4))
    bench.figure("int8_perplexity_ratio", values["int8"] / values["fp32"])
    bench.figure("bf16_perplexity_ratio", values["bf16"] / values["fp32"])

    bench.say("paged attention against contiguous SDPA")
    worst = math.inf
    for context in (256, 1024, 4096):
        for batch in (1, 8):
            samples = compare_attention(source.config, batch, context, 7 if bench.quick else 25)
            ratio = samples.ratio("sdpa", "paged")
            worst = min(worst, ratio.median)
            report(bench, "attention", samples, ["paged"], "sdpa", batch=batch, context=context, threads=threads)
    bench.figure("attention_vs_contiguous_sdpa_worst", worst)


def run_cuda(bench: Benchmark) -> None:
    """Decode and prefill on a GPU: against generate in bf16, and what determinism and graphs cost and save."""
    if not torch.cuda.is_available():
        raise ModelLoadError("--device cuda was asked for, and torch sees no CUDA device here")
    device = torch.device("cuda")
    source = open_weights(bench.arguments.model)
    tokenizer = load_tokenizer(bench.arguments.model)
    rounds = 5 if bench.quick else 15
    generate = GenerateArm(transformers_twin(source, torch.bfloat16), device)

    def engine(dtype: Kind, deterministic: bool, graphs: bool) -> EngineArm:
        config = EngineConfig(
            bench.arguments.model,
            dtype,
            device="cuda",
            kv_dtype="bf16" if dtype != "fp32" else "fp32",
            max_batched_tokens=512,
            kv_memory_mib=4096,
            deterministic=deterministic,
            cuda_graphs=graphs,
        )
        return EngineArm(source, tokenizer, config, device)

    engines = {
        "bf16": engine("bf16", False, True),
        "bf16 deterministic": engine("bf16", True, True),
        "bf16 without graphs": engine("bf16", False, False),
        "fp32": engine("fp32", False, True),
        "int8": engine("int8", True, True),
    }
    for batch in (1, 16, 64):
        bench.say(f"decode steps, batch {batch}, context {CONTEXT}")
        arms: dict[str, Callable[[], float]] = {"generate bf16": partial(generate.decode_ms, batch, CONTEXT)}
        arms |= {name: partial(e.decode_ms, batch, CONTEXT) for name, e in engines.items()}
        samples = alternate(arms, rounds, warmup=2, returns_value=True)
        report(bench, "decode", samples, list(engines), "generate bf16", batch=batch, context=CONTEXT, device="cuda")
        bench.figure(f"cuda_decode_b{batch}_bf16", samples.ratio("generate bf16", "bf16").median)
        bench.figure(f"cuda_decode_b{batch}_deterministic_cost", samples.ratio("bf16 deterministic", "bf16").median)
        bench.figure(f"cuda_decode_b{batch}_graphs_gain", samples.ratio("bf16 without graphs", "bf16").median)
    arms = {"generate bf16": partial(generate.prefill_ms, 512)}
    arms |= {name: partial(e.prefill_ms, 512) for name, e in engines.items()}
    samples = alternate(arms, rounds, warmup=2, returns_value=True)
    report(bench, "prefill", samples, list(engines), "generate bf16", batch=1, context=512, device="cuda")
    bench.figure("cuda_prefill512_bf16", samples.ratio("generate bf16", "bf16").median)
    bench.figure("cuda_prefill512_deterministic_cost", samples.ratio("bf16 deterministic", "bf16").median)


def main(arguments: list[str] | None = None) -> int:
    """Run on the chosen device; the exit code is the harness's, 2 when the model or a library is missing."""
    options: dict[str, dict[str, Any]] = {
        "--device": {"choices": ["cpu", "cuda"], "default": "cpu", "help": "cuda: other figures, named cuda_..."},
        "--threads": {"type": int, "default": 2, "help": "threads of both sides on the CPU"},
        "--model": {"default": EngineConfig().model, "help": "a Llama: the embedded one, a GGUF file, or a folder"},
    }
    cuda = "cuda" in (sys.argv[1:] if arguments is None else arguments)
    description = "Speed of the engine against transformers' generate and torch's attention."
    bench = Benchmark("llumnix_engine", description, [] if cuda else TARGETS, arguments, options)
    try:
        (run_cuda if bench.arguments.device == "cuda" else run_cpu)(bench)
    except (ModelLoadError, ImportError) as error:
        print(f"llumnix_engine cannot run: {error}", file=sys.stderr)
        return 2
    for what in dict.fromkeys(row["what"] for row in bench.rows):
        print_rows(what, [{k: v for k, v in row.items() if k != "what"} for row in bench.rows if row["what"] == what])
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
