"""What vLLM reads from the process's environment, set before it is imported."""

from __future__ import annotations

import logging
import os
from pathlib import Path


def set_environment(local_rank: int) -> None:
    """What a user has set stays, but for what settings say. Read by vLLM when it is imported, or later."""
    root = os.environ.get("VLLM_CACHE_ROOT") or Path("~/.cache/vllm").expanduser()
    # Compiled code: ranks of a node, and nodes with one file system, would write it at the same time.
    private = Path(root) / f"mpies-{os.uname().nodename}-{local_rank}"
    if not str(root).endswith(private.name):
        os.environ["VLLM_CACHE_ROOT"] = str(private)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # on CPUs, it would count in place of the bytes reckoned
    # The first of vLLM's two runners: for the second, logits processors are written otherwise.
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    # FlashInfer's sampler is compiled by nvcc when vLLM starts, which fails without a CUDA toolkit. Nothing
    # is sampled by it here.
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    # What is wrong comes as an exception, and is told in one line.
    level = os.environ.setdefault("VLLM_LOGGING_LEVEL", "CRITICAL")
    logging.getLogger("vllm").setLevel(level)  # until vLLM sets it
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # it misses Triton, on CPUs
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
