"""Starts an AutoencoderKL at the principal components of its images instead of at random.

Residual branches start at zero, so that blocks pass their input on. The strided convolutions become the
principal components of 2 x 2 patches of the level before, the convolutions after each upsampling the
least-squares prediction of the next level. Normalisation and SiLU would bend this linear path, so a signal
x meets them as four channels x + c, -x - c, x - c, c - x: with a large c their variance hardly depends on
x, and silu(y) - silu(-y) = y brings x back.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

SIGNS = (1.0, -1.0, 1.0, -1.0)
SHIFTS = (1.0, -1.0, -1.0, 1.0)
NEIGHBOURS = ((1, 1), (0, 1), (1, 0), (1, 2), (2, 1))


@torch.no_grad()
def start_at_principal_components(vae: AutoencoderKL, images: Tensor) -> None:
    """Sets the weights of `vae` from images [n, 3, H, W] in [-1, 1], to a linear code with room to learn.

    All levels need at least 12 channels, the last two 4 per latent channel, and each normalisation group a
    multiple of 4.
    """
    for block in vae.modules():
        if isinstance(block, nn.Conv2d) and block.kernel_size == (1, 1) and block.bias is not None:
            nn.init.dirac_(block.weight)
            nn.init.zeros_(block.bias)
        if isinstance(block, ResnetBlock2D):
            nn.init.zeros_(block.conv2.weight)
            nn.init.zeros_(block.conv2.bias)
    levels, shift = _start_encoder(vae.encoder, images, vae.config.latent_channels)
    _calibrate(vae.encoder, shift, lambda: vae.encoder(images))
    _start_decoder(vae.decoder, levels)
    _calibrate(vae.decoder, 6.0, lambda: vae.decode(levels[-1]))


def _start_encoder(encoder: Any, images: Tensor, channels: int) -> tuple[list[Tensor], float]:
    _pass(encoder.conv_in, 3, 3)
    levels = [images]
    strided = [block.downsamplers[0].conv for block in encoder.down_blocks if block.downsamplers]
    for conv in strided[:-1]:
        basis, mean = _principal(levels[-1], conv.out_channels)
        _set(conv, basis, -basis.flatten(1) @ mean)
        levels.append(F.conv2d(levels[-1], basis, -basis.flatten(1) @ mean, stride=2))
    basis, mean = _principal(levels[-1], channels)
    basis = basis / F.conv2d(levels[-1], basis, stride=2).std((0, 2, 3)).sqrt()[:, None, None, None]
    levels.append(F.conv2d(levels[-1], basis, -basis.flatten(1) @ mean, stride=2))
    shift = 8 * levels[-1].std().item()
    _set(strided[-1], *_four(basis, -basis.flatten(1) @ mean, shift))
    _join(encoder.conv_out, channels)
    nn.init.constant_(encoder.conv_out.bias[channels:], -8.0)
    return levels, shift


def _start_decoder(decoder: Any, levels: list[Tensor]) -> None:
    channels, width = levels[-1].shape[1], decoder.conv_in.out_channels
    nn.init.zeros_(decoder.conv_in.weight)
    nn.init.zeros_(decoder.conv_in.bias)
    for number, (y, x) in enumerate(NEIGHBOURS[: width // channels]):
        for channel in range(channels):
            decoder.conv_in.weight[number * channels + channel, channel, y, x] = 1
    signal = decoder.conv_in(levels[-1])[:, : channels * len(NEIGHBOURS)]
    convs = [block.upsamplers[0].conv for block in decoder.up_blocks if block.upsamplers]
    for conv, wanted in zip(convs, reversed(levels[:-1]), strict=True):
        signal = F.interpolate(signal[:, : conv.in_channels], scale_factor=2.0)
        weight, bias = _least_squares(signal, wanted)
        last = wanted is levels[0]
        _set(conv, *(_four(weight, bias, 6.0) if last else (weight, bias)))
        signal = F.conv2d(signal, weight, bias, padding=1)
    _join(decoder.conv_out, 3)


def _principal(signal: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` principal components [count, c, 2, 2] of 2 x 2 patches, and the mean patch [4 c]."""
    patches = F.unfold(signal, 2, stride=2).transpose(1, 2).flatten(0, 1).double()
    mean = patches.mean(0)
    vectors = torch.linalg.eigh((patches - mean).T @ (patches - mean)).eigenvectors
    basis = vectors.flip(1)[:, :count].T
    return basis.unflatten(1, (-1, 2, 2)).to(signal), mean.to(signal)


def _least_squares(signal: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The 3 x 3 convolution of `signal` that comes nearest to `wanted`."""
    size = signal.shape[1] * 9 + 1
    gram, moment = torch.zeros(size, size).double(), torch.zeros(size, wanted.shape[1]).double()
    for one, other in zip(signal, wanted, strict=True):
        rows = F.pad(F.unfold(one[None], 3, padding=1)[0].T, (0, 1), value=1.0)
        gram += (rows.T @ rows).double()
        moment += (rows.T @ other.flatten(1).T).double()
    gram += 1e-4 * gram.diagonal().mean() * torch.eye(size)
    solution = torch.linalg.solve(gram, moment).T.to(signal)
    return solution[:, :-1].unflatten(1, (-1, 3, 3)), solution[:, -1]


def _set(conv: Any, weight: Tensor, bias: Tensor) -> None:
    count, channels, height, width = weight.shape
    nn.init.zeros_(conv.weight[:count])
    conv.weight[:count, :channels, :height, :width] = weight
    conv.bias[:count] = bias


def _four(weight: Tensor, bias: Tensor, shift: float) -> tuple[Tensor, Tensor]:
    signs, shifts = bias.new_tensor(SIGNS), bias.new_tensor(SHIFTS) * shift
    four = weight[:, None] * signs[:, None, None, None]
    return four.flatten(0, 1), (bias[:, None] * signs + shifts).flatten()


def _pass(conv: Any, count: int, inputs: int) -> None:
    nn.init.zeros_(conv.weight[:count])
    nn.init.zeros_(conv.bias[:count])
    conv.weight[:count, :inputs, 1, 1] = torch.eye(count, inputs)


def _join(conv: Any, count: int) -> None:
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    for channel in range(count):
        conv.weight[channel, 4 * channel : 4 * channel + 4, 1, 1] = torch.tensor(SIGNS) / 2


def _calibrate(part: nn.Module, shift: float, forward: Callable[[], object]) -> None:
    """Lets every normalisation that meets shifted channels give back what it took away."""

    def undo(norm: nn.GroupNorm, inputs: tuple[Tensor]) -> None:
        offsets = inputs[0].mean((0, 2, 3))
        grouped = inputs[0].unflatten(1, (norm.num_groups, -1))
        scale = grouped.var((2, 3, 4), unbiased=False).sqrt().mean(0)
        scale = scale.repeat_interleave(norm.num_channels // norm.num_groups)
        shifted = offsets.abs() > shift / 2
        norm.weight[shifted] = scale[shifted]
        pattern = offsets.new_tensor(SHIFTS).repeat(norm.num_channels // 4) * shift
        norm.bias[shifted] = -pattern[shifted]

    norms = [module for module in part.modules() if isinstance(module, nn.GroupNorm)]
    hooks = [norm.register_forward_pre_hook(undo) for norm in norms]
    forward()
    for hook in hooks:
        hook.remove()
