"""Commands that run the route in this process, without Redis or HTTP: models, generate, upscale, bench protocol.

`service.cli` mounts them. Heavy modules (torch, diffusers) are imported inside the functions that need them, so that
`giantleap --help` and the API processes start fast.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from models.bundle import Bundle, BundleError, read_bundle
from service.cli_options import BundleOption, DeviceOption, settings_from, stop
from service.errors import GiantleapError
from service.settings import Settings

if TYPE_CHECKING:
    from tqdm import tqdm

    from models.images import ImageFormat
    from models.route import Route


def models(bundle: BundleOption = None) -> None:
    """Print the bundles that the settings name."""
    for each in _bundles(settings_from(bundle=bundle)):
        space, defaults = each.latent_space, each.defaults
        typer.echo(f"{each.name}  {each.about.title}  ({each.about.licence})")
        typer.echo(f"  scales     {', '.join(f'x{scale}' for scale in each.scales)}")
        typer.echo(f"  latents    {space.name}: {space.channels} channels, stride {space.stride_px} px")
        typer.echo(f"  base size  {defaults.base_width_px} x {defaults.base_height_px} px")
        typer.echo(f"  defaults   {defaults.steps} steps, guidance {defaults.guidance_scale}")
        typer.echo(f"  directory  {each.directory}")


def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Image to write: .png, .jpg or .webp.")],
    scale: Annotated[int, typer.Option(help="Enlargement of the base image: 1, 2 or 4.")] = 2,
    seed: Annotated[int, typer.Option(help="Same seed, same image.", min=0)] = 0,
    negative_prompt: Annotated[str, typer.Option(help="What not to draw.")] = "",
    width: Annotated[int | None, typer.Option(help="Width of the final image, px.")] = None,
    height: Annotated[int | None, typer.Option(help="Height of the final image, px.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", min=1)] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Classifier-free guidance.", min=0)] = None,
    bundle: BundleOption = None,
    device: DeviceOption = None,
) -> None:
    """Draw one image without a service: generate, upscale, decode."""
    settings = settings_from(bundle=bundle, device=device)
    served = _bundles(settings)[0]
    output_format = _image_format(out)
    defaults = served.defaults
    try:
        base_width_px, base_height_px = served.base_size(
            width or defaults.base_width_px * scale, height or defaults.base_height_px * scale, scale
        )
    except ValueError as error:
        stop(str(error))
    if served.closed_vocabulary:
        _warn_of_unknown_words(served, prompt)

    from tqdm import tqdm

    from models.generator import DrawItem
    from models.images import to_image_bytes

    route = _route(settings, served)
    item = DrawItem(
        prompt,
        negative_prompt,
        seed,
        base_width_px,
        base_height_px,
        steps or defaults.steps,
        defaults.guidance_scale if guidance_scale is None else guidance_scale,
    )
    clock = route.clock()
    with tqdm(total=item.steps, desc="generate", unit="step") as bar, clock.measure("generate"):
        (latent,) = route.generate([item], lambda step, steps: _advance(bar, step), set)
    if latent is None:
        stop("the drawing was canceled")
    with clock.measure("upscale"):
        enlarged = route.upscale(latent[None], scale)
    with clock.measure("decode"):
        (pixels,) = route.decode(enlarged)
    if pixels is None:
        stop("the decoded image holds values that are not finite; nothing was written")
    with clock.measure("encode"):
        out.write_bytes(to_image_bytes(pixels, output_format))
    _report(out, clock.stages_s)


def upscale(
    latent: Annotated[Path, typer.Argument(help="A .safetensors or .npy file with one latent [channels, h, w].")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Image to write: .png, .jpg or .webp; or .safetensors.")],
    scale: Annotated[int, typer.Option(help="Enlargement: 2 or 4.")] = 2,
    scaled: Annotated[bool, typer.Option(help="The latent is as a pipeline returns it, not raw.")] = False,
    bundle: BundleOption = None,
    device: DeviceOption = None,
) -> None:
    """Enlarge a latent of the bundle's latent space without a service, and decode it unless the output is a latent."""
    import torch
    from safetensors.torch import save_file

    from models.images import to_image_bytes
    from service.latents_in import LATENT_TENSOR, read_latent

    settings = settings_from(bundle=bundle, device=device)
    served = _bundles(settings)[0]
    try:
        raw = torch.from_numpy(read_latent(latent.read_bytes(), None))
    except (OSError, GiantleapError) as error:
        stop(f"{latent}: {error}")
    space = served.latent_space
    raw = raw[None] if raw.dim() == 3 else raw
    if raw.shape[:2] != (1, space.channels):
        stop(f"{latent}: latents of {space.name} are [{space.channels}, h, w]; found {list(raw.shape)}")
    if scaled:
        raw = space.to_raw(raw)
    if scale not in served.scales:
        stop(f"scale {scale}: bundle {served.name} has {', '.join(map(str, served.scales))}")
    as_latent = out.suffix == ".safetensors"
    output_format = "png" if as_latent else _image_format(out)
    route = _route(settings, served)
    clock = route.clock()
    with clock.measure("upscale"):
        enlarged = route.upscale(raw, scale)
    if as_latent:
        save_file({LATENT_TENSOR: enlarged[0].contiguous()}, out)
    else:
        with clock.measure("decode"):
            (pixels,) = route.decode(enlarged)
        if pixels is None:
            stop("the decoded image holds values that are not finite; nothing was written")
        out.write_bytes(to_image_bytes(pixels, output_format))
    _report(out, clock.stages_s)


