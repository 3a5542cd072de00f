"""What is wrong with a training run, from its record: detectors, one root cause, advice.

Everything here is a pure function of a `gradkern.record.Record`. Needs numpy.
"""

from __future__ import annotations

from gradkern.diagnosis.advice import Threshold, recommend_threshold
from gradkern.diagnosis.detectors import DETECTORS, detect
from gradkern.diagnosis.diagnose import diagnose
from gradkern.diagnosis.findings import Advice, Diagnosis, Finding

__all__ = [
    "DETECTORS",
    "Advice",
    "Diagnosis",
    "Finding",
    "Threshold",
    "detect",
    "diagnose",
    "recommend_threshold",
]
