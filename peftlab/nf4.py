"""NF4 with double quantisation, exact, in torch: QLoRA, Dettmers et al. 2023, arXiv:2305.14314.

A weight matrix, read by rows, is cut into blocks of 64. Each block is divided by its largest
magnitude, its absmax, and each weight replaced by the nearest of 16 levels (section 3). Double
quantisation stores an absmax, too, as one of 256 levels: minus the mean of all, in blocks of 256.
That makes 4 + 8/64 + 32/(64·256) = 4.127 bits per weight.

The layout and the levels are those of bitsandbytes; where that is installed, its kernel decodes
on a GPU. Bytes hold two codes, the first in the upper half.
"""

import importlib
import importlib.util
from collections.abc import Iterable
from functools import cache
from types import ModuleType
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlab.products import linear

BLOCK = 64  # weights with one absmax
NESTED = 256  # absmax with one scale
LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
BINS = 128  # per unit length, for the search; levels are much further apart than 1 / BINS


class Packed(NamedTuple):
    """A quantised matrix of n weights in blocks = ⌈n / 64⌉ blocks."""

    codes: Tensor  # uint8 [32 blocks]: two weights each; the last block is filled up with zeros
    absmax: Tensor  # uint8 [blocks]: index of a level of `dynamic_levels`
    scales: Tensor  # float32 [⌈blocks / 256⌉]
    mean: Tensor  # float32 scalar: mean absmax

    @property
    def n_bytes(self) -> int:
        """What is stored, in bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self)


class NF4Linear(nn.Linear):
    """A frozen linear layer whose W [d_out, d_in] is stored as NF4.

    `weight` is decoded anew at each use, and neither it nor anything of its size is kept for
    backward. Made out of an nn.Linear in place, by `quantize_`: who held the layer still does.
    """

    dtype: torch.dtype  # of the decoded weight

    @property
    def packed(self) -> Packed:
        """The stored tensors."""
        return Packed(*(self.get_buffer(name) for name in Packed._fields))

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """W [d_out, d_in], decoded; no parameter: nothing that is written to it is kept."""
        return unpack(self.packed, (self.out_features, self.in_features), self.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Map x [..., d_in] to x Wᵀ + b [..., d_out], in autocast's type where that is on."""
        bias, dtype, device = self.bias, self.dtype, input.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            input = input.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        shape = (self.out_features, self.in_features)
        return cast(Tensor, _Linear.apply(input, bias, self.packed, shape, dtype))


class _Linear(torch.autograd.Function):
    """F.linear that keeps the packed weight for backward, and decodes it a second time there."""

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, packed: Packed, shape, dtype):
        ctx.save_for_backward(*packed)
        ctx.shape, ctx.dtype = shape, dtype
        return linear(x, unpack(packed, shape, dtype), bias)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        (gradient,) = grad_outputs
        of_x = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = linear(gradient, unpack(Packed(*ctx.saved_tensors), ctx.shape, ctx.dtype).T)
        if ctx.needs_input_grad[1]:
            of_bias = gradient.flatten(0, -2).sum(0)
        return of_x, of_bias, None, None, None


def quantize_(linears: Iterable[nn.Linear], device: torch.device) -> None:
    """Turn each layer into an NF4Linear in place; its weight is packed on `device`."""
    for layer in linears:
        restore_(layer, pack(layer.weight.detach().to(device)))


def restore_(layer: nn.Linear, packed: Packed) -> None:
    """Drop the dense weight of `layer` for `packed`: the way back from `dequantize_`."""
    dtype = layer.weight.dtype
    del layer.weight
    layer.__class__ = NF4Linear
    cast(NF4Linear, layer).dtype = dtype
    for name, tensor in packed._asdict().items():
        layer.register_buffer(name, tensor)


def dequantize_(net: nn.Module) -> dict[nn.Linear, Packed]:
    """Turn every NF4Linear inside `net` back into an nn.Linear, frozen, with the decoded weight.

    Returns what was stored, by layer, for `restore_`: coding the decoded weight again would give
    another function.
    """
    stored: dict[nn.Linear, Packed] = {}
    for layer in net.modules():
        if isinstance(layer, NF4Linear):
            stored[layer] = layer.packed
    for layer in stored:
        weight = layer.weight
        for name in Packed._fields:
            delattr(layer, name)
        layer.__class__ = nn.Linear
        layer.weight = nn.Parameter(weight, requires_grad=False)
    return stored


