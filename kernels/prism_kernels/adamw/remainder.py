"""An fp32 master weight as a bf16 weight and 16 bits more: 4 bytes, of which a forward reads 2."""

from __future__ import annotations

import torch
from torch import Tensor

from prism_kernels.checks import check_tensor, describe, is_tensor, wrong

QUIET = 0x00400000  # the bit of an fp32 NaN that makes it quiet


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """(weight bf16, remainder int16) of an fp32 tensor of any shape, of which :func:`join_master` makes its very bits.

    As integers, master = weight * 2^16 + remainder. The weight is the nearest bf16; of two that are equally near, the
    one further from 0, where ``master.bfloat16()`` takes the even one: an even weight would have 65,537 masters, one
    more than 16 bits tell apart. Infinities are exact; a NaN keeps its bits, but is quiet.

    Raises ValueError for any other dtype.
    """
    if not is_tensor(master, (torch.float32,)):
        raise wrong("master", "a float32 tensor", describe(master))
    bits = master.detach().contiguous().view(torch.int32)
    upper = torch.where(master.isnan(), bits | QUIET, bits + 0x8000) >> 16
    return upper.to(torch.int16).view(torch.bfloat16), bits.to(torch.int16)


def join_master(weight: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 master of a bf16 weight and its int16 remainder, tensors of one shape: see :func:`split_master`.

    Raises ValueError, naming the argument, for other dtypes or shapes.
    """
    if not is_tensor(weight, (torch.bfloat16,)):
        raise wrong("weight", "a bfloat16 tensor", describe(weight))
    check_tensor("remainder", remainder, sizes(weight), (torch.int16,))
    upper = weight.detach().contiguous().view(torch.int16).to(torch.int32) << 16
    lower = remainder.to(torch.int32)
    return torch.where(weight.isnan(), upper | (lower & 0xFFFF), upper + lower).view(torch.float32)


def sizes(tensor: Tensor) -> dict[str, int | None]:
    """A tensor's shape as :func:`prism_kernels.checks.check_tensor` takes it."""
    return {f"d{i}": size for i, size in enumerate(tensor.shape)}
