"""The reference for ports: record every number on the way, and compare those of another implementation with them."""

from qwen3np.porting.compare import compare
from qwen3np.porting.judge import Comparison, PointReport
from qwen3np.porting.diagnose import Cause, Diagnosis, diagnose
from qwen3np.porting.dumps import read_dump
from qwen3np.porting.record import Recording, record

__all__ = [
    "Cause",
    "Comparison",
    "Diagnosis",
    "PointReport",
    "Recording",
    "compare",
    "diagnose",
    "read_dump",
    "record",
]
