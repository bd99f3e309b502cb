"""The catalogue: the models have the published sizes, learn, decode as they read, and say when memory is short."""

from __future__ import annotations

import pytest
import torch

from apps.migperf.workloads.build import Workload, is_out_of_memory, make_model
from apps.migperf.workloads.shapes import SHAPES, shape
from apps.migperf.workloads.transformer import Decoder
from apps.program.errors import UserError

# Parameters in millions, as published: torchvision's documentation, the papers' tables, the models' cards.
PUBLISHED = {
    "resnet18": 11.69, "resnet34": 21.80, "resnet50": 25.56, "resnet101": 44.55, "vit_base": 86.57, "bert_base": 109.48,
    "bert_large": 335.14, "distilbert": 66.36, "minilm": 22.71, "llama_decode": 1235.81,
}  # fmt: skip


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_parameters_are_the_published_ones(name: str) -> None:
    with torch.device("meta"):
        model = make_model(shape(name), 64)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count / 1e6 == pytest.approx(PUBLISHED[name], rel=0.01)


@pytest.mark.parametrize("name", list(SHAPES))
def test_every_workload_runs_small_in_both_modes(name: str) -> None:
    small = shape(name, 0.1)
    for mode in ("infer", "train"):
        workload = Workload(small, mode, batch=2, sequence=16)
        first = workload.step()
        for _ in range(3):
            last = workload.step()
        assert last == last
        if mode == "train":
            assert last < first  # the same batch again: the loss falls
    assert Workload(small, "infer", 1).parameters < 40e6


def test_decoding_against_the_cache_equals_reading_the_whole_text() -> None:
    torch.manual_seed(0)
    model = Decoder(shape("llama_decode", 0.15)).eval()
    ids = torch.randint(model.shape.vocabulary, (2, 12))
    cache = model.new_cache(2, 12, model.tokens.weight)
    with torch.inference_mode():
        whole = model(ids)[:, -1]
        for length in range(1, 13):  # the cache's last place is the newest token's
            step = model.decode(ids[:, length - 1 : length], cache[..., :length, :])
    torch.testing.assert_close(step, whole, rtol=1e-4, atol=1e-4)


def test_a_bert_layer_is_torch_s_own_with_the_same_weights() -> None:
    from apps.migperf.workloads.transformer import Layer

    torch.manual_seed(0)
    small = shape("bert_base", 0.25)
    ours = Layer(small, pre_norm=False).eval()
    theirs = torch.nn.TransformerEncoderLayer(
        small.width, small.heads, small.feed_forward, 0.0, "gelu", 1e-12, batch_first=True
    ).eval()
    names = {"self_attn.in_proj_weight": "qkv.weight", "self_attn.in_proj_bias": "qkv.bias",
             "self_attn.out_proj.weight": "out.weight", "self_attn.out_proj.bias": "out.bias", "linear1.weight": "up.weight",
             "linear1.bias": "up.bias", "linear2.weight": "down.weight", "linear2.bias": "down.bias"}  # fmt: skip
    state = ours.state_dict()
    theirs.load_state_dict({**theirs.state_dict(), **{name: state[mine] for name, mine in names.items()}})
    given = torch.randn(2, 7, small.width)
    torch.testing.assert_close(ours(given), theirs(given), rtol=1e-4, atol=1e-4)


def test_what_is_out_of_memory() -> None:
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to ..."))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory of what happened"))


def test_unknown_names_and_scales_are_told() -> None:
    with pytest.raises(UserError, match="no workload 'gpt9': there are resnet18"):
        shape("gpt9")
    with pytest.raises(UserError, match="at most 1, not 2"):
        shape("lstm", 2)
