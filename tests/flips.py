"""The attack: flip single bits of a finished run's file, and see whether what is read then is named.

    make torture FLIPS=200

Each flip is tried on a copy: `mpies.replay --verify`, then the same training command again. If it changes a
committed value, or makes the file unreadable, both have to say so in a line, without a traceback, and leave
the file as it is. If it changes nothing that counts, both have to work. Most of a small file is HDF5's own,
and room for more rows, so half of the bits are of bytes that hold values, and half of any byte. The last line
gives the figures; exit code 0 only if all held.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import h5py

from mpies.runfile.schema import ALL_TABLES, PER_GENERATION

GENERATIONS = 12
SETTINGS = """
model: {path: MODEL, dtype: float32, device: cpu}
es: {population: 6, generations: GENERATIONS, sigma: 0.05, alpha: 0.02}
engine: {max_new_tokens: 4}
run: {evaluate_every: 4, progress: lines}
"""


@dataclass(frozen=True)
class Tried:
    place: str
    kind: str
    """unchanged, changed, or unreadable."""
    problem: str
    """What did not hold; empty: all did."""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
    )


def content(path: Path) -> dict[str, str]:
    """Every attribute and every committed value, by where it is."""
    found = {}
    with h5py.File(path, "r", locking=False) as file:
        count = int(file.attrs["generations_committed"])
        found |= {f"@{name}": repr(value) for name, value in file.attrs.items()}

        for table in ("config", *ALL_TABLES.keys() & file.keys()):
            rows = slice(count) if table in PER_GENERATION else ()
            for name, data in file[table].items():
                found[f"{table}/{name}"] = repr(data[rows].tolist() if data.shape else data[()])
    return found


def value_bytes(path: Path) -> list[int]:
    """Where in the file the committed values of all tables are."""
    found: list[int] = []
    with h5py.File(path, "r", locking=False) as file:
        count = int(file.attrs["generations_committed"])
        for table in ALL_TABLES.keys() & file.keys():
            for data in file[table].values():
                rows = count if table in PER_GENERATION else len(data)
                width = data.dtype.itemsize * math.prod(data.shape[1:])
                chunks = [data.id.get_chunk_info(i) for i in range(data.id.get_num_chunks())]
                for chunk in chunks:
                    held = min(rows - chunk.chunk_offset[0], data.chunks[0])
                    found += range(chunk.byte_offset, chunk.byte_offset + width * max(0, held))
    return found


def choose_bits(path: Path, count: int, seed: int) -> list[int]:
    """Different bits of a file, half of them of bytes that hold values."""
    values = [8 * byte + bit for byte in value_bytes(path) for bit in range(8)]
    draw = random.Random(seed)
    chosen = draw.sample(values, count // 2)
    others = sorted(set(range(8 * path.stat().st_size)) - set(chosen))
    return chosen + draw.sample(others, count - len(chosen))


def flip(path: Path, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def seen(path: Path) -> str | None:
    """A hash of the content, read by a process of its own, since HDF5 may crash or hang; None: unreadable."""
    code = "import flips, sys, pathlib; print(hash(str(flips.content(pathlib.Path(sys.argv[1])))))"
    here = Path(__file__).parent
    folders = os.pathsep.join(str(folder) for folder in (here, here / "helpers", here.parent))
    environment = {**os.environ, "PYTHONPATH": folders, "PYTHONHASHSEED": "0"}
    command = [sys.executable, "-c", code, str(path)]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    except subprocess.TimeoutExpired:
        return None
    return None if ended.returncode else ended.stdout


def said(ended: subprocess.CompletedProcess[str]) -> str:
    return f"exit {ended.returncode}: {(ended.stdout + ended.stderr).strip()[-400:]}"


def judge(path: Path, kind: str, command: list[str]) -> str:
    """What does not hold of the two commands; empty: all does."""
    before = path.read_bytes()
    for name, words in (
        ("verify", ["mpies.replay", str(path), "--verify"]),
        ("resume", ["mpies.train", *command, f"run.directory={path.parent}"]),
    ):
        try:
            ended = run(*words)
        except subprocess.TimeoutExpired:
            return f"{name} hangs"
        text = ended.stdout + ended.stderr
        if "Traceback" in text or ended.returncode < 0:
            return f"{name} crashes: {said(ended)}"
        if kind == "unchanged" and ended.returncode and "damaged" not in text:
            return f"{name} fails though nothing is changed: {said(ended)}"
        if kind != "unchanged" and not ((ended.returncode and "mpies: " in text) or "not counted" in text):
            return f"{name} does not name it: {said(ended)}"
        if ended.returncode and path.read_bytes() != before:
            return f"{name} has changed the file that it refused: {said(ended)}"
    return ""


def attempt(folder: Path, finished: Path, whole: str, bit: int, command: list[str]) -> Tried:
    place = folder / f"bit-{bit}"
    place.mkdir()
    path = Path(shutil.copy(finished, place))
    flip(path, bit)
    found = seen(path)
    kind = "unreadable" if found is None else "unchanged" if found == whole else "changed"
    tried = Tried(f"byte {bit // 8}, bit {bit % 8}", kind, judge(path, kind, command))
    shutil.rmtree(place)
    return tried


def finished_run(folder: Path, config: Path) -> Path:
    """A finished run's file."""
    import tiny  # with torch, which the many processes of `seen` do without

    model = tiny.save_model(folder / "model")
    settings = SETTINGS.replace("MODEL", str(model)).replace("GENERATIONS", str(GENERATIONS))
    config.write_text(settings.replace("run: {", f"run: {{directory: {folder / 'run'}, "))
    ended = run("mpies.train", str(config))
    assert ended.returncode == 0, said(ended)
    return folder / "run" / "run.h5"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flips", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-once", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [str(folder / "settings.yaml")]
        finished = finished_run(folder, Path(*command))
        whole = seen(finished)
        assert whole
        bits = choose_bits(finished, options.flips, options.seed)
        with ThreadPoolExecutor(options.at_once) as pool:
            tried = []
            for one in pool.map(lambda bit: attempt(folder, finished, whole, bit, command), bits):
                tried.append(one)
                mark = f" PROBLEM: {one.problem}" if one.problem else ""
                print(f"{len(tried)} of {options.flips}: {one.place}: {one.kind}{mark}", flush=True)
    problems = [one for one in tried if one.problem]
    kinds = Counter(one.kind for one in tried)
    print(
        f"{options.flips} bits flipped (seed {options.seed}): {kinds['changed']} changed what is read,"
        f" {kinds['unreadable']} made it unreadable, {kinds['unchanged']} changed nothing;"
        f" {len(problems)} were not told as they should be"
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
