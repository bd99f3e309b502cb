"""The OpenAI-compatible HTTP app over instances in one process: shapes, streams, limits, and that no body breaks it.

Oracles: the fake model's own answer for every text; OpenAI's API reference for the shapes; for arbitrary bodies, the
property that the answer is a good 200 or an OpenAI-shaped 4xx and that the server serves the next request.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actors.llumnix.frontend import Frontend, FrontendSettings
from apps.llumnix.generation import ModelCard, derived_seed
from apps.llumnix.http_app import HttpLimits, build_app
from tests.actors.llumnix.fake_cluster import (
    MAX_LEN,
    ByteTokenizer,
    FakeInstance,
    FakeScheduler,
    expected_text,
)

LIMITS = HttpLimits(max_body_bytes=200_000, request_timeout_s=5.0)
MODEL = "fake-model"


@dataclass
class FakeBackend:
    frontend: Frontend
    scheduler: FakeScheduler
    card: ModelCard = field(default_factory=lambda: ModelCard(MODEL, ("path/to/fake.gguf",), MAX_LEN, 1_700_000_000))
    tokenizer: ByteTokenizer = field(default_factory=ByteTokenizer)

    async def submit(self, requests):
        return await self.frontend.submit(requests)

    def ready(self) -> bool:
        return self.frontend.num_instances > 0

    async def status(self) -> dict[str, Any]:
        return {"instances": list(self.scheduler.instances)}

    async def history(self, since: float) -> dict[str, Any]:
        return {"since": since}

    async def audit(self) -> dict[str, Any]:
        return {}

    async def set_policy(self, dispatch: str | None, migration: bool | None) -> dict[str, Any]:
        return {"dispatch": dispatch, "migration": migration}

    async def migrate(self, request_id: str, destination: str | None) -> dict[str, Any]:
        if not self.scheduler.migrate(request_id):
            raise LookupError(f"request {request_id} is at no instance")
        return {"outcome": "committed"}


@contextlib.asynccontextmanager
async def server(instances=2, step_s=0.0005, limits=LIMITS):
    scheduler = FakeScheduler(*(FakeInstance(f"i{n}", step_s) for n in range(instances)))
    frontend = Frontend(
        scheduler, lambda h: h, FrontendSettings(sweep_interval_s=0.05, silence_s=1, dispatch_timeout_s=0.2)
    )
    frontend.start()
    await asyncio.sleep(0.01)
    app = build_app(FakeBackend(frontend, scheduler), limits)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://server", timeout=10) as client:
            yield client, scheduler, frontend
    finally:
        await frontend.stop()
        for instance in scheduler.instances.values():
            instance.die()


def serve(test, **kwargs):
    """Run ``test(client, scheduler, frontend)`` against a fresh server."""

    async def main():
        async with server(**kwargs) as parts:
            await asyncio.wait_for(test(*parts), 30)

    asyncio.run(main())


def assert_error(response, status, param=..., contains=""):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and error["message"].endswith(".")
    assert contains in error["message"], error["message"]
    if param is not ...:
        assert error["param"] == param


def events(text):
    """Payloads of a text/event-stream; checks the framing."""
    blocks = text.split("\n\n")
    assert blocks[-1] == "" and blocks[-2] == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]


def answers(scheduler):
    """The undisturbed answer to every request that reached an instance, in choice order."""
    added = {r.request_id: r for i in scheduler.instances.values() for r in i.added}
    return [expected_text(added[name]) for name in sorted(added, key=lambda n: int(n.rsplit("-", 1)[1]))]


COMPLETION = {"model": MODEL, "prompt": "Hello", "max_tokens": 8, "seed": 1}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, "seed": 1}


def test_completion():
    async def test(client, scheduler, frontend):
        body = (await client.post("/v1/completions", json=COMPLETION)).json()
        assert body["object"] == "text_completion" and body["id"].startswith("cmpl-") and body["model"] == MODEL
        [choice] = body["choices"]
        assert choice["text"] == answers(scheduler)[0] and choice["finish_reason"] == "length"
        assert choice["logprobs"] is None and choice["index"] == 0
        assert body["usage"] == {
            "prompt_tokens": 5,
            "completion_tokens": 8,
            "total_tokens": 13,
            "prompt_tokens_details": {"cached_tokens": 0},
        }

    serve(test)


def test_completion_stream_equals_the_whole_and_ends_with_usage():
    async def test(client, scheduler, frontend):
        whole = (await client.post("/v1/completions", json=COMPLETION)).json()
        options = {"stream": True, "stream_options": {"include_usage": True}}
        response = await client.post("/v1/completions", json=COMPLETION | options)
        assert response.headers["content-type"].startswith("text/event-stream")
        chunks = events(response.text)
        assert "".join(c["choices"][0]["text"] for c in chunks[:-1]) == whole["choices"][0]["text"]
        assert [c["choices"][0]["finish_reason"] for c in chunks[:-1]] == [None] * 7 + ["length"]
        assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
        assert len({c["id"] for c in chunks}) == 1

    serve(test)


def test_chat_and_its_stream():
    async def test(client, scheduler, frontend):
        whole = (await client.post("/v1/chat/completions", json=CHAT)).json()
        message = whole["choices"][0]["message"]
        assert whole["object"] == "chat.completion" and message["role"] == "assistant"
        assert message["content"] == answers(scheduler)[0]
        chunks = events((await client.post("/v1/chat/completions", json=CHAT | {"stream": True})).text)
        assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == message["content"]
        assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"

    serve(test)


def test_chat_content_parts_and_developer_role_reach_the_template():
    async def test(client, scheduler, frontend):
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
        await client.post("/v1/chat/completions", json=CHAT | {"messages": messages})
        [request] = [r for i in scheduler.instances.values() for r in i.added]
        assert bytes(request.prompt_token_ids) == b"system:be brief\nuser:ab\nassistant:"

    serve(test)


def test_n_choices_have_derived_seeds_and_many_prompts_come_in_order():
    async def test(client, scheduler, frontend):
        wanted = COMPLETION | {"prompt": ["one", "two"], "n": 3}
        body = (await client.post("/v1/completions", json=wanted)).json()
        assert [c["index"] for c in body["choices"]] == list(range(6))
        assert [c["text"] for c in body["choices"]] == answers(scheduler)
        added = {r.request_id[-1]: r for i in scheduler.instances.values() for r in i.added}
        assert [added[str(i)].sampling.seed for i in range(6)] == [derived_seed(1, i) for i in range(6)]
        assert len({derived_seed(1, i) for i in range(6)}) == 6
        assert body["usage"]["prompt_tokens"] == 6 and body["usage"]["completion_tokens"] == 48
        streamed = events((await client.post("/v1/completions", json=wanted | {"stream": True})).text)
        for index in range(6):
            parts = [c["choices"][0]["text"] for c in streamed if c["choices"][0]["index"] == index]
            assert "".join(parts) == body["choices"][index]["text"]

    serve(test)


def test_logprobs_of_both_endpoints():
    async def test(client, scheduler, frontend):
        legacy = (await client.post("/v1/completions", json=COMPLETION | {"logprobs": 2})).json()["choices"][0]
        logprobs, text = legacy["logprobs"], legacy["text"]
        assert "".join(logprobs["tokens"]) == text and logprobs["text_offset"] == list(range(8))
        assert logprobs["token_logprobs"] == [-0.5] * 8 and logprobs["top_logprobs"][0] == {"a": -1.0, "b": -2.0}
        chat = CHAT | {"logprobs": True, "top_logprobs": 1}
        content = (await client.post("/v1/chat/completions", json=chat)).json()["choices"][0]["logprobs"]["content"]
        assert [entry["token"] for entry in content] == list(answers(scheduler)[0])
        assert content[0]["bytes"] == [ord(content[0]["token"])] and len(content[0]["top_logprobs"]) == 1
        chunks = events((await client.post("/v1/chat/completions", json=chat | {"stream": True})).text)
        streamed = [e for c in chunks for e in (c["choices"][0]["logprobs"] or {"content": []})["content"]]
        assert streamed == content

    serve(test)


def test_echo_token_prompts_and_sampling_parameters_reach_the_engine():
    async def test(client, scheduler, frontend):
        extra = {
            "prompt": [72, 105], "echo": True, "temperature": 0, "top_k": 5, "top_p": 0.5, "min_p": 0.1,
            "repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": -0.3, "stop": ["x", "yz"],
            "stop_token_ids": [3], "ignore_eos": True, "min_tokens": 2, "priority": 4,
        }  # fmt: skip
        body = (await client.post("/v1/completions", json=COMPLETION | extra)).json()
        [request] = [r for i in scheduler.instances.values() for r in i.added]
        assert body["choices"][0]["text"] == "Hi" + expected_text(request)
        s = request.sampling
        assert (s.temperature, s.top_k, s.top_p, s.min_p, s.repetition_penalty) == (0, 5, 0.5, 0.1, 1.2)
        assert (s.presence_penalty, s.frequency_penalty, s.stop, s.stop_token_ids) == (0.3, -0.3, ("x", "yz"), (3,))
        assert (s.ignore_eos, s.min_tokens, s.seed, request.priority) == (True, 2, 1, 4)

    serve(test)


BAD_BODIES = [
    ("completions", {"prompt": ""}, "prompt", "empty"),
    ("completions", {"prompt": []}, "prompt", "empty"),
    ("completions", {"prompt": [[]]}, "prompt", "empty"),
    ("completions", {"prompt": "x" * (MAX_LEN + 1)}, "prompt", "maximum context length is 512"),
    ("completions", {"prompt": [999]}, "prompt", "not below 256"),
    ("completions", {"prompt": 5}, "prompt", ""),
    ("completions", {"max_tokens": -1}, "max_tokens", "greater than or equal to 1"),
    ("completions", {"max_tokens": 10**15}, "max_tokens", "maximum context length"),
    ("completions", {"max_tokens": 10**30}, "max_tokens", ""),
    ("completions", {"max_tokens": "many"}, "max_tokens", "integer"),
    ("completions", {"min_tokens": 9}, "min_tokens", "above max_tokens"),
    ("completions", {"temperature": -0.1}, "temperature", ""),
    ("completions", {"temperature": 2.1}, "temperature", ""),
    ("completions", {"top_p": 0}, "top_p", ""),
    ("completions", {"top_k": -7}, "top_k", ""),
    ("completions", {"min_p": 1.5}, "min_p", ""),
    ("completions", {"repetition_penalty": 0}, "repetition_penalty", ""),
    ("completions", {"presence_penalty": 3}, "presence_penalty", ""),
    ("completions", {"n": 0}, "n", ""),
    ("completions", {"n": 10_000}, "n", ""),
    ("completions", {"prompt": ["a"] * 40, "n": 2}, "n", "choices"),
    ("completions", {"stop": ["x"] * 10_000}, "stop", "at most 64"),
    ("completions", {"stop": [""]}, "stop[0]", ""),
    ("completions", {"logprobs": 21}, "logprobs", ""),
    ("completions", {"seed": 1.5}, "seed", ""),
    ("completions", {"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
    ("completions", {"temprature": 1}, "temprature", "Unrecognized"),
    ("completions", {"stream_options": {"include_usage": True}}, None, "stream is true"),
    ("chat/completions", {"messages": []}, "messages", ""),
    ("chat/completions", {"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", ""),
    ("chat/completions", {"messages": [{"content": "x"}]}, "messages[0].role", "Missing"),
    ("chat/completions", {"messages": [{"role": "user", "content": "x" * MAX_LEN}]}, "messages", "maximum context"),
    ("chat/completions", {"top_logprobs": 3}, None, "logprobs is true"),
    ("chat/completions", {"tools": [{}]}, None, "not supported"),
]


def test_bad_bodies_are_refused_with_a_sentence_and_the_server_keeps_serving():
    async def test(client, scheduler, frontend):
        for path, change, param, contains in BAD_BODIES:
            base = CHAT if path.startswith("chat") else COMPLETION
            assert_error(await client.post(f"/v1/{path}", json=base | change), 400, param, contains)
        assert (await client.post("/v1/completions", json=COMPLETION)).status_code == 200
        assert frontend.num_streams == 0

    serve(test)


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"model": "\xff"}', b'{"model": "\\ud800"}', b"[" * 50_000]
    + [b'{"model": "fake-model", "prompt": "a", "temperature": NaN}'],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/sextant/migrate"])
def test_malformed_bodies(path, raw):
    async def test(client, scheduler, frontend):
        assert_error(await client.post(path, content=raw), 400)

    serve(test)


def test_unknown_model_path_method_and_large_bodies():
    async def test(client, scheduler, frontend):
        assert_error(await client.post("/v1/completions", json=COMPLETION | {"model": "gpt-9"}), 404, "model", "gpt-9")
        assert (
            await client.post("/v1/completions", json=COMPLETION | {"model": "path/to/fake.gguf"})
        ).status_code == 200
        assert_error(await client.get("/v1/nothing"), 404)
        assert_error(await client.get("/v1/completions"), 405)
        assert_error(await client.get("/v1/models/gpt-9"), 404, "model")
        large = COMPLETION | {"prompt": "x" * 300_000}
        assert_error(await client.post("/v1/completions", json=large), 413, contains="larger than 200000 bytes")
        assert_error(await client.post("/sextant/migrate", json={"request_id": "none"}), 404, "request_id")

    serve(test)


def test_introspection_routes():
    async def test(client, scheduler, frontend):
        assert (await client.get("/sextant/history?since=1.5")).json() == {"since": 1.5}
        assert_error(await client.get("/sextant/history?since=x"), 400, "since")
        answer = await client.post("/sextant/policy", json={"dispatch": "round_robin", "migration": False})
        assert answer.json() == {"dispatch": "round_robin", "migration": False}
        assert_error(await client.post("/sextant/policy", json={"dispatch": "luck"}), 400, "dispatch")
        assert (await client.get("/sextant/audit")).json() == {}

    serve(test)


def test_models_and_health():
    async def test(client, scheduler, frontend):
        listed = (await client.get("/v1/models")).json()
        assert listed["object"] == "list" and [m["id"] for m in listed["data"]] == [MODEL]
        assert (await client.get(f"/v1/models/{MODEL}")).json() == listed["data"][0]
        assert (await client.get("/health")).status_code == 200
        for instance in scheduler.instances.values():
            instance.die()
        await asyncio.sleep(0.05)
        assert_error(await client.get("/health"), 503)
        refused = await client.post("/v1/completions", json=COMPLETION)
        assert_error(refused, 503)
        assert refused.headers["retry-after"] == "1"

    serve(test)


def test_migration_ordered_over_http_mid_stream_changes_nothing():
    async def test(client, scheduler, frontend):
        body = COMPLETION | {"stream": True, "max_tokens": 200}
        moved, text = 0, ""
        async with client.stream("POST", "/v1/completions", json=body) as response:
            # The in-process transport hands the response over when it is complete: order from beside it.
            text = (await response.aread()).decode()
        assert text.endswith("data: [DONE]\n\n")

        async def mover():
            nonlocal moved
            while True:
                await asyncio.sleep(0.01)
                for instance in scheduler.instances.values():
                    for request_id in list(instance.requests)[:1]:
                        answer = await client.post("/sextant/migrate", json={"request_id": request_id})
                        moved += answer.status_code == 200

        task = asyncio.create_task(mover())
        disturbed = await client.post("/v1/completions", json=body)
        task.cancel()
        told = ["".join(c["choices"][0]["text"] for c in events(t)) for t in (text, disturbed.text)]
        assert told[0] == told[1] == answers(scheduler)[0] and len(told[0]) == 200 and moved >= 3

    serve(test)


def test_an_engine_failure_mid_stream_is_an_error_event_and_mid_body_a_500():
    async def test(client, scheduler, frontend):
        async def break_it():
            while True:
                await asyncio.sleep(0.005)
                for instance in scheduler.instances.values():
                    for request_id, (_, output) in instance.requests.items():
                        if len(output) > 5:
                            instance.fail_next = request_id

        task = asyncio.create_task(break_it())
        body = COMPLETION | {"max_tokens": 400}
        last = events((await client.post("/v1/completions", json=body | {"stream": True})).text)[-1]
        assert last["error"]["type"] == "server_error" and "broken" in last["error"]["message"]
        response = await client.post("/v1/completions", json=body)
        assert response.status_code == 500 and "broken" in response.json()["error"]["message"]
        task.cancel()

    serve(test)


def test_a_request_that_takes_too_long_is_ended_and_aborted():
    async def test(client, scheduler, frontend):
        for body in (COMPLETION, COMPLETION | {"n": 2}):
            response = await client.post("/v1/completions", json=body | {"max_tokens": 400})
            assert response.status_code == 504 and response.json()["error"]["code"] == "timeout"
        await asyncio.sleep(0.05)
        assert not any(i.requests for i in scheduler.instances.values())

    serve(test, step_s=0.02, limits=HttpLimits(request_timeout_s=0.2))


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_request_everywhere(stream):
    async def test(client, scheduler, frontend):
        call = client.post("/v1/completions", json=COMPLETION | {"max_tokens": 400, "stream": stream, "n": 2})
        task = asyncio.create_task(call)
        while sum(len(i.requests) for i in scheduler.instances.values()) < 2:
            await asyncio.sleep(0.005)
        task.cancel()
        async with asyncio.timeout(5):
            while any(i.requests for i in scheduler.instances.values()) or frontend.num_streams:
                await asyncio.sleep(0.005)

    serve(test, step_s=0.01)


# ---- arbitrary bodies

scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20)
)
json_values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=8), v, max_size=4)
)
FIELDS = [
    "model", "prompt", "messages", "max_tokens", "n", "stream", "stream_options", "temperature", "top_p", "top_k",
    "min_p", "stop", "stop_token_ids", "seed", "logprobs", "top_logprobs", "echo", "best_of", "suffix", "user",
    "presence_penalty", "repetition_penalty", "ignore_eos", "min_tokens", "priority", "logit_bias", "tools", "nonsense",
]  # fmt: skip
small = st.integers(-3, 30)
plausible = st.fixed_dictionaries(
    {},
    optional={
        "prompt": st.text(max_size=30) | st.lists(st.integers(-2, 300), max_size=5) | st.lists(st.text(max_size=5)),
        "messages": st.lists(
            st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "x"]), "content": scalars}), max_size=3
        ),
        "max_tokens": small,
        "n": st.integers(-1, 4),
        "stream": st.booleans(),
        "temperature": st.floats(-1, 3),
        "top_p": st.floats(-1, 2),
        "seed": st.integers(),
        "stop": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=5),
        "logprobs": small | st.booleans(),
        "echo": st.booleans(),
    },
)
arbitrary = st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=6)
raw_bodies = st.binary(max_size=60) | json_values.map(lambda v: json.dumps(v).encode())


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    path=st.sampled_from(["completions", "chat/completions"]),
    bodies=st.lists(plausible | arbitrary | raw_bodies, min_size=1, max_size=4),
)
def test_no_body_breaks_the_server(path, bodies):
    async def test(client, scheduler, frontend):
        for body in bodies:
            if isinstance(body, dict):
                base = CHAT if path.startswith("chat") else COMPLETION
                raw = json.dumps(base | body).encode()
            else:
                raw = body
            response = await client.post(f"/v1/{path}", content=raw)
            if response.status_code == 200:
                if response.headers["content-type"].startswith("text/event-stream"):
                    assert not any("error" in payload for payload in events(response.text))
                else:
                    assert response.json()["choices"]
            else:
                assert 400 <= response.status_code < 500, response.text
                assert_error(response, response.status_code)
        assert (await client.post("/v1/completions", json=COMPLETION)).status_code == 200
        assert frontend.num_streams == 0

    serve(test)
