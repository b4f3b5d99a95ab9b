"""`giantleap provenance`: say what an image carries of how it was made; make a certificate for trying signatures."""

import os
from pathlib import Path
from typing import Annotated

import typer

from giantleap.cli.files import check_input_files, check_output_directory, read_input
from giantleap.cli.options import settings_from, stop
from giantleap.models.messages import install_hint
from giantleap.service.errors import EXIT_FAILURE, GiantleapError

app = typer.Typer(no_args_is_help=True, help="Marks of generated images: XMP and C2PA manifests.")


@app.command()
def verify(file: Annotated[Path, typer.Argument(help="A PNG, JPEG or WebP image; - reads standard input.")]) -> None:
    """Say what an image carries; the exit code is 1 where its manifest does not match it."""
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
    days: Annotated[int, typer.Option(help="How long it is valid.", min=1, max=3650)] = 365,
) -> None:
    """Make a certificate and its key for trying: nobody trusts it, and viewers say so."""
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
