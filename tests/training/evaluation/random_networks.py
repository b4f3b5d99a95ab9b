"""Networks of the perceptual metrics with random weights."""

from pathlib import Path

import torch
from torch import Tensor


class RandomFeatures:
    """A fixed random projection of the picture, averaged over 4 x 4 cells."""

    name = "random projection"

    def __init__(self) -> None:
        self.matrix = torch.randn(48, 5, generator=torch.Generator().manual_seed(0))

    def __call__(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8
        cells = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255.0, 4)
        return cells.flatten(1) @ self.matrix


def write_tiny_clip(directory: Path) -> Path:
    """Write a CLIP of random weights with a tokenizer of letters, in the layout of transformers; return its place."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    tokenizer = CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[])
    text = {
        "vocab_size": len(words), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    vision = {
        "image_size": 32, "patch_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    model.save_pretrained(directory)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(directory)
    return directory


def write_random_inception(path: Path) -> Path:
    """Write random weights of torch-fidelity's Inception, which must be installed; return their place."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Unread(FeatureExtractorInceptionV3):  # type: ignore[misc]
        def load_state_dict(self, *arguments: object, **options: object) -> None:
            """Keep the weights that it starts with."""

    torch.save({}, path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Unread("random", ["2048"], str(path))
    torch.save(network.state_dict(), path)
    return path
