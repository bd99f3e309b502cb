"""The served LSTM on Ray Serve: two shards over HTTP answer as the network does, every stream from its own state; a clean end."""

from __future__ import annotations

import socket

import httpx
import pytest
import torch

from apps.balanced_sparsity.config import BalancedSparsityConfig
from apps.balanced_sparsity.models.build import Shape, build_model
from apps.balanced_sparsity.store import Trained, save_trained
from apps.program.config import load_config
from apps.program.errors import UserError

pytestmark = pytest.mark.timeout(240)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_streams_of_two_shards_keep_their_states_and_the_server_ends(ray_local, tmp_path):
    from ray import serve

    from apps.balanced_sparsity.serving.service import running_service

    port = free_port()
    overrides = [f"serving.port={port}", "serving.max_streams=3", "model.name=speech_lstm", "data.name=digit_rows",
                 "model.lstm.hidden=16"]  # fmt: skip
    config = load_config(BalancedSparsityConfig, "lstm_server", overrides, system="balanced_sparsity")
    assert config.serving.shards == 2
    shape = Shape(8, 10)
    model = build_model(config.model, shape).eval().requires_grad_(False)
    save_trained(tmp_path / "model.pt", Trained(config, shape, (), model.state_dict(), 1, {}, "accuracy"))
    sequences = {name: torch.randn(4, 8) for name in ("s1", "s2", "s0", "s6")}  # two a shard
    with running_service(config, str(tmp_path)) as url, httpx.Client(base_url=url, timeout=30, trust_env=False) as http:
        for name in sequences:
            assert http.post("/streams", json={"stream": name}).status_code == 201
        for step in range(4):
            for name, frames in sequences.items():
                told = http.post(f"/streams/{name}/frames", json={"frames": [frames[step].tolist()]}).json()
                expected = model(frames[None, : step + 1], torch.tensor([step + 1]))[0]
                assert told["frames"] == step + 1
                torch.testing.assert_close(torch.tensor(told["mean"]), expected, atol=1e-5, rtol=0)
        shards = http.get("/status").json()["shards"]
        assert [shard["streams"] for shard in shards] == [2, 2] and sum(shard["frames"] for shard in shards) == 16
        answers = [http.post("/streams", json={}) for _ in range(3)]  # of six places four are taken
        refused = [answer for answer in answers if answer.status_code == 429]
        assert refused and "in use" in refused[0].json()["error"]["message"]
        assert http.get("/streams/nobody").status_code == 404
        assert http.post(f"/streams/{next(iter(sequences))}/frames", json={"frames": [[1.0]]}).status_code == 400
        with pytest.raises(UserError, match="cannot listen"), running_service(config, str(tmp_path)):
            pass
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health", trust_env=False)
    assert not serve.status().applications and ray_local.address
