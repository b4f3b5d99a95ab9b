"""The command `giantleap batch`: files in, files out, in any number of processes. The work is in `giantleap.batch`."""

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from giantleap.cli.errors import EXIT_INTERRUPTED, EXIT_ROWS_FAILED
from giantleap.cli.options import (
    BundleOption,
    DeviceOption,
    MethodOption,
    open_bundle_route,
    read_bundles,
    settings_from,
    stop,
)
from giantleap.cli.progress import import_torch
from giantleap.models.pixels.image_formats import ImageFormat
from giantleap.service.errors import BadConfiguration
from giantleap.service.settings import Settings

if TYPE_CHECKING:
    from giantleap.batch.rows import BatchOptions
    from giantleap.batch.runner import Runner

OutputKind = Literal["images", "latents"]


def batch(
    source: Annotated[
        str, typer.Argument(metavar="INPUT", help="File, folder, pattern or URL: prompts, latents or images.")
    ],
    output: Annotated[
        str, typer.Argument(metavar="OUTPUT", help="Folder or s3:// URL; run again with the same one to resume.")
    ],
    scale: Annotated[float | None, typer.Option(help="Scale factor; default: the bundle's.")] = None,
    method: MethodOption = None,
    size: Annotated[str | None, typer.Option(help="Final size of generated images, px: WIDTHxHEIGHT.")] = None,
    seed: Annotated[
        int, typer.Option(help="Base seed; a row without its own derives one from this and its key.", min=0)
    ] = 0,
    scaled: Annotated[bool, typer.Option(help="Latents are scaled, as a pipeline returns them; default: raw.")] = False,
    out: Annotated[OutputKind, typer.Option(help="What to write.")] = "images",
    output_format: Annotated[ImageFormat, typer.Option("--format", help="Image format.")] = "png",
    batch_size: Annotated[int, typer.Option(help="Maximum rows per batch.", min=1)] = 8,
    shard_rows: Annotated[int, typer.Option(help="Rows that a process claims at once.", min=1)] = 256,
    lease: Annotated[
        float, typer.Option(help="Seconds until another process takes over the shard of a dead one.", min=1)
    ] = 60,
    bundle: BundleOption = None,
    device: DeviceOption = None,
) -> None:
    """Generate or upscale many rows without a service, in any number of processes. Exit code 4: rows failed."""
    settings = settings_from(bundle=bundle, device=device)
    width_px, height_px = _read_size(size)
    import_torch()

    from giantleap.batch.rows import BatchOptions

    options = BatchOptions(
        scale=scale,
        method=method,
        width_px=width_px,
        height_px=height_px,
        seed=seed,
        scaled=scaled,
        out=out,
        format=output_format,
        batch_size=batch_size,
        shard_rows=shard_rows,
    )
    _run(source, output, options, lease, settings)


def _run(url: str, output: str, options: "BatchOptions", lease_s: float, settings: Settings) -> None:
    from giantleap.batch.engine import RowEngine
    from giantleap.batch.inputs import Source
    from giantleap.batch.rows import check_options
    from giantleap.batch.runner import Runner, open_job
    from giantleap.batch.store import BatchError, Store

    served, stopping = read_bundles(settings)[0], threading.Event()
    try:
        source, store = Source(url), Store(output)
        source.refuse_output(store)
        check_options(options, served)
        open_job(store, options.to_job(served))
        engine = RowEngine(open_bundle_route(settings, served), served, settings, options, store, stopping)
        runner = Runner(source, store, engine, options, lease_s, stopping)
    except BatchError as error:
        stop(str(error))
    except BadConfiguration as error:
        stop(error.detail)
    with _signals_to(stopping):
        failed = _show(runner)
    if stopping.is_set():
        raise typer.Exit(EXIT_INTERRUPTED)
    if runner.has_failed():
        typer.echo(
            f"giantleap: some rows failed, {failed} of them here; {store.url}/_batch/manifest says why", err=True
        )
        raise typer.Exit(EXIT_ROWS_FAILED)


def _show(runner: "Runner") -> int:
    """Run to the end with a progress bar; how many rows failed here."""
    from tqdm import tqdm

    failed = 0
    with tqdm(total=runner.count_rows(), unit="row", desc="batch") as bar:
        for entries in runner.run():
            failed += sum(entry.error is not None for entry in entries)
            bar.update(len(entries))
            bar.set_postfix(failed=failed)
    return failed


@contextmanager
def _signals_to(stopping: threading.Event) -> Iterator[None]:
    """Set the event by the first Ctrl-C or SIGTERM in the block; a second one ends the process at once."""

    def request(number: int, _: FrameType | None) -> None:
        stopping.set()
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _read_size(text: str | None) -> tuple[int, int] | tuple[None, None]:
    if text is None:
        return None, None
    if (match := re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)) is not None:
        return int(match[1]), int(match[2])
    return stop(f"--size: is {text:.20}; give WIDTHxHEIGHT in pixels, such as 512x512")
