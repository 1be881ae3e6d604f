"""Which member of a block each token of a vLLM step belongs to, and each row that a token is chosen for.

A step mixes prompts, parts of prompts and single tokens of many requests. Each request carries its member;
before every step, vLLM's runner says whose tokens it has scheduled, in which order, and it is written into
tensors that stay where they are, so that graphs which read them stay valid.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch

from mpies.engines.vllm import WITHOUT_BLOCKS
from mpies.errors import InputError

KEY = "mpies_member"


def of_member(member: int) -> dict[str, int]:
    """`extra_args` of a member's requests."""
    return {KEY: member}


class Runner(Protocol):
    """What is used of vLLM's: see `follow`."""

    requests: Any
    input_batch: Any
    _prepare_inputs: Any


class Members:
    """A step's: `tokens` of its tokens, `rows` of those rows. `nobody` stands for the unperturbed model.

    `block`: how many members there are; `most`: tokens of a step, and rows, since vLLM can be asked to tell
    of every token of a prompt.
    """

    def __init__(self, block: int, most: int, device: torch.device):
        self.nobody = block
        self.tokens = Owners(most, self.nobody, device)
        self.rows = Owners(most, self.nobody, device)

    def assign(self, members: list[int], counts: np.ndarray) -> None:
        """The step has counts[i] tokens of members[i] after one another, and one row of each."""
        owners = np.array(members, np.int64)
        self.tokens.write(np.repeat(owners, counts))
        self.rows.write(owners)


class Owners:
    """Members of tokens or rows, the first `count` of which exist; the others are nobody's."""

    def __init__(self, most: int, nobody: int, device: torch.device):
        self.count, self._nobody = 0, nobody
        self.on_cpu = device.type == "cpu"
        pinned = device.type == "cuda"
        self._host = torch.full((most,), nobody, dtype=torch.int64, pin_memory=pinned)
        self.array = self._host.numpy()
        self.tensor = self._host if self.on_cpu else self._host.to(device)

    def of(self, rows: int) -> np.ndarray:
        """The members of the step's rows, as many as a layer is given: int64 (rows,), on a CPU.

        Raises InputError for others than the step has: nobody knows whose they are.
        """
        if rows != self.count:
            raise InputError(
                f"es.perturbation: a layer of vLLM's is given {rows} rows, where a step has {self.count};"
                f" {WITHOUT_BLOCKS}"
            )
        return self.array[:rows]

    def at(self, rows: int) -> torch.Tensor:
        """The same on the device, where rows that pad a graph are nobody's."""
        if self.on_cpu:
            self.of(rows)
        return self.tensor[:rows]

    def write(self, owners: np.ndarray) -> None:
        self.count = len(owners)
        self.array[: self.count] = owners
        self.array[self.count :] = self._nobody
        if not self.on_cpu:
            self.tensor.copy_(self._host, non_blocking=True)


def follow(runner: Runner, members: Members) -> None:
    """From now on, `members` are those of the step that the runner prepares.

    The runner prepares a step in `_prepare_inputs`, whose second argument says how many tokens each of
    `input_batch.req_ids` has in it; `requests` knows what each request came with.
    """
    prepare = runner._prepare_inputs

    def prepare_with_members(scheduled: Any, counts: np.ndarray) -> Any:
        prepared = prepare(scheduled, counts)
        members.assign(
            [_member(runner.requests[name], members) for name in runner.input_batch.req_ids], counts
        )
        return prepared

    runner._prepare_inputs = prepare_with_members


def _member(request: Any, members: Members) -> int:
    return (request.sampling_params.extra_args or {}).get(KEY, members.nobody)
