"""A GPU that is pretended: tensors that say they are on it, and compute on the CPU.

They catch operations on tensors of both devices, as a real GPU does, and count what makes a GPU slow:
operations, each a launch, and waiting for results. `install` makes DEVICE known to this process, for good.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("privateuseone", 0)

# Operations that make another tensor of the same memory, or memory that nobody has written to: no launch.
VIEWS = """alias as_strided chunk detach diagonal expand lift_fresh narrow permute reshape _reshape_alias
    select slice split split_with_sizes squeeze t transpose unbind unfold _unsafe_view unsqueeze view
    view_as"""
EMPTY = "empty empty_like empty_strided new_empty new_empty_strided"
NO_LAUNCH = {*VIEWS.split(), *EMPTY.split()}
# The result, or its size, has to be known on the host.
WAITS = {
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "item",
    "masked_select",
    "nonzero",
    "_unique2",
    "bincount",
}
CHANGE_SHAPE = {"t_", "transpose_", "resize_", "set_", "squeeze_", "unsqueeze_"}
COPIES = {"_to_copy", "copy_"}
INDICES = {"index", "index_put_", "index_put", "_index_put_impl_"}  # may lie on the CPU: they are uploaded


class Counted:
    """What a GPU would have done."""

    def __init__(self) -> None:
        self.operations: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        """By the line of mpies that waits."""
        self.uploads: Counter[str] = Counter()
        """The same; those that wait are among the waits, too."""
        self.uploaded: Counter[torch.dtype] = Counter()
        """Bytes, by their dtype on the way."""


COUNTED = Counted()


class Stream:
    """A queue of the GPU's. Copies to it that are queued on another than the usual one are made when the
    usual one waits for them, and no earlier: what forgets to wait finds other values."""

    current: Stream

    def __init__(self, device: Any = None) -> None:
        self.queued: list[Callable[[], Any]] = []

    def record_event(self) -> Stream:
        return self

    def wait_stream(self, other: Stream) -> None:
        for work in other.queued:
            work()
        other.queued.clear()

    wait_event = wait_stream

    def synchronize(self) -> None:
        COUNTED.waits[place()] += 1


USUAL = Stream.current = Stream()


@contextmanager
def on_stream(stream: Stream) -> Iterator[None]:
    """torch.cuda.stream(...)."""
    Stream.current = stream
    try:
        yield
    finally:
        Stream.current = USUAL


STREAMS = {
    "Stream": Stream,
    "stream": on_stream,
    "current_stream": lambda device: Stream.current,
    "cudart": lambda: SimpleNamespace(cudaHostRegister=lambda place, size, flags: 0),
}


def place() -> str:
    """The line of mpies that is being executed, or of another library if none of mpies is."""
    frame, first = sys._getframe(2), ""
    while frame:
        name, line = frame.f_code.co_filename, frame.f_lineno
        if f"{os.sep}torch{os.sep}" not in name and name != __file__:
            first = first or f"{os.path.basename(name)}:{line}"
            if f"{os.sep}mpies{os.sep}" in name:
                return f"{name.split(f'{os.sep}mpies{os.sep}')[-1]}:{line}"
        frame = frame.f_back  # type: ignore[assignment]
    return first


def on_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE.type


def held(value: Any) -> Any:
    return value.held if isinstance(value, OnGpu) else value


def outline_of(cls: type[torch.Tensor], tensor: torch.Tensor) -> Any:
    """A tensor of that class which says it is on the GPU, as large as the other, and holds nothing."""
    with torch.utils._python_dispatch._disable_current_modes(), torch._C.DisableTorchFunction():
        outline = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        # As torch's own FakeTensor does it.
        return make_subclass(cls, outline, False, dispatch_device=True, device_for_backend_keys=DEVICE)


make_subclass = torch.Tensor._make_subclass


class OnGpu(torch.Tensor):
    """A tensor on the pretended GPU; `held` has its values, on the CPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, tensor: torch.Tensor):
        made = outline_of(cls, tensor)
        made.held = tensor
        return made

    def __repr__(self, **_):
        return f"OnGpu({self.held!r})"

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def numpy(self, *_, **__):
        raise TypeError("can't convert a tensor on a GPU to numpy. Use Tensor.cpu() first")

    def record_stream(self, stream: Stream) -> None:
        assert isinstance(stream, Stream)

    def tolist(self):
        COUNTED.waits[place()] += 1
        return self.held.tolist()

    def cpu(self):
        return self.to("cpu")

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        if not isinstance(value, OnGpu):
            raise RuntimeError("a parameter on the GPU is given data on the CPU")
        torch._C._TensorBase.data.__set__(self, value)
        self.held = value.held

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return DEVICE
        name = func._schema.name.split("::")[1]
        if name in CHANGE_SHAPE:
            raise NotImplementedError(name)
        refuse_mixed(name, args, kwargs)
        if name in COPIES:
            return copied(func, name, args, kwargs)
        if name in WAITS:
            COUNTED.waits[place()] += 1
        elif name not in NO_LAUNCH:
            COUNTED.operations[name] += 1
        wanted = kwargs.get("device")
        if on_gpu(wanted):
            kwargs = {**kwargs, "device": torch.device("cpu")}
        given = tree_map(held, args)
        if name == "histc" and not given[0].is_floating_point():  # which GPUs take, and CPUs do not
            return OnGpu(func(given[0].float(), *given[1:]).to(given[0].dtype))
        with launching_on_held(func.namespace):
            made = func(*given, **tree_map(held, kwargs))
        if func._schema.is_mutable and args and made is held(args[0]):
            return args[0]
        return made if wanted is not None and not on_gpu(wanted) else tree_map(wrapped, made)


