"""The verb `sparsify` on a tiny random Llama: the engine loads what it writes, and its figures are those of the folder."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers

from actors.llumnix.engine.config import EngineConfig
from actors.llumnix.engine.loading import load_model, open_weights
from actors.llumnix.engine.model_config import ModelConfig, RopeConfig
from actors.llumnix.engine.tokenizer import Tokenizer
from apps.balanced_sparsity.cli import app
from apps.balanced_sparsity.serving.checkpoint import save_checkpoint
from apps.balanced_sparsity.serving.language_model import perplexity
from apps.balanced_sparsity.serving.llama import Llama
from tests.actors.llumnix.engine.model_tools import blocks_for, make_batch

CONFIG = ModelConfig("LlamaForCausalLM", 64, 96, 2, 4, 2, 16, 256, 256, 1e-5, RopeConfig(interleaved=True), True)
SMALL = ["sparsify.tokens=32", "sparsify.sequences=4", "sparsify.test_sequences=2", "sparsify.steps=2"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A folder of the engine's with random weights and a tokenizer whose tokens are bytes."""
    folder = tmp_path_factory.mktemp("models") / "dense"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = FastTokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    torch.manual_seed(0)
    model = Llama(CONFIG, 64).requires_grad_(False)
    save_checkpoint(folder, model, {}, 16, other_type=torch.float32, tokenizer=Tokenizer(fast, [0]))
    return folder


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("SEXTANT_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs" / "balanced_sparsity"


def fails(capsys, *arguments) -> str:
    assert app.run(["sparsify", *map(str, arguments)]) != 0
    [line] = capsys.readouterr().err.strip().splitlines()
    return line


def test_perplexity_is_that_of_the_definition():
    torch.manual_seed(1)
    model = Llama(CONFIG, 64).requires_grad_(False)
    tokens = torch.randint(0, 256, (3, 9))
    losses = []
    for row in tokens:
        for t in range(1, 9):
            losses.append(-model(row[None, :t])[0, -1].double().log_softmax(-1)[row[t]])
    assert perplexity(model, tokens) == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-5)


def test_the_folder_is_served_by_the_engine_and_the_figures_are_its_own(dense, runs, tmp_path, capsys):
    out = tmp_path / "sparse"
    assert app.run(["sparsify", "--model", str(dense), "--out", str(out), "pruning.pattern=balanced:16", *SMALL]) == 0
    told = json.loads((runs / "latest" / "result.json").read_text())
    shown = capsys.readouterr().out
    assert (
        "layer 2 of 2" in shown and "distillation step 2 of 2" in shown and "perplexity" in shown and str(out) in shown
    )

    source = open_weights(str(out))
    names = [f"layers.{number}.{name}" for number in (0, 1) for name in ("q", "k", "v", "o", "gate", "up", "down")]
    for name in names:  # 4 of every 16 columns are kept
        assert int((source.tensor(name).view(-1, 16) != 0).sum(1).max()) == 4
    assert (told["matrices"], told["sparsity"], told["pattern"]) == (14, 0.75, "balanced:16")
    assert told["size"]["file_bytes"] == (out / "balanced.safetensors").stat().st_size
    assert told["size"]["matrix_bytes"] <= 1.02 * told["size"]["ideal_bytes"] < 0.6 * told["size"]["dense_bytes"]
    assert told["calibration_tokens"] == 4 * 32 and told["test_tokens"] == 2 * 32
    assert told["dense_perplexity"] != told["perplexity"]

    engine, tokenizer = load_model(EngineConfig(str(out), dtype="fp32", device="cpu", kernels="torch"))
    ids = tokenizer.encode("def f(x): return x")
    logits = engine.forward(make_batch([(ids, 0, blocks_for(len(ids)))], all_rows=True), engine.new_kv(4))
    expected = Llama.from_source(source, 64)(torch.tensor(ids)[None])[0]
    assert (logits - expected).norm() < 0.02 * expected.norm()  # of bf16 values


def test_perplexity_and_calibration_are_of_the_named_texts(dense, runs, tmp_path):
    text, test = tmp_path / "a.txt", tmp_path / "b.txt"
    text.write_text("the quick brown fox " * 60)
    test.write_text("jumps over the lazy dog " * 30)
    figures = ["pruning.sparsity=0", "sparsify.value_type=fp32", "sparsify.steps=0", "sparsify.reconstruct=false"]
    out = tmp_path / "whole"
    assert app.run(["sparsify", "--model", str(dense), "--out", str(out), f"sparsify.text={text}", f"sparsify.test={test}",
                    *SMALL[:3], *figures]) == 0  # fmt: skip
    told = json.loads((runs / "latest" / "result.json").read_text())
    assert told["perplexity"] == pytest.approx(told["dense_perplexity"], rel=1e-6) and told["sparsity"] == 0
    assert (told["calibration_text"], told["test_text"]) == ("a.txt", "b.txt")
    model, content = Llama.from_source(open_weights(str(dense)), 64), test.read_text()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    stretches = [content[begin : begin + 32].replace(" ", "Ġ") for begin in (0, len(content) // 2)]
    ids = torch.tensor([[letters.index(letter) for letter in stretch] for stretch in stretches])
    assert told["dense_perplexity"] == pytest.approx(perplexity(model, ids), rel=1e-6)


def test_mistakes_are_one_sentence(dense, runs, tmp_path, capsys):
    out, short = tmp_path / "new", tmp_path / "short.txt"
    short.write_text("too little")
    good = ["--model", dense, "--out", out, *SMALL]
    for arguments, says in {
        ("--model", "nobody", "--out", out): "there is no model 'nobody'",
        (*good, "pruning.sparsity=0.99"): "at most 0.96875 sparse",
        (*good, "pruning.pattern=unstructured"): "only balanced patterns and 2:4",
        (*good, "pruning.pattern=checkers"): "balanced:B",
        (*good, f"sparsify.text={tmp_path / 'none.txt'}"): "none.txt cannot be read",
        (*good, f"sparsify.text={short}"): "too short for a sequence of 32 tokens",
        (*good, "sparsify.skip_layers=[2]"): "no layer 2 to skip",
        (*good, "sparsify.skip_layers=[0,1]"): "skips every layer",
        (*good, "sparsify.tokens=300"): "at most 256 tokens",
        ("--model", dense, "--out", tmp_path, *SMALL): "not empty",
        ("--model", dense, "--out", short, *SMALL): "is a file",
        ("--model", dense, *SMALL): "--out",
    }.items():
        line = fails(capsys, *arguments)
        assert says in line and line.startswith("balanced_sparsity: "), line
    assert not out.exists()
