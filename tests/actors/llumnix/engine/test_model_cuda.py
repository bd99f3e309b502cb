"""The CUDA path: run on the CPU in Triton's interpreter (without graphs), and on a GPU with graphs where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from actors.llumnix.engine.config import EngineConfig
from actors.llumnix.engine.loading import build_model
from actors.llumnix.engine.model_cuda import CudaRunner, DecodeInputs, buckets, is_decode
from actors.llumnix.engine.model_torch import FIXED_ROWS, Linear
from actors.llumnix.engine.weights.huggingface import HuggingFaceSource
from tests.actors.llumnix.engine.model_tools import blocks_for, greedy, make_batch
from tests.actors.llumnix.engine.test_huggingface import save

pytest.importorskip("transformers")
CPU = torch.device("cpu")
REPOSITORY = Path(__file__).resolve().parents[4]


@pytest.mark.parametrize(
    ("largest", "expected"),
    [(1, (1,)), (2, (1, 2)), (3, (1, 2, 4)), (8, (1, 2, 4, 8)), (9, (1, 2, 4, 8, 16)), (24, (1, 2, 4, 8, 16, 24))],
)
def test_buckets_hold_every_batch(largest, expected):
    assert buckets(largest) == expected


def test_padded_inputs_belong_to_no_sequence():
    inputs = DecodeInputs(4, 6, CPU)
    inputs.fill(make_batch([([7], 40, [3, 4, 5]), ([8], 2, [9])] * 2))
    batch = make_batch([([17], 20, [1, 2]), ([18], 3, [8])])
    inputs.fill(batch)
    assert inputs.token_ids_T.tolist() == [17, 18, 0, 0]
    assert inputs.positions_T.tolist() == [20, 3, 0, 0]
    assert inputs.query_start.tolist() == [0, 1, 2, 2, 2]
    assert inputs.context_len_S.tolist() == [21, 4, 0, 0]
    assert inputs.block_table_SN[:2, :2].tolist() == [[1, 2], [8, 0]]


def test_decode_batches_are_recognised():
    assert is_decode(make_batch([([1], 4, [1]), ([2], 9, [2])]))
    assert not is_decode(make_batch([([1], 4, [1]), ([2, 3], 9, [2])]))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("rows", [1, 3, FIXED_ROWS, FIXED_ROWS + 1, 200])
def test_fixed_rows_give_a_row_the_same_bits(dtype, rows):
    """Deterministic products: row 0 is the same alone and among any others; and they are right."""
    torch.manual_seed(0)
    weight, x = torch.randn(40, 96), torch.randn(200, 96)
    linear = Linear(weight, dtype, CPU, torch.randn(40), fixed_rows=FIXED_ROWS)
    alone = linear(x[:1])
    many = linear(x[:rows])
    assert many.shape == (rows, 40)
    assert torch.equal(many[0], alone[0])
    torch.testing.assert_close(
        many, x[:rows] @ weight.T + linear.bias, rtol=0.02, atol=0.2 if dtype == "bf16" else 1e-4
    )


INTERPRETED = """
import sys
import torch
from actors.llumnix.engine.config import EngineConfig
from actors.llumnix.engine.loading import build_model
from actors.llumnix.engine.model_cuda import CudaRunner
from actors.llumnix.engine.weights.equalise import EqualisedSource
from actors.llumnix.engine.weights.huggingface import HuggingFaceSource
from pathlib import Path
from tests.actors.llumnix.engine.model_tools import make_batch

