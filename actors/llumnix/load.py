"""What an instance tells the scheduler about itself after every step. Plain data; policies read nothing else."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RequestLoad:
    request_id: str
    blocks: int
    """Physical KV blocks held (running) or needed to start (waiting: prompt + one token)."""
    priority: int
    tokens: int
    """Prompt and output tokens so far."""
    arrival_time: float
    prefilled: bool = True
    """All prompt tokens computed: the request is decoding."""


@dataclass(frozen=True)
class InstanceLoad:
    instance_id: str
    step: int
    """Steps done since the start; of two loads of one instance the larger is the newer."""
    total_blocks: int
    free_blocks: int
    """Free or evictable (cached but unreferenced) blocks."""
    block_size: int
    running: tuple[RequestLoad, ...]
    waiting: tuple[RequestLoad, ...]
    """In the order in which they will be admitted: the first is the head of the line."""
    reserved_blocks: int = 0
    """Blocks promised to migrations on their way in."""
    migrating: tuple[str, ...] = ()
    """Requests on their way out or in."""
    draining: bool = False
    preemptions: int = 0
    """Since the start."""
    step_ms: float = 0.0
    """Moving median of the decode step."""
    timestamp: float = 0.0
