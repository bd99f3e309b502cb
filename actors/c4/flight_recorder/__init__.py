"""Offline diagnosis of PyTorch Flight Recorder dumps: who made a job hang, and in which collective. No Ray, no torch."""

from actors.c4.flight_recorder.analysis import diagnose, diagnose_folder
from actors.c4.flight_recorder.errors import FlightRecorderError, RefusedPickleError, UnreadableDumpError
from actors.c4.flight_recorder.load import Limits, from_objects, load_folder
from actors.c4.flight_recorder.model import Cause, Diagnosis, DumpSet, FaultClass, Finding, Operation, RankDump, State

__all__ = [
    "Cause",
    "Diagnosis",
    "DumpSet",
    "FaultClass",
    "Finding",
    "FlightRecorderError",
    "Limits",
    "Operation",
    "RankDump",
    "RefusedPickleError",
    "State",
    "UnreadableDumpError",
    "diagnose",
    "diagnose_folder",
    "from_objects",
    "load_folder",
]
