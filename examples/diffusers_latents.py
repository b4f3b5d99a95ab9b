"""Latents of a diffusers pipeline, enlarged by the service: decoded there, or taken back and decoded here.

make serve                                    # in another terminal
python examples/diffusers_latents.py out      # writes out/decoded_there.png and out/decoded_here.png
"""

import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from giantleap_client import Client


def main(out: str, url: str = "http://127.0.0.1:8000", model: str = "bundles/pocket") -> None:
    """Draw a latent here, and let the service enlarge it twice."""
    pipeline = DiffusionPipeline.from_pretrained(model)
    latents = pipeline(
        "a large red sphere on a green floor under a blue sky, on the left",
        width=128,
        height=128,
        num_inference_steps=8,
        guidance_scale=1.0,
        use_resolution_binning=False,  # of Sana alone: the size as it is
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
    ).images
    with Client(url) as client:
        # A pipeline returns scaled latents; packed ones (FLUX, Qwen-Image) also need width and height of their image.
        client.upscale(latents, scale=2, scaled=True).save(Path(out, "decoded_there.png"))
        larger = client.upscale(latents, scale=2, scaled=True, output="latent").tensor()
    # What comes back is raw, as the VAE takes it.
    with torch.no_grad():
        pixels = pipeline.vae.decode(larger[None], return_dict=False)[0]
    pipeline.image_processor.postprocess(pixels)[0].save(Path(out, "decoded_here.png"))


if __name__ == "__main__":
    main(*sys.argv[1:])
