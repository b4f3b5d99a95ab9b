"""Latents and images as request bodies, and files as what a caller works with.

numpy, torch, Pillow and safetensors are imported where a value needs them.
"""

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image

Source: TypeAlias = "str | os.PathLike[str] | bytes | np.ndarray[Any, Any] | torch.Tensor | Image.Image"

SAFETENSORS_TYPE = "application/x-safetensors"
_NPY_TYPE = "application/x-npy"
_PNG_TYPE = "image/png"
_PNG_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "I;16"})


def to_body(source: Source) -> tuple[bytes, str]:
    """A latent or an image as a file, and its media type.

    Floating-point arrays and tensors are latents ([C, h, w] or [B, C, h, w]); of uint8 they are images, an array
    [H, W, 3], a tensor [3, H, W].

    Raises:
        TypeError: The source is of another kind, dtype or mode.
        OSError: The file cannot be read.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source), sniff_type(bytes(source[:16]))
    if isinstance(source, str | os.PathLike):
        return to_body(Path(source).read_bytes())
    # By the name of their module: a value of a library exists only where the library is installed and imported.
    library = type(source).__module__.partition(".")[0]
    kinds = {kind.__module__.partition(".")[0] for kind in type(source).__mro__}
    if "PIL" in kinds:
        return _from_image(source), _PNG_TYPE
    if "torch" in kinds:
        return _from_tensor(source)
    if "numpy" in kinds:
        return _from_array(source)
    raise TypeError(
        f"the source is a {library}.{type(source).__name__}; give a path, bytes, a numpy array, a torch tensor or a "
        "PIL image"
    )


def sniff_type(head: bytes) -> str:
    """The media type of a file by its first bytes; neither an image nor .npy: safetensors."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return _PNG_TYPE
    if head.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "image/webp"
    return _NPY_TYPE if head.startswith(b"\x93NUMPY") else SAFETENSORS_TYPE


def _from_image(image: Any) -> bytes:
    from PIL import ImageOps

    if image.mode not in _PNG_MODES:
        raise TypeError(f'the image has mode {image.mode}; give it as image.convert("RGB")')
    buffer = io.BytesIO()
    ImageOps.exif_transpose(image).save(buffer, "PNG", compress_level=1)  # as the service reads the image's own file
    return buffer.getvalue()


def _from_array(array: Any) -> tuple[bytes, str]:
    import numpy as np

    if array.dtype == np.uint8:
        from PIL import Image

        return _from_image(Image.fromarray(array)), _PNG_TYPE
    if array.dtype.kind != "f":
        raise TypeError(f"the array has dtype {array.dtype}; a latent is float16 or float32, an image uint8")
    buffer = io.BytesIO()
    np.save(buffer, array.astype(np.float32) if array.dtype.itemsize > 4 else array, allow_pickle=False)
    return buffer.getvalue(), _NPY_TYPE


def _from_tensor(tensor: Any) -> tuple[bytes, str]:
    import torch

    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.uint8:
        return _from_array(tensor.permute(1, 2, 0).numpy())
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"the tensor has dtype {tensor.dtype}; a latent is floating-point, an image uint8")
    from safetensors.torch import save

    tensor = tensor.float() if tensor.dtype == torch.float64 else tensor
    return save({"latent": tensor.contiguous()}), SAFETENSORS_TYPE


@dataclass(frozen=True, slots=True)
class Result:
    """The files of a job that has succeeded: images, or latents. Each method takes the index of a file.

    Attributes:
        files: The files as the service made them.
        job: The job as `GET /jobs/{id}` describes it: seeds, sizes, stage times, warnings.
    """

    files: tuple[bytes, ...] = field(repr=False)
    job: Mapping[str, Any] = field(repr=False)

    def __len__(self) -> int:
        return len(self.files)

    def seed(self, index: int = 0) -> int | None:
        """The seed that gives the image again."""
        seed: int | None = self.job["results"][index]["seed"]
        return seed

    def save(self, path: str | os.PathLike[str], index: int = 0) -> Path:
        """Write a file as it is, and return its path."""
        target = Path(path)
        target.write_bytes(self.files[index])
        return target

    def image(self, index: int = 0) -> "Image.Image":
        """An image as PIL image.

        Raises:
            TypeError: The file is a latent.
        """
        from PIL import Image

        if self._is_latent(index):
            raise TypeError("the result is a latent; use array or tensor, or upscale without output=latent")
        image = Image.open(io.BytesIO(self.files[index]))
        image.load()
        return image

    def array(self, index: int = 0) -> "np.ndarray[Any, Any]":
        """A latent [C, h, w] as it is stored, or an image as uint8 [H, W, 3]."""
        import numpy as np

        if not self._is_latent(index):
            return np.asarray(self.image(index).convert("RGB"))
        from safetensors.numpy import load

        (latent,) = load(self.files[index]).values()
        return latent

    def tensor(self, index: int = 0) -> "torch.Tensor":
        """A latent [C, h, w] as it is stored, or an image as float32 [3, H, W] from 0 to 1."""
        import torch

        if not self._is_latent(index):
            return torch.from_numpy(self.array(index).copy()).permute(2, 0, 1).float() / 255
        from safetensors.torch import load

        (latent,) = load(self.files[index]).values()
        return latent

    def _is_latent(self, index: int) -> bool:
        return bool(self.job["results"][index]["content_type"] == SAFETENSORS_TYPE)
