"""Who is to blame: applies the rules, follows the waits-for graph, and admits what the dumps leave open.

First come the rules that prove a fault of one rank. Whoever waits, directly or through others, for a rank so found is explained.
For ranks still unexplained a member without a dump is the reason, if they wait for nobody else. What then remains stands at an
operation that all members entered: a hang of communication (or of a device that recorded no starts), told as suspects.
"""

from __future__ import annotations

from pathlib import Path

from actors.c4.flight_recorder import rules
from actors.c4.flight_recorder.job import Job
from actors.c4.flight_recorder.load import Limits, load_folder
from actors.c4.flight_recorder.model import Cause, Diagnosis, DumpSet, FaultClass, Finding
from actors.c4.flight_recorder.waits import Wait, Waits, waits_for

_MAX_EVIDENCE = 40


def diagnose_folder(folder: Path, limits: Limits = Limits()) -> Diagnosis:
    """The verdict on the dumps in ``folder``. Raises FlightRecorderError for input that cannot be used."""
    return diagnose(load_folder(folder, limits))


def diagnose(dump_set: DumpSet) -> Diagnosis:
    """The verdict on one set of dumps; pure, linear in the number of operations that never completed."""
    job = Job(dump_set)
    waits = waits_for(job)
    findings, mismatch_suspects = _proven(job, waits)
    _link_to_culprits(job, waits, findings)
    stuck = {rank for rank, operations in job.incomplete.items() if operations}
    silent, doubtful = _silent_culprits(job, dump_set, waits, findings, stuck)
    findings.update(silent)
    unexplained = (
        stuck
        - waits.reaching(findings)
        - {
            wait.waiter
            for several in waits.doubtful.values()
            for wait in several
            if wait.awaited in findings.keys() | doubtful.keys()
        }
    )
    unexplained -= waits.reaching(rank for rank in stuck if rank not in unexplained)
    suspects: dict[int, str] = {}
    if unexplained:
        suspects = {rank: text for rank, text in mismatch_suspects.items() if rank not in findings} or _suspects(
            job, waits, unexplained
        )
    suspects = {**doubtful, **suspects}
    if len(suspects) == 1 and not doubtful and not findings:
        findings.update(_only_suspect(job, suspects))
        suspects = {}
    return _verdict(job, waits, dump_set, findings, suspects, stuck)


def _proven(job: Job, waits: Waits) -> tuple[dict[int, Finding], dict[int, str]]:
    mismatches, suspects = rules.mismatched(job)
    dead = rules.frozen(job)
    findings: dict[int, Finding] = {**mismatches}
    for more in (
        dead,
        rules.idle_but_awaited(job, waits),
        rules.host_lag(job, waits, dead.keys() | mismatches.keys()),
        rules.not_started(job, waits),
    ):
        for rank, finding in more.items():
            findings.setdefault(rank, finding)
    return findings, suspects


def _link_to_culprits(job: Job, waits: Waits, findings: dict[int, Finding]) -> None:
    """A rank that stands at an operation together with a culprit is held up by it, whoever entered it."""
    for rank, operations in job.incomplete.items():
        for operation in operations:
            if operation.is_p2p:
                others = {job.partner(operation, rank)}
            else:
                others = set(job.members.get(operation.group, ()))
            for culprit in others & findings.keys():
                if culprit is not None and culprit != rank:
                    waits.add(Wait(rank, culprit, operation, entered=True))


def _silent_culprits(
    job: Job, dump_set: DumpSet, waits: Waits, findings: dict[int, Finding], stuck: set[int]
) -> tuple[dict[int, Finding], dict[int, str]]:
    """(culprits, suspects with a sentence) among the ranks without a usable dump, as far as others wait for them.

    Who began a dump and left it empty hung hard: a culprit. A file that is not there may merely not have been collected, and its
    rank may wait like the others: a culprit if nothing else explains the hang, else a suspect.
    """
    explained = waits.reaching(findings)
    awaited: dict[int, list[Wait]] = {}
    for rank in stuck:
        for wait in waits.doubtful.get(rank, ()):
            if wait.operation.name == "send" or wait.awaited not in job.silent:
                continue
            known = [one for one in waits.by_waiter.get(rank, ()) if not one.entered]
            if not wait.operation.is_p2p:  # members of an empty dump are awaited beside others who did not enter
                known = [one for one in known if one.operation == wait.operation and wait.awaited not in dump_set.empty]
            if not known:
                awaited.setdefault(wait.awaited, []).append(wait)
    found: dict[int, Finding] = {}
    doubtful: dict[int, str] = {}
    queued = {
        member
        for rank in stuck
        for operation in job.incomplete[rank]
        if not operation.is_p2p
        for member in dump_set.empty.intersection(job.members.get(operation.group, ()))
    }
    for rank in queued - awaited.keys():
        doubtful[rank] = f"Rank {rank} left an empty dump, though no rank is seen to wait for it first."
    for rank, waiting in awaited.items():
        began = rank in dump_set.empty
        open_waits = [wait for wait in waiting if wait.waiter not in explained]
        if not began and not open_waits:
            continue
        wait = rules.first_wait(job, open_waits or waiting)
        waiters = sorted({one.waiter for one in waiting})
        sentence = (
            f"Rank {rank} left {'an empty dump' if began else 'no dump'}, and {rules.ranks_text(waiters)} "
            f"wait{'s' if len(waiters) == 1 else ''} for it in "
            f"{wait.operation.describe()} of group {job.label(wait.operation.group)}."
        )
        if began or not findings:
            found[rank] = Finding(rank, Cause.SILENT, wait.operation.group, wait.operation, sentence)
        else:
            doubtful[rank] = sentence
    return found, doubtful


