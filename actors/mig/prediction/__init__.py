"""Latency and memory of a workload on slices on which it was not measured. Pure: no Ray, no torch, numpy alone."""

from __future__ import annotations

from actors.mig.prediction.errors import PredictionError
from actors.mig.prediction.measurement import Measurement, Prediction
from actors.mig.prediction.predictor import predict
from actors.mig.prediction.slices import Slice, parse_slice

__all__ = ["Measurement", "Prediction", "PredictionError", "Slice", "parse_slice", "predict"]
