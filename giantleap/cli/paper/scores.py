"""The quality of a cell's images: FID, KID and CLIP as in the paper, and how much of the base image they keep.

The paper compares with the photographs whose captions are the prompts; it has no measure by pixels. Those here compare
with the base image of the same prompt and seed, to which the large image is reduced first.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from giantleap.training.evaluation.cases import list_pictures, read_picture
from giantleap.training.evaluation.feature_extractors import open_networks
from giantleap.training.evaluation.metrics import Networks, NotAvailableError, psnr_db, to_levels
from giantleap.training.evaluation.perceptual import Jod, flip, ms_ssim
from giantleap.training.evaluation.picture_sets import PictureSet, SetSettings, Value, not_available

TO_BASE = ("base_psnr_db", "base_ms_ssim", "base_flip", "base_jod")
_NO_REFERENCE = "no pictures to compare with were given (--reference)"
NO_BASE = "base images are those of `direct` at scale 1, which is not in the table (--scale 1)"
_BASE_FACTOR = 2  # the comparison is at twice the base size, where also small bases have an MS-SSIM


@dataclass(frozen=True, slots=True)
class ScorePlan:
    """What images are scored against.

    Args:
        images: How many images of a cell are compared, at least those of its runs.
        reference: Folder of true pictures, for FID and KID.
        patch_px: Side of the random crops of patch FID and KID.
        kid_subset_size: Samples per subset of KID.
        inception: Name of the weights.
        clip: Likewise.
    """

    images: int = 0
    reference: Path | None = None
    patch_px: int = 1024
    kid_subset_size: int = 1000
    inception: Path | None = None
    clip: Path | None = None

    def open_networks(self) -> Networks:
        """Open the networks, on the CPU, where they take no memory of the device that is measured."""
        return open_networks(self.inception, None, None if self.clip is None else str(self.clip), torch.device("cpu"))

    def summary(self) -> dict[str, int | str | None]:
        """The values, of paths the names only."""
        return {name: value.name if isinstance(value, Path) else value for name, value in asdict(self).items()}


class Scorer:
    """Compares the images of all cells.

    Args:
        plan: What with.
        networks: From `open_networks`.
        seed: Of crops and subsets.

    Raises:
        EvaluationError: There is no picture in the reference folder, or one cannot be read.
    """

    def __init__(self, plan: ScorePlan, networks: Networks, seed: int) -> None:
        self._networks = networks
        self._settings = SetSettings(plan.patch_px, kid_subset_size=plan.kid_subset_size, seed=seed)
        self._jod: Jod | str
        try:
            self._jod = Jod()
        except NotAvailableError as error:
            self._jod = str(error)
        self.targets = self.open_set()
        if plan.reference is None:
            self.targets.network = _NO_REFERENCE
        elif not isinstance(networks.features, str):
            for index, path in enumerate(list_pictures(plan.reference)):
                self.targets.add(index, to_levels(read_picture(path, None, 1)))

    def open_set(self) -> PictureSet:
        """An empty set of pictures."""
        return PictureSet(self._networks.features, self._settings)

    def text_score(self, picture: Tensor, caption: str) -> float:
        """The CLIP score of a picture [1, 3, height_px, width_px].

        Raises:
            NotAvailableError: There are no weights.
        """
        if isinstance(self._networks.text, str):
            raise NotAvailableError(self._networks.text)
        return float(self._networks.text(picture, [caption])[0])

    def jod(self, picture: Tensor, target: Tensor) -> float:
        """The JOD of a picture.

        Raises:
            NotAvailableError: cvvdp cannot be used.
        """
        if isinstance(self._jod, str):
            raise NotAvailableError(self._jod)
        return self._jod(picture, target)


class CellScores:
    """Those of one cell.

    Args:
        scorer: Compares.
        no_base: Why images are not compared with a base image, where `add` gets none.
    """

    def __init__(self, scorer: Scorer, no_base: str = NO_BASE) -> None:
        self._scorer = scorer
        self._pictures = scorer.open_set()
        self._values: dict[str, list[float]] = {}
        self._missing = dict.fromkeys(TO_BASE, no_base)

    def add(self, index: int, image: Tensor, caption: str, base: Tensor | None) -> None:
        """Add image `index`; image and base image are uint8, [height_px, width_px, 3]."""
        scorer, picture = self._scorer, _to_picture(image)
        if not isinstance(scorer.targets.network, str):
            self._pictures.add(index, picture)
        self._take("clip_score", lambda: scorer.text_score(picture, caption))
        if base is not None:
            seen, expected = at_base(picture, _to_picture(base))
            self._take("base_psnr_db", lambda: min(psnr_db(seen, expected, 0), 100.0))  # keeps the mean finite
            self._take("base_ms_ssim", lambda: ms_ssim(seen, expected))
            self._take("base_flip", lambda: flip(seen, expected))
            self._take("base_jod", lambda: scorer.jod(seen, expected))

    def result(self) -> dict[str, Value]:
        """Every score: of sets, or the mean over images."""
        row = self._pictures.compare(self._scorer.targets)
        for name in ("clip_score", *TO_BASE):
            values = self._values.get(name)
            row[name] = sum(values) / len(values) if values else not_available(self._missing[name])
        return row

    def _take(self, name: str, measure: Callable[[], float]) -> None:
        try:
            value = measure()
        except NotAvailableError as error:
            self._missing[name] = str(error)
        else:
            self._values.setdefault(name, []).append(value)


def at_base(image: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """Reduce an image to the base size, and enlarge it and the base image for the comparison; [1, 3, h, w], uint8."""
    size = (base.shape[-2], base.shape[-1])
    small = _resize(image, size)
    large = (_BASE_FACTOR * size[0], _BASE_FACTOR * size[1])
    return _resize(small, large), _resize(base, large)


def _resize(picture: Tensor, size: tuple[int, int]) -> Tensor:
    resized = F.interpolate(picture.float(), size=size, mode="bicubic", antialias=True)
    return resized.clamp(0, 255).round().to(torch.uint8)


def _to_picture(image: Tensor) -> Tensor:
    return image.permute(2, 0, 1)[None].cpu()
