"""What the GPU checks can measure. Nothing here loads torch, which `--help` does not need."""

from pathlib import Path
from typing import Literal, get_args

GpuMethod = Literal["plain", "exact", "tiled", "tiny", "channels-last", "compiled"]
METHODS: tuple[GpuMethod, ...] = get_args(GpuMethod)
DECODE_RESULT = Path("benchmarks/results/gpu_decode.json")
ENGINES_RESULT = Path("benchmarks/results/gpu_engines.json")
