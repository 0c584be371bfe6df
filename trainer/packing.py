"""Batches on their way from the loader to a device: arrays as tensors, and the tensors of a step as one."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch


class _Place(NamedTuple):
    """Where in `Packed.data` a tensor lies, in which type, and which type it is to have."""

    begin: int
    shape: tuple[int, ...]
    packed: torch.dtype
    dtype: torch.dtype


@dataclass(frozen=True)
class Packed:
    """The micro-batches of a step as one tensor, ids in the smallest type that holds them.

    Loader processes hand over, and a device receives, one small tensor instead of some thirty large ones, of which each
    would cost a file in shared memory, or a copy, of its own.
    """

    data: torch.Tensor  # uint8
    layout: list  # the micro-batches, with a _Place for each tensor

    def pin_memory(self) -> "Packed":
        return Packed(self.data.pin_memory(), self.layout)


def pack(micros: list[dict]) -> Packed:
    parts, size = [], 0

    def layout(value):
        nonlocal size
        if isinstance(value, dict):
            return {name: layout(part) for name, part in value.items()}
        if not torch.is_tensor(value):
            return value
        narrow = _narrowed(value)
        place = _Place(size, tuple(value.shape), narrow.dtype, value.dtype)
        parts.append(narrow.flatten().view(torch.uint8))
        parts.append(torch.zeros(-len(parts[-1]) % 8, dtype=torch.uint8))  # the next one begins where any type may
        size += len(parts[-2]) + len(parts[-1])
        return place

    layouts = [layout(micro) for micro in micros]
    return Packed(torch.cat(parts), layouts)


def _narrowed(value: torch.Tensor) -> torch.Tensor:
    """Ids, which are not negative, in the smallest integer type that holds them; other tensors as they are."""
    if value.dtype != torch.int64 or not value.numel():
        return value
    highest = int(value.max())
    types = (torch.int8, torch.int16, torch.int32, torch.int64)
    return value.to(next(dtype for dtype in types if highest <= torch.iinfo(dtype).max))


def unpack(packed: Packed, device: torch.device) -> list[dict]:
    """The micro-batches of `pack` on a device."""
    data = packed.data.to(device, non_blocking=True)

    def value(place):
        if isinstance(place, dict):
            return {name: value(part) for name, part in place.items()}
        if not isinstance(place, _Place):
            return place
        end = place.begin + math.prod(place.shape) * place.packed.itemsize
        return data[place.begin : end].view(place.packed).view(place.shape).to(place.dtype)

    return [value(layout) for layout in packed.layout]


def to_tensors(arrays: dict) -> dict:
    """The arrays of a nested batch as tensors, without a copy where they may be written; other values as they are."""
    return {k: to_tensors(v) if isinstance(v, dict) else _tensor(v) for k, v in arrays.items()}


def _tensor(value):
    if not isinstance(value, np.ndarray):
        return value
    return torch.from_numpy(value if value.flags.writeable else value.copy())


def to_device(batch: dict, device: torch.device) -> dict:
    """The tensors of a nested batch on a device; other values as they are."""
    return {
        k: to_device(v, device) if isinstance(v, dict) else v.to(device, non_blocking=True) if torch.is_tensor(v) else v
        for k, v in batch.items()
    }
