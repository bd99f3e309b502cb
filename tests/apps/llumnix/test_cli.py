"""The command line: a user's mistake is one clear line and a non-zero exit, found before Ray is started; configurations
and the Serve builder resolve."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import yaml

from apps.llumnix.config import LlumnixConfig
from apps.program.config import load_config, presets
from apps.program.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[3]


def command(*arguments: str, timeout: float = 60) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "apps.llumnix", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def assert_one_line(result: subprocess.CompletedProcess, *contains: str) -> None:
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("llumnix: "), result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    for text in contains:
        assert text in lines[0]


def test_a_port_in_use_is_one_line():
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        assert_one_line(command("serve", f"server.port={port}"), f"127.0.0.1:{port}", "server.port=N")


@pytest.mark.parametrize("model", ["nothing-of-that-name", "missing/folder/model.gguf"])
def test_a_missing_model_is_one_line(model):
    assert_one_line(command("serve", f"engine.model={model}", f"server.port={free_port()}"), "model")


def test_a_corrupt_model_is_one_line(tmp_path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + b"\x03\x00\x00\x00" + b"\xff" * 40)
    assert_one_line(command("serve", f"engine.model={broken}", f"server.port={free_port()}"), "broken.gguf")


def test_a_server_that_is_not_there_is_one_line():
    url = f"http://127.0.0.1:{free_port()}"
    assert_one_line(command("status", "--once", "--url", url), url, "cannot be reached")
    assert_one_line(command("chat", "--url", url), url, "cannot be reached")


def test_unknown_keys_and_values_name_what_is_allowed():
    assert_one_line(command("serve", "instances.cout=3"), "instances.cout", "instances.count")
    assert_one_line(command("serve", "scheduler.dispatch=luck"), "scheduler.dispatch", "round_robin")
    assert_one_line(command("serve", "engine.threads=0"), "threads must be at least 1")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_every_preset_resolves_and_cpu_needs_nothing_downloaded():
    names = set(presets("llumnix")) - {"serve"}
    assert {"cpu", "gpu", "cluster"} <= names
    configs = {name: load_config(LlumnixConfig, name, system="llumnix") for name in names}
    cpu = configs["cpu"]
    assert cpu.engine.model == "smollm2-135m-instruct" and cpu.engine.device == "cpu" and cpu.instances.count >= 2
    assert cpu.model_name == "smollm2-135m-instruct" and cpu.url == "http://127.0.0.1:8000"
    assert configs["cluster"].instances.num_gpus == 1


def test_serve_yaml_fits_serves_schema_and_its_builder_takes_its_arguments():
    from ray.serve.schema import ServeDeploySchema

    from apps.llumnix.graph import build

    content = yaml.safe_load((REPOSITORY / "configs/llumnix/serve.yaml").read_text())
    schema = ServeDeploySchema.model_validate(content)
    [app] = schema.applications
    assert app.import_path == "apps.llumnix.graph:build"
    built = build(app.args)
    assert built._bound_deployment.name == "Ingress"
    with pytest.raises(ConfigError, match="no argument 'nonsense'"):
        build({"nonsense": 1})
    with pytest.raises(ConfigError, match="engine.dtype"):
        build({"overrides": ["engine.dtype=fp7"]})


@pytest.mark.timeout(300)
def test_serve_starts_answers_shows_its_status_and_ends_cleanly_on_sigterm(smollm2_gguf):
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "apps.llumnix", "serve", f"server.port={port}", "instances.count=1",
         "engine.kv_memory_mib=64", "engine.max_model_len=512", "ray.address=local"],
        cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"RAY_AUTH_MODE": "token"},
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 240
        while True:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "the server did not become ready"
            try:
                if httpx.get(f"{url}/health", timeout=2, trust_env=False).status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            time.sleep(0.3)
        body = {"model": "smollm2-135m-instruct", "prompt": "One, two,", "max_tokens": 4, "temperature": 0}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60, trust_env=False).json()
        assert answer["usage"]["completion_tokens"] == 4
        shown = command("status", "--once", "--url", url)
        assert shown.returncode == 0 and "instance-" in shown.stdout and "1 instances" in shown.stdout
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output
        assert f"Serving smollm2-135m-instruct at {url}/v1" in output and "Traceback" not in output
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
