"""The images of a /generate job as one input blob: from base64 in the API, back to pixels in the worker.

Works on bytes and numpy only, so that the API process needs no torch. Whatever the client's files hold besides pixels
is left behind: the blob has PNG files of the size that the pipeline takes.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import safetensors.numpy
from PIL import Image

from giantleap.service.errors import GiantleapError, InvalidFields, InvalidRequest
from giantleap.service.jobs.images import Pixels, decoded_image, open_alpha, read_base64, read_image
from giantleap.service.jobs.job import GenerateParams
from giantleap.service.jobs.requests import GenerateRequest

MAX_REFERENCE_PX = 1024 * 1024
"""Maximum pixels of a reference image, which is scaled down to it; above, the pipelines would do so themselves."""
_MIN_REFERENCE_SIDE_PX, _MAX_REFERENCE_ASPECT = 64, 8
_INIT_IMAGE, _MASK, _REFERENCE = "init_image", "mask", "image_{}"
_MIDDLE = 128


@dataclass(frozen=True, slots=True)
class InputImages:
    """The images of a job. The mask is [height_px, width_px] and true where the image is generated again."""

    init_image: Pixels | None = None
    mask: np.typing.NDArray[np.bool_] | None = None
    references: tuple[Pixels, ...] = ()


def to_input(request: GenerateRequest, params: GenerateParams, max_px: int) -> bytes | None:
    """The input blob of a job; None without images.

    Args:
        request: Of the client.
        params: What was planned for it.
        max_px: Most pixels of each image.

    Raises:
        InvalidFields: An image cannot be read or is too large, or the mask does not fit its image.
    """
    if request.images:
        files = {_REFERENCE.format(i): _to_reference(i, text, max_px) for i, text in enumerate(request.images)}
        return _pack(files)
    if request.init_image is None:
        return None
    with _field_errors(_INIT_IMAGE), decoded_image(read_base64(request.init_image), max_px) as start:
        size, fitted = start.size, _to_png(start.resize(params.base_size_px, Image.Resampling.LANCZOS))
    if request.mask is None:
        return fitted
    with _field_errors(_MASK), decoded_image(read_base64(request.mask), max_px) as image:
        if image.size != size:
            raise InvalidRequest(f"is of {_px(image.size)}, the init_image of {_px(size)}; send both of one size")
        mask = image.convert("L").point(lambda level: 255 * (level >= _MIDDLE))
        if mask.getextrema() == (0, 0):
            raise InvalidRequest("is black everywhere; paint the area to generate again white")
        # A line must not disappear: what is marked a little is marked.
        marked = mask.resize(params.base_size_px, Image.Resampling.BOX).point(lambda level: 255 * (level > 0))
    return _pack({_INIT_IMAGE: fitted, _MASK: _to_png(marked)})


def read_input(blob: bytes, params: GenerateParams) -> InputImages:
    """The images of a job from its input blob."""
    base_px = params.base_size_px[0] * params.base_size_px[1]
    if params.strength is not None and not params.mask:
        return InputImages(read_image(blob, base_px))
    if not params.mask and not params.images:
        return InputImages()
    files = {name: array.tobytes() for name, array in safetensors.numpy.load(blob).items()}
    if params.mask:
        mask = read_image(files[_MASK], base_px)[..., 0] >= _MIDDLE
        return InputImages(read_image(files[_INIT_IMAGE], base_px), mask)
    names = (_REFERENCE.format(index) for index in range(params.images))
    return InputImages(references=tuple(read_image(files[name], MAX_REFERENCE_PX) for name in names))


def to_mask(body: bytes, max_px: int) -> bytes:
    """A mask in OpenAI's convention, whose transparent area is generated again, in ours: white there, black elsewhere.

    Raises:
        GiantleapError: As `open_alpha`, or nothing in it is transparent.
    """
    alpha = open_alpha(body, max_px)
    if alpha is None or not (np.asarray(alpha) < _MIDDLE).any():
        raise InvalidRequest("has no transparent area; make the area to generate again transparent")
    return _to_png(alpha.point(lambda level: 255 * (level < _MIDDLE)))


def _to_reference(index: int, text: str, max_px: int) -> bytes:
    with _field_errors(f"images.{index}"), decoded_image(read_base64(text), max_px) as image:
        short, long = sorted(image.size)
        if short < _MIN_REFERENCE_SIDE_PX or long > _MAX_REFERENCE_ASPECT * short:
            raise InvalidRequest(
                f"is of {_px(image.size)}; send sides of at least {_MIN_REFERENCE_SIDE_PX} px, the longer one at most "
                f"{_MAX_REFERENCE_ASPECT} times the other"
            )
        factor = (MAX_REFERENCE_PX / (image.width * image.height)) ** 0.5
        if factor >= 1:
            return _to_png(image)
        return _to_png(image.resize((int(image.width * factor), int(image.height * factor)), Image.Resampling.LANCZOS))


@contextmanager
def _field_errors(field: str) -> Iterator[None]:
    """Turn the error of an image into that of the field that it came in."""
    try:
        yield
    except GiantleapError as error:
        raise InvalidFields((field, error.detail)) from error


def _px(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]} px"


def _to_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _pack(files: dict[str, bytes]) -> bytes:
    return safetensors.numpy.save({name: np.frombuffer(content, np.uint8) for name, content in files.items()})
