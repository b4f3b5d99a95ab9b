"""The pocket autoencoder of stride 4: a stock diffusers AutoencoderDC, started as the exact PCA of 4 x 4 blocks.

AutoencoderDC moves pixels into channels and back (pixel unshuffle and shuffle), so a block transform is one of the
functions that it holds. Here its weights are set to such a transform, with residual branches that add nothing at
first: training starts at the fidelity of the PCA. `training/pocket/autoencoder.py` trains it.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
from torch import Tensor, nn

STRIDE_PX = 4
PIXELS = 3 * STRIDE_PX**2  # values of one block
CHANNELS = 24
SCALING_FACTOR = 0.5  # the brightest channel of rendered scenes has a deviation near one
SIGNALS = 12  # values of a 2 x 2 block of pixels, which the half-size stages carry
ANCHORS = 16  # channels of the decoder's last stage that hold a constant, so that its RMS norm is nearly linear
ANCHOR = 4.0
LIFT = 1.25  # added before the decoder's last ReLU and taken away after it; pictures lie in [-1, 1]


@dataclass(frozen=True)
class BlockPca:
    """Principal components of 4 x 4 color blocks.

    Args:
        axes: orthonormal, by falling variance, [channels, 3, 4, 4].
        mean: of the blocks, [3, 4, 4].
    """

    axes: Tensor
    mean: Tensor

    @classmethod
    def fit(cls, images: Tensor, channels: int) -> "BlockPca":
        """Fits the components in float64.

        Shape:
            images [n, 3, height, width], sides multiples of 4.
        """
        blocks = F.unfold(images, STRIDE_PX, stride=STRIDE_PX).transpose(1, 2).reshape(-1, PIXELS).double()
        mean = blocks.mean(dim=0)
        variances, axes = torch.linalg.eigh(torch.cov((blocks - mean).T))
        order = variances.argsort(descending=True)[:channels]
        shape = (3, STRIDE_PX, STRIDE_PX)
        return cls(axes[:, order].T.reshape(channels, *shape), mean.reshape(shape))

    def encode(self, images: Tensor) -> Tensor:
        """Shape: [n, 3, H, W] to [n, channels, H / 4, W / 4]."""
        axes = self.axes.to(images.dtype)
        bias = -(self.axes.flatten(1) @ self.mean.flatten()).to(images.dtype)
        return F.conv2d(images, axes, bias, stride=STRIDE_PX)

    def decode(self, codes: Tensor) -> Tensor:
        """Shape: [n, channels, h, w] to [n, 3, 4 h, 4 w]."""
        mean = self.mean.to(codes.dtype).tile(1, codes.shape[2], codes.shape[3])
        return F.conv_transpose2d(codes, self.axes.to(codes.dtype), stride=STRIDE_PX) + mean


def make_autoencoder(channels: int = CHANNELS) -> AutoencoderDC:
    """Builds the network with its default random weights, channels last."""
    network: Any = AutoencoderDC(
        latent_channels=channels,
        scaling_factor=SCALING_FACTOR,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(32, 32, 64),
        decoder_block_out_channels=(32, 32, 64),
        encoder_layers_per_block=(0, 1, 1),
        decoder_layers_per_block=(0, 2, 2),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        encoder_out_shortcut=False,
        decoder_in_shortcut=False,
    )
    built: AutoencoderDC = network.to(memory_format=torch.channels_last)
    return built


@torch.no_grad()
def start_at_pca(network: AutoencoderDC, pca: BlockPca) -> None:
    """Sets the weights so that the network encodes and decodes as the PCA does, to about 54 dB of it.

    Random weights stay where they change nothing: in residual branches, whose last norm has weight 0, and in channels
    that nothing reads yet.
    """
    for name, module in network.named_modules():
        if name.endswith(".norm"):
            nn.init.zeros_(module.weight)
    axes = _interleaved(pca.axes)
    _start_encoder(network.encoder, axes, _interleaved(pca.mean[None])[0])
    _start_decoder(network.decoder, axes, _interleaved(pca.mean[None])[0])


def _interleaved(blocks: Tensor) -> Tensor:
    """Orders the 48 values of a block as two pixel unshuffles do: [n, 3, 4, 4] to [n, 48]."""
    return F.pixel_unshuffle(F.pixel_unshuffle(blocks, 2), 2).flatten(1)


def _clear(conv: nn.Conv2d) -> Tensor:
    """Sets a 3 x 3 convolution to zero and returns a view of the matrix of its middle, [out, in]."""
    nn.init.zeros_(conv.weight)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv.weight[:, :, 1, 1]


def _start_encoder(encoder: Any, axes: Tensor, mean: Tensor) -> None:
    first, second, last = encoder.conv_in.conv, encoder.down_blocks[1][-1].conv, encoder.conv_out
    _clear(first)[:3].copy_(torch.eye(3))
    _clear(second)[:SIGNALS, :SIGNALS].copy_(torch.eye(SIGNALS))
    # The shortcut of the second block adds the mean of each two neighboring values to the first 24 of 48.
    shortcut = torch.eye(PIXELS, dtype=torch.double)
    for place in range(PIXELS // 2):
        shortcut[place, 2 * place : 2 * place + 2] += 0.5
    matrix = axes @ torch.linalg.inv(shortcut)
    _clear(last)[:, :PIXELS].copy_(matrix)
    last.bias.copy_(-(axes @ mean))


def _start_decoder(decoder: Any, axes: Tensor, mean: Tensor) -> None:
    first, second, last = decoder.conv_in, decoder.up_blocks[1][0].conv, decoder.conv_out.conv
    channels = len(axes)
    first.weight[:channels].zero_()
    first.weight[:channels, :, 1, 1].copy_(torch.eye(channels))
    first.bias[:channels].zero_()
    middle = _clear(second)
    middle[:PIXELS, :channels].copy_(axes.T)
    second.bias[:PIXELS].copy_(mean)
    places = torch.arange(len(middle))
    middle[places, places // 2] -= 1.0  # the shortcut repeats each channel twice
    second.bias[PIXELS : PIXELS + 4 * ANCHORS].fill_(ANCHOR)
    norm = decoder.norm_out
    norm.weight[:SIGNALS].fill_((ANCHORS / len(norm.weight)) ** 0.5 * ANCHOR)
    norm.bias[:SIGNALS].fill_(LIFT)
    last.weight[:, : SIGNALS + ANCHORS].zero_()
    last.weight[:, :SIGNALS, 1, 1].copy_(torch.eye(SIGNALS))
    last.bias.fill_(-LIFT)
