"""Networks of the perceptual metrics: Inception for FID and KID, AlexNet for LPIPS, CLIP.

Their weights are not part of this package. Each opener takes a file, a directory or a hub id and raises
`NotAvailableError` with the reason if it cannot use it. Nothing else is downloaded.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from giantleap.training.evaluation.metrics import Networks, NotAvailableError

_DAMAGE = (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError)


def open_networks(inception: Path | None, lpips: Path | None, clip: str | None, device: torch.device) -> Networks:
    """Open the named networks; an unusable one is replaced by the reason, for the report."""
    opened: dict[str, Any] = {}
    openers: dict[str, Callable[[], Any]] = {}
    if inception is not None:
        openers["features"] = lambda: Inception(inception, device)
    if lpips is not None:
        openers["distance"] = lambda: Lpips(lpips, device)
    if clip is not None:
        openers["text"] = lambda: ClipScore(clip, device)
    for name, opener in openers.items():
        try:
            opened[name] = opener()
        except NotAvailableError as error:
            opened[name] = str(error)
    return Networks(**opened)


def _read_state(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a `.pth` or `.safetensors` file, unpickling nothing else."""
    import pickle

    from safetensors.torch import load_file

    if not path.is_file():
        raise NotAvailableError(f"no weights at {path}")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (*_DAMAGE, pickle.UnpicklingError) as error:
        raise NotAvailableError(f"{path}: damaged, or holds more than tensors") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise NotAvailableError(f"{path}: expected a dict of tensors")
    return state


class Inception:
    """The 2048 features of Inception v3's last pooling, which define FID (Heusel et al. 2017).

    Args:
        path: The weights that torch-fidelity publishes (`weights-inception-2015-12-05-6726825d.pth`).
        device: Where it runs.

    Raises:
        NotAvailableError: torch-fidelity is not installed, or the weights cannot be read.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        state = _read_state(path)
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise NotAvailableError("Inception needs `pip install torch-fidelity`, with its torchvision") from error
        # torch-fidelity unpickles its file, so it gets a file of these tensors only.
        with tempfile.TemporaryDirectory() as folder:
            torch.save(state, Path(folder) / "tensors.pth")
            try:
                self._net: Any = FeatureExtractorInceptionV3("fid", ["2048"], str(Path(folder) / "tensors.pth"))
            except _DAMAGE as error:
                raise NotAvailableError(f"{path}: not the weights of torch-fidelity's Inception") from error
        self._net.to(device).eval()
        self._device = device
        self.name = f"inception-v3 ({path.name})"

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """See `giantleap.training.evaluation.metrics.Features`."""
        features: Tensor = self._net(images.to(self._device))[0].float().cpu()
        return features


class Lpips:
    """LPIPS with AlexNet (Zhang et al. 2018, version 0.1): weighted distance of unit features after five ReLUs.

    The distance weights come with torchmetrics, AlexNet's from torchvision (`alexnet-owt-7be5be79.pth`).

    Args:
        path: The weights of AlexNet.
        device: Where it runs.
        linear: Distance weights, if not torchmetrics'.

    Raises:
        NotAvailableError: Weights cannot be read or belong to another network.
    """

    _SHIFT = (-0.030, -0.088, -0.188)
    _SCALE = (0.458, 0.448, 0.450)
    _TAPS = (1, 4, 7, 9, 11)  # indices of the ReLUs in `features`

    def __init__(self, path: Path, device: torch.device, linear: Path | None = None) -> None:
        if linear is None:
            import torchmetrics

            linear = Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models" / "alex.pth"
        features = nn.Sequential(
            nn.Conv2d(3, 64, 11, stride=4, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 192, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(192, 384, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1),
            nn.ReLU(),
        )
        state, weights = _read_state(path), _read_state(linear)
        own = {key.removeprefix("features."): value for key, value in state.items() if key.startswith("features.")}
        try:
            features.load_state_dict(own)
            self._linear = [weights[f"lin{tap}.model.1.weight"].to(device) for tap in range(len(self._TAPS))]
        except _DAMAGE as error:
            raise NotAvailableError(f"{path}: not the weights of torchvision's AlexNet") from error
        self._features = features.to(device).eval().requires_grad_(False)
        self._device = device
        self.name = f"lpips alex 0.1 ({path.name})"

    @torch.inference_mode()
    def __call__(self, images: Tensor, targets: Tensor) -> Tensor:
        """See `giantleap.training.evaluation.metrics.PairDistance`."""
        total = torch.zeros(len(images), device=self._device)
        for weight, one, two in zip(self._linear, self._look(images), self._look(targets), strict=True):
            total += F.conv2d((one - two).square(), weight).mean(dim=(1, 2, 3))
        return total.cpu()

    def _look(self, images: Tensor) -> list[Tensor]:
        shift, scale = (torch.tensor(v, device=self._device).view(1, 3, 1, 1) for v in (self._SHIFT, self._SCALE))
        x = (images.to(self._device).float() / 127.5 - 1.0 - shift) / scale
        seen: list[Tensor] = []
        for index, layer in enumerate(self._features):
            x = layer(x)
            if index in self._TAPS:
                seen.append(x / (x.square().sum(dim=1, keepdim=True) + 1e-10).sqrt())
        return seen


class ClipScore:
    """100 times the cosine of the CLIP embeddings of picture and caption, at least 0 (Hessel et al. 2021, without 2.5).

    torchmetrics' version expects the outputs of an older transformers; the arithmetic is the same.

    Args:
        name: A directory with a transformers CLIP, or a hub id.
        device: Where it runs.

    Raises:
        NotAvailableError: It cannot be read.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        from transformers import CLIPModel, CLIPProcessor

        try:
            self._model: Any = cast(Any, CLIPModel).from_pretrained(name, use_safetensors=True)
            self._processor: Any = CLIPProcessor.from_pretrained(name)
        except _DAMAGE as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise NotAvailableError(f"CLIP {name}: {reason}") from error
        self._model.to(device).eval()
        self._device = device
        self.name = f"clip ({name})"

    @torch.inference_mode()
    def __call__(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """See `giantleap.training.evaluation.metrics.TextScore`."""
        inputs = self._processor(
            text=list(texts), images=list(images), return_tensors="pt", padding=True, truncation=True
        ).to(self._device)
        output = self._model(**inputs)
        score: Tensor = 100.0 * F.cosine_similarity(output.image_embeds, output.text_embeds)
        return score.clamp(min=0.0).cpu()
