"""The torch.distributed backend "c4": registering it, and starting the recording of this process. No Ray.

register_backend()
start_recording(RecordingConfig(run="job", generation=0, rank=rank, world_size=world_size))
torch.distributed.init_process_group("c4", ...)
"""

from __future__ import annotations

import os
import threading
from typing import Any

import torch
import torch.distributed as dist

from actors.c4.recorder.group import C4Group
from actors.c4.recorder.recorder import Recorder, RecordingConfig
from actors.c4.recorder.transport import RingOptions

RUN_VARIABLE = "SEXTANT_C4_RUN"
GENERATION_VARIABLE = "SEXTANT_C4_GENERATION"
NAME = "c4"

_lock = threading.Lock()
_recorder: Recorder | None = None
_options = RingOptions()


def register_backend() -> None:
    """Make ``init_process_group("c4")`` and ``new_group(backend="c4")`` known to torch. Twice does no harm."""
    if NAME in dist.Backend.backend_list:
        return
    devices = ["cpu", "cuda"] if torch.cuda.is_available() and dist.is_nccl_available() else ["cpu"]
    dist.Backend.register_backend(NAME, _create, extended_api=True, devices=devices)


def start_recording(config: RecordingConfig, options: RingOptions | None = None) -> Recorder:
    """Open this process's ring; one that was open under another configuration ends, its groups go on unread.

    Args:
        config: whose records these are.
        options: how rings of groups made from now on move data.

    Raises:
        RecorderError: the ring cannot be made and ``config.required``.
    """
    global _recorder, _options
    with _lock:
        if options is not None:
            _options = options
        if _recorder is not None:
            if _recorder.config == config:
                return _recorder
            _recorder.close()
        _recorder = Recorder(config)
        return _recorder


def recorder() -> Recorder | None:
    """This process's, when recording has begun."""
    return _recorder


def stop_recording() -> None:
    """End it in order; the ring file stays until ``clean_stale`` after the process."""
    global _recorder
    with _lock:
        if _recorder is not None:
            _recorder.close()
            _recorder = None


def _create(made: Any, _backend_options: Any) -> C4Group:
    ranks = tuple(made.global_ranks_in_group) or tuple(range(made.group_size))
    current = _recorder
    if current is None:
        me = ranks[made.group_rank]
        world = dist.get_world_size() if dist.is_initialized() else made.group_size
        current = start_recording(
            RecordingConfig(os.environ.get(RUN_VARIABLE) or "run", _generation(), me, max(world, me + 1))
        )
    devices = ("cpu", "cuda") if torch.cuda.is_available() and dist.is_nccl_available() else ("cpu",)
    return C4Group(
        made.store, made.group_rank, made.group_size, made.timeout, name=str(made.group_id), ranks=ranks,
        recorder=current, options=_options, devices=devices,
    )  # fmt: skip


def _generation() -> int:
    text = os.environ.get(GENERATION_VARIABLE) or "0"
    return int(text) if text.isdecimal() else 0
