"""The streams of a served LSTM and their HTTP face, without Ray: who makes room, what is refused, what the answers are."""

from __future__ import annotations

import math
from dataclasses import replace

import httpx
import pytest
import torch

from apps.balanced_sparsity.config import BalancedSparsityConfig
from apps.balanced_sparsity.models.build import Shape, build_model
from apps.balanced_sparsity.serving.http_app import build_app
from apps.balanced_sparsity.serving.streams import Opened, Refusal, ServedNet, Stepped, StreamTable, load_served
from apps.balanced_sparsity.store import Trained, save_trained
from apps.program.errors import UserError


def trained(name, data):
    lstm = {"hidden": 16, "layers": 2}
    config = BalancedSparsityConfig.model_validate({"model": {"name": name, "lstm": lstm}, "data": {"name": data}})
    shape = Shape(8, 10)
    torch.manual_seed(0)
    model = build_model(config.model, shape)
    return Trained(config, shape, (), model.state_dict(), 1, {}, "accuracy")


@pytest.fixture(scope="module")
def speech():
    return trained("speech_lstm", "digit_rows")


@pytest.fixture
def net(speech, tmp_path) -> ServedNet:
    save_trained(tmp_path / "model.pt", speech)
    return load_served(tmp_path)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_the_mean_is_what_the_network_answers_for_the_frames_so_far(speech, net):
    model, table = speech.model(), StreamTable(net)
    sequences = {"a": torch.randn(7, 8), "b": torch.randn(5, 8)}
    for name in sequences:
        assert table.open(name) == Opened(name, None)
    for cut in (slice(0, 3), slice(3, 4), slice(4, 7)):
        for name, frames in sequences.items():
            if len(frames[cut]):
                told = table.step(name, frames[cut].tolist())
                assert isinstance(told, Stepped)
                seen = frames[: told.frames]
                expected = model(seen[None], torch.tensor([len(seen)]))[0]
                torch.testing.assert_close(torch.tensor(told.mean), expected, atol=1e-5, rtol=0)
                last = model.classifier(model.lstm(seen[None])[0][0, -1])
                torch.testing.assert_close(torch.tensor(told.outputs[-1]), last, atol=1e-5, rtol=0)
    assert table.close("a").frames == 7 and table.info().streams == 1 and table.info().frames == 12


def test_a_word_lstm_hears_numbers_of_words(tmp_path):
    word = trained("word_lstm", "docstrings")
    save_trained(tmp_path / "model.pt", word)
    model, table = word.model(), StreamTable(load_served(tmp_path))
    table.open("a")
    told = table.step("a", [[3.0], [9.0]])
    expected, _ = model(torch.tensor([[3], [9]]), model.first_state(1))
    torch.testing.assert_close(torch.tensor(told.outputs), expected[:, 0], atol=1e-5, rtol=0)
    assert told.mean is None
    for wrong in (10.0, -1.0, 2.5):
        assert table.step("a", [[wrong]]).status == 400
    assert table.status("a").frames == 2


def test_a_full_table_gives_up_only_who_was_idle(net):
    clock = Clock()
    table = StreamTable(net, max_streams=2, evict_after_idle_s=10, clock=clock)
    table.open("a")
    table.open("b")
    clock.now = 8
    table.step("a", [[0.0] * 8])
    clock.now = 9.9
    refused = table.open("c")
    assert refused.status == 429 and "All 2 streams are in use" in refused.sentence
    clock.now = 10
    assert table.open("c") == Opened("c", "b")
    assert table.step("b", [[0.0] * 8]).status == 404 and table.status("a").frames == 1
    assert table.open("d").status == 429
    clock.now = 30
    table.status("a")  # looking is no use of it
    assert table.open("d") == Opened("d", "a")
    assert (table.info().streams, table.info().evicted) == (2, 2)


