"""The loop: resumed it is the unbroken one, two workers agree with one, every arm trains, and what does not fit is refused."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch

from apps.mcmisp.config import ARMS, McmispConfig
from apps.mcmisp.data.feed import local_feed
from apps.mcmisp.data.order import RowOrder
from apps.mcmisp.data.prepare import prepare
from apps.mcmisp.tables import table_of
from apps.mcmisp.training.config import TrainingConfig
from apps.mcmisp.training.loop import Pretraining
from apps.mcmisp.training.optim import Optimizers, RunningMean, rate_factor
from apps.program.errors import UserError
from apps.training.worker import LocalWorker
from tests.apps.mcmisp.data.corpus import data_config, write_corpus


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("training")
    write_corpus(path / "text")
    return path


@pytest.fixture(scope="module")
def rows(folder):
    return prepare(data_config(folder))


def config(folder, arm="guided", model=None, guidance=None, **training) -> McmispConfig:
    training = {
        "steps": 12, "batch": 8, "precision": "fp32", "report_every": 4, "evaluate_every": 6, "checkpoint_every": 6,
        "evaluation_rows": 16, **training,
    }  # fmt: skip
    return McmispConfig(
        model={"layers": 2, "width": 32, "heads": 4, "max_positions": 32, **(model or {})}, data=data_config(folder),
        guidance={"start_error_rate": 1.0, "warmup_steps": 2, "gate": "all", **(guidance or {})}, training=training,
    ).for_arm(arm)  # fmt: skip


def loop(one: McmispConfig, rows, worker=None) -> Pretraining:
    worker = worker or LocalWorker()
    order = RowOrder(len(rows), one.training.batch, one.data.window_rows, one.training.seed)
    feed = local_feed(rows, order, worker.rank, worker.world_size)
    table = table_of(rows, one.cooccurrence) if one.is_guided else None
    return Pretraining(one, rows, feed, worker, table)


def weights(run: Pretraining) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_lowers_the_loss(rows, folder, arm):
    run = loop(config(folder, arm, steps=30, learning_rate=5e-3), rows)
    run.run()
    assert run.history[-1]["validation_loss"] < 0.9 * run.history[0]["loss"]
    guided = [entry for entry in run.history if entry.get("divergence")]
    assert bool(guided) == (arm not in ("plain", "adaptive"))


@pytest.mark.parametrize("electra", ["discriminator", "generator", "both"])
def test_electra_trains_with_each_reading_of_guidance(rows, folder, electra):
    options = {"electra": electra, "undetected_only": electra == "discriminator"}
    run = loop(config(folder, model={"objective": "electra"}, guidance=options, steps=8), rows)
    run.run()
    assert run.history[-1]["divergence"] > 0
    assert run.history[-1]["detection_loss"] < run.history[0]["detection_loss"]


@pytest.mark.parametrize("arm", ["guided_adaptive", "plain"])
@pytest.mark.parametrize("objective", ["mlm", "electra"])
def test_resumed_it_is_bit_for_bit_the_unbroken_run(rows, folder, tmp_path, arm, objective):
    one = config(
        folder, arm, model={"objective": objective, "dropout": 0.1}, steps=10, evaluate_every=5, checkpoint_every=5
    )

    class Stop(Exception):
        pass

    class Interrupted(LocalWorker):
        def report(self, metrics, write=None):
            super().report(metrics, write)
            if metrics["step"] == 5:
                raise Stop

    torch.manual_seed(1)
    unbroken = loop(one, rows)
    unbroken.run()
    torch.manual_seed(1)
    with pytest.raises(Stop):
        loop(one, rows, Interrupted(tmp_path)).run()
    torch.manual_seed(999)
    resumed = loop(one, rows, LocalWorker(tmp_path))
    assert resumed.step == 5
    resumed.run()
    assert torch.equal(weights(unbroken), weights(resumed))
    # Seconds differ, all else is the same.
    strip = lambda run: [{k: v for k, v in e.items() if k != "seconds"} for e in run.history]  # noqa: E731
    assert strip(unbroken) == strip(resumed)


class Team:
    """Workers as threads of this process: gradients and figures are averaged at a barrier, as DDP does it."""

    def __init__(self, size: int):
        self.size, self.barrier, self.values = size, threading.Barrier(size, timeout=60), {}

    def mean(self, rank: int, values: torch.Tensor) -> torch.Tensor:
        self.values[rank] = values
        self.barrier.wait()
        total = sum(self.values[r] for r in range(self.size)) / self.size
        self.barrier.wait()
        return total


class TeamWorker(LocalWorker):
    def __init__(self, team: Team, rank: int):
        super().__init__()
        self.team, self.rank, self.world_size = team, rank, team.size

    def mean(self, values):
        return self.team.mean(self.rank, values)


@pytest.mark.parametrize("arm,objective", [("guided_adaptive", "mlm"), ("random", "mlm"), ("contrast", "electra")])
def test_two_workers_agree_with_one(rows, folder, arm, objective):
    """The mean of the workers' gradients is that of one worker with all rows: errors are counted over all.

    Gradients are compared, not weights: Muon's bfloat16 iterations and Adam's division enlarge the last bits of small ones.
    """
    one = config(
        folder, arm, model={"objective": objective}, guidance={"electra": "both", "gate": "confident"}, clip_norm=None
    )
    alone = loop(one, rows)
    team = Team(2)
    pair = [loop(one, rows, TeamWorker(team, rank)) for rank in range(2)]
    figures: dict = {}

    def three_steps(run: Pretraining) -> None:
        for _ in range(3):
            run.optimizers.step = lambda factor: None
            figures[run] = run.one_step().figures
            run.step += 1

    threads = [threading.Thread(target=three_steps, args=(run,)) for run in pair]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    three_steps(alone)
    assert figures[alone]["divergence"] > 0
    for key, value in figures[alone].items():
        assert figures[pair[0]][key] == figures[pair[1]][key] == pytest.approx(value, rel=1e-5), key
    for mine, other, expected in zip(*(run.model.named_parameters() for run in (*pair, alone)), strict=True):
        mean = (mine[1].grad + other[1].grad) / 2
        torch.testing.assert_close(
            mean, expected[1].grad, atol=1e-6 * expected[1].grad.abs().max().item() + 1e-8, rtol=1e-4
        )


def test_a_checkpoint_of_another_configuration_or_table_is_refused(rows, folder, tmp_path):
    loop(config(folder, steps=6), rows, LocalWorker(tmp_path)).run()
    with pytest.raises(UserError, match="is of another guidance: go on with the same"):
        loop(config(folder, steps=6, guidance={"temperature": 3.0}), rows, LocalWorker(tmp_path))
    other = config(folder, steps=6).model_copy(update={"cooccurrence": config(folder).cooccurrence.__class__(window=3)})
    with pytest.raises(UserError, match="is of another table version"):
        loop(other, rows, LocalWorker(tmp_path))
    with pytest.raises(UserError, match="is of another guidance and table version and training"):
        loop(config(folder, "plain", steps=7), rows, LocalWorker(tmp_path))


def test_rows_longer_than_the_models_positions_are_refused(rows, folder):
    with pytest.raises(UserError, match=r"data.row_tokens 32 is more than model.max_positions 16"):
        loop(config(folder, model={"max_positions": 16}), rows)


def test_the_learning_rate_warms_up_stays_and_decays():
    one = TrainingConfig(steps=100, warmup_fraction=0.1, decay_fraction=0.2)
    factors = [rate_factor(one, step) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == factors[50] == factors[79] == 1.0
    assert factors[99] == pytest.approx(1 / 21) and all(a > b for a, b in itertools.pairwise(factors[80:]))


def test_matrices_of_layers_go_to_muon_and_the_rest_to_adamw(rows, folder):
    run = loop(config(folder), rows)
    adamw, muon = Optimizers(run.model, TrainingConfig()).all
    in_muon = {id(p) for g in muon.param_groups for p in g["params"]}
    for name, parameter in run.model.named_parameters():
        assert (id(parameter) in in_muon) == (".layers." in name and parameter.ndim == 2), name
    count = sum(len(g["params"]) for o in (adamw, muon) for g in o.param_groups)
    assert count == len(list(run.model.parameters()))


def test_the_running_mean_follows_and_swaps_back():
    parameter = torch.nn.Parameter(torch.zeros(3))
    mean = RunningMean([parameter], 0.9)
    with torch.no_grad():
        parameter.fill_(1.0)
    mean.update()
    expected = 1 - 2 / 11
    mean.swap()
    torch.testing.assert_close(parameter.detach(), torch.full((3,), expected))
    mean.swap()
    assert (parameter == 1).all()
