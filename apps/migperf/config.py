"""Configuration of the migperf app. Verbs that need settings add their sections here."""

from __future__ import annotations

from actors.cluster.session import RayConfig
from apps.program.config import Config


class MigperfConfig(Config):
    """``python -m apps.migperf VERB [--config configs/migperf/<preset>.yaml] [key=value ...]``."""

    ray: RayConfig = RayConfig()
