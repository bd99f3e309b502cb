"""The rows back end: the definition's divergence, and the full maps' losses and gradients to 1e-5."""

from __future__ import annotations

import pytest
import torch

from kernels.guided_attention import Rows, guided_kl, kept_keys, log_weights_of_maps, log_weights_of_rows
from kernels.guided_attention.cost import attention_cost
from kernels.guided_attention.reference import kl, target_logits
from tests.kernels.guided_attention.world import world


@pytest.mark.parametrize("contrast", [False, True])
@pytest.mark.parametrize("renormalise", [False, True])
def test_the_divergence_is_the_definitions(contrast, renormalise):
    w = world(size=30)
    got = guided_kl(*w.arguments(contrast), renormalise=renormalise, backend="torch")
    torch.testing.assert_close(got.double(), w.expected(contrast, renormalise), atol=2e-6, rtol=1e-5)
    assert (got >= -1e-6).all() or not renormalise


def test_rows_and_maps_agree_in_loss_and_gradients():
    w = world(size=128, dim=32)
    weights = torch.rand(len(w.rows), 2, generator=torch.Generator().manual_seed(0))

    def loss_and_gradients(from_maps: bool):
        q, k = w.q.clone().requires_grad_(), w.k.clone().requires_grad_()
        kept = kept_keys(w.rows, w.kept, w.document)
        if from_maps:
            log_a = log_weights_of_maps(q @ k.transpose(-2, -1) * w.scale, w.rows, kept)
        else:
            log_a = log_weights_of_rows(q, k, w.rows, kept, w.scale)
        goal = target_logits(w.rows, w.ids, w.table, w.mixture(False))[:, None].masked_fill(~kept[:, None], -1e30)
        loss = (kl(torch.log_softmax(goal, -1), log_a, kept) * weights).sum()
        loss.backward()
        return loss, q.grad, k.grad

    for mine, other in zip(loss_and_gradients(False), loss_and_gradients(True), strict=True):
        assert torch.isfinite(mine).all()
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


def test_only_wanted_rows_of_q_get_a_gradient_and_only_kept_keys():
    w = world()
    w.q.requires_grad_()
    w.k.requires_grad_()
    guided_kl(*w.arguments(), backend="torch").sum().backward()
    assert (w.q.grad.abs().sum((1, 3)) > 0).sum() == w.wanted.sum() - 1  # one row has no kept keys
    assert (w.q.grad.abs().sum((1, 3))[~w.wanted] == 0).all()
    assert (w.k.grad.abs().sum((1, 3))[~w.kept] == 0).all()


def test_no_errors_give_no_rows_and_no_gradient():
    w = world()
    w.q.requires_grad_()
    none = Rows.at(torch.zeros_like(w.wanted))
    got = log_weights_of_rows(w.q, w.k, none, torch.zeros(0, 70, dtype=torch.bool), 1.0)
    assert got.shape == (0, 2, 70)


def test_the_costs_are_those_of_the_operations():
    """Counted by torch for the products that the back ends do, and by the shapes that reach memory."""
    from torch.utils.flop_counter import FlopCounterMode

    batch, size, heads, guided, dim, longest = 2, 64, 4, 1, 16, 9
    cost = attention_cost(batch, size, heads, guided, dim, [longest, longest])
    q, k = torch.randn(batch, guided, size, dim), torch.randn(batch, guided, size, dim)
    rows = Rows.at((torch.arange(size) < longest).expand(batch, size))
    with FlopCounterMode(display=False) as counter:
        log_weights_of_rows(q, k, rows, torch.ones(len(rows), size, dtype=torch.bool), 1.0)
    assert counter.get_total_flops() == cost.rows_flops
    with FlopCounterMode(display=False) as counter:
        torch.randn(batch, heads, size, dim) @ torch.randn(batch, heads, dim, size)
    assert counter.get_total_flops() == cost.maps_flops
    assert cost.maps_bytes == batch * heads * size * size * 4
    assert cost.rows_bytes == batch * guided * longest * size * 4
    assert cost.fused_bytes == batch * guided * longest * 3 * 4