def pack(weight: Tensor) -> Packed:
    """Quantise a matrix of any shape and floating type."""
    codes, absmax = encode(weight)
    mean = absmax.mean()
    rest = _blocks(absmax - mean, NESTED)
    scales = rest.abs().amax(1)
    levels = dynamic_levels(weight.device)
    middles = (levels[1:] + levels[:-1]) / 2
    nearest = torch.bucketize(_divide(rest, scales), middles).to(torch.uint8)
    return Packed(codes, nearest.flatten()[: len(absmax)], scales, mean)


def unpack(packed: Packed, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return the weight that `packed` stands for."""
    scales = packed.scales.repeat_interleave(NESTED)[: len(packed.absmax)]
    levels = dynamic_levels(packed.absmax.device).index_select(0, packed.absmax.int())
    return decode(packed.codes, levels * scales + packed.mean, shape, dtype)


def encode(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes uint8 [32 blocks], two in each byte, and absmax float32 [blocks]."""
    blocks = _blocks(weight.float().flatten(), BLOCK)
    absmax = blocks.abs().amax(1)
    scaled = _divide(blocks, absmax).flatten()
    # Each bin holds at most one middle between two levels, so that one comparison is left to do:
    # six times as fast as torch.bucketize.
    lowest, middle = _search(weight.device)
    bins = ((scaled + 1) * BINS).int()
    codes = lowest.index_select(0, bins) + (scaled > middle.index_select(0, bins))
    return codes[0::2] << 4 | codes[1::2], absmax


def decode(codes: Tensor, absmax: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return level times absmax, a float32 product that is then rounded to `dtype`."""
    n = torch.Size(shape).numel()
    kernels = bitsandbytes() if codes.is_cuda else None
    if kernels is not None:
        state = kernels.QuantState(absmax, shape, dtype=dtype, blocksize=BLOCK, quant_type="nf4")
        return kernels.dequantize_4bit(codes[: (n + 1) // 2, None], state)
    pairs = _pairs(codes.device).index_select(0, codes.int()).view(torch.float32)
    blocks = pairs.view(-1, BLOCK).mul_(absmax[:, None]).to(dtype)
    return blocks.flatten()[:n].view(shape)


@cache
def bitsandbytes() -> ModuleType | None:
    """Return bitsandbytes' functions, if they are installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return None
    return importlib.import_module("bitsandbytes.functional")


@cache
def dynamic_levels(device: torch.device) -> Tensor:
    """Return the 256 levels of an absmax, ascending, float32: Dettmers et al. 2021, section 2.1.

    ± the centres of 2^i equal parts of [10^(i-7), 10^(i-6)] for i = 0 .. 6, and 0 and 1.
    """
    parts = []
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        centres = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (i - 6)
        parts += [centres, -centres]
    return torch.cat([*parts, torch.tensor([0.0, 1.0])]).sort().values.to(device)


@cache
def _pairs(device: torch.device) -> Tensor:
    """Return the two levels of each byte, [256], side by side in one eight-byte number."""
    levels = torch.tensor(LEVELS)
    pairs = torch.stack((levels.repeat_interleave(16), levels.repeat(16)), dim=1)
    return pairs.view(torch.float64).flatten().to(device)


@cache
def _search(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return, for each bin from -1 to 1, the lowest code in it and the middle above its level."""
    levels = torch.tensor(LEVELS)
    middles = (levels[1:] + levels[:-1]) / 2
    edges = torch.arange(2 * BINS + 1) / BINS - 1
    lowest = torch.bucketize(edges, middles)
    above = torch.cat((middles, torch.tensor([torch.inf])))[lowest]
    return lowest.to(device, torch.uint8), above.to(device)


def _blocks(flat: Tensor, size: int) -> Tensor:
    """Cut [n] into [⌈n / size⌉, size], the last one filled up with zeros."""
    return F.pad(flat, (0, -len(flat) % size)).view(-1, size)


def _divide(blocks: Tensor, by: Tensor) -> Tensor:
    """Divide each row by its own number; a row of zeros stays one."""
    return blocks / torch.where(by > 0, by, 1)[:, None]
