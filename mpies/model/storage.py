"""Where the base weights are: on the device, or in the host's memory, from which they are streamed.

Streamed, a parameter is copied to the device while the one before is worked on: there are two buffers, which
take turns, each as large as the largest parameter that it gets. What an update makes is copied back in
the order of the work. The copies are exact, so no bit depends on where the base is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch

from mpies.errors import InputError

Tensors = dict[str, torch.Tensor]


class Storage(Protocol):
    """The base in the dtype that it is kept in, by name."""

    streams: bool
    """Is it somewhere else than where it is computed with?"""

    def bring(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, value on the device), one by one; a value is there until the next one is asked for."""
        ...

    def copy(self, name: str) -> torch.Tensor:
        """A value on the device that stays; it is the base itself, if that is there."""
        ...

    def keep(self, name: str, value: torch.Tensor) -> None:
        """base <- value, which `bring` brought and which was worked on since."""
        ...

    def settle(self) -> None:
        """Wait until the base holds all that was kept: before the host reads or writes it."""
        ...


class OnDevice:
    streams = False

    def __init__(self, base: Tensors):
        self._base = base

    def bring(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, self._base[name]) for name in names)

    def copy(self, name: str) -> torch.Tensor:
        return self._base[name]

    def keep(self, name: str, value: torch.Tensor) -> None:
        """It was worked on in its place."""

    def settle(self) -> None:
        """The device does one thing after another."""


class OnHost:
    """`base` is in memory that the GPU reads and writes by itself; see `pinned_room`."""

    streams = True

    def __init__(self, base: Tensors, device: torch.device):
        self._base = base
        self._device = device
        self._copying = torch.cuda.Stream(device)

    def bring(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        names = list(names)
        working = torch.cuda.current_stream(self._device)
        buffers = [self._buffer(names[turn::2]) for turn in (0, 1)]

        def begin(number: int) -> tuple[torch.Tensor, torch.cuda.Event]:
            # By now, the buffer was used for the last time by work that is queued already.
            self._copying.wait_stream(working)
            base = self._base[names[number]]
            target = buffers[number % 2][: base.numel()].view(base.shape)
            with torch.cuda.stream(self._copying):
                target.copy_(base, non_blocking=True)
                return target, self._copying.record_event()

        coming = begin(0) if names else None
        for number, name in enumerate(names):
            assert coming
            value, arrived = coming
            coming = begin(number + 1) if number + 1 < len(names) else None
            working.wait_event(arrived)
            yield name, value

    def _buffer(self, names: list[str]) -> torch.Tensor:
        """Room for any of these parameters; nobody else gets it before the copies into it are done."""
        sizes = [self._base[name].numel() for name in names]
        dtype = next(iter(self._base.values())).dtype
        made = torch.empty(max(sizes, default=0), dtype=dtype, device=self._device)
        made.record_stream(self._copying)
        return made

    def copy(self, name: str) -> torch.Tensor:
        return self._base[name].to(self._device, non_blocking=True)

    def keep(self, name: str, value: torch.Tensor) -> None:
        self._base[name].copy_(value, non_blocking=True)

    def settle(self) -> None:
        torch.cuda.current_stream(self._device).synchronize()


def storage_for(base: Tensors, device: torch.device) -> Storage:
    """For a base that is on the device, or on the host while the device is a GPU."""
    kept = next(iter(base.values())).device
    return OnDevice(base) if kept.type == device.type else OnHost(base, device)


def scratch_bytes(sizes: Sequence[int], dtype: torch.dtype, streamed: bool) -> int:
    """Bytes on the device beside base and live weights, at most: what a base's parameters are worked on in.

    `sizes`: their elements, in order; `dtype`: the base's. A parameter in float32; or the two buffers that
    parameters are streamed through, and, of a base in another dtype, a parameter in float32 besides.
    """
    one = torch.float32.itemsize * max(sizes, default=0)
    if not streamed:
        return one
    buffers = dtype.itemsize * sum(max(sizes[turn::2], default=0) for turn in (0, 1))
    return buffers + (one if dtype.itemsize < torch.float32.itemsize else 0)


def copies_bytes(base: Tensors, device: torch.device) -> int:
    """Bytes on the device of copies that a base is worked on in: 0 if that is done in its place."""
    kept = next(iter(base.values()))
    streamed = kept.device.type != device.type
    if not streamed and kept.dtype == torch.float32:
        return 0
    return scratch_bytes([tensor.numel() for tensor in base.values()], kept.dtype, streamed)


def room_on(device: torch.device, shapes: dict[str, torch.Size], dtype: torch.dtype) -> Tensors:
    """Memory for a base on a device, by name; not yet written."""
    return {name: torch.empty(shape, dtype=dtype, device=device) for name, shape in shapes.items()}


def pinned_room(shapes: dict[str, torch.Size], dtype: torch.dtype) -> Tensors:
    """The same in the host's memory, one piece that stays where it is: a GPU copies from and to it by itself.

    Not of torch's own pinned memory, whose pieces are powers of two: up to twice as much. Raises InputError
    where the system does not allow it.
    """
    whole = torch.empty(sum(shape.numel() for shape in shapes.values()), dtype=dtype)
    failed = int(torch.cuda.cudart().cudaHostRegister(whole.data_ptr(), whole.nbytes, 0))
    if failed:
        raise InputError(
            f"model.base: CUDA cannot pin {whole.nbytes / 1e9:.1f} GB of the host's memory (error {failed}):"
            " ask for more (--mem, ulimit -l), start fewer ranks on a node, or use model.base=device"
        )
    pieces = whole.split([shape.numel() for shape in shapes.values()])
    return {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}
