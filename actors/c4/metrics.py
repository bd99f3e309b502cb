"""Live figures of C4: ``sextant_c4_...`` series in Prometheus (by ``actors.cluster.metrics``)."""

from __future__ import annotations

from actors.cluster import metrics

verdicts = metrics.counter("c4", "verdicts", "events", help="Faults named.", tags=["run", "fault_class", "kind"])
detection = metrics.histogram(
    "c4",
    "detection",
    "seconds",
    buckets=[0.25, 0.5, 1, 1.5, 2, 3, 5, 10, 30, 60],
    help="Onset of a fault to its naming.",
    tags=["run", "fault_class"],
)
evictions = metrics.counter("c4", "evictions", "events", help="Generations ended for a fault.", tags=["run"])
ranks_watched = metrics.gauge("c4", "watched", "workers", help="Ranks observed.", tags=["run"])
quarantined = metrics.gauge("c4", "quarantined", "nodes", help="Nodes kept out.", tags=["run"])
observed = metrics.counter("c4", "observations", "bytes", help="Received by the master.", tags=["run"])
master_cost = metrics.gauge("c4", "master_cost", "ratio", help="Share of a core that judging takes.", tags=["run"])
agent_cost = metrics.gauge("c4", "agent_cost", "ratio", help="Share of a core.", tags=["run", "node"])
agent_errors = metrics.gauge("c4", "agent_loop", "errors", help="Exceptions survived.", tags=["run", "node"])
operation_interval = metrics.gauge(
    "c4", "operation_interval", "seconds", help="Median time of an operation with the work before it.", tags=["run"]
)
