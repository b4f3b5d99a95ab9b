"""What marks cost per image: encoding alone, with XMP, and with a signed C2PA manifest, as CPU time and size.

    python -m benchmarks.images.provenance        writes benchmarks/results/provenance.json

CPU time and not wall-clock time, so that other work on the machine counts little. The image is smoothed noise, which
takes the encoders about as long as a photograph.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.machine import read_machine
from giantleap.models.pixels.image_formats import CONTENT_TYPES, ImageFormat
from giantleap.models.pixels.images import to_image_bytes, to_pixels
from giantleap.models.provenance.dev_certificate import make_dev_certificate
from giantleap.models.provenance.manifest import ManifestSigner
from giantleap.models.provenance.marker import ImageMarker
from giantleap.models.provenance.xmp import Origin

RESULT = Path(__file__).resolve().parents[2] / "results" / "provenance.json"
SIDES_PX = (512, 1024)
RUNS = 9


def measure(encode: Callable[[], bytes]) -> tuple[float, int]:
    """Median CPU time in seconds of nine runs after a warm-up, and the size of the file."""
    size_bytes, times_s = len(encode()), []
    for _ in range(RUNS):
        start_s = time.process_time()
        encode()
        times_s.append(time.process_time() - start_s)
    return statistics.median(times_s), size_bytes


def measure_format(output_format: ImageFormat, side_px: int, signer: ManifestSigner) -> dict[str, object]:
    """One row: an image of one size in one format, plain, with XMP, and signed."""
    noise = torch.rand(1, 3, side_px // 8, side_px // 8, generator=torch.Generator().manual_seed(0))
    pixels = to_pixels(F.interpolate(noise, size=(side_px, side_px), mode="bicubic"))[0]
    markers = {"xmp": ImageMarker(), "signed": ImageMarker(signer)}
    encoders: dict[str, Callable[[], bytes]] = {"plain": lambda: to_image_bytes(pixels, output_format)} | {
        name: lambda marker=marker: marker.to_file(pixels, output_format, Origin()) for name, marker in markers.items()
    }
    row: dict[str, object] = {"format": output_format, "image_px": side_px}
    for name, encode in encoders.items():
        row[f"{name}_s"], row[f"{name}_bytes"] = measure(encode)
    return row


def run() -> None:
    """Measure every format and size, print the rows and store them."""
    with tempfile.TemporaryDirectory() as folder:
        paths = Path(folder, "cert.pem"), Path(folder, "key.pem")
        for path, content in zip(paths, make_dev_certificate(days=1), strict=True):
            path.write_bytes(content)
        signer = ManifestSigner.open(*paths)
        rows = [measure_format(name, side_px, signer) for side_px in SIDES_PX for name in CONTENT_TYPES]
    for row in rows:
        print(row)
    machine = read_machine(("torch", "pillow", "c2pa-python"))
    RESULT.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")
