"""The demo model itself: logits and greedy text equal transformers' with the same weights, and the same bits in any batch."""

from __future__ import annotations

import pytest
import torch

from actors.llumnix.engine.config import EngineConfig
from actors.llumnix.engine.loading import build_model, load_tokenizer
from actors.llumnix.engine.weights.gguf import GgufSource
from benchmarks.transformers_twin import transformers_twin
from tests.actors.llumnix.engine.model_tools import blocks_for, greedy, make_batch

pytest.importorskip("transformers")

PROMPTS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain what a transformer is in machine learning.",
    "List three fruits.",
    "Why is the sky blue?",
    "Translate 'good morning' to Spanish.",
    "What is 12 + 30?",
    "Tell me a joke about cats.",
    "Who wrote Hamlet?",
    "How do I boil an egg?",
    "Name a planet with rings.",
    "Summarise the story of Cinderella.",
    "What does HTTP stand for?",
    "Give me a synonym of happy.",
    "Is water wet?",
    "Write a Python function that adds two numbers.",
    "What year did World War II end?",
    "Describe the colour red to someone who cannot see.",
    "How many days are in a leap year?",
    "Say hello in Japanese.",
]
NUM_TOKENS = 20


@pytest.fixture(scope="module")
def source(smollm2_gguf):
    return GgufSource(smollm2_gguf)


@pytest.fixture(scope="module")
def tokenizer(smollm2_gguf):
    return load_tokenizer(str(smollm2_gguf))


@pytest.fixture(scope="module")
def twin(source):
    return transformers_twin(source)


@pytest.fixture(scope="module")
def model(source):
    return build_model(source, EngineConfig(dtype="fp32", device="cpu"), torch.device("cpu"))


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return [tokenizer.apply_chat_template([{"role": "user", "content": text}]) for text in PROMPTS]


def test_logits_equal_transformers(model, twin, tokenizer):
    ids = tokenizer.encode(
        "It is a truth universally acknowledged, that a single man in possession of a good fortune " * 3
    )
    with torch.no_grad():
        expected = twin(torch.tensor([ids])).logits[0]
    ours = model.forward(make_batch([(ids, 0, blocks_for(len(ids)))], all_rows=True), model.new_kv(16))
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)


def test_greedy_equals_transformers_on_20_prompts(model, twin, prompts):
    """A greedy text is transformers' own if each of its tokens is transformers' first choice after all before it.

    One pass over prompt + text checks that for every token; ``generate`` itself runs below.
    """
    texts = greedy(model, model.new_kv(100), prompts, NUM_TOKENS)
    for prompt, text in zip(prompts, texts, strict=True):
        assert len(text) == NUM_TOKENS or text[-1] in model.eos_token_ids
        with torch.no_grad():
            logits = twin(torch.tensor([prompt + text[:-1]]), logits_to_keep=len(text)).logits[0]
        assert logits.argmax(-1).tolist() == text


def test_greedy_equals_generate(model, twin, prompts):
    for prompt in prompts[:2]:
        with torch.no_grad():
            theirs = twin.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, use_cache=True)
        assert greedy(model, model.new_kv(8), [prompt], 12) == [theirs[0, len(prompt) :].tolist()]


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_small_weights_still_answer(source, tokenizer, prompts, dtype):
    model = build_model(source, EngineConfig(dtype=dtype, device="cpu"), torch.device("cpu"))
    [text] = greedy(model, model.new_kv(8), prompts[:1], 8)
    assert "Paris" in tokenizer.decode(text)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_same_bits_alone_in_a_batch_and_in_chunks(source, prompts, dtype):
    """The compiled path's promise, on the real weights: logits of one prompt, bit for bit."""
    config = EngineConfig(dtype=dtype, device="cpu", kernels="auto")
    model = build_model(source, config, torch.device("cpu"))
    if model.path != "cpp":
        pytest.skip("no compiler: the torch path makes no such promise")
    prompt, others = prompts[4], prompts[5:8]
    table = blocks_for(len(prompt))
    alone = model.forward(make_batch([(prompt, 0, table)]), model.new_kv(16))[0]
    pieces = [(other, 0, blocks_for(len(other), 5 + 3 * i)) for i, other in enumerate(others)]
    batch = make_batch([pieces[0], (prompt, 0, table), *pieces[1:]])
    assert torch.equal(model.forward(batch, model.new_kv(16))[1], alone)
    kv = model.new_kv(16)
    backwards = blocks_for(len(prompt), 15, -2)
    for start, end in ((0, 7), (7, 30), (30, len(prompt) - 1), (len(prompt) - 1, len(prompt))):
        last = model.forward(make_batch([(prompt[start:end], start, backwards)]), kv)[0]
    assert torch.equal(last, alone)
