"""Under Ray Train and C4, fed by Ray Data: two workers give the losses of one process, also when one is killed in between."""

from __future__ import annotations

import json
import os

import pytest

from apps.mcmisp.config import McmispConfig
from apps.mcmisp.data.prepare import prepare
from apps.mcmisp.store import load_trained
from apps.mcmisp.training.fit import fit_here, fit_on_ray
from tests.apps.mcmisp.data.corpus import data_config, write_corpus

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.environ.get("SEXTANT_MCMISP_FITS"),
        reason="has not passed yet (no quiet machine): set SEXTANT_MCMISP_FITS=1",
    ),
]


def test_two_workers_train_as_one_process_does(ray_local, tmp_path):
    write_corpus(tmp_path / "text", 150)
    config = McmispConfig.model_validate(
        {
            "model": {"layers": 1, "width": 32, "heads": 4, "max_positions": 32}, "data": data_config(tmp_path),
            "guidance": {"start_error_rate": 1.0, "gate": "all"},
            "training": {
                "steps": 6, "batch": 8, "precision": "fp32", "report_every": 1, "evaluate_every": 3, "checkpoint_every": 3,
                "optimizer": "adamw", "evaluation_rows": 16,
            },
        }
    )  # fmt: skip
    rows = prepare(config.data)
    alone = fit_here(config, rows, None)
    told: list[dict] = []
    both = config.model_copy(update={"training": config.training.model_copy(update={"workers": 2})})
    path = fit_on_ray(both, rows, tmp_path / "run", told.append)
    assert [entry["step"] for entry in told] == [1, 2, 3, 4, 5, 6]
    for mine, expected in zip(told, alone.history, strict=True):
        for key in ("loss", "divergence", "error_rate"):
            assert mine[key] == pytest.approx(expected[key], rel=2e-3), (key, json.dumps(mine))
    assert load_trained(path).config.training.workers == 2
