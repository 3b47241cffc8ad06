"""The reference for ports: record every number on the way, and compare those of another implementation with them."""

from qwen3np.porting.compare import Comparison, PointReport, compare
from qwen3np.porting.dumps import read_dump
from qwen3np.porting.record import Recording, record

__all__ = ["Comparison", "PointReport", "Recording", "compare", "read_dump", "record"]
