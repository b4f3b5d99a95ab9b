"""`giantleap bundle list | show | pull | make | check`: the bundles that are available, and whether one runs here.

A bundle is given by its directory or by its name; a pulled bundle comes before the shipped descriptor of that name.
`giantleap.cli.main` mounts these commands. Heavy modules (torch, diffusers, huggingface_hub) are imported inside them.
"""

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from giantleap.cli.errors import to_line
from giantleap.cli.files import check_input_files, check_output_directory
from giantleap.cli.options import (
    DeviceOption,
    bundle_directory,
    complete_bundle,
    pulled_dir,
    read_bundle_or_stop,
    settings_from,
    stop,
    stop_if_on_hub,
)
from giantleap.cli.progress import ShownStages, working
from giantleap.models.bundle.bundle import DESCRIPTOR, Bundle, BundleError, ModelSource
from giantleap.models.bundle.descriptor import METHODS, Method, smallest_steps
from giantleap.models.bundle.names import list_bundles as list_directories

if TYPE_CHECKING:
    from giantleap.models.route import Route

app = typer.Typer(no_args_is_help=True, help="List, describe, download, make and check bundles.")

TO_HELP = "Directory to write; default: bundles/NAME in GIANTLEAP_DATA_DIR, where commands find it by name."
NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="Name of a bundle, or its directory.", autocompletion=complete_bundle)
]


@app.command("list")
def list_bundles() -> None:
    """List shipped and pulled bundles with their methods."""
    for directory in list_directories(pulled_dir()):
        bundle = read_bundle_or_stop(directory)
        place = "on the hub" if isinstance(bundle.pipeline, str) else str(directory)
        typer.echo(f"{bundle.name:<15} {', '.join(bundle.methods):<30} {bundle.about.license:<38} {place}")


@app.command()
def show(name: NameArgument) -> None:
    """Describe one bundle: parts, methods, sizes, defaults, license."""
    bundle = read_bundle_or_stop(bundle_directory(name))
    about, defaults, limits, space = bundle.about, bundle.defaults, bundle.limits, bundle.latent_space
    typer.echo(f"{bundle.name}  {about.title}")
    typer.echo(f"  license     {about.license}")
    if about.license_notes is not None:
        typer.echo(f"              {about.license_notes}")
    typer.echo(f"  provenance  {about.provenance}")
    typer.echo(f"  pipeline    {_place(ModelSource(bundle.pipeline, bundle.revision))}")
    typer.echo(
        f"  dtype       {bundle.dtype or 'by GIANTLEAP_DTYPE'}; scheduler {bundle.scheduler or 'of the pipeline'}"
    )
    typer.echo(f"  vae         {'that of the pipeline' if bundle.vae is None else _place(bundle.vae)}")
    typer.echo(f"  tiny vae    {'none' if bundle.tiny_vae is None else _place(bundle.tiny_vae)}")
    typer.echo(f"  previews    {bundle.descriptor.previews_unavailable or 'yes'}")
    typer.echo(f"  latents     {space.name}: {space.channels} channels, stride {space.stride_px} px")
    sides = f"sides from {limits.min_base_px} to {limits.max_base_px} px in steps of {limits.multiple_px}"
    typer.echo(f"  base image  {defaults.base_width_px} x {defaults.base_height_px} px; {sides}")
    how = f"method {defaults.method}, x{defaults.scale}, {defaults.steps} steps, guidance {defaults.guidance_scale}"
    typer.echo(f"  defaults    {how}")
    for method in METHODS:
        typer.echo(f"  {method:<11} {_offer(bundle, method)}")
    for part, origin in bundle.descriptor.origin.items():
        typer.echo(f"  {part:<11} from {origin}")


@app.command()
def pull(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of a shipped bundle, or a directory with one.")],
    to: Annotated[Path | None, typer.Option(help=TO_HELP)] = None,
) -> None:
    """Download all files of a bundle from the Hugging Face hub; a second run resumes an interrupted one."""
    from giantleap.models.bundle.hub import PUBLIC_HUB, Hub, HubError
    from giantleap.models.bundle.pull import pull_bundle
    from giantleap.models.lua.checkpoints import CheckpointError

    bundle = read_bundle_or_stop(bundle_directory(name, among_pulled=False))
    target = pulled_dir() / bundle.name if to is None else to
    check_output_directory(target)
    complete = (target / DESCRIPTOR).exists()
    try:
        with working("comparing files with their digests") if complete else nullcontext():
            pulled = pull_bundle(bundle, target, Hub(os.environ.get("HF_ENDPOINT", PUBLIC_HUB)), typer.echo)
    except (BundleError, CheckpointError, HubError, OSError) as error:
        stop(to_line(error))
    shown = pulled.name if to is None else target
    typer.echo(f"bundle {pulled.name} is in {target}; serve it with: giantleap serve --bundle {shown}")
    _print_missing(pulled)


