"""What previews of the pocket bundle cost, and how close the linear map comes to the decoder.

    python -m benchmarks.previews [--out DIR]     writes benchmarks/results/previews.json, and the previews to DIR

CPU time and not wall-clock time, so that other work on the machine counts little.
"""

import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.machine import read_machine
from giantleap.cli.demo import PROMPT
from giantleap.models.generation.items import GenerationItem
from giantleap.models.load import load_route
from giantleap.models.pixels.images import psnr_db, to_image_bytes, to_signed
from giantleap.models.provenance.xmp import Origin, to_xmp

RESULT = Path(__file__).resolve().parents[1] / "results" / "previews.json"
RUNS = 9
PREVIEWS = 3


def run(out: Path | None) -> None:
    """Measure, print and store."""
    route = load_route("pocket", device="cpu")
    previewer, files = route.previewer, {}
    assert previewer is not None
    plain = GenerationItem(PROMPT, "", 7, 128, 128, 12, 1.5)

    def show(index: int, step: int, raw: Tensor) -> None:
        start_s = time.process_time()
        files[step] = to_image_bytes(previewer.show(raw), "jpeg", to_xmp(Origin()))
        preview_s.append(time.process_time() - start_s)

    times_s: dict[str, list[float]] = {"plain": [], "previews": []}
    preview_s: list[float] = []
    latents = {}
    for _ in range(RUNS + 1):  # the first is a warm-up
        for name, item in (("plain", plain), ("previews", replace(plain, previews=PREVIEWS))):
            start_s = time.process_time()
            (latents[name],) = route.generate([item], on_preview=show)
            times_s[name].append(time.process_time() - start_s)
    last, same = latents["plain"], latents["previews"]
    assert last is not None and same is not None and torch.equal(last, same), "previews change nothing"
    (decoded,) = route.decode(last[None])
    assert decoded is not None
    row = {f"{name}_s": statistics.median(each[1:]) for name, each in times_s.items()} | {
        "preview_s": statistics.median(preview_s[PREVIEWS:]),
        "preview_bytes": max(map(len, files.values())),
        "previews": PREVIEWS,
        "finished_psnr_db": psnr_db(to_signed(previewer.show(last)), to_signed(decoded)),
    }
    print(row)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        for step, content in files.items():
            (out / f"step_{step}.jpg").write_bytes(content)
        (out / "latent.jpg").write_bytes(to_image_bytes(previewer.show(last), "jpeg"))
        (out / "decoded.jpg").write_bytes(to_image_bytes(decoded, "jpeg"))
    RESULT.write_text(json.dumps({"machine": read_machine(("torch", "pillow")), **row}, indent=2) + "\n")