@contextmanager
def launching_on_held(namespace: str) -> Iterator[None]:
    """Operations of our own launch kernels, here on what tensors of the GPU hold."""
    if namespace != "mpies":
        yield
        return
    from triton.runtime import driver

    before, driver.active.takes_cpu = driver.active.takes_cpu, True
    try:
        yield
    finally:
        driver.active.takes_cpu = before


def wrapped(value: Any) -> Any:
    return OnGpu(value) if isinstance(value, torch.Tensor) and not isinstance(value, OnGpu) else value


def refuse_mixed(name: str, args: Any, kwargs: Any) -> None:
    """As torch does: only numbers, indices and what is copied may lie on the CPU."""
    if name in INDICES:
        count_upload(sum(tensor.nbytes for tensor in on_cpu(args[1])), torch.int64, waits=True)
        args = (args[0], *args[2:])
    if on_cpu((args, kwargs)) and name not in COPIES:
        raise RuntimeError(f"Expected all tensors to be on the same device: {name} got some on the CPU")


def on_cpu(values: Any) -> list[torch.Tensor]:
    tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]
    return [tensor for tensor in tensors if not isinstance(tensor, OnGpu) and tensor.dim()]


def count_upload(size: int, dtype: torch.dtype, waits: bool) -> None:
    if not size:
        return
    line = place()
    COUNTED.uploads[line] += 1
    COUNTED.uploaded[dtype] += size
    if waits:
        COUNTED.waits[line] += 1


def copied(func, name: str, args: Any, kwargs: Any) -> Any:
    """A copy within the GPU, to it, or from it. To it, a blocking copy is converted on the CPU before."""
    source = args[1] if name == "copy_" else args[0]
    target = isinstance(args[0], OnGpu) if name == "copy_" else on_gpu(kwargs.get("device", source.device))
    blocking = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
    if isinstance(source, OnGpu) and target:
        COUNTED.operations[name] += 1
    elif isinstance(source, OnGpu):
        if blocking:
            COUNTED.waits[place()] += 1
    elif target and source.dim():
        dtype = (args[0].dtype if name == "copy_" else kwargs.get("dtype")) if blocking else source.dtype
        dtype = dtype or source.dtype
        count_upload(source.numel() * dtype.itemsize, dtype, blocking)
    if name == "copy_":
        work = partial(func, *tree_map(held, args), **tree_map(held, kwargs))
        if Stream.current is USUAL or blocking:
            work()
        else:
            Stream.current.queued.append(work)
        return args[0]
    made = func(*tree_map(held, args), **{key: value for key, value in kwargs.items() if key != "device"})
    return OnGpu(made) if target else made


