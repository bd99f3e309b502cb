"""A sparse language model served: decode speed, perplexity and size against the same model dense; and an LSTM stepped at batch 1.

    python -m benchmarks.balanced_serving [--quick] [--threads 2] [--method sparsegpt] --out DIR

SmolLM2-135M is pruned to 50 and 75 % (balanced, blocks of 32), recovered on text, written packed, and loaded by the serving
engine. The rival is that engine's own dense kernels with the same value type, measured in alternation. ``--quick`` prunes by
Wanda's scores of little text and without recovery, so its perplexities are far worse than the full run's; speed and size do not
depend on it. Runs without Ray.
"""

from __future__ import annotations

import copy
import inspect
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from actors.llumnix.engine.config import EngineConfig
from actors.llumnix.engine.loading import ModelLoadError, load_tokenizer, open_weights
from actors.llumnix.engine.tokenizer import Tokenizer
from actors.llumnix.engine.weights.source import WeightSource
from apps.balanced_sparsity.pruning.one_shot import Method
from apps.balanced_sparsity.pruning.packed_modules import BalancedLSTM, Matrix, lstm_names
from apps.balanced_sparsity.pruning.packing import pack_
from apps.balanced_sparsity.pruning.patterns import Pattern
from apps.balanced_sparsity.pruning.schedule import GradualSchedule
from apps.balanced_sparsity.pruning.sparsifier import Sparsifier
from apps.balanced_sparsity.serving.checkpoint import CheckpointSize, save_checkpoint
from apps.balanced_sparsity.serving.llama import Llama
from apps.balanced_sparsity.serving.lstm import LstmServer
from apps.balanced_sparsity.serving.sparsify import Recovery, sparsify_
from benchmarks.engine_arms import EngineArm
from benchmarks.harness import REPOSITORY, Benchmark, Target, alternate, print_rows
from benchmarks.llumnix_engine import perplexity, perplexity_text
from kernels.linear import Kind

BLOCK = 32
CONTEXT = 256
SPARSITIES = {50: 0.5, 75: 0.75}
TOKENS = 512
"""Of one calibration sequence."""
HEADLINE: Kind = "bf16"
"""The engine's default, whose ratio bears the plain key; the others bear their name at its end."""
HIDDEN = 1500
"""Units of a layer of the LSTM (Zaremba et al., 2014, large)."""
LSTM_SPARSITIES = {80: 0.8, 90: 0.9}
MODULES = (
    *("json", "logging", "pathlib", "email", "http.client", "unittest.mock", "typing", "decimal", "asyncio", "zipfile"),
    *("tarfile", "statistics", "random", "datetime", "threading", "socket", "inspect", "optparse", "doctest", "heapq"),
)
"""Of Python's library, for calibration where there are no books; not those of the perplexity text."""
TARGETS = [
    Target("decode_tokens_vs_dense_75", 1.4, 2, meaning=f"dense / sparse decode step, both {HEADLINE}, batch 1"),
    Target(
        "checkpoint_bytes_vs_ideal", 1.05, 1.02, better="lower", meaning="balanced matrices on disk / without padding"
    ),
    Target("lstm_step_vs_dense_80", 1.4, 2, meaning="faster of two dense / packed, fp32, 2 x 1500, one frame"),
    Target("lstm_step_vs_dense_90", 2, 3),
    Target("lstm_largest_difference", 1e-5, 1e-5, better="lower", meaning="packed against nn.LSTM, outputs and states"),
]


@dataclass(frozen=True)
class Plan:
    """How much is done."""

    sequences: int
    method: Method
    recovery: Recovery
    kinds: tuple[Kind, ...]
    rounds: int


