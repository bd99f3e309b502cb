"""A terminal chat that streams, with history, against a running server."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TextIO

from apps.llumnix.client import Client, ServerError

HELP = "Commands: /new begins anew, /undo takes the last exchange back, /status shows the instances, /quit ends (or Ctrl-D)."


@dataclass
class ChatSession:
    """The conversation so far, and how answers are sampled."""

    client: Client
    temperature: float = 0.7
    max_tokens: int = 512
    seed: int | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    request_id: str | None = None
    """Id of the answer that streams now; ``/sextant/migrate`` takes it."""

    def ask(self, question: str) -> Iterator[str]:
        """Send a question; yields the answer's text as it streams, and keeps both in the history when it is complete."""
        messages = [*self.messages, {"role": "user", "content": question}]
        body = {"messages": messages, "temperature": self.temperature, "max_tokens": self.max_tokens}
        if self.seed is not None:
            body["seed"] = self.seed
        answer = ""
        with contextlib.closing(self.client.stream("chat/completions", model=self.client.model(), **body)) as events:
            for event in events:
                self.request_id = event["id"]
                for choice in event["choices"]:
                    text = choice["delta"].get("content") or ""
                    answer += text
                    if text:
                        yield text
        self.messages = [*messages, {"role": "assistant", "content": answer}]

    def undo(self) -> bool:
        """Take the last question and answer back; False when there is none."""
        if len(self.messages) < 2:
            return False
        del self.messages[-2:]
        return True


def chat_loop(session: ChatSession, read: Callable[[str], str] = input, out: TextIO = sys.stdout) -> None:
    """Read questions and print streamed answers until /quit, end of input, or Ctrl-C at the prompt."""
    print(f"Chat with {session.client.model()} at {session.client.url}. {HELP}", file=out)
    while True:
        try:
            question = read("\nyou> ").strip()
        except (EOFError, KeyboardInterrupt):
            print(file=out)
            return
        if not question:
            continue
        if question.startswith("/"):
            if not _command(session, question, out):
                return
            continue
        _answer(session, question, out)


def _answer(session: ChatSession, question: str, out: TextIO) -> None:
    print("bot> ", end="", flush=True, file=out)
    try:
        for text in session.ask(question):
            print(text, end="", flush=True, file=out)
        print(file=out)
    except KeyboardInterrupt:
        print(" [stopped]", file=out)  # closing the stream has aborted the request at the server
    except ServerError as error:
        print(f"\n[{error}]", file=out)


def _command(session: ChatSession, command: str, out: TextIO) -> bool:
    """Run one command; False ends the chat."""
    match command.split()[0]:
        case "/quit" | "/exit":
            return False
        case "/new":
            session.messages.clear()
            print("[a new conversation]", file=out)
        case "/undo":
            print("[taken back]" if session.undo() else "[nothing to take back]", file=out)
        case "/status":
            for instance in session.client.status()["instances"]:
                print(
                    f"{instance['instance_id']}: {instance['running']} running, {instance['waiting']} waiting, "
                    f"{instance['used_blocks']}/{instance['total_blocks']} KV blocks",
                    file=out,
                )
        case _:
            print(HELP, file=out)
    return True