def test_a_refused_request_changes_nothing(net):
    table, clean = StreamTable(net, max_frames=3), StreamTable(net)
    first, second = torch.randn(2, 8).tolist()
    for one in (table, clean):
        one.open("a")
        one.step("a", [first])
    for frames, says in [
        ([], "1 to 3 frames"),
        ([second] * 4, "1 to 3 frames, not 4"),
        ([second, second[:7]], "8 numbers; frame 1 has 7"),
        ([second, [math.nan] * 8], "NaN"),
        ([second, [1e300] * 8], "1e+06"),
    ]:
        told = table.step("a", frames)
        assert isinstance(told, Refusal) and told.status == 400 and says in told.sentence
    assert table.open("a").status == 409
    assert table.step("a", [second]) == clean.step("a", [second])
    assert table.step("nobody", [second]).status == table.close("nobody").status == table.status("nobody").status == 404


def test_what_cannot_be_served(tmp_path, speech):
    with pytest.raises(UserError, match="There is no checkpoint"):
        load_served(tmp_path / "missing.pt")
    vgg = BalancedSparsityConfig()
    shape = Shape(1, 10, 8)
    model = build_model(vgg.model, shape)
    save_trained(tmp_path / "model.pt", replace(speech, config=vgg, shape=shape, weights=model.state_dict()))
    with pytest.raises(UserError, match="speech_lstm or a word_lstm"):
        load_served(tmp_path)


class OneTable:
    """``Streams`` over one table in this process."""

    def __init__(self, table):
        self.table = table

    async def open(self, stream):
        return self.table.open(stream)

    async def step(self, stream, frames):
        return self.table.step(stream, frames)

    async def status(self, stream):
        return self.table.status(stream)

    async def close(self, stream):
        return self.table.close(stream)

    async def info(self):
        return [self.table.info()]


@pytest.fixture
async def http(net):
    app = build_app(OneTable(StreamTable(net, max_streams=2)), 4096)
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://s"
    ) as client:
        yield client


async def test_a_stream_over_http(http):
    opened = await http.post("/streams", json={"stream": "mic-1"})
    assert opened.status_code == 201 and opened.json() == {"stream": "mic-1", "evicted": None}
    told = (await http.post("/streams/mic-1/frames", json={"frames": [[0.5] * 8, [1] * 8]})).json()
    assert told["frames"] == 2 and len(told["outputs"]) == 2 and len(told["outputs"][0]) == len(told["mean"]) == 10
    assert (await http.get("/streams/mic-1")).json()["frames"] == 2
    named = (await http.post("/streams")).json()["stream"]
    assert (await http.get("/status")).json()["shards"] == [{"streams": 2, "max_streams": 2, "evicted": 0, "frames": 2}]
    assert (await http.delete(f"/streams/{named}")).status_code == 200
    assert (await http.get("/health")).json() == {"status": "ok"}


async def test_http_mistakes_are_a_status_and_a_sentence(http):
    async def refused(status, says, path, content, method="POST"):
        answer = await http.request(method, path, content=content)
        message = answer.json()["error"]["message"]
        assert answer.status_code == status and says in message, (answer.status_code, message)
        return answer

    await http.post("/streams", json={"stream": "a"})
    await http.post("/streams", json={"stream": "b"})
    full = await refused(429, "in use", "/streams", b"{}")
    assert full.headers["retry-after"] == "1"
    await refused(409, "open already", "/streams", b'{"stream": "a"}')
    await refused(400, "name has 1 to 128", "/streams", b'{"stream": "a b"}')
    await refused(400, "stream", "/streams", b'{"stream": 3}')
    await refused(400, "nonsense", "/streams", b'{"nonsense": 3}')
    await refused(400, "JSON", "/streams/a/frames", b"{")
    await refused(400, "frames", "/streams/a/frames", b"{}")
    await refused(400, "frames.0.1", "/streams/a/frames", b'{"frames": [[1, "x"]]}')
    await refused(400, "8 numbers", "/streams/a/frames", b'{"frames": [[1]]}')
    await refused(413, "larger than 4096", "/streams/a/frames", b" " * 5000)
    await refused(404, "is not open", "/streams/c/frames", b'{"frames": [[1]]}')
    await refused(404, "no such path", "/nowhere", b"")
    await refused(405, "HTTP method", "/streams/a", b"")
    assert (await http.get("/streams/a")).json()["frames"] == 0
