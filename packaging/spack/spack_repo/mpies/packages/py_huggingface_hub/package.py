"""Spack's own package, with a version for transformers 5.4, until Spack has one."""

from spack.package import default_args, depends_on, version
from spack_repo.builtin.packages.py_huggingface_hub.package import PyHuggingfaceHub as BuiltinHub


class PyHuggingfaceHub(BuiltinHub):
    version("1.5.0", sha256="f281838db29265880fb543de7a23b0f81d3504675de82044307ea3c6c62f799d")

    with default_args(type=("build", "run"), when="@1:"):
        depends_on("py-filelock@3.10:")
        depends_on("py-hf-xet@1.2:1")
        depends_on("py-httpx@0.23:0")
        depends_on("py-typer")
        depends_on("py-typing-extensions@4.1:")