def _only_suspect(job: Job, suspects: dict[int, str]) -> dict[int, Finding]:
    """The one rank at which all waiting ends, without a peer that stands there too, is to blame."""
    ((rank, sentence),) = suspects.items()
    head = job.head(rank)
    group = head.group if head is not None else None
    return {rank: Finding(rank, Cause.DEVICE_STUCK, group, head, sentence + " No other rank stands there.")}


def _suspects(job: Job, waits: Waits, unexplained: set[int]) -> dict[int, str]:
    """Members of the operations at which all arrived, where the waiting of the unexplained ranks ends."""
    suspects: dict[int, str] = {}
    for (group, seq), ranks in waits.arrived.items():
        here = [rank for rank in ranks if rank in unexplained and not waits.by_waiter.get(rank)]
        if here:
            name = next((one.describe() for one in job.blockers[here[0]] if one.group == group), f"#{seq}")
            for rank in here:
                suspects[rank] = (
                    f"Rank {rank} entered {name} of group {job.label(group)} as all members did; it never completed."
                )
    for rank in list(suspects):
        for operation in job.blockers[rank]:
            if operation.is_p2p:
                for partner, other in rules.counterparts(job, rank, operation):
                    if job.dumps[partner].frontier < other.record_id:  # else it is alive: it completed what came later
                        suspects.setdefault(
                            partner,
                            f"Rank {partner} is the other end of {operation.describe()} of group "
                            f"{job.label(operation.group)}, at which rank {rank} stands.",
                        )
    if not suspects:
        for rank in sorted(unexplained):
            waiting = waits.by_waiter.get(rank, [])
            if waiting:
                wait = waiting[0]
                suspects[rank] = (
                    f"Rank {rank} waits for rank {wait.awaited} in {wait.operation.describe()} of group "
                    f"{job.label(wait.operation.group)}, in a circle."
                )
    return suspects


def _verdict(
    job: Job, waits: Waits, dump_set: DumpSet, findings: dict[int, Finding], suspects: dict[int, str], stuck: set[int]
) -> Diagnosis:
    ordered = tuple(findings[rank] for rank in sorted(findings))
    evidence = [finding.sentence for finding in ordered]
    evidence += [suspects[rank] for rank in sorted(suspects)]
    held = [wait for rank in sorted(stuck - findings.keys()) for wait in waits.by_waiter.get(rank, ())[:1]]
    evidence += rules.waiting_text(job, iter(held))
    if not stuck and not findings:
        fault_class = FaultClass.HEALTHY
        evidence.append("No operation is outstanding on any rank.")
    elif ordered and any(finding.cause is not Cause.MISMATCH for finding in ordered):
        fault_class = FaultClass.NON_COMMUNICATION_HANG
    else:
        fault_class = FaultClass.COMMUNICATION_HANG
    group, operation = _where(job, waits, ordered, suspects)
    return Diagnosis(
        fault_class=fault_class,
        findings=ordered,
        process_group=job.label(group) if group is not None else None,
        collective=operation.name if operation is not None else None,
        sequence=operation.seq if operation is not None else None,
        suspects=tuple(sorted(suspects)),
        evidence=tuple(evidence[:_MAX_EVIDENCE]),
        confidence=_confidence(ordered, suspects, dump_set),
        warnings=dump_set.warnings,
        world_size=len(dump_set.world),
        ranks_read=len(dump_set.dumps),
        silent=tuple(sorted(dump_set.silent)),
    )


def _where(job: Job, waits: Waits, findings: tuple[Finding, ...], suspects: dict[int, str]):
    for finding in findings:
        if finding.group is not None:
            return finding.group, finding.operation
    for rank in sorted(suspects):
        head = job.head(rank)
        if head is not None:
            return head.group, head
    return None, None


def _confidence(findings: tuple[Finding, ...], suspects: dict[int, str], dump_set: DumpSet) -> str:
    if suspects and not findings:
        return "low"
    if (
        suspects
        or any(finding.cause in (Cause.SILENT, Cause.DEVICE_STUCK) for finding in findings)
        or len(dump_set.dumps) * 2 < len(dump_set.world)
    ):
        return "medium"
    return "high"
