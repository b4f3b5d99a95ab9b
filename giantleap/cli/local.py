"""Commands that run the route in this process, without Redis or HTTP: models, generate, upscale.

`giantleap.cli.main` mounts them. Slow modules (torch, diffusers, Pillow) are imported inside the functions that need
them, so that `giantleap --help` starts fast.
"""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from giantleap.cli.errors import EXIT_FAILED
from giantleap.cli.files import (
    LATENT,
    STANDARD,
    LocalLoras,
    LoraOption,
    check_input_files,
    check_output_file,
    image_format,
    read_input,
    read_loras,
    write_output,
)
from giantleap.cli.options import (
    BundleOption,
    DecodeOption,
    DeviceOption,
    MethodOption,
    RefineStepsOption,
    RefineStrengthOption,
    advance,
    open_bundle_route,
    read_bundles,
    settings_from,
    stop,
    to_message,
    to_refine,
)
from giantleap.cli.progress import ShownStages, import_torch
from giantleap.models.bundle.bundle import Bundle
from giantleap.models.pixels.image_formats import Compression
from giantleap.service.errors import BadConfiguration, GiantleapError
from giantleap.service.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

    from giantleap.models.filters.chain import FilterChain
    from giantleap.models.generation.items import GenerationItem
    from giantleap.models.provenance.marker import ImageMarker
    from giantleap.models.route import Route
    from giantleap.service.jobs.job import GenerateParams, JobParams


OutOption = Annotated[
    Path,
    typer.Option(
        "-o",
        "--out",
        help="File to write: .png, .jpg or .webp; `upscale` also .safetensors; - writes a PNG to standard output.",
    ),
]
EmbedOption = Annotated[
    bool, typer.Option("--embed-parameters", help="Write prompt, seed and other parameters into the file's metadata.")
]
CompressionOption = Annotated[
    Compression | None, typer.Option(help="fast (default), or small: a smaller file, several times slower.")
]
QualityOption = Annotated[int | None, typer.Option(help="Quality of .jpg and .webp, 1 to 100; default: 95.")]
LuaOption = Annotated[
    Path | None, typer.Option(help="LUA weights to use instead of the bundle's: .safetensors, .pth or .pt.")
]


InputArgument = Annotated[
    Path, typer.Argument(help="A .safetensors or .npy file with one latent, or an image; - reads standard input.")
]


def models(bundle: BundleOption = None) -> None:
    """Print methods, latent space, sizes and defaults of the bundles in GIANTLEAP_BUNDLE."""
    for each in read_bundles(settings_from(bundle=bundle)):
        space, defaults = each.latent_space, each.defaults
        typer.echo(f"{each.name}  {each.about.title}  ({each.about.license})")
        for method in each.methods:
            typer.echo(f"  {method:<10} {', '.join(f'x{scale}' for scale in each.scales_of(method))}")
        typer.echo(f"  latents    {space.name}: {space.channels} channels, stride {space.stride_px} px")
        typer.echo(f"  base size  {defaults.base_width_px} x {defaults.base_height_px} px")
        typer.echo(f"  defaults   {defaults.steps} steps, guidance {defaults.guidance_scale}")
        typer.echo(f"  directory  {each.directory}")


