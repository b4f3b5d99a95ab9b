"""FID and KID of whole pictures and of random crops, with the reason where a figure is not available."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from giantleap.training.evaluation.metrics import (
    KID_SUBSET_SIZE,
    KID_SUBSETS,
    Features,
    NotAvailableError,
    crop,
    crop_places,
    fid,
    kid,
)

Value = float | str
"""A figure, or "not available: ..." with the reason."""


@dataclass(frozen=True)
class SetSettings:
    """How sets are compared; crops are at the same places for every method.

    Attributes:
        patch_px: Side of the random crops of patch FID and KID.
        patches: Crops per picture.
        kid_subsets: Number of KID subsets.
        kid_subset_size: Samples per subset.
        seed: Seed of crops and subsets.
    """

    patch_px: int = 1024
    patches: int = 1
    kid_subsets: int = KID_SUBSETS
    kid_subset_size: int = KID_SUBSET_SIZE
    seed: int = 0


@dataclass
class PictureSet:
    """Features of pictures and of their crops.

    Attributes:
        network: Extracts the features, or the reason why there is none.
        settings: Of the crops and subsets.
    """

    network: Features | str
    settings: SetSettings
    _whole: list[Tensor] = field(default_factory=list)
    _patches: list[Tensor] = field(default_factory=list)
    _patch_fault: str = ""

    def add(self, index: int, picture: Tensor) -> None:
        """Add uint8 picture `index` [1, 3, height_px, width_px]."""
        if isinstance(self.network, str):
            return
        picture, settings = picture.cpu(), self.settings
        self._whole.append(self.network(picture).cpu())
        try:
            height_px, width_px = picture.shape[-2:]
            places = crop_places(height_px, width_px, settings.patch_px, settings.patches, settings.seed, index)
        except NotAvailableError as error:
            self._patch_fault = str(error)
            return
        self._patches.append(self.network(crop(picture, places, settings.patch_px)).cpu())

    def compare(self, targets: "PictureSet") -> dict[str, Value]:
        """Return FID and KID against the true pictures, of both whole pictures and crops."""
        reason = next((each for each in (self.network, targets.network) if isinstance(each, str)), "")
        whole = self._compare(self._whole, targets._whole, reason)
        patches = self._compare(self._patches, targets._patches, reason or self._patch_fault or targets._patch_fault)
        return whole | {f"patch_{name}": value for name, value in patches.items()}

    def _compare(self, actual: list[Tensor], expected: list[Tensor], reason: str) -> dict[str, Value]:
        if reason:
            return dict.fromkeys(("fid", "kid", "kid_std"), not_available(reason))
        features, targets, settings = torch.cat(actual), torch.cat(expected), self.settings
        row: dict[str, Value] = {}
        try:
            row["fid"] = fid(features, targets)
        except NotAvailableError as error:
            row["fid"] = not_available(str(error))
        try:
            value = kid(features, targets, settings.kid_subsets, settings.kid_subset_size, settings.seed)
            row |= {"kid": value.mean, "kid_std": value.std}
        except NotAvailableError as error:
            row |= dict.fromkeys(("kid", "kid_std"), not_available(str(error)))
        return row


def not_available(reason: str) -> str:
    """Return the text that replaces an unavailable figure."""
    return f"not available: {reason}"
