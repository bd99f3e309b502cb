"""Command line of the llumnix app: serve, chat, status, replay, demo."""

from __future__ import annotations

import signal
import sys
import threading
from typing import Annotated

import typer

from apps.llumnix.config import LlumnixConfig
from apps.program.cli import program

Url = Annotated[str | None, typer.Option(help="Server to talk to; by default the one of the configuration.")]


app = program("llumnix", "Serve a language model on instances between which requests migrate live.")


@app.verb
def serve(config: LlumnixConfig) -> None:
    """Start the instances and the OpenAI-compatible server; ends with Ctrl-C or SIGTERM."""
    from apps.llumnix.service import running_service

    ended = threading.Event()
    print(f"Starting {config.instances.count} instances of {config.model_name} ...", flush=True)
    with running_service(config) as url:
        # Only now: starting Ray installs a handler of its own, which would end this process in the middle.
        previous = signal.signal(signal.SIGTERM, lambda *_: ended.set())
        try:
            print(f"Serving {config.model_name} at {url}/v1 (Ctrl-C ends).", flush=True)
            while not ended.wait(0.5):
                pass
        except KeyboardInterrupt:
            pass
        print("Ending ...", flush=True)
    signal.signal(signal.SIGTERM, previous)


@app.verb
def chat(
    config: LlumnixConfig,
    url: Url = None,
    temperature: Annotated[float, typer.Option(min=0, max=2)] = 0.7,
    max_tokens: Annotated[int, typer.Option(min=1)] = 512,
    seed: Annotated[int | None, typer.Option(help="Makes the answers repeatable.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
) -> None:
    """Chat in the terminal, with a server that runs or, when there is none at the configured address, with its own."""
    from apps.llumnix.chat import ChatSession, chat_loop
    from apps.llumnix.client import Client, ServerError
    from apps.llumnix.service import running_service

    def talk(address: str) -> None:
        with Client(address) as client:
            session = ChatSession(client, temperature, max_tokens, seed)
            if system:
                session.messages.append({"role": "system", "content": system})
            chat_loop(session)

    if url is not None:
        talk(url)
        return
    try:
        with Client(config.url) as client:
            client.model()
    except ServerError as error:
        if error.status is not None:
            raise
        print(f"No server at {config.url}: starting one ...", flush=True)
        with running_service(config) as own:
            talk(own)
        return
    talk(config.url)


@app.verb
def status(
    config: LlumnixConfig,
    url: Url = None,
    once: Annotated[bool, typer.Option("--once", help="Print once and end.")] = False,
    interval: Annotated[float, typer.Option(min=0.05, help="Seconds between updates.")] = 0.5,
) -> None:
    """Instances, load, requests and migrations of a running server, as a live table."""
    from apps.llumnix.client import Client
    from apps.llumnix.status import show

    with Client(url or config.url) as client:
        show(client, once or not sys.stdout.isatty(), interval)


def _add_verbs() -> None:
    """The verbs that other modules bring."""
    from apps.llumnix.demo import demo
    from apps.llumnix.replay import replay

    app.verb(replay)
    app.verb(demo)


if __name__ == "__main__":
    _add_verbs()
    app.main()