def calibration_text(tokenizer: Tokenizer, sequences: int) -> tuple[str, torch.Tensor]:
    """(what it is, int64 [sequences, TOKENS]): from the middles of books without Moby Dick, or docstrings of other modules."""
    archive = REPOSITORY.parent / "shared" / "data" / "text" / "gutenberg.tar.xz"
    found: list[list[int]] = []
    if archive.is_file():
        what = "books (Gutenberg), without Moby Dick"
        with tarfile.open(archive) as tar:
            books = [m for m in tar.getmembers() if m.name.endswith(".txt") and "moby" not in m.name]
            pieces = -(-sequences // len(books))
            for member in books:
                file = tar.extractfile(member)
                text = "" if file is None else file.read().decode("utf-8", "ignore")
                for piece in range(pieces):
                    begin = len(text) * (2 * piece + 1) // (2 * pieces)
                    found.append(tokenizer.encode(text[begin : begin + 8 * TOKENS])[:TOKENS])
        found = [ids for ids in found if len(ids) == TOKENS]
    else:
        what = "docstrings of Python's library, of other modules than the perplexity's"
        docs = []
        for module in map(import_module, MODULES):
            docs += [inspect.getdoc(item) or "" for item in (module, *vars(module).values()) if callable(item)]
        ids = tokenizer.encode("\n\n".join(dict.fromkeys(docs)))
        found = [ids[i : i + TOKENS] for i in range(0, len(ids) - TOKENS, TOKENS)]
    step = max(1, len(found) // sequences)  # of all books, not of the first ones
    return what, torch.tensor(found[::step][:sequences])


def measure_language_model(bench: Benchmark, plan: Plan, folder: Path) -> None:
    """Decode, prefill, perplexity and size of the dense engine and of each sparse one."""
    name: str = bench.arguments.model
    source, tokenizer = open_weights(name), load_tokenizer(name)
    dense = Llama.from_source(source, max(TOKENS, 512))
    what, calibration = calibration_text(tokenizer, plan.sequences)
    text_name, text = perplexity_text(tokenizer)
    text = text[:512] if bench.quick else text
    bench.say(f"recovery text: {what}, {calibration.numel()} tokens; perplexity text: {text_name}, {len(text)} tokens")
    sizes: dict[int, dict[Kind, CheckpointSize]] = {}
    for percent, sparsity in SPARSITIES.items():
        began = time.monotonic()
        model = copy.deepcopy(dense)
        out = sparsify_(
            model, calibration, Pattern.balanced(BLOCK), sparsity,
            method=plan.method, recovery=plan.recovery, told=_every(10, bench.say),
        )  # fmt: skip
        bench.row(what="sparsify", percent=percent, method=plan.method, tokens=calibration.numel(),
                  reconstruct=plan.recovery.reconstruct, steps=plan.recovery.steps, seconds=round(time.monotonic() - began, 1),
                  last_layer_error=round(out.layer_errors[-1], 3))  # fmt: skip
        sizes[percent] = {}
        for kind in plan.kinds:
            other = torch.float32 if kind == "fp32" else torch.bfloat16
            to = folder / f"{kind}-{percent}"
            sizes[percent][kind] = save_checkpoint(
                to, model, out.masks, BLOCK, value_type=kind, other_type=other, tokenizer=tokenizer
            )
    del dense
    bench.figure(
        "checkpoint_bytes_vs_ideal",
        max(size.matrix_bytes / size.ideal_bytes for by_kind in sizes.values() for size in by_kind.values()),
    )
    for kind in plan.kinds:
        measure_kind(
            bench, plan, kind, source, tokenizer, text, folder, {p: by_kind[kind] for p, by_kind in sizes.items()}
        )


def measure_kind(
    bench: Benchmark,
    plan: Plan,
    kind: Kind,
    source: WeightSource,
    tokenizer: Tokenizer,
    text: list[int],
    folder: Path,
    sizes: dict[int, CheckpointSize],
) -> None:
    """Dense against 50 and 75 %, all of one value type."""
    tail = "" if kind == HEADLINE else f"_{kind}"

    def arm(opened: WeightSource) -> EngineArm:
        config = EngineConfig(
            str(opened.path), kind, device="cpu", threads=bench.arguments.threads, max_batched_tokens=512,
            max_model_len=2048, kv_memory_mib=128,
        )  # fmt: skip
        return EngineArm(opened, tokenizer, config, torch.device("cpu"))

    arms = {"dense": arm(source)}
    arms |= {f"sparse {percent}": arm(open_weights(str(folder / f"{kind}-{percent}"))) for percent in SPARSITIES}
    for name, engine in arms.items():
        bench.row(what="engine", kind=kind, arm=name, path=engine.model.path, numerics=engine.model.numerics)
    bench.say(f"{kind}: decode steps, batch 1, context {CONTEXT}")
    decode = alternate({n: partial(a.decode_ms, 1, CONTEXT) for n, a in arms.items()}, plan.rounds, returns_value=True)
    bench.say(f"{kind}: prefill of 512 tokens")
    prefill = alternate(
        {n: partial(a.prefill_ms, 504) for n, a in arms.items()}, max(1, plan.rounds // 3), returns_value=True
    )
    bench.say(f"{kind}: perplexity")
    perplexities = {n: perplexity(a.model, text) for n, a in arms.items()}
    for name, engine in arms.items():
        percent = int(name.split()[1]) if name != "dense" else 0
        any_size = next(iter(sizes.values()))
        matrices = sizes[percent].matrix_bytes if percent else any_size.dense_bytes
        bench.row(
            what="served", kind=kind, arm=name,
            tokens_per_s=round(1e3 / decode.median(name), 2),
            step_ms=round(decode.median(name), 2),
            dense_over_this=round(decode.ratio("dense", name).median, 3),
            spread_percent=round(100 * decode.spread(name), 1),
            prefill_dense_over_this=round(prefill.ratio("dense", name).median, 3),
            perplexity=round(perplexities[name], 3),
            perplexity_ratio=round(perplexities[name] / perplexities["dense"], 4),
            read_mb_per_step=round(engine.model.weight_bytes / 1e6, 2),
            matrices_mb=round(matrices / 1e6, 2),
            model_mb=round((matrices + any_size.other_bytes) / 1e6, 2),
        )  # fmt: skip
    for percent in SPARSITIES:
        name = f"sparse {percent}"
        bench.figure(f"decode_tokens_vs_dense_{percent}{tail}", decode.ratio("dense", name).median)
        bench.figure(f"prefill_vs_dense_{percent}{tail}", prefill.ratio("dense", name).median)
        bench.figure(f"perplexity_ratio_{percent}{tail}", perplexities[name] / perplexities["dense"])
        bench.figure(f"matrix_bytes_vs_dense_{percent}{tail}", sizes[percent].matrix_bytes / sizes[percent].dense_bytes)


class _Lstm(nn.Module):
    """Zaremba's large language model without its embedding and softmax."""

    def __init__(self, hidden: int):
        super().__init__()
        self.lstm = nn.LSTM(hidden, hidden, 2)


def measure_lstm(bench: Benchmark) -> None:
    """One frame of one stream through 2 x 1500 units: packed against dense with the same pruned weights."""
    hidden, frames = HIDDEN, 20 if bench.quick else 60
    worst = 0.0
    for percent, sparsity in LSTM_SPARSITIES.items():
        torch.manual_seed(0)
        dense = _Lstm(hidden).eval()
        sparsifier = Sparsifier(Pattern.balanced(BLOCK), GradualSchedule(0.0, sparsity, 0, 0))
        sparsifier.prepare(dense)
        sparsifier.squash()
        packed = copy.deepcopy(dense)
        report = pack_(packed)
        x = torch.randn(frames, hidden)
        with torch.inference_mode():
            expected, wanted = dense.lstm(x)
            got, state = packed.lstm(x)
        pairs = ((got, expected), *zip(state, wanted, strict=True))
        worst = max(worst, *(float((ours - theirs).abs().max()) for ours, theirs in pairs))
        # nn.LSTM lays its weights out anew for every call; the same steps over dense products are the stronger rival.
        stepped = BalancedLSTM(dense.lstm, _dense_matrices(dense.lstm))
        arms: dict[str, Any] = {"nn.LSTM": dense.lstm, "dense steps": stepped, "packed": packed.lstm}
        servers = {name: LstmServer(lstm) for name, lstm in arms.items()}
        for server in servers.values():
            server.open("stream")

        def step(server: LstmServer, frame: torch.Tensor = x[0]) -> None:
            server.step("stream", frame)

        samples = alternate({n: partial(step, s) for n, s in servers.items()}, frames, warmup=3)
        rival = min(("nn.LSTM", "dense steps"), key=samples.median)
        bench.figure(f"lstm_step_vs_dense_{percent}", samples.ratio(rival, "packed").median)
        for name in servers:
            bench.row(
                what="lstm", percent=percent, arm=name,
                step_ms=round(samples.median(name) * 1e3, 3),
                dense_over_this=round(samples.ratio(rival, name).median, 3),
                spread_percent=round(100 * samples.spread(name), 1),
                weights_mb=round((report.packed_bytes if name == "packed" else report.dense_bytes) / 1e6, 2),
            )  # fmt: skip
    bench.figure("lstm_largest_difference", worst)


def _dense_matrices(lstm: nn.LSTM) -> dict[str, Matrix]:
    """The LSTM's weights as linear layers."""
    matrices: dict[str, Matrix] = {}
    for name, (weight, bias) in lstm_names(lstm).items():
        linear = nn.Linear(lstm.input_size, 4 * lstm.hidden_size)
        linear.weight, linear.bias = getattr(lstm, weight), getattr(lstm, bias or "")
        matrices[name] = linear
    return matrices


def _every(count: int, say: Any) -> Any:
    """``say`` for every ``count``-th line."""
    lines = 0

    def told(text: str) -> None:
        nonlocal lines
        lines += 1
        if lines % count == 0:
            say(text)

    return told


def main(arguments: list[str] | None = None) -> int:
    """The exit code is the harness's, 2 when the model is missing."""
    options: dict[str, dict[str, Any]] = {
        "--threads": {"type": int, "default": 2, "help": "threads of both sides"},
        "--model": {"default": EngineConfig().model, "help": "a Llama: the embedded one, a GGUF file, or a folder"},
        "--method": {"choices": ["magnitude", "wanda", "sparsegpt"], "help": "sparsegpt; with --quick wanda"},
    }
    bench = Benchmark(
        "balanced_serving", "A sparse language model and LSTM against dense ones.", TARGETS, arguments, options
    )
    torch.set_num_threads(bench.arguments.threads)
    plan = (
        Plan(2, bench.arguments.method or "wanda", Recovery(reconstruct=False, steps=0), (HEADLINE,), 5)
        if bench.quick
        else Plan(32, bench.arguments.method or "sparsegpt", Recovery(steps=60), ("bf16", "fp32", "int8"), 15)
    )
    try:
        with tempfile.TemporaryDirectory() as folder:
            measure_lstm(bench)
            measure_language_model(bench, plan, Path(folder))
    except ModelLoadError as error:
        print(f"balanced_serving cannot run: {error}", file=sys.stderr)
        return 2
    for what in ("sparsify", "served", "lstm"):
        print_rows(what, [{k: v for k, v in row.items() if k != "what"} for row in bench.rows if row["what"] == what])
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