@app.command()
def make(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the new bundle.")],
    lua: Annotated[Path, typer.Option(help="LUA weights: .safetensors, .pth or .pt.")],
    base: Annotated[
        str, typer.Option("--from", help="Bundle whose VAE the weights were trained for; its other parts are copied.")
    ] = "pocket",
    to: Annotated[Path | None, typer.Option(help=TO_HELP)] = None,
    title: Annotated[str | None, typer.Option(help="Title; default: that of the source bundle.")] = None,
    license_name: Annotated[
        str | None, typer.Option("--license", help="License; default: that of the source bundle.")
    ] = None,
) -> None:
    """Make a bundle from another bundle and your LUA weights."""
    source = read_bundle_or_stop(bundle_directory(base))
    target = pulled_dir() / name if to is None else to
    check_input_files(lua)
    check_output_directory(target)

    from giantleap.models.bundle.make import make_bundle
    from giantleap.models.vae.preview_fit import add_preview_map

    about = {key: text for key, text in (("title", title), ("license", license_name)) if text is not None}
    try:
        with working(f"making bundle {name}"):
            made = make_bundle(source, lua, name, target, about)
            if made.descriptor.previews_unavailable and made.vae_directory is not None:
                made = add_preview_map(made)
    except (OSError, ValueError) as error:
        stop(to_line(error))
    shown = made.name if to is None else target
    typer.echo(f"bundle {made.name} is in {target}; try it with: giantleap bundle check {shown}")
    if isinstance(made.pipeline, str):
        typer.echo(f"its pipeline is on the hub; fetch it with: giantleap bundle pull {target} --to DIR")


@app.command()
def check(
    name: NameArgument,
    method: Annotated[str | None, typer.Option(help=f"One of {', '.join(METHODS)}; default: the bundle's.")] = None,
    device: DeviceOption = None,
) -> None:
    """Compare a bundle's files with their digests, load it and generate one image with one denoising step."""
    settings = settings_from(device=device)
    bundle = read_bundle_or_stop(bundle_directory(name))
    stop_if_on_hub(bundle)
    chosen = _choose_method(bundle, method)

    from giantleap.models.device import choose_device, choose_dtype
    from giantleap.models.engines.threads import set_threads
    from giantleap.models.lua.checkpoints import CheckpointError
    from giantleap.models.route import Route

    set_threads(settings.torch_threads)
    try:
        where = choose_device(settings.device)
        with working(f"loading bundle {bundle.name}"):
            route = Route.open(bundle, where, choose_dtype(settings.dtype, where, bundle.dtype))
        _generate_once(route, bundle, chosen, typer.echo)
    except (ValueError, OSError, CheckpointError) as error:
        named = f"bundle {bundle.name}: "
        stop(named + to_line(error).removeprefix(named))
    _print_missing(bundle)


def _generate_once(route: "Route", bundle: Bundle, method: Method, report: Callable[[str], object]) -> None:
    from giantleap.models.generation.items import GenerationItem

    defaults = bundle.defaults
    scale = defaults.scale if defaults.scale in bundle.scales_of(method) else max(bundle.scales_of(method))
    width_px, height_px = defaults.base_width_px, defaults.base_height_px
    if method == "direct":
        scale = 1
    route.reset_peak_memory()
    steps = smallest_steps(method, scale)
    item = GenerationItem("", "", 0, width_px, height_px, steps, defaults.guidance_scale)
    shown = ShownStages(route.clock())
    with shown.measure("generate"):
        generated = route.generate([item], method, scale)
    latents = [latent for latent in generated if latent is not None]
    _, images = route.upscale_and_decode(latents, scale, method, "exact", shown)
    if not images or images[0] is None:
        raise ValueError("the decoded image holds values that are not finite")
    height, width = images[0].shape[:2]
    stages = "  ".join(f"{stage} {duration_s:.2f} s" for stage, duration_s in shown.clock.stages_s.items())
    peak = route.peak_memory()
    dtype = str(route.dtype).removeprefix("torch.")
    report(
        f"bundle {bundle.name} runs: base {width_px} x {height_px} px, method {method} x{scale}, {width} x {height} px"
    )
    report(f"  {stages}")
    report(f"  {route.device}, {dtype}, peak {peak.size_bytes / 1e9:.2f} GB ({peak.source})")


def _choose_method(bundle: Bundle, name: str | None) -> Method:
    chosen: Method | None = bundle.defaults.method if name is None else next((m for m in METHODS if m == name), None)
    if chosen is None:
        stop(f"unknown method {name}; choose one of {', '.join(METHODS)}")
    if reason := bundle.unavailable_reason(chosen):
        stop(reason)
    return chosen


def _offer(bundle: Bundle, method: Method) -> str:
    if reason := bundle.unavailable_reason(method):
        return f"not available: {reason}"
    if method == "direct":
        return f"sides up to {bundle.limits.max_direct_px} px"
    return ", ".join(f"x{scale}" for scale in bundle.scales_of(method))


def _print_missing(bundle: Bundle) -> None:
    for method in METHODS:
        if reason := bundle.unavailable_reason(method):
            typer.echo(f"  {method} is not available: {reason}")


def _place(source: ModelSource) -> str:
    return str(source.place) if source.revision is None else f"{source.place} at {source.revision}, on the hub"
