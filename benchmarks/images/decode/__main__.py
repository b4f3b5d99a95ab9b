"""`python -m benchmarks.images.decode` measures decodes on a CPU and writes `benchmarks/results/decode.json`.

With `--pocket` it times the pocket bundle's decoder by every way in turns. A run replaces its own part of the file.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.images.decode.cases import DTYPES, METHODS, RESULT, VAE_CONFIGS, Case
from benchmarks.machine import read_machine


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--px", type=int, nargs="+", help="Sides of the square images.")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--family", choices=sorted(VAE_CONFIGS), default="sdxl")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--channels-last", action="store_true", help="Memory format of the weights.")
    parser.add_argument("--runs", type=int, help="Decodes per method and size; medians are printed.")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads.")
    parser.add_argument(
        "--largest-run-px", type=int, default=1024, help="Above this size measure memory only, on the meta device."
    )
    parser.add_argument(
        "--pocket", type=Path, nargs="?", const=Path("bundles/pocket"), metavar="BUNDLE",
        help="Time the decoder of this bundle (the pocket one) plain, exact, compiled and in ONNX Runtime, in turns.",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    case = Case(options.family, options.dtype, options.channels_last, options.threads, options.runs or 1)
    if options.child:
        from benchmarks.images.decode.run import run_child

        print(json.dumps(run_child(case, options.methods[0], options.px[0], options.child)))
        return
    earlier: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    if options.pocket:
        from benchmarks.images.decode.pocket import measure_bundle

        rows = measure_bundle(options.pocket, options.px or [256, 512, 1024], options.threads, options.runs or 7)
        record = earlier | {"pocket": {"threads": options.threads, "machine": read_machine(), "rows": rows}}
    else:
        from benchmarks.images.decode.run import measure

        rows = measure(case, options.methods, options.px or [512, 1024], options.largest_run_px)
        others = {name: earlier[name] for name in ("pocket",) if name in earlier}
        record = {**asdict(case), "machine": read_machine(), "rows": rows, **others}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
