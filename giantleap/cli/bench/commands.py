"""`giantleap bench protocol`, `engines` and `paper`: measurements on this machine.

`giantleap.cli.main` mounts these commands; `giantleap.service.worker.timing`, `giantleap.cli.bench.engines` and
`giantleap.cli.paper.measure` measure.
"""

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from giantleap.cli.files import (
    check_input_directories,
    check_input_files,
    check_output_directory,
    check_output_file,
    write_output,
)
from giantleap.cli.options import (
    BundleOption,
    DeviceOption,
    MethodOption,
    RefineStepsOption,
    RefineStrengthOption,
    open_bundle_route,
    read_bundles,
    settings_from,
    stop,
    stop_if_on_hub,
    to_message,
    to_refine,
)
from giantleap.models.bundle.bundle import Bundle
from giantleap.models.messages import install_hint
from giantleap.service.errors import GiantleapError
from giantleap.service.settings import Settings

app = typer.Typer(no_args_is_help=True, help="Measurements on this machine.")

ScaleOption = Annotated[list[float] | None, typer.Option(help="Scale factor to measure, repeatable; default: all.")]
WarmupsOption = Annotated[int, typer.Option(help="Warm-up runs, not measured.", min=0)]
RunsOption = Annotated[int, typer.Option(help="Measured runs.", min=1)]
JsonOption = Annotated[
    Path | None, typer.Option("--json", help="Also write the results as JSON lines; - for standard output.")
]


@app.command()
def protocol(
    scale: ScaleOption = None,
    method: MethodOption = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", min=1)] = None,
    warmups: WarmupsOption = 20,
    runs: RunsOption = 20,
    refine_strength: RefineStrengthOption = None,
    refine_steps: RefineStepsOption = None,
    json_out: JsonOption = None,
    bundle: BundleOption = None,
    device: DeviceOption = None,
) -> None:
    """Measure the stages by the paper's protocol: batch 1, one device, warm-ups, then the median per stage."""
    check_output_file(json_out)
    settings, served = _read_bundle(bundle, device)

    from tqdm import tqdm

    from giantleap.service.jobs.planning import choose_method, choose_scale
    from giantleap.service.jobs.refining import choose_refine
    from giantleap.service.worker.timing import ProtocolPlan, time_runs, to_result, to_table

    try:
        refine = choose_refine(served, to_refine(refine_strength, refine_steps))
        chosen = choose_method(served, method)
        scales = [choose_scale(served, chosen, each) for each in scale or served.scales_of(chosen)]
    except (ValueError, GiantleapError) as error:
        stop(to_message(error))
    route = open_bundle_route(settings, served)
    defaults, results = served.defaults, []
    for factor in scales:
        base_px = (defaults.base_width_px, defaults.base_height_px)
        plan = ProtocolPlan(
            factor, *base_px, steps or defaults.steps, defaults.guidance_scale, chosen, warmups, runs, refine
        )
        timed = tqdm(time_runs(route, plan), total=warmups + runs, desc=f"x{factor}", unit="run")
        results.append(to_result(route, plan, list(timed)))
    typer.echo(to_table(results))
    _write_lines(json_out, [result.to_json() for result in results])


@app.command()
def engines(
    scale: ScaleOption = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Include torch-compile, which takes minutes.")] = False,
    warmups: WarmupsOption = 3,
    runs: RunsOption = 10,
    json_out: JsonOption = None,
    bundle: BundleOption = None,
    device: DeviceOption = None,
) -> None:
    """Measure time and error of every engine that runs LUA on this machine, to choose GIANTLEAP_ENGINE."""
    check_output_file(json_out)
    settings, served = _read_bundle(bundle, device)

    from giantleap.cli.bench.engines import measure_engines, to_table
    from giantleap.models.device import choose_device
    from giantleap.models.engines.threads import set_threads
    from giantleap.service.jobs.planning import choose_scale

    try:
        scales = [choose_scale(served, "lua", each) for each in scale or served.scales_of("lua")[1:]]
        where = choose_device(settings.device)
        set_threads(settings.torch_threads)
        rows = measure_engines(served, settings, where, scales, compiled=compiled, warmups=warmups, runs=runs)
    except (ValueError, GiantleapError) as error:
        stop(to_message(error))
    typer.echo(to_table(rows))
    _write_lines(json_out, [json.dumps(row.to_record()) for row in rows])


@app.command()
def paper(
    out: Annotated[Path, typer.Option(help="Directory of the results; run again with the same one to resume.")],
    captions: Annotated[
        Path | None, typer.Option(help="JSON list of prompts, used in turn; default: one prompt.")
    ] = None,
    method: Annotated[list[str] | None, typer.Option(help="Method to measure, repeatable; default: all.")] = None,
    scale: ScaleOption = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first image.", min=0)] = 42,
    warmups: WarmupsOption = 20,
    runs: RunsOption = 20,
    refine_strength: RefineStrengthOption = None,
    refine_steps: RefineStepsOption = None,
    images: Annotated[int, typer.Option(help="Minimum number of images for FID, KID and CLIP.", min=0)] = 0,
    reference: Annotated[Path | None, typer.Option(help="Folder of real images, for FID and KID.")] = None,
    inception: Annotated[Path | None, typer.Option(help="Weights of torch-fidelity's Inception, for FID, KID.")] = None,
    clip: Annotated[Path | None, typer.Option(help="Directory of a CLIP model, for the CLIP score.")] = None,
    patch_px: Annotated[int, typer.Option(help="Side of the crops of patch FID and KID.", min=1)] = 1024,
    kid_subset_size: Annotated[int, typer.Option(help="Images in each subset of KID.", min=2)] = 1000,
    bundle: BundleOption = None,
    device: DeviceOption = None,
) -> None:
    """Measure every method at every scale, as Table 1 of the paper. Writes JSON, Markdown and a sheet of crops."""
    if find_spec("torchmetrics") is None:  # checked before hours of images
        stop(f"torchmetrics is missing: {install_hint('bench')}")
    check_output_directory(out)
    check_input_directories(reference, clip)
    check_input_files(inception)
    settings, served = _read_bundle(bundle, device)

    from giantleap.cli.demo import PROMPT
    from giantleap.cli.paper.measure import measure_table
    from giantleap.cli.paper.plan import TablePlan, plan_cells, read_captions
    from giantleap.cli.paper.scores import ScorePlan
    from giantleap.service.jobs.refining import choose_refine

    try:
        refine = choose_refine(served, to_refine(refine_strength, refine_steps))
        plan = TablePlan(
            cells=plan_cells(served, method or (), scale or served.scales, refines=refine is not None),
            captions=(PROMPT,) if captions is None else read_captions(captions),
            steps=steps or served.defaults.steps,
            seed=seed,
            warmups=warmups,
            runs=runs,
            refine=refine,
            scores=ScorePlan(images, reference, patch_px, kid_subset_size, inception, clip),
        )
        page = measure_table(open_bundle_route(settings, served), served, plan, out)
    except (ValueError, GiantleapError) as error:
        stop(to_message(error))
    typer.echo(page)


def _read_bundle(name: str | None, device: str | None) -> tuple[Settings, Bundle]:
    """The settings, and the first bundle that they name; one whose weights are on the hub ends the command."""
    settings = settings_from(bundle=name, device=device)
    served = read_bundles(settings)[0]
    stop_if_on_hub(served)
    return settings, served


def _write_lines(path: Path | None, lines: Sequence[str]) -> None:
    if path is not None:
        write_output(path, "".join(f"{line}\n" for line in lines).encode())
