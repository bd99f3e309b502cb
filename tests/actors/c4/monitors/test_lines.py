"""Held lines: their end is told once, at once, and only for the agent that had the right token."""

from __future__ import annotations

import asyncio

from actors.c4.monitors.lines import LineAddress, Lines, hold_line


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def test_the_end_of_a_line_is_told() -> None:
    ends: list[str] = []

    async def on_end(node_id: str) -> None:
        ends.append(node_id)

    lines = Lines(on_end)
    address = await lines.open("127.0.0.1")
    first, second = asyncio.Event(), asyncio.Event()
    holding = [
        asyncio.create_task(hold_line(address, "n0", first)),
        asyncio.create_task(hold_line(address, "n1", second)),
    ]
    await until(lambda: len(lines._held) == 2)
    assert ends == []
    first.set()
    await until(lambda: ends == ["n0"])
    await holding[0]
    second.set()
    await holding[1]
    lines.close()


async def test_strangers_are_sent_away_and_tell_nothing() -> None:
    ends: list[str] = []

    async def on_end(node_id: str) -> None:
        ends.append(node_id)

    lines = Lines(on_end)
    address = await lines.open("127.0.0.1")
    for hello in (b"wrong n0\n", b"\xff\xfe\n", b"\n", b"a b c\n"):
        reader, writer = await asyncio.open_connection("127.0.0.1", address.port)
        writer.write(hello)
        assert await reader.read() == b""
        writer.close()
    assert (ends, lines._held) == ([], {})
    lines.close()


async def test_a_line_that_was_taken_over_by_a_new_agent_tells_nothing() -> None:
    ends: list[str] = []

    async def on_end(node_id: str) -> None:
        ends.append(node_id)

    lines = Lines(on_end)
    address = await lines.open("127.0.0.1")
    old, new = asyncio.Event(), asyncio.Event()
    first = asyncio.create_task(hold_line(address, "n0", old))
    await until(lambda: "n0" in lines._held)
    before = lines._held["n0"]
    second = asyncio.create_task(hold_line(address, "n0", new))
    await until(lambda: lines._held["n0"] is not before)
    old.set()
    await first
    await asyncio.sleep(0.05)
    assert ends == []
    new.set()
    await second
    await until(lambda: ends == ["n0"])
    lines.close()


async def test_an_agent_calls_again_until_its_end() -> None:
    ended = asyncio.Event()
    holding = asyncio.create_task(hold_line(LineAddress("127.0.0.1", 1, "token"), "n0", ended))
    await asyncio.sleep(0.1)
    assert not holding.done()
    ended.set()
    await asyncio.wait_for(holding, 10)
