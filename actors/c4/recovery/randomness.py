"""States of the random number generators that a training loop draws from: torch (CPU and CUDA), numpy, ``random``."""

from __future__ import annotations

import pickle
import random
import sys
from typing import Any


def random_states() -> bytes:
    """The states now; only of libraries that the process has loaded."""
    states: dict[str, Any] = {"python": random.getstate()}
    if (numpy := sys.modules.get("numpy")) is not None:
        states["numpy"] = numpy.random.get_state()
    if (torch := sys.modules.get("torch")) is not None:
        states["torch"] = torch.get_rng_state().numpy()
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            states["cuda"] = [state.numpy() for state in torch.cuda.get_rng_state_all()]
    return pickle.dumps(states, protocol=5)


def set_random_states(data: bytes | memoryview) -> None:
    """Puts back what ``random_states`` took. The bytes are a pickle of this run's own memory, never of a foreign file."""
    states = pickle.loads(data)
    random.setstate(states["python"])
    if "numpy" in states:
        import numpy

        numpy.random.set_state(states["numpy"])  # noqa: NPY002 - the global state is what loops draw from
    if "torch" in states:
        import torch

        torch.set_rng_state(torch.from_numpy(states["torch"].copy()))
        if "cuda" in states and torch.cuda.is_available():
            torch.cuda.set_rng_state_all([torch.from_numpy(state.copy()) for state in states["cuda"]])
