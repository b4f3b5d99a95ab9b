"""Measure time and memory of exporting LUA at full depth: `python -m benchmarks.engines.export_presets`.

Random weights; each preset runs in a separate process, so that peak memory is its own. Every graph is compared with
PyTorch, as any export is. The result goes to `benchmarks/results/export_presets.json`.
"""

import argparse
import json
import multiprocessing
import platform
import resource
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULT = Path(__file__).resolve().parents[1] / "results" / "export_presets.json"
PRESETS = ("medium", "release")
CHANNELS = (4, 16)
# Batch, rows and columns in windows, different from the traced ones.
CASES = ((1, 1, 1), (3, 1, 2), (1, 3, 2))


def measure(preset_name: str, channels: int, scale: int) -> dict[str, Any]:
    """Export one graph in this process.

    Returns:
        Wall and processor seconds, peak memory, size and errors.
    """
    import torch

    from giantleap.export.graphs import LuaGraph, trace
    from giantleap.export.manifest import INPUT, OUTPUTS
    from giantleap.export.onnx_files import write_onnx
    from giantleap.export.parity import compare
    from giantleap.models.engines.base import Artifact
    from giantleap.models.engines.onnx_runtime import open_graph
    from giantleap.models.lua.network import Lua, preset

    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = Lua(preset(preset_name, channels)).eval()
    started_s, started_cpu_s = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"lua_x{scale}.onnx"
        files = write_onnx(trace(LuaGraph(net, scale, "fp32"), channels, net.spec.window), path, "enlarged")
        export_s, export_cpu_s = time.perf_counter() - started_s, time.process_time() - started_cpu_s
        cases = [(batch, rows * net.spec.window, columns * net.spec.window) for batch, rows, columns in CASES]
        statistics = torch.zeros(channels), torch.ones(channels)
        parity = compare(
            "lua",
            "fp32",
            open_graph(Artifact(path, INPUT, OUTPUTS["lua"]), torch.device("cpu")),
            lambda latent: net.core(latent, scale),
            None,
            cases,
            statistics,
            torch.device("cpu"),
        )
        size_bytes = sum(each.stat().st_size for each in files)
    return {
        "preset": preset_name,
        "channels": channels,
        "scale": scale,
        "export_s": round(export_s, 1),
        "export_cpu_s": round(export_cpu_s, 1),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "size_bytes": size_bytes,
        "files": len(files),
        "max_error": parity.max_error,
        "cases": [case.model_dump() for case in parity.cases],
    }


def main() -> None:
    """Run the selected exports, print a line for each, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", action="append", choices=PRESETS)
    parser.add_argument("--channels", action="append", type=int)
    parser.add_argument("--scale", action="append", type=int, choices=(2, 4))
    parser.add_argument("--out", type=Path, default=RESULT)
    chosen = parser.parse_args()
    rows = []
    for preset_name in chosen.preset or PRESETS:
        for channels in chosen.channels or CHANNELS:
            for scale in chosen.scale or (2,):
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    row = pool.apply(measure, (preset_name, channels, scale))
                rows.append(row)
                print(
                    f"{preset_name:<8} {channels:>2} channels x{scale}: {row['export_s']:.0f} s wall, "
                    f"{row['export_cpu_s']:.0f} s of processor, {row['peak_rss_bytes'] / 1e9:.1f} GB, "
                    f"{row['size_bytes'] / 1e6:.0f} MB, max error {row['max_error']:.1e}",
                    flush=True,
                )
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps({"machine": _machine(), "rows": rows}, indent=2) + "\n")


def _machine() -> dict[str, Any]:
    import os

    from giantleap.export.machine import read_versions

    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "load_1_min": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "threads": 1,
        **read_versions(),
    }


if __name__ == "__main__":
    main()
