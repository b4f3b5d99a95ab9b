"""Perceptual measures of a picture against its reference that need no weights: MS-SSIM, FLIP, ColorVideoVDP.

All take 8-bit RGB pictures [1, 3, height_px, width_px]. FLIP and ColorVideoVDP are packages that may be missing.
"""

from typing import Any

import torch
from torch import Tensor

from giantleap.training.evaluation.metrics import NotAvailableError

MS_SSIM_MIN_PX = 176  # of torchmetrics, for its five scales
DISPLAY = "standard_4k"  # 75 px per degree; FLIP assumes 67


def ms_ssim(image: Tensor, target: Tensor) -> float:
    """Multi-scale structural similarity (Wang et al. 2003): 1 for equal pictures.

    Raises:
        NotAvailableError: A side is too small.
    """
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    if min(image.shape[-2:]) < MS_SSIM_MIN_PX:
        raise NotAvailableError(f"MS-SSIM needs sides of {MS_SSIM_MIN_PX} px; found {list(image.shape[-2:])}")
    seen, expected = (each.float() / 255.0 for each in (image, target))
    return float(multiscale_structural_similarity_index_measure(seen, expected, data_range=1.0))


def flip(image: Tensor, target: Tensor) -> float:
    """Mean perceived difference while flipping between pictures (Andersson et al. 2020), at 67 px per degree: 0 to 1.

    Raises:
        NotAvailableError: flip-evaluator is not installed.
    """
    try:
        import flip_evaluator
    except ImportError as error:
        raise NotAvailableError("FLIP needs `pip install flip-evaluator`") from error
    reference, test = ((each[0].permute(1, 2, 0).float() / 255.0).contiguous().numpy() for each in (target, image))
    return float(flip_evaluator.evaluate(reference, test, "LDR", applyMagma=False)[1])


class Jod:
    """ColorVideoVDP (Mantiuk et al. 2024) on a 4K monitor of 30 inches: quality in JOD, 10 for no visible difference.

    Raises:
        NotAvailableError: cvvdp cannot be imported, or its torchvision does not fit the installed torch.
    """

    def __init__(self) -> None:
        try:
            import pycvvdp
        except (ImportError, RuntimeError) as error:  # torchvision beside a torch of another build: RuntimeError
            raise NotAvailableError(f"JOD needs `pip install cvvdp`: {error}") from error
        self._metric: Any = pycvvdp.cvvdp(display_name=DISPLAY, heatmap="none", device=torch.device("cpu"))

    @torch.inference_mode()
    def __call__(self, image: Tensor, target: Tensor) -> float:
        """Compare a picture with its reference."""
        test, reference = (each[0].permute(1, 2, 0).contiguous().numpy() for each in (image, target))
        return float(self._metric.predict(test, reference, dim_order="HWC")[0])
