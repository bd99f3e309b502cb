"""The Triton kernels in Triton's interpreter, against plain torch. Runs as a program of its own, because TRITON_INTERPRET must be

set before the kernels are defined; prints one JSON object {check: error or null}.
"""

from __future__ import annotations

import torch

from kernels.guided_attention import guided_kl
from tests.kernels.guided_attention.world import World, world
from tests.kernels.without_gpu import report


def _same(w: World, contrast: bool, renormalise: bool) -> None:
    weights = torch.rand(len(w.rows), w.q.shape[1], generator=torch.Generator().manual_seed(5))
    results = []
    for backend in ("torch", "triton"):
        q, k = w.q.detach().clone().requires_grad_(), w.k.detach().clone().requires_grad_()
        arguments = (q, k, *w.arguments(contrast)[2:])
        loss = guided_kl(*arguments, renormalise=renormalise, backend=backend)
        (loss * weights).sum().backward()
        results.append((loss.detach(), q.grad, k.grad))
    for mine, other in zip(results[1], results[0], strict=True):
        assert torch.isfinite(mine).all()
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


def wrong_word() -> None:
    _same(world(), False, True)


def wrong_and_right_word() -> None:
    _same(world(), True, True)


def without_renormalisation() -> None:
    _same(world(), False, False)


def head_dim_that_is_no_power_of_two() -> None:
    _same(world(batch=2, size=40, dim=24), True, True)


def more_rows_than_a_tile() -> None:
    _same(world(batch=2, heads=1, size=60, share=0.7), False, True)


def heads_as_a_slice_of_all() -> None:
    w = world(batch=2, heads=4, size=33)
    w.q, w.k = w.q[:, 1:3], w.k[:, 1:3]
    w.q.requires_grad_()
    w.k.requires_grad_()
    got = guided_kl(*w.arguments(), backend="triton")
    torch.testing.assert_close(got, guided_kl(*w.arguments(), backend="torch"), atol=1e-5, rtol=1e-5)


def no_rows() -> None:
    w = world(batch=2, size=20)
    w.wanted[:] = False
    w.wrong = w.wrong[:0]
    w.q.requires_grad_()
    loss = guided_kl(*w.arguments(), backend="triton").sum()
    loss.backward()
    assert float(loss) == 0 and (w.q.grad == 0).all()


CHECKS = {f.__name__: f for f in (
    wrong_word, wrong_and_right_word, without_renormalisation, head_dim_that_is_no_power_of_two, more_rows_than_a_tile,
    heads_as_a_slice_of_all, no_rows,
)}  # fmt: skip


if __name__ == "__main__":
    report(CHECKS)
