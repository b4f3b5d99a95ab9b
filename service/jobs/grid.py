"""The size of a job in latent pixels: what batches, the queue's limit and the memory of a device are counted in."""

from dataclasses import dataclass

from giantleap.models.lua.spec import scaled_size
from giantleap.service.jobs.job import GenerateParams, JobParams


@dataclass(frozen=True, slots=True)
class LatentGrid:
    """Converts image sizes of a bundle to latent sizes.

    Attributes:
        stride_px: Image pixels per latent pixel.
        window: Side of the upscaler's window; the sides of a latent are padded to multiples of it.
    """

    stride_px: int
    window: int

    def padded(self, side: int) -> int:
        """A latent's side, padded to whole windows."""
        return -(-side // self.window) * self.window


def count_items(params: JobParams) -> int:
    """How many images a job asks for."""
    return params.num_images if isinstance(params, GenerateParams) else params.batch_items


def output_latent_px(params: JobParams, grid: LatentGrid) -> int:
    """Latent pixels of one item after upscaling, as the device sees them: an upscale job's are padded."""
    if isinstance(params, GenerateParams):
        return (params.width_px // grid.stride_px) * (params.height_px // grid.stride_px)
    height, width = grid.padded(params.latent_height), grid.padded(params.latent_width)
    return scaled_size(height, params.scale) * scaled_size(width, params.scale)
