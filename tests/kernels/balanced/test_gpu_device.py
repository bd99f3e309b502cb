"""Balanced products on a GPU (skipped without one): every arm against float64, CUDA C++ and Triton, graphs, autograd."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from kernels.balanced import BalancedLinear, balanced_linear, pack, reference
from kernels.balanced.gpu import arms, compiled, linear
from kernels.balanced.spec import VALUE_TYPES
from tests.kernels.balanced.world import randn

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
pytest.importorskip("triton")

EPSILON = {torch.float32: 2**-21, torch.bfloat16: 2**-6, torch.float16: 2**-9}
PATTERNS = [(2, 4, 1), (3, 7, 1), (4, 16, 1), (16, 32, 1), (8, 32, 16), (8, 32, 64), (32, 64, 1), (24, 256, 1)]


def close(y: torch.Tensor, x: torch.Tensor, packed, bias=None) -> None:
    expected = reference.linear(x, packed, bias)
    magnitude = x.double().abs() @ packed.unpack(torch.float64).abs().T
    allowed = (
        expected.abs() * EPSILON[y.dtype] + magnitude * (packed.spec.blocks * packed.spec.k * 2**-24 + 2**-20) + 1e-6
    )
    assert bool(((y.double() - expected).abs() <= allowed).all()), (y.double() - expected).abs().max()


@pytest.mark.parametrize("dtype", list(EPSILON))
@pytest.mark.parametrize("value_type", VALUE_TYPES)
@pytest.mark.parametrize(("k", "block", "vector"), PATTERNS)
def test_every_arm_equals_float64_and_itself(k, block, vector, value_type, dtype):
    packed = pack(randn(352, 640).cuda(), k, block, value_type=value_type, vector=vector)
    bias = randn(352).cuda()
    for batch in (1, 3, 16, 70, 300):
        x = randn(batch, 640).cuda().to(dtype)
        for arm in arms.working(packed.spec, dtype, batch, x.device):
            for use_compiled in (True, False):
                y = arms.product(arm, x, packed, bias, use_compiled)
                close(y, x, packed, bias)
                assert torch.equal(
                    y, arms.product(arm, x, packed, bias, use_compiled)
                )  # however its parts were scheduled


def test_the_cuda_kernels_run_where_there_is_nvcc():
    if compiled.nvcc() is None:
        pytest.skip("no nvcc")
    spec = pack(randn(64, 64).cuda(), 4, 16, value_type="fp16").spec
    for arm, batch in (("gather", 1), ("decompress", 16)):
        request = arms.compiled_request(arm, spec, torch.float16, batch)
        assert compiled.library(request, torch.cuda.get_device_capability()) is not None


@pytest.mark.parametrize("arm", ["gather", "decompress", "vector"])
def test_in_a_cuda_graph_it_follows_its_inputs(arm):
    packed = pack(randn(256, 512).cuda(), 8, 32, value_type="fp16", vector=32)
    x = randn(2, 512).cuda().half()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        linear(x, packed, None, arm)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear(x, packed, None, arm)
    for seed in (1, 2):
        x.copy_(randn(2, 512, seed=seed))
        graph.replay()
        close(y, x, packed)


def test_entry_point_strides_alignment_empty_batches_and_errors():
    packed = pack(randn(33, 40).cuda(), 3, 8)
    flat = randn(2 * 3 * 40 + 1).cuda()
    for x in (flat[1:].view(2, 3, 40), randn(40, 6).cuda().t(), randn(4, 80).cuda()[:, ::2], flat[1:41]):
        close(balanced_linear(x, packed), x, packed)
    assert balanced_linear(torch.empty(3, 0, 40, device="cuda"), packed).shape == (3, 0, 33)
    with pytest.raises(ValueError, match="x is on cpu"):
        balanced_linear(torch.zeros(2, 40), packed)
    with pytest.raises(ValueError, match="must be float32"):
        balanced_linear(torch.zeros(2, 40, dtype=torch.int32, device="cuda"), packed)


def test_gradients_and_one_graph():
    packed = pack(randn(33, 44).cuda(), 3, 8)
    packed.values.requires_grad_()
    x, grad = randn(5, 44).cuda().requires_grad_(), randn(5, 33).cuda()
    compiled_ = torch.compile(lambda x: F.relu(balanced_linear(x, packed)), fullgraph=True, backend="aot_eager")
    y = compiled_(x)
    y.backward(grad)
    of_x, of_weight = reference.backward(x.detach(), packed, grad * (y > 0))
    assert torch.allclose(x.grad.double(), of_x, atol=1e-4)
    got = packed.with_tensors({**packed.tensors(), "values": packed.values.grad}).unpack()
    assert torch.allclose(got.double(), of_weight, atol=1e-4)


def test_a_layer_that_moves_takes_the_layout_of_the_device():
    layer = BalancedLinear(pack(randn(33, 40), 3, 8), randn(33))
    x = randn(4, 40)
    expected = layer(x)
    layer.cuda()
    assert layer.weight.spec.layout == "warps"
    assert torch.allclose(layer(x.cuda()).cpu(), expected, atol=1e-5)
    layer.cpu()
    assert torch.equal(layer(x), expected)


def test_two_of_four_through_torch():
    packed = pack(randn(256, 512).cuda(), 2, 4, value_type="fp16")
    x = randn(64, 512).cuda().half()
    close(arms.product("2:4", x, packed, None), x, packed)
