"""Live figures of C4, ``sextant_c4_...`` series in Prometheus (by ``actors.cluster.metrics``), and the log line of a verdict."""

from __future__ import annotations

import logging

from actors.c4.ports import NumberedVerdict
from actors.c4.recovery.policy import Action
from actors.cluster import metrics

logger = logging.getLogger("sextant.c4.master")

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


def tell(run: str, one: NumberedVerdict) -> None:
    """One line in the log (Ray's dashboard shows it) and the figures."""
    verdict = one.verdict
    line = (
        f"c4 run={run} verdict={one.number} generation={one.generation} class={verdict.fault_class} kind={verdict.kind} "
        f"culprit={str(verdict.culprit)!r} nodes={','.join(verdict.culprit.nodes) or '-'} confidence={verdict.confidence:.2f} "
        f"detection_s={verdict.detection_s:.2f} slowdown={verdict.slowdown:.2f} action={one.action} reason={one.reason!r} "
        f"evidence={'; '.join(verdict.evidence)!r}" + (f" repeats={one.repeats}" if one.repeats else "")
    )
    logger.warning(line)
    if one.repeats == 0:
        verdicts.increase(run=run, fault_class=verdict.fault_class.value, kind=verdict.kind.value)
        detection.observe(max(1e-3, verdict.detection_s), run=run, fault_class=verdict.fault_class.value)
    if one.action == Action.EVICT:
        evictions.increase(run=run)
