"""`giantleap provenance`: read the provenance marks of an image; make a test certificate for signatures."""

import os
from pathlib import Path
from typing import Annotated

import typer

from giantleap.cli.files import check_input_files, check_output_directory, read_input
from giantleap.cli.options import settings_from, stop
from giantleap.models.messages import install_hint
from giantleap.service.errors import EXIT_FAILURE, GiantleapError

app = typer.Typer(no_args_is_help=True, help="Provenance marks of images: XMP, C2PA manifests, watermark.")


@app.command()
def verify(file: Annotated[Path, typer.Argument(help="A PNG, JPEG or WebP image; - reads standard input.")]) -> None:
    """Print the provenance marks of an image. Exit code 1: its manifest is not valid."""
    from giantleap.service.jobs.verification import verify_image

    check_input_files(file)
    try:
        marks = verify_image(read_input(file), None, settings_from().max_image_px)
    except GiantleapError as error:
        stop(f"{file}: {error.detail}")
    manifest, mark = marks.manifest, marks.watermark
    rows = {
        "generated": "yes" if marks.generated else "not known",
        "xmp source type": marks.xmp.digital_source_type,
        "xmp creator": marks.xmp.creator_tool,
        "xmp parameters": marks.xmp.parameters,
        "manifest": manifest.state,
        "manifest source type": manifest.digital_source_type,
        "manifest signed by": manifest.signed_by,
        "manifest problems": ", ".join(manifest.problems) or None,
        "watermark": None if mark is None else f"{mark.number}, {mark.score} standard deviations above chance",
    }
    for name, value in rows.items():
        if value is not None:
            typer.echo(f"{name:<20}  {value}")
    if manifest.state == "invalid":
        raise typer.Exit(EXIT_FAILURE)


@app.command()
def dev_cert(
    out: Annotated[Path, typer.Option(help="Directory for c2pa-cert.pem and c2pa-key.pem.")] = Path(),
    days: Annotated[int, typer.Option(help="Days of validity.", min=1, max=3650)] = 365,
) -> None:
    """Make a test certificate and its key. Viewers show it as untrusted."""
    try:
        from giantleap.models.provenance.dev_certificate import make_dev_certificate
    except ImportError:
        stop(f"cryptography is not installed: {install_hint('provenance')}")
    check_output_directory(out)
    out.mkdir(parents=True, exist_ok=True)
    certificate, key = out / "c2pa-cert.pem", out / "c2pa-key.pem"
    if taken := [str(path) for path in (certificate, key) if path.exists()]:
        stop(f"{' and '.join(taken)} exist already; name another directory with --out")
    chain, secret = make_dev_certificate(days)
    certificate.write_bytes(chain)
    with os.fdopen(os.open(key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(secret)
    typer.echo(f"export GIANTLEAP_C2PA_CERT={certificate.absolute()} GIANTLEAP_C2PA_KEY={key.absolute()}")
