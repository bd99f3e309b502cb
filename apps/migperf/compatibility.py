"""Which frameworks run inside a slice: each is imported and computes a small matrix product, in a process of its own."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

# A framework's module: code that computes something with it and prints its version and device.
PROBES: dict[str, str] = {
    "torch": (
        "import torch as f; d='cuda' if f.cuda.is_available() else 'cpu'; x=f.ones(8,8,device=d); float((x@x).sum()); "
        "print(f.__version__, d)"
    ),
    "tensorflow": "import tensorflow as f; x=f.ones((8,8)); float(f.reduce_sum(x@x)); print(f.__version__, x.device)",
    "jax": "import jax as f, jax.numpy as n; x=n.ones((8,8)); float((x@x).sum()); print(f.__version__, f.devices()[0])",
    "paddle": "import paddle as f; x=f.ones([8,8]); float((x@x).sum()); print(f.__version__, f.get_device())",
    "mxnet": "import mxnet as f; x=f.nd.ones((8,8)); float(f.nd.dot(x,x).sum().asscalar()); print(f.__version__, x.context)",
    "deepspeed": "import deepspeed as f; print(f.__version__, f.accelerator.get_accelerator().device_name())",
    "transformers": (
        "import transformers as f, torch; c=f.BertConfig(hidden_size=32,num_hidden_layers=1,num_attention_heads=2,"
        "intermediate_size=64,vocab_size=99); d='cuda' if torch.cuda.is_available() else 'cpu'; "
        "f.BertModel(c).to(d)(torch.ones(1,4,dtype=torch.long,device=d)); print(f.__version__, d)"
    ),
    "triton": "import triton as f; print(f.__version__, 'imports')",
    "onnxruntime": "import onnxruntime as f; print(f.__version__, f.get_available_providers()[0])",
    "vllm": "import vllm as f; print(f.__version__, 'imports')",
    "ray": "import ray as f; print(f.__version__, 'imports')",
}  # fmt: skip
PATIENCE_S = 180.0


@dataclass(frozen=True)
class Compatibility:
    """What one probe found."""

    framework: str
    outcome: Literal["runs", "not installed", "fails"]
    detail: str


def probe(framework: str, environment: Mapping[str, str]) -> Compatibility:
    """Runs one framework's probe in a process with this (whole) environment."""
    if importlib.util.find_spec(framework) is None:
        return Compatibility(framework, "not installed", "")
    command = [sys.executable, "-c", PROBES[framework]]
    try:
        done = subprocess.run(command, env=dict(environment), capture_output=True, text=True, timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        return Compatibility(framework, "fails", f"no end within {PATIENCE_S:.0f} s")
    lines = (done.stdout if done.returncode == 0 else done.stderr or done.stdout).strip().splitlines()
    detail = lines[-1][:160] if lines else f"exit code {done.returncode}"
    return Compatibility(framework, "runs" if done.returncode == 0 else "fails", detail)
