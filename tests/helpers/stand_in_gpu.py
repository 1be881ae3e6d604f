"""A GPU that is none: Triton's driver for it compiles kernels for real, and runs them in an emulator.

With it, kernels take tensors on the CPU. It stands between Triton's own compiler, which needs no GPU, and
`ptx`, which executes what the compiler made: so the launches are those of the program, arguments,
specialisations and grids included. What AMD's compiler makes is compiled only.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ptx
import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager

# As on an H100, where nothing depends on it.
PROPERTIES = {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}
NO_RESERVE = 0x4000  # of mmap: memory that is there once it is written to
LIMITS = 2**31 - 1, 2**16 - 1, 2**16 - 1  # of a grid


def target_named(name: str) -> GPUTarget:
    """sm_90 and the like are NVIDIA's, gfx942 AMD's."""
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    return GPUTarget("hip", name, 64)


@dataclass
class Launch:
    """A launch of a kernel: what it was compiled to, and on what grid."""

    kernel: str
    grid: tuple[int, ...]
    files: dict[str, Path]
    """By their suffixes: ptx, cubin; amdgcn, hsaco."""
    metadata: Any
    device: int
    """The number of the GPU."""

    @property
    def in_gluon(self) -> bool:
        """Were its layouts chosen by hand? Triton's own compiler begins with code that has none."""
        return "ttir" not in self.files


class StandIn(DriverBase):
    """Triton's driver for the GPU that `target` names."""

    def __init__(self, target: str):
        self.target = target_named(target)
        self.current = 0
        """Which of several GPUs is the current one."""
        self.takes_cpu = True
        """Are tensors on the CPU as good as those on the GPU? Triton refuses them."""
        self.only: dict[str, slice] = {}
        """Of a kernel's grids, the programs that are run: all, but for kernels that it names."""
        self.launches: list[Launch] = []
        self.programs: dict[str, ptx.Program] = {}
        """What is run, by the file that it was read from."""
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (0, 0, 0, 0, 1024),  # 1024 threads at most
            unload_module=lambda *_: None,
            get_device_properties=lambda _: PROPERTIES,
        )

    def activate(self) -> StandIn:
        driver.set_active(self)
        return self

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.current

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self):
        raise NotImplementedError

    def launcher_cls(self, source, metadata):
        """What launches a kernel: called with its grid, five things of Triton's own, and its arguments."""
        files = {Path(file).suffix[1:]: Path(file) for file in compiled_files(metadata)}
        constants = {path[0] for path in source.constants}

        def launch(x, y, z, *given):
            for size, limit in zip((x, y, z), LIMITS, strict=True):
                assert 0 < size <= limit, f"{metadata.name} is launched on a grid of {(x, y, z)}"
            arguments = [value for i, value in enumerate(given[6:]) if i not in constants]
            for value in arguments:
                assert isinstance(value, torch.Tensor) or type(value) in (int, float), "not what C can take"
            self.launches.append(Launch(metadata.name, (x, y, z), files, metadata, self.current))
            if "ptx" in files:
                self.run(files["ptx"], (x, y, z), arguments)

        return launch

    def run(self, file: Path, grid: tuple[int, int, int], arguments: list[Any]) -> None:
        program = self.programs.get(str(file)) or ptx.Program(file.read_text())
        self.programs[str(file)] = program
        tensors = [value for value in arguments if isinstance(value, torch.Tensor)]
        places = {hasattr(tensor, "held") for tensor in tensors}
        if len(places) > 1 or (False in places and not self.takes_cpu):  # as Triton does
            raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
        memory = ptx.Memory([getattr(tensor, "held", tensor) for tensor in tensors])  # of a pretended GPU
        raw = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in arguments]
        program.run(grid, raw, memory, self.only.get(program.name, slice(None)))


def compiled_files(metadata) -> list[str]:
    """What Triton's cache holds of a kernel."""
    group = get_cache_manager(metadata.hash).get_group(f"{metadata.name}.json")
    return [file for file in group.values() if not file.endswith(".json")]


def room(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros (count,), of which only those that are touched take memory."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize, flags=flags), dtype=dtype)