source = HuggingFaceSource(Path(sys.argv[1]))
cpu = torch.device("cpu")
tokens = list(range(3, 25))
for settings in sys.argv[2:]:
    dtype, kv_dtype, mode = settings.split("/")
    config = EngineConfig(
        dtype=dtype, kv_dtype=kv_dtype, device="cpu", kernels="torch", max_num_seqs=4, deterministic=mode == "fixed"
    )
    runner = CudaRunner(EqualisedSource(source) if dtype == "int8" else source, config, cpu, 64)  # As build_model does.
    oracle = build_model(source, config, cpu)
    kv, expected_kv = oracle.new_kv(8), oracle.new_kv(8)
    table, other = [7, 2], [4]
    mixed = make_batch([(tokens[:20], 0, table), (tokens[5:11], 0, other)])
    pair = make_batch([(tokens[20:21], 20, table), ([9], 6, other)])
    triple = make_batch([(tokens[21:22], 21, table), ([11], 7, other), ([5], 0, [6])])
    for batch, run in ((mixed, runner.run), (pair, runner.run_padded), (triple, runner.run_padded)):
        expected = oracle.forward(batch, expected_kv)
        found = run(batch, kv)
        assert found.isfinite().all()
        limit = 1e-5 if dtype == kv_dtype == "fp32" else 0.02
        error = ((found - expected).norm() / expected.norm()).item()
        assert error < limit, (dtype, kv_dtype, error)
        difference = (kv.float() - expected_kv.float()).abs().max().item()
        assert difference < (1e-4 if dtype == kv_dtype == "fp32" else 0.1), (dtype, kv_dtype, difference)
print("equal")
"""


@pytest.mark.parametrize(
    ("family", "settings"), [("Llama", ["fp32/fp32/fixed", "bf16/bf16/fast"]), ("Qwen3", ["int8/fp32/fixed"])]
)
def test_cuda_path_in_the_interpreter(tmp_path, family, settings):
    """Prefill, decode and padded decode against the plain torch path, which is checked against transformers elsewhere."""
    pytest.importorskip("triton")
    save(tmp_path, family, {"head_dim": 16, "num_attention_heads": 4, "num_hidden_layers": 1})
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED, str(tmp_path), *settings],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(REPOSITORY)},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.stdout.strip() == "equal", done.stderr[-3000:]


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_graphs_give_what_eager_gives(tmp_path, dtype, deterministic):
    save(tmp_path, "Llama", {"max_position_embeddings": 256})
    source, cuda = HuggingFaceSource(tmp_path), torch.device("cuda")
    prompts = [list(range(3, 3 + n)) for n in (5, 33, 18)]
    texts = {}
    for graphs in (True, False):
        config = EngineConfig(
            dtype=dtype, device="cuda", cuda_graphs=graphs, deterministic=deterministic, max_num_seqs=8
        )
        model = build_model(source, config, cuda)
        texts[graphs] = greedy(model, model.new_kv(64), prompts, 24, ignore_eos=True)
    assert texts[True] == texts[False]
    cpu = build_model(source, EngineConfig(dtype=dtype, device="cpu", kernels="torch"), CPU)
    batch = make_batch([(prompts[1], 0, blocks_for(33))])
    found = model.forward(batch, model.new_kv(8)).cpu()
    expected = cpu.forward(batch, cpu.new_kv(8))
    assert (found - expected).norm() / expected.norm() < (1e-3 if dtype == "fp32" else 0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_deterministic_bits_do_not_depend_on_the_batch(tmp_path, dtype):
    save(tmp_path, "Llama", {"max_position_embeddings": 256})
    config = EngineConfig(dtype=dtype, device="cuda", deterministic=True, max_num_seqs=16)
    model = build_model(HuggingFaceSource(tmp_path), config, torch.device("cuda"))
    assert isinstance(model._decoder, CudaRunner)
    prompt = list(range(3, 80))
    pieces = [(list(range(5 + i, 40 + i)), 0, blocks_for(36, 20 + 4 * i)) for i in range(9)]
    kv = model.new_kv(128)
    alone = model.forward(make_batch([(prompt, 0, blocks_for(80))]), kv)[0].clone()
    step_alone = model.forward(make_batch([([9], 77, blocks_for(80))]), kv)[0].clone()
    kv = model.new_kv(128)
    model.forward(make_batch([(prompt[:30], 0, blocks_for(80, 10))]), kv)
    together = model.forward(make_batch([*pieces, (prompt[30:], 30, blocks_for(80, 10))]), kv)[-1].clone()
    assert torch.equal(together, alone)
    decodes = [([3], 35, blocks) for _, _, blocks in pieces]
    assert torch.equal(model.forward(make_batch([*decodes, ([9], 77, blocks_for(80, 10))]), kv)[-1], step_alone)
