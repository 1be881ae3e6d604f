"""From a run file to the weights of any generation, without MPI and without a GPU.

    python -m mpies.replay RUN.h5 --generation 137 --output gen137/     a Hugging Face folder
    python -m mpies.replay RUN.h5 --verify                              recompute every digest

The initial model and the run file's (seed, reward) rows determine every generation's weights, bit for
bit; the digests in the file prove it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpies import config, extras
from mpies.command_line import EXIT_CODES, HelpFormatter, Parser, conduct_alone
from mpies.errors import InputError, OrderlyError
from mpies.run.replaying import needs_anchor, replay, which_generation
from mpies.runfile import History, TruncatedError, read_history, refuse_unknown, salvage_history

if TYPE_CHECKING:
    import torch

    from mpies.model.weights import Weights
    from mpies.replica import LoadedModel


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    device = _check(options)
    history = _read(options.run_file)
    refuse_unknown(options.run_file, history)
    if options.verify:
        loaded = _load_initial(options, history, device)
        return _report(history, _replay(options, loaded.weights, history, 0, history.generations))
    generation = which_generation(options.generation, history)
    loaded = _load_initial(options, history, device)
    first = _from_checkpoint(options, loaded.weights, history, generation) if options.output else 0
    (digest,) = _replay(options, loaded.weights, history, first, generation)
    expected = int(history.digest[generation - 1]) if generation else history.model_digest
    if digest != expected:
        raise OrderlyError(
            f"generation {generation}: the replayed weights' digest {digest:016x} is not the run"
            f" file's {expected:016x}; --verify tells from which generation on"
        )
    print(f"generation {generation}: digest {digest:016x}, as in the run file")
    if options.output:
        origin = {"run_uuid": history.run_uuid, "generation": generation, "digest": f"{expected:016x}"}
        _write(loaded, Path(options.output), origin)
    return 0


def _check(options: argparse.Namespace) -> torch.device:
    """The device. Raises InputError for options that cannot be, and where libraries are missing."""
    extras.require("replay", "python -m mpies.replay")
    if options.verify and options.output:
        raise InputError("--verify writes no model: leave out --output, or --verify")
    if options.verify and options.generation is not None:
        raise InputError("--verify recomputes all generations: leave out --generation, or --verify")
    if not 1 <= options.threads <= config.MOST_THREADS:
        raise InputError(f"--threads: given {options.threads}, allowed is 1 to {config.MOST_THREADS}")
    device = _make_ready(options.device)
    if options.output:
        from mpies.model.saving import refuse_overwriting

        folder = Path(options.output)
        # A folder that would be made below a file is told after the replay otherwise.
        nearest = next((each for each in (folder, *folder.parents) if each.exists()), folder)
        try:
            refuse_overwriting(nearest if nearest.is_file() else folder)
        except InputError as error:
            raise InputError(f"--output: {error}") from None
    return device


def _make_ready(name: str) -> torch.device:
    """The CPU, or the first GPU. Raises InputError if there is none, or none that can be used."""
    import torch

    if name == "cpu":
        return torch.device(name)
    from mpies.ranks import gpu

    device = torch.device(gpu.KIND, 0)
    try:
        if not gpu.count_visible():
            raise InputError("--device: no GPU is visible here; leave it out to replay on the CPU")
        gpu.make_ready(device)
    except InputError as error:
        told = str(error).replace("model.device:", "--device:")
        raise InputError(told.replace(gpu.INSTEAD, "or leave it out to replay on the CPU")) from error
    return device


def _read(path: str) -> History:
    try:
        history = read_history(path)
    except TruncatedError:
        history = salvage_history(path)
        print(f"{path}: its end is missing; salvaged {history.generations} generations")
        return history
    if history.damage.damaged:
        print(f"mpies: {path}: {history.damage}", file=sys.stderr)
    if history.damage.uncounted == 1:
        print(
            f"{path}: generation {history.generations + 1} is there, but not counted: the job was killed then"
        )
    return history


def _load_initial(options: argparse.Namespace, history: History, device: torch.device) -> LoadedModel:
    """The initial model, its weights checked against the digest in the run file."""
    import torch

    from mpies.model.loading import base_dtype
    from mpies.replica import load_model

    torch.set_num_threads(options.threads)
    path, settings = options.model or history.model_path, config.from_yaml(history.settings)
    try:
        loaded = load_model(
            path,
            device=device,
            dtype=getattr(torch, options.dtype or history.dtype),
            # The base is the run's, whatever dtype is asked for here.
            master=base_dtype(settings.model.master, getattr(torch, history.dtype)),
            rank=settings.es.noise_rank,
            threads=options.threads,
            left_out=history.left_out,
            model_class=history.model_class,
        )
    except InputError as error:
        raise InputError(f"{error}; name the initial model with --model") from None
    digest = loaded.weights.digest()
    if digest != history.model_digest:
        raise InputError(
            f"{path}: its weights' digest is {digest:016x}, but the run began with"
            f" {history.model_digest:016x}; name the initial model with --model"
        )
    return loaded


def _replay(
    options: argparse.Namespace, weights: Weights, history: History, first: int, last: int
) -> list[int]:
    """The digest after the last generation; of all with --verify."""
    anchor = None
    if needs_anchor(history, first, last):
        from mpies.model.anchor import Anchor

        anchor = Anchor(options.model or history.model_path, weights, history.model_digest)
    with _progress(last - first) as progress:
        return replay(
            weights, history, first, last, anchor=anchor, every_digest=options.verify, progress=progress
        )


def _write(loaded: LoadedModel, folder: Path, origin: dict[str, Any]) -> None:
    from mpies.model.saving import save

    loaded.weights.show_base()
    save(loaded.model, loaded.tokenizer, folder, origin)
    print(f"wrote {folder} ({str(loaded.model.dtype).removeprefix('torch.')})")


def _from_checkpoint(options: argparse.Namespace, weights: Weights, history: History, generation: int) -> int:
    from mpies.run import checkpoint

    folder = Path(options.run_file).parent
    return checkpoint.restore(folder, weights, history.run_uuid, history.digest, generation)


def _report(history: History, digests: list[int]) -> int:
    wrong = [g + 1 for g, digest in enumerate(digests) if digest != int(history.digest[g])]
    print(f"{len(digests) - len(wrong)} of {len(digests)} generations' digests agree")
    if wrong:
        print(f"first generation that does not: {wrong[0]}")
    odd = [
        g + 1
        for g in range(len(digests))
        if not np.array_equal(history.coefficients(g), history.coefficient[g])
    ]
    if odd:
        print(f"logged coefficients do not follow from the rewards, first in generation {odd[0]}")
    return 1 if wrong or odd or history.damage.damaged else 0


@contextlib.contextmanager
def _progress(generations: int) -> Iterator[Callable[[float], None]]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = [
        TextColumn(f"replaying {generations} generations"),
        BarColumn(),
        TextColumn("{task.percentage:.0f} %, left"),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda share: bar.advance(task, share)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m mpies.replay",
        description=__doc__,
        epilog=EXIT_CODES,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("run_file", metavar="RUN.h5")
    parser.add_argument("--generation", metavar="G", help="a number, last (default) or best")
    parser.add_argument("--output", metavar="DIR", help="write that generation's model to this folder")
    parser.add_argument("--verify", action="store_true", help="recompute the digest of every generation")
    parser.add_argument("--model", metavar="PATH", help="the initial model; default: the run file's path")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: the run's")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    # Not everywhere is there a way to ask for the cores that this process may use.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--threads", type=int, default=cores, help="CPU threads (default: all)")
    return parser


if __name__ == "__main__":
    sys.exit(conduct_alone(main, sys.argv[1:]))