class Torch(TorchFunctionMode):
    """What torch's functions do with the device, where no tensor is on it yet."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        for one in args:
            if isinstance(one, torch.Tensor) and type(one) not in (torch.Tensor, torch.nn.Parameter, OnGpu):
                with self:  # of a class with rules of its own, whose tensors are on the GPU
                    return type(one).__torch_function__(func, types, args, kwargs)
        if func is functional.scaled_dot_product_attention:
            return attention(func, args, kwargs)
        if name in ("__getitem__", "__setitem__") and isinstance(args[0], OnGpu):
            args = (args[0], indices(args[1]), *args[2:])
        if name == "to" and isinstance(args[0], torch.Tensor):
            return moved(func, args, kwargs)
        if name == "_has_compatible_shallow_copy_type" and isinstance(args[0], OnGpu) != isinstance(
            args[1], OnGpu
        ):
            return False  # Module.to asks: there the new tensor replaces the old one
        if name in CAST and isinstance(args[0], OnGpu):
            return (
                args[0] if args[0].dtype == CAST[name] else moved(torch.Tensor.to, (args[0], CAST[name]), {})
            )
        if (
            name != "_parse_to"
            and on_gpu(kwargs.get("device"))
            and not any(isinstance(leaf, OnGpu) for leaf in tree_leaves(args))
        ):
            made = func(*args, **{**kwargs, "device": "cpu"})
            if name in ("tensor", "as_tensor"):
                count_upload(made.nbytes, made.dtype, waits=True)
            elif name not in NO_LAUNCH:
                COUNTED.operations[name] += 1
            return OnGpu(made)
        return func(*args, **kwargs)


def indices(given: Any) -> Any:
    """Lists as tensors on the CPU, as which they are uploaded."""
    if isinstance(given, tuple):
        return tuple(torch.tensor(part) if isinstance(part, list) else part for part in given)
    return torch.tensor(given) if isinstance(given, list) else given


CAST = {"float": torch.float32, "double": torch.float64, "long": torch.int64, "int": torch.int32}


def attention(func, args, kwargs) -> torch.Tensor:
    """One operation, as it is on a GPU."""
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    if not any(isinstance(tensor, OnGpu) for tensor in given):
        return func(*args, **kwargs)
    refuse_mixed("attention", args, kwargs)
    COUNTED.operations["attention"] += 1
    with torch._C.DisableTorchFunction():
        return OnGpu(func(*tree_map(held, args), **tree_map(held, kwargs)))


def moved(func, args, kwargs) -> torch.Tensor:
    """tensor.to(...)."""
    tensor, *rest = args
    device = kwargs.get(
        "device", next((a for a in rest if isinstance(a, (str, torch.device))), tensor.device)
    )
    dtype = (
        kwargs.get("dtype", next((a for a in rest if isinstance(a, torch.dtype)), tensor.dtype))
        or tensor.dtype
    )
    device = tensor.device if device is None else torch.device(device)
    if device.type == tensor.device.type and dtype == tensor.dtype and not kwargs.get("copy"):
        return tensor
    if not on_gpu(device) and not isinstance(tensor, OnGpu):
        return func(*args, **kwargs)
    options = {"dtype": dtype, "device": device, "non_blocking": bool(kwargs.get("non_blocking"))}
    return copied(torch.ops.aten._to_copy.default, "_to_copy", (tensor,), options)


def set_data(parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
    """parameter.data = value, where one is on the GPU: torch would refuse, as they are of two classes."""
    if isinstance(value, OnGpu):
        torch.utils.swap_tensors(parameter, torch.nn.Parameter(value, requires_grad=False))
    else:
        torch._C._TensorBase.data.__set__(parameter, value)


def make_own(cls: Any, data: torch.Tensor, requires_grad: bool = False, **kwargs: Any) -> Any:
    """Tensor._make_subclass: of a tensor on the GPU, what is on the GPU as well, and holds nothing."""
    if isinstance(data, OnGpu) and not kwargs:
        return outline_of(cls, data)
    return make_subclass(cls, data, requires_grad, **kwargs)


def install() -> None:
    torch.Tensor._make_subclass = staticmethod(make_own)
    backend_registration._setup_privateuseone_for_python_backend()
    for name, stand_in in STREAMS.items():
        setattr(torch.cuda, name, stand_in)
    torch.nn.Parameter.data = property(torch._C._TensorBase.data.__get__, set_data)


@contextmanager
def counting() -> Iterator[Counted]:
    """Count anew; what is done with the GPU has to be within."""
    global COUNTED
    COUNTED = Counted()
    # As while decoding, everywhere: torch has tensors of two kinds, and here they do not go together.
    with torch.inference_mode(), Torch():
        yield COUNTED
