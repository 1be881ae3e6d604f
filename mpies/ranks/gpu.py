"""A rank's GPU made ready: that its driver is new enough, that kernels can be compiled and compute right."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from mpies import noise
from mpies.errors import InputError, reason
from mpies.noise import kernels_for
from mpies.noise.trial import find_wrong

# What torch calls GPUs, AMD's too.
KIND = "cuda"
INSTEAD = "or use model.device=cpu"
UNKNOWN = f"tell the authors, with the GPU's model and the versions of torch and Triton; {INSTEAD}"
# numba keeps compiled code by its own file's date: not by those that it takes constants from.
STALE = (
    "it may have been compiled for another version; delete *.nbi and *.nbc in"
    f" {Path(noise.__file__).with_name('__pycache__')}, or in numba's cache"
)


def count_visible() -> int:
    """GPUs that this process may use. Raises InputError where there are some, but torch cannot use them.

    The driver's library counts them, whatever torch was built for; only CUDA itself says that it is too old.
    """
    visible = torch.cuda.device_count()
    if visible and not torch.cuda.is_available():
        raise InputError(
            f"model.device: {visible} GPU(s) are here, but torch {torch.__version__} cannot use them"
            f" ({_refusal_of_cuda()}): ask your site for a newer driver, install a torch that was built for"
            f" an older CUDA, {INSTEAD}"
        )
    return visible


def _refusal_of_cuda() -> str:
    try:
        torch.cuda.init()
    except Exception as error:
        return reason(error).split(". ")[0]
    return "CUDA finds none"


def make_ready(device: torch.device) -> None:
    """A GPU is the current one from now on, and the device's kernels have the definition's bits.

    Raises InputError, with the remedy, where they cannot be compiled or run, or compute something else.
    """
    if device.type != "cpu":
        torch.cuda.set_device(device)
        # cuDNN's attention makes a plan for every new length of the keys, so for nearly every token, and
        # keeps it. Torch's other ways compute the same without plans.
        torch.backends.cuda.enable_cudnn_sdp(False)
    try_kernels(device)


def try_kernels(device: torch.device) -> None:
    """Raise InputError, with the remedy, unless the device's kernels have the definition's bits."""
    said: list[str] = []
    try:
        with _kept_back(said):
            wrong = find_wrong(kernels_for(device, threads=1), device)
    except Exception as error:
        raise InputError(f"model.device: {device}: {_explain(error, said)}; {INSTEAD}") from error
    if wrong:
        told = (
            f"model.device: {device}: the kernel {wrong!r} computes other bits than the definition of noise"
        )
        raise InputError(f"{told}: {STALE if device.type == 'cpu' else UNKNOWN}")


def _explain(error: Exception, said: list[str]) -> str:
    """Why kernels do not run, and what helps; `said`: the lines that the compiler wrote."""
    if "C compiler" in str(error):
        return (
            "Triton, which compiles the kernels, finds no C compiler: install gcc, load your site's module"
            " (module load gcc), or name one by CC=/path/to/it"
        )
    headers = Path(sysconfig.get_path("include"))
    if isinstance(error, subprocess.CalledProcessError) and not (headers / "Python.h").exists():
        return (
            f"Triton cannot compile the kernels without Python's headers, and there is no {headers}/Python.h:"
            " install them (python3-dev, python3-devel), or use a Python that has them, as conda's and uv's"
        )
    if isinstance(error, subprocess.CalledProcessError):
        why = next((line for line in said if "error" in line), reason(error))
        return f"Triton's C compiler fails ({why}): try another one by CC=/path/to/it"
    if "libcuda" in str(error):
        return (
            "Triton does not find the driver's library libcuda.so.1: name its folder by"
            " TRITON_LIBCUDA_PATH; in a container, give --nv"
        )
    return f"the kernels do not run ({type(error).__name__}: {reason(error)})"


@contextlib.contextmanager
def _kept_back(lines: list[str]) -> Iterator[None]:
    """What is written to stderr meanwhile, by subprocesses too, goes into `lines`; shown if all is well."""
    sys.stderr.flush()
    own = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(own, 2)
            os.close(own)
            file.seek(0)
            text = file.read()
            lines += text.decode(errors="replace").splitlines()
    os.write(2, text)
