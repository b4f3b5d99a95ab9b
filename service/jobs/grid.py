"""The size of a job: in latent pixels, which batches and limits count, and in pixel-steps, which budgets count."""

from dataclasses import dataclass

from giantleap.models.bundle.bundle import Bundle
from giantleap.models.generation.refinement import window_starts
from giantleap.models.lua.spec import scaled_size
from giantleap.models.methods.passes import network_pixel_steps
from giantleap.service.jobs.capacity import Workload, to_workload
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
    """Number of images of a job."""
    return params.num_images if isinstance(params, GenerateParams) else params.batch_items


def output_latent_px(params: JobParams, grid: LatentGrid) -> int:
    """Latent pixels of one item after upscaling, as the device sees them: an upscale job's are padded."""
    if isinstance(params, GenerateParams):
        return (params.width_px // grid.stride_px) * (params.height_px // grid.stride_px)
    height, width = grid.padded(params.latent_height), grid.padded(params.latent_width)
    return scaled_size(height, params.scale) * scaled_size(width, params.scale)


@dataclass(frozen=True, slots=True)
class Charge:
    """What a job takes from the budget of its API key.

    Attributes:
        pixel_steps: As `count_pixel_steps`.
        megapixel_steps_per_minute: The budget.
    """

    pixel_steps: int
    megapixel_steps_per_minute: int

    @property
    def cost_us(self) -> float:
        """The time in which the budget allows that much again, microseconds."""
        return 60 * self.pixel_steps / self.megapixel_steps_per_minute

    @property
    def is_too_large(self) -> bool:
        """Whether a whole minute of the budget does not cover it."""
        return self.pixel_steps > 1_000_000 * self.megapixel_steps_per_minute


def count_pixel_steps(params: JobParams, bundle: Bundle) -> int:
    """The work of a job: the pixels that the network sees in each denoising step, and the final pixels once.

    Counts each sampling pass of the method and of `refine` in image pixels; an `init_image` skips steps. The final
    pixels stand for upscaling, encoding and decoding, so they are all of a plain /upscale.
    """
    work = to_workload(params, bundle)
    final_px = work.width_px * work.height_px
    pixel_steps = final_px
    if isinstance(params, GenerateParams):
        steps = params.steps if params.strength is None else int(params.steps * params.strength)
        pixel_steps += network_pixel_steps(params.method, params.scale, steps, final_px)
    if params.refine is not None:
        pixel_steps += params.refine.steps * _window_px(work, bundle)
    return count_items(params) * pixel_steps


def _window_px(work: Workload, bundle: Bundle) -> int:
    """Pixels of all windows of a refine pass (`giantleap.models.generation.refine`), overlaps counted each time."""
    unit_px, area = bundle.latent_space.multiple_px, 1
    window = max(1, bundle.max_side_px // unit_px)
    for side_px in (work.width_px, work.height_px):
        side = -(-side_px // unit_px)
        area *= len(window_starts(side, window)) * min(side, window)
    return unit_px**2 * area