def protocol(
    scale: Annotated[list[int] | None, typer.Option(help="Scales to time; none: all of the bundle.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", min=1)] = None,
    warmups: Annotated[int, typer.Option(help="Runs thrown away first.", min=0)] = 20,
    runs: Annotated[int, typer.Option(help="Runs that count.", min=1)] = 20,
    json_out: Annotated[Path | None, typer.Option("--json", help="Also write the results as JSON lines.")] = None,
    bundle: BundleOption = None,
    device: DeviceOption = None,
) -> None:
    """Time the route by the paper's protocol: batch 1, one device, warm-ups, then the median per stage."""
    from tqdm import tqdm

    from service.protocol import measure_protocol, to_table

    settings = settings_from(bundle=bundle, device=device)
    served = _bundles(settings)[0]
    unknown = sorted(set(scale or ()) - set(served.scales))
    if unknown:
        stop(f"scale {unknown[0]}: bundle {served.name} has {', '.join(map(str, served.scales))}")
    route = _route(settings, served)
    defaults, results = served.defaults, []
    for each in scale or served.scales:
        with tqdm(total=warmups + runs, desc=f"x{each}", unit="run") as bar:
            result = measure_protocol(
                route,
                each,
                defaults.base_width_px,
                defaults.base_height_px,
                steps or defaults.steps,
                warmups,
                runs,
                on_progress=partial(_advance, bar),
            )
        results.append(result)
    typer.echo(to_table(results))
    if json_out is not None:
        json_out.write_text("".join(f"{result.to_json()}\n" for result in results))


def _advance(bar: "tqdm[NoReturn]", done: int, total: int = 0) -> None:
    bar.update(done - bar.n)


def _bundles(settings: Settings) -> list[Bundle]:
    try:
        return [read_bundle(directory) for directory in settings.bundle]
    except BundleError as error:
        stop(str(error))


def _route(settings: Settings, bundle: Bundle) -> "Route":
    from models.route import Route, choose_device, choose_dtype

    try:
        device = choose_device(settings.device)
        return Route.open(bundle, device, choose_dtype(settings.dtype, device))
    except ValueError as error:
        stop(str(error))


def _warn_of_unknown_words(bundle: Bundle, prompt: str) -> None:
    from models.prompt_words import read_prompt_words

    unknown = read_prompt_words(Path(bundle.pipeline)).unknown_words(prompt)
    if unknown:
        typer.echo(f"giantleap: bundle {bundle.name} does not know: {', '.join(unknown)}", err=True)


def _image_format(out: Path) -> "ImageFormat":
    formats: dict[str, ImageFormat] = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
    if out.suffix.lower() not in formats:
        stop(f"{out}: the name must end in one of {', '.join(formats)}")
    return formats[out.suffix.lower()]


def _report(out: Path, stages_s: Mapping[str, float]) -> None:
    typer.echo(f"{out}  " + "  ".join(f"{stage} {duration_s:.3f} s" for stage, duration_s in stages_s.items()))
