"""Metric names, and that a metric outside Ray takes the same calls and the same mistakes."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from actors.cluster.metrics import UNITS, counter, gauge, histogram, metric_name

REPOSITORY = Path(__file__).resolve().parents[3]


def test_names() -> None:
    assert metric_name("llumnix", "generated", "tokens") == "sextant_llumnix_generated_tokens"
    assert metric_name("c4", "all_reduce_bus", "bytes_per_second") == "sextant_c4_all_reduce_bus_bytes_per_second"


@pytest.mark.parametrize(
    ("system", "what", "unit"),
    [
        ("Llumnix", "generated", "tokens"),
        ("llumnix", "generated tokens", "tokens"),
        ("llumnix", "", "tokens"),
        ("llumnix", "generated", "token"),
        ("llumnix", "generated_tokens", "tokens"),
        ("llumnix", "tokens", "tokens"),
        ("llumnix", "generated_total", "tokens"),
        ("llumnix", "_generated", "tokens"),
    ],
)
def test_bad_names(system: str, what: str, unit: str) -> None:
    with pytest.raises(ValueError, match="metric"):
        metric_name(system, what, unit)


def test_every_unit_makes_a_name_that_prometheus_takes() -> None:
    for unit in UNITS:
        assert re.fullmatch(r"[a-zA-Z_:][a-zA-Z0-9_:]*", metric_name("a", "b", unit))


def test_outside_ray_calls_are_checked_and_do_nothing() -> None:
    tokens = counter("llumnix", "generated", "tokens", tags=["instance"])
    tokens.increase(3, instance="a")
    with pytest.raises(ValueError, match="wants the tags"):
        tokens.increase(3)
    with pytest.raises(ValueError, match="cannot decrease"):
        tokens.increase(-1, instance="a")
    with pytest.raises(TypeError, match="is a counter, not a gauge"):
        tokens.set(1, instance="a")


@pytest.mark.parametrize("buckets", [[], [0, 1], [2, 1], [1, 1]])
def test_buckets_must_ascend(buckets: list[float]) -> None:
    with pytest.raises(ValueError, match="ascending"):
        histogram("llumnix", "downtime", "milliseconds", buckets=buckets)


def test_naming_a_metric_does_not_import_ray() -> None:
    code = "import sys; from actors.cluster.metrics import gauge; gauge('a', 'b', 'bytes').set(1); sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


def test_a_metric_travels_to_another_process() -> None:
    metric = pickle.loads(pickle.dumps(gauge("llumnix", "free_kv", "blocks", help="h", tags=["instance"])))
    assert (metric.kind, metric.name, metric.tags) == ("gauge", "sextant_llumnix_free_kv_blocks", ("instance",))


@pytest.mark.cluster
def test_ray_exports_it_under_that_name(ray_local) -> None:
    """Asks the node's Prometheus endpoint, as a user's Prometheus would."""
    import urllib.request

    import ray

    requests = counter("demo", "served", "requests", help="h", tags=["instance"])
    load = gauge("demo", "free_kv", "blocks")
    delay = histogram("demo", "delay", "milliseconds", buckets=[1, 10])
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    wanted = {
        r'^ray_sextant_demo_served_requests(_total)?\{.*instance="a".*\} [1-9]': "counter",
        r"^ray_sextant_demo_free_kv_blocks\{.*\} 7\.0": "gauge",
        r'^ray_sextant_demo_delay_milliseconds_bucket\{.*le="10(\.0)?".*\} [1-9]': "histogram",
    }
    deadline = time.monotonic() + 60
    missing = dict(wanted)
    while missing and time.monotonic() < deadline:
        requests.increase(instance="a")
        load.set(7)
        delay.observe(5)
        with urllib.request.urlopen(url, timeout=10) as answer:
            text = answer.read().decode()
        missing = {pattern: kind for pattern, kind in wanted.items() if not re.search(pattern, text, re.MULTILINE)}
        time.sleep(0.5)
    assert not missing