def generate(
    prompt: Annotated[str, typer.Argument(help="Prompt; - reads it from standard input.")],
    out: OutOption,
    scale: Annotated[float | None, typer.Option(help="Scale factor; default: the bundle's.")] = None,
    method: MethodOption = None,
    seed: Annotated[int, typer.Option(help="Seed of the initial noise.", min=0)] = 0,
    negative_prompt: Annotated[str | None, typer.Option(help="Negative prompt.")] = None,
    width: Annotated[int | None, typer.Option(help="Width of the final image, px.")] = None,
    height: Annotated[int | None, typer.Option(help="Height of the final image, px.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", min=1)] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Classifier-free guidance.", min=0)] = None,
    init_image: Annotated[Path | None, typer.Option(help="Start image: .png, .jpg or .webp.")] = None,
    strength: Annotated[
        float | None, typer.Option(help="Share of the steps to run from the start image, 0 to 1.")
    ] = None,
    mask: Annotated[Path | None, typer.Option(help="Mask of the start image: white is generated again.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="Reference image, repeatable.")] = None,
    refine_strength: RefineStrengthOption = None,
    refine_steps: RefineStepsOption = None,
    decode: DecodeOption = "exact",
    compression: CompressionOption = None,
    quality: QualityOption = None,
    embed_parameters: EmbedOption = False,
    lora: LoraOption = None,
    lua: LuaOption = None,
    bundle: BundleOption = None,
    device: DeviceOption = None,
) -> None:
    """Generate one image without a service: generate, upscale, decode."""
    image_format(out)
    check_output_file(out)
    files = (init_image, mask, *(image or ()))
    check_input_files(lua, *files)
    fields = {
        "prompt": _read_prompt(prompt, files),
        "negative_prompt": negative_prompt,
        "scale": scale,
        "width": width,
        "height": height,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "method": method,
        "decode": decode,
        "strength": strength,
        "refine": to_refine(refine_strength, refine_steps),
        "compression": compression,
        "quality": quality,
        "embed_parameters": embed_parameters,
    }
    settings = settings_from(bundle=bundle, device=device)
    served = _read_bundle(settings, lua)
    _generate_to_file(settings, served, fields | _read_images(*files), seed, read_loras(lora, served, settings), out)


def _generate_to_file(
    settings: Settings, served: Bundle, fields: Mapping[str, object], seed: int, loras: LocalLoras, out: Path
) -> None:
    """Plan a request of these fields, load the bundle and generate one image."""
    from giantleap.service.jobs.edits.inputs import to_input
    from giantleap.service.jobs.planning import plan_generate
    from giantleap.service.jobs.requests import GenerateRequest
    from giantleap.service.worker.items import build_generation_item

    try:
        request = GenerateRequest.model_validate(fields)
        params = plan_generate(request, served, settings, seed, image_format(out), loras=loras.uses)
        blob = to_input(request, params, settings.max_image_px)
    except (ValueError, GiantleapError) as error:
        stop(to_message(error))
    _warn_of_unknown_words(served, params.prompt)
    writer = _open_writer(settings)
    route = open_bundle_route(settings, served)
    route.generator.adapters.offer(dict(loras.paths), budget_bytes=0)
    item, stages = build_generation_item(params, 0, blob or b""), ShownStages(route.clock())
    latents, refine = [_generate_latent(route, item, params, stages)], [item] if item.refine else []
    _, images = route.upscale_and_decode(latents, params.scale, params.method, params.decode, stages, refine)
    writer.write(out, params, served.name, images[0], stages)


def _read_images(init_image: Path | None, mask: Path | None, *images: Path) -> dict[str, object]:
    """The images of the command line as a request has them."""
    named = {"init_image": init_image, "mask": mask}
    texts = {name: b64encode(read_input(path)).decode() for name, path in named.items() if path is not None}
    return texts | {"images": [b64encode(read_input(path)).decode() for path in images]}


def _read_prompt(prompt: str, files: Sequence[Path | None]) -> str:
    """The prompt of the command line, or that of standard input, which is one input only."""
    if [prompt == "-", *(path == STANDARD for path in files)].count(True) > 1:
        stop("standard input is either the prompt or an image; give the others on the command line")
    if prompt != "-":
        return prompt
    return read_input(STANDARD).decode(errors="replace").strip()


def _read_bundle(settings: Settings, lua: Path | None) -> Bundle:
    """The first bundle of the settings, with the LUA weights of a file if one is given."""
    served = read_bundles(settings)[0]
    if lua is None:
        return served
    import_torch()

    from giantleap.models.bundle.make import with_lua

    try:
        return with_lua(served, lua)
    except (OSError, ValueError) as error:
        stop(to_message(error))


def _generate_latent(route: "Route", item: "GenerationItem", params: "GenerateParams", stages: ShownStages) -> "Tensor":
    """Generate the item's raw latent and show the steps in a progress bar."""
    from tqdm import tqdm

    def show(step: int, steps: int) -> None:
        bar.total = steps
        advance(bar, step)

    with tqdm(total=item.steps, desc="generate", unit="step") as bar, stages.clock.measure("generate"):
        (latent,) = route.generate([item], params.method, params.scale, on_step=show)
    if latent is None:
        stop("the generation was canceled")
    return latent


def upscale(
    file: InputArgument,
    out: OutOption,
    scale: Annotated[float | None, typer.Option(help="Scale factor; default: the bundle's.")] = None,
    method: MethodOption = None,
    scaled: Annotated[bool, typer.Option(help="The latent is scaled, as a pipeline returns it; default: raw.")] = False,
    width: Annotated[int | None, typer.Option(help="Width of the image of a packed latent, px.")] = None,
    height: Annotated[int | None, typer.Option(help="Height of the image of a packed latent, px.")] = None,
    decode: DecodeOption = "exact",
    compression: CompressionOption = None,
    quality: QualityOption = None,
    lua: LuaOption = None,
    bundle: BundleOption = None,
    device: DeviceOption = None,
) -> None:
    """Upscale a latent or an image without a service; an output named .safetensors is the latent, not decoded."""
    as_latent = out.suffix == LATENT
    output_format = "png" if as_latent else image_format(out)
    check_output_file(out)
    check_input_files(file, lua)

    from giantleap.service.jobs.images import read_image
    from giantleap.service.jobs.latents import LATENT_TENSOR
    from giantleap.service.jobs.planning import prepare_upscale
    from giantleap.service.jobs.requests import UpscaleQuery

    settings = settings_from(bundle=bundle, device=device)
    served, body = _read_bundle(settings, lua), read_input(file)
    try:
        query = UpscaleQuery.model_validate(
            {
                "scale": scale,
                "scaled": scaled,
                "method": method,
                "decode": decode,
                "output": "latent" if as_latent else "image",
            }
            | {"width": width, "height": height, "compression": compression, "quality": quality}
        )
        params, blob = prepare_upscale(query, body, None, served, settings, output_format)
        if params.batch_items != 1:
            stop(f"{file}: holds {params.batch_items} latents; the command takes a file with one")
    except (ValueError, GiantleapError) as error:
        stop(f"{file}: {to_message(error)}")

    from safetensors.torch import load, save

    writer = _open_writer(settings)
    route = open_bundle_route(settings, served)
    stages = ShownStages(route.clock())
    how = (params.scale, params.method, None if as_latent else params.decode, stages)
    if params.image_width_px is None:
        latents, images = route.upscale_and_decode(list(load(blob)[LATENT_TENSOR]), *how)
    else:
        latents, images = route.upscale_images([read_image(blob, settings.max_image_px)], *how)
    if as_latent:
        write_output(out, save({LATENT_TENSOR: latents[0].contiguous()}))
        _report(out, stages.clock.stages_s)
    else:
        writer.write(out, params, served.name, images[0], stages)


@dataclass(frozen=True, slots=True)
class _Writer:
    """Filters, marks and writes images."""

    filters: "FilterChain"
    marker: "ImageMarker"

    def write(self, out: Path, params: "JobParams", bundle: str, pixels: "Tensor | None", stages: ShownStages) -> None:
        """Write an image of the seed of its parameters; one that a filter holds back ends the command."""
        from giantleap.models.filters.chain import FilterFailed, ImageRefused
        from giantleap.service.jobs.marking import to_origin
        from giantleap.service.worker.outputs.filters import to_context

        if pixels is None:
            stop("the decoded image has values that are not finite; nothing was written")
        with stages.measure("encode"):
            try:
                self.filters.check(pixels, to_context(params, bundle, pixels))
            except (ImageRefused, FilterFailed) as error:
                stop(f"{error}; nothing was written", code=EXIT_FAILED)
            origin = to_origin(params, bundle, params.seed)
            write_output(out, self.marker.to_file(pixels, params.output_format, origin, params.file))
        _report(out, stages.clock.stages_s)


def _open_writer(settings: Settings) -> _Writer:
    """A filter or a certificate of the settings that cannot be used ends the command."""
    import_torch()

    from giantleap.models.provenance.marker import ImageMarker
    from giantleap.service.jobs.marking import open_manifest_signer
    from giantleap.service.worker.outputs.filters import open_filters

    try:
        marker = ImageMarker(open_manifest_signer(settings), settings.watermark)
        return _Writer(open_filters(settings.filters, lambda name, outcome: None), marker)
    except BadConfiguration as error:
        stop(error.detail)


def _warn_of_unknown_words(bundle: Bundle, prompt: str) -> None:
    if not bundle.closed_vocabulary:
        return
    from giantleap.models.bundle.vocabulary import read_prompt_words

    unknown = read_prompt_words(Path(bundle.pipeline)).unknown_words(prompt)
    if unknown:
        typer.echo(f"giantleap: bundle {bundle.name} does not know: {', '.join(unknown)}", err=True)


def _report(out: Path, stages_s: Mapping[str, float]) -> None:
    times = "  ".join(f"{stage} {duration_s:.3f} s" for stage, duration_s in stages_s.items())
    typer.echo(f"{out}  {times}", err=out == STANDARD)
