"""Runs a program on a GPU that is pretended: python tests/helpers/pretending.py -m mpies.train ...

What mpies asks CUDA about the GPUs is answered here, as an H100 would; tensors are `pretended_gpu`'s, and
kernels are compiled, and emulated, by `stand_in_gpu`. MPIES_GPUS says how many there are (1), and the ranks
of a node go round among them. At its end, the program's counts go to the file that MPIES_COUNTS names, as
JSON.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path[0] = str(Path(__file__).parent)
# Tests without a GPU have set it for kernels of their own; here they are compiled.
os.environ.pop("TRITON_INTERPRET", None)

import pretended_gpu
import stand_in_gpu
import torch

from mpies import noise
from mpies.model import lowrank_block
from mpies.ranks import gpu

TARGET = "sm_90"
MEMORY = 80 * 2**30
PROPERTIES = SimpleNamespace(
    name="pretended GPU", multi_processor_count=132, uuid="pretended", major=9, minor=0
)
GPUS = int(os.environ.get("MPIES_GPUS", 1))


def _wait(*_) -> None:
    pretended_gpu.COUNTED.waits[pretended_gpu.place()] += 1


ANSWERS = {
    "device_count": lambda: GPUS,
    "is_available": lambda: True,
    "set_device": lambda device: None,
    "synchronize": _wait,
    "get_device_properties": lambda device: PROPERTIES,
    "get_device_name": lambda device: PROPERTIES.name,
    "get_device_capability": lambda device: (9, 0),
    "mem_get_info": lambda device: (MEMORY, MEMORY),
    "reset_peak_memory_stats": lambda device: None,
    "memory_allocated": lambda device: 0,
    "max_memory_allocated": lambda device: 0,
}


def install() -> None:
    """From now on, this process has GPUs."""
    stand_in_gpu.StandIn(TARGET).activate().takes_cpu = False
    pretended_gpu.install()
    for name, answer in ANSWERS.items():
        setattr(torch.cuda, name, answer)
    gpu.KIND = pretended_gpu.DEVICE.type
    noise.TRITON_KNOWS.add(gpu.KIND)
    lowrank_block.FUSED_ON.add(gpu.KIND)


def main(arguments: list[str]) -> None:
    assert arguments[0] == "-m", "a module is run"
    install()
    sys.argv = arguments[1:]
    sys.path.insert(1, os.getcwd())
    with pretended_gpu.counting() as counted:
        try:
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        finally:
            if file := os.environ.get("MPIES_COUNTS"):
                names = "operations", "waits", "uploads"
                Path(file).write_text(json.dumps({name: dict(getattr(counted, name)) for name in names}))


if __name__ == "__main__":
    main(sys.argv[1:])
