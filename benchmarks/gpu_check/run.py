"""Measurements that need a GPU, one subcommand each, as JSON in `benchmarks/results/` with card, driver and versions.

`python -m benchmarks.gpu_check decode` times decoders (`benchmarks/gpu_check/decode.py`), `engines` every engine of LUA
(`benchmarks/gpu_check/engines.py`). Both exit with 2 without CUDA; `decode --device cpu` checks that it works, and
stores nothing as figures of a GPU. On a CPU: `benchmarks/images/decode` and `benchmarks/engines`.
"""

import itertools
import json
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from benchmarks.gpu_check.cases import DECODE_RESULT, ENGINES_RESULT, METHODS

app = typer.Typer(no_args_is_help=True, add_completion=False)


@app.callback()
def describe() -> None:
    """Measurements for a machine with a GPU."""


@app.command()
def decode(
    px: Annotated[list[int] | None, typer.Option(help="Side of the square images; may be repeated.")] = None,
    family: Annotated[list[str] | None, typer.Option(help="sdxl or flux1; may be repeated.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="bfloat16 or float32; may be repeated.")] = None,
    method: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(METHODS)}; may be repeated.")] = None,
    strip_mib: Annotated[list[int] | None, typer.Option(help="More strip sizes of the exact decode.")] = None,
    device: Annotated[Literal["cuda", "cpu"], typer.Option(help="cpu only checks that it works.")] = "cuda",
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = DECODE_RESULT,
) -> None:
    """Measure decodes, also in channels-last and compiled; status 1 when an exact one could not run."""
    if device == "cpu" and out.resolve() == DECODE_RESULT.resolve():
        typer.echo(
            f"{DECODE_RESULT} holds figures of a GPU only; with --device cpu give another file as --out.", err=True
        )
        raise typer.Exit(2)
    from benchmarks.gpu_check.card import choose_device
    from benchmarks.gpu_check.decode import cases_of, measure_rows, to_records

    chosen = choose_device(device)
    if unknown := set(method or ()) - set(METHODS):
        raise typer.BadParameter(f"--method {', '.join(sorted(unknown))}: expected one of {', '.join(METHODS)}")
    methods = [each for each in METHODS if method is None or each in method]
    rows = []
    for name, type_name, image_px in itertools.product(
        family or ["sdxl", "flux1"], dtype or ["bfloat16", "float32"], px or [1024, 2048, 4096]
    ):
        rows += measure_rows(cases_of(name, image_px, type_name, strip_mib or [4, 64, 256], methods), chosen)
    write_record(out, chosen, {}, to_records(rows))
    if any(row.error for row in rows if row.method == "exact"):
        raise typer.Exit(1)


def write_record(out: Path, device: Any, about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Store the rows with the machine and its card."""
    from benchmarks.gpu_check.card import describe_device
    from benchmarks.machine import read_machine

    out.parent.mkdir(parents=True, exist_ok=True)
    machine = {**read_machine(), **describe_device(device), **about}
    out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


@app.command()
def engines(
    preset: Annotated[list[str] | None, typer.Option(help="medium or release; may be repeated.")] = None,
    latent: Annotated[list[int] | None, typer.Option(help="Side of the square latents; may be repeated.")] = None,
    scale: Annotated[list[int] | None, typer.Option(help="2 or 4; may be repeated.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Batch size; may be repeated.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="bfloat16 or float16; may be repeated.")] = None,
    channels: Annotated[int, typer.Option(help="Channels of the latents.")] = 4,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = ENGINES_RESULT,
) -> None:
    """Measure LUA with every installed engine; status 1 when a target of the H200 is missed."""
    import torch

    from benchmarks.gpu_check.card import choose_device
    from benchmarks.gpu_check.engines import (
        RUNS,
        VARIANTS,
        WARMUPS,
        EngineCase,
        line,
        measure_case,
        measure_matrix_rate,
    )
    from giantleap.models.lua.network import preset as lua_preset

    device = choose_device("cuda")
    types = [getattr(torch, name) for name in dtype or ["bfloat16", "float16"]]
    roofs = {each: measure_matrix_rate(device, each) for each in types}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, side, by, items, each in itertools.product(
            preset or ["medium", "release"], latent or [64, 128, 256], scale or [2, 4], batch or [1, 8], types
        ):
            case = EngineCase(name, lua_preset(name, channels), side, by, items, each)
            done = measure_case(case, device, Path(folder), roofs[each], VARIANTS, WARMUPS, RUNS)
            rows += done
            for row in done:
                typer.echo(line(row))
    rates = {str(each).removeprefix("torch."): rate for each, rate in roofs.items()}
    write_record(out, device, {"matrix_flop_per_s": rates}, [row.to_record() for row in rows])
    if any(row.target is not None and (row.ratio or 0.0) < row.target for row in rows):
        raise typer.Exit(1)
