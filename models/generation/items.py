"""What to generate: one image's request to the pipeline, its seed, and how callers follow the steps."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from giantleap.models.adapters.files import AdapterUse
from giantleap.models.generation.refinement import Refinement

StepCallback = Callable[[int, int], None]
CancelCheck = Callable[[int], bool]

SEED_LIMIT = 2**63


@dataclass(frozen=True, slots=True)
class GenerationItem:
    """One image to generate. The size is that of the base image, before upscaling.

    Args:
        prompt: What to show.
        negative_prompt: What to avoid; empty for none. Only with guidance (`Generator.takes_negative_prompt`).
        seed: Seed of the noise.
        width_px: A multiple of the latent space's `multiple_px`.
        height_px: A multiple of the latent space's `multiple_px`.
        steps: Denoising steps, of which `strength` skips a part.
        guidance_scale: In the pipeline's own scale: 1 is none, for Z-Image 0.
        init_image: Start image in place of noise, [3, height_px, width_px], in [-1, 1].
        strength: How far to depart from `init_image`, above 0 and up to 1.
        mask: [1, height_px, width_px]: 1 where `init_image` is generated again, 0 where it stays; None for all of it.
        references: Images that the prompt talks about, of any size, each [height_px, width_px, 3], uint8, on the CPU.
        refine: How to sample the enlarged latent again (`giantleap.models.generation.refine`); None leaves it out.
        loras: LoRA adapters that act on this image.
        previews: How many previews to make on the way; they change nothing.
    """

    prompt: str
    negative_prompt: str
    seed: int
    width_px: int
    height_px: int
    steps: int
    guidance_scale: float
    init_image: Tensor | None = None
    strength: float = 1.0
    mask: Tensor | None = None
    references: tuple[Tensor, ...] = ()
    refine: Refinement | None = None
    loras: tuple[AdapterUse, ...] = ()
    previews: int = 0

    @property
    def shared(self) -> tuple[object, ...]:
        """The values that must be equal for all items of a batch."""
        strength = None if self.init_image is None else self.strength
        images = (strength, self.mask is None, len(self.references))
        return self.width_px, self.height_px, self.steps, self.guidance_scale, *images, self.loras


def image_seed(seed: int, index: int) -> int:
    """The seed of image `index` of a job: seed + index, modulo `SEED_LIMIT`."""
    return (seed + index) % SEED_LIMIT
