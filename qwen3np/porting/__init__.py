"""The reference for ports: record every intermediate value, and compare another implementation with it.

`diagnose` is a module: `from qwen3np.porting.diagnose import diagnose`.
"""

from qwen3np.porting.compare import compare
from qwen3np.porting.dumps import read_dump
from qwen3np.porting.judge import Comparison, PointReport
from qwen3np.porting.record import Recording, record

__all__ = ["Comparison", "PointReport", "Recording", "compare", "read_dump", "record"]
