"""The unmodified client of OpenAI: an image, the same one with partial images on the way, and an edit of it.

make serve                                        # in another terminal
python examples/openai_client.py out              # writes out/image.png, out/partial_0.jpg, ..., out/streamed.png
python examples/openai_client.py out sdxl         # and out/edited.png, by a bundle that edits (docs/api.md)
"""

import base64
import sys
from pathlib import Path

import openai

PROMPT = "a large red sphere on a green floor under a blue sky, on the left"


def main(out: str, editor: str | None = None, url: str = "http://127.0.0.1:8000") -> None:
    """Draw, stream and edit. The fields of OpenAI's API are its own; those of the service go into `extra_body`."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused") as client:
        image = client.images.generate(prompt=PROMPT, size="256x256", extra_body={"seed": 7, "scale": 2})
        assert image.data is not None
        write(out, "image.png", image.data[0].b64_json)

        stream = client.images.generate(
            prompt=PROMPT, size="256x256", extra_body={"seed": 7, "scale": 2}, stream=True, partial_images=2
        )
        for event in stream:
            if event.type == "image_generation.partial_image":
                write(out, f"partial_{event.partial_image_index}.jpg", event.b64_json)
            else:
                write(out, "streamed.png", event.b64_json)

        if editor is not None:
            edited = client.images.edit(
                image=Path(out, "image.png"),
                prompt="a blue cube on a green floor",
                model=editor,
                extra_body={"strength": 0.6, "seed": 7, "scale": 1},
            )
            assert edited.data is not None
            write(out, "edited.png", edited.data[0].b64_json)


def write(out: str, name: str, image: str | None) -> None:
    """Write one image of a response."""
    assert image is not None
    Path(out, name).write_bytes(base64.b64decode(image))


if __name__ == "__main__":
    main(*sys.argv[1:])
