"""An emulator of PTX, NVIDIA's assembly language, in NumPy: all threads of many blocks at a time.

It knows what Triton makes of this program's kernels, and raises `Refused` at everything else: at fused
or approximate arithmetic above all, at an access outside of the tensors that a kernel was given, at one that
is not aligned, and at threads of which only some take a branch. Floats are NumPy's: each operation rounded
once, to nearest even, subnormals kept. What ptxas and the chip make of PTX is beyond it.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np
import torch

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
WIDTHS = {"%p": 1, "%rs": 16, "%r": 32, "%rd": 64, "%f": 32, "%fd": 64}
AT_ONCE = 2**17  # threads
SHARED = 2**16  # bytes of a block's shared memory

COMPARE = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
    "neu": lambda a, b: ~(a == b),
}


def truncated(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, towards zero."""
    return (np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))).astype(a.dtype)


FLOATS = {"add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv}
# Of unsigned or, where the type is signed, signed integers of the type's width.
INTEGERS: dict[str, Callable[..., np.ndarray]] = {
    "add": operator.add,
    "sub": operator.sub,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "not": operator.invert,
    "neg": operator.neg,
    "min": np.minimum,
    "max": np.maximum,
    "mul.lo": operator.mul,
    "div": truncated,
    "rem": lambda a, b: a - truncated(a, b) * b,
    "mad.lo": lambda a, b, c: a * b + c,
}


def to_bfloat16(value: np.ndarray) -> np.ndarray:
    """float32 rounded to nearest even: bits, uint16."""
    bits = value.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(value), bits >> np.uint32(16) | np.uint32(0x40), rounded).astype(np.uint16)


# Halves: from their bits to float32, which holds each of them and the product of any two, and back.
WIDEN = {
    "f16": lambda bits: bits.view(np.float16).astype(np.float32),
    "bf16": lambda bits: (bits.astype(np.uint32) << np.uint32(16)).view(np.float32),
}
NARROW = {"f16": lambda value: value.astype(np.float16).view(np.uint16), "bf16": to_bfloat16}


class Refused(Exception):
    """The emulator does not know this, or the program must not do it."""


@dataclass(frozen=True)
class Instruction:
    guard: str | None
    """The predicate that it is executed under, with ! before it if that has to be false."""
    name: str
    operands: list[str]

    @property
    def parts(self) -> list[str]:
        return self.name.split(".")

    @property
    def type(self) -> str:
        return self.parts[-1]

    def __str__(self) -> str:
        return f"{self.guard or ''} {self.name} {', '.join(self.operands)}".strip()


class Memory:
    """The memory of tensors on the CPU, each in its own bounds, by addresses."""

    def __init__(self, tensors: Sequence[torch.Tensor]):
        self._regions = []
        for tensor in tensors:
            if tensor.numel() and not tensor.is_contiguous():
                raise Refused("a kernel is given a tensor that is not contiguous")
            if tensor.numel():
                self._regions.append((tensor.data_ptr(), tensor.view(-1).view(torch.uint8).numpy()))

    def find(self, addresses: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """A tensor as unsigned integers of `size` bytes, and the places of addresses uint64 (n,) in it."""
        low, high = int(addresses.min()), int(addresses.max())
        for start, raw in self._regions:
            if start <= low < start + raw.size:
                if high + size > start + raw.size:
                    raise Refused(f"an access {high + size - start - raw.size} bytes beyond a tensor")
                # A view may begin at an odd element: places are counted from an aligned one.
                whole = raw[: raw.size // size * size].view(UNSIGNED[8 * size])
                return whole, ((addresses - np.uint64(start)) // np.uint64(size)).astype(np.int64)
        raise Refused("an access outside of all tensors")


class Program:
    """A kernel, from its PTX."""

    def __init__(self, text: str):
        text = re.sub(r"//.*", "", text)
        entry = re.search(r"\.visible \.entry (\w+)\((.*?)\)(.*?)\{(.*)\n\}", text, re.DOTALL)
        if not entry:
            raise Refused("no kernel in it")
        self.name, parameters, head, body = entry.groups()
        self.parameters = re.findall(r"\.param (\.\w+)[^,]*?(\w+_param_\d+)", parameters)
        self.threads = int(re.search(r"\.reqntid (\d+)", head)[1])  # type: ignore[index]
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        for line in re.split(r"[;\n]", body):
            self._read(line.strip())

    def _read(self, line: str) -> None:
        if label := re.fullmatch(r"(\$\w+):", line):
            self.labels[label[1]] = len(self.instructions)
        elif found := re.fullmatch(r"(?:@(!?%p\d+)\s+)?([a-z][\w.:]*)\s*(.*)", line):
            guard, name, rest = found.groups()
            operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", rest)
            name = name.replace("shared::cta", "shared")  # as Triton 3.8 calls it
            self.instructions.append(Instruction(guard, name, [operand.strip() for operand in operands]))
        elif not re.match(r"$|\{|\}|\.(reg|loc|section|file|pragma|shared)", line):
            raise Refused(line)

    def run(
        self,
        grid: tuple[int, int, int],
        arguments: Sequence[int | float],
        memory: Memory,
        only: slice = slice(None),
    ) -> None:
        """Run the grid's programs, or those that `only` takes of them, on `memory`; tensors are addresses."""
        given = {}
        for (kind, name), value in zip(self.parameters, [*arguments, 0, 0]):  # two of Triton's own, unused
            bits = int(np.float32(value).view(np.uint32)) if kind == ".f32" else int(value)
            given[name] = bits % 2**64
        numbers = np.arange(*only.indices(int(np.prod(grid))), dtype=np.int64)
        step = max(1, AT_ONCE // self.threads)
        with np.errstate(all="ignore"):
            for first in range(0, len(numbers), step):
                Blocks(self, numbers[first : first + step], grid, given, memory).run()


class Blocks:
    """Blocks of a running kernel. A register's value is an array that broadcasts to (blocks, threads)."""

    def __init__(self, program: Program, numbers: np.ndarray, grid, given: dict[str, int], memory: Memory):
        self.program, self.given, self.memory = program, given, memory
        self.shape = len(numbers), program.threads
        self.registers: dict[str, np.ndarray] = {
            "%tid.x": np.arange(program.threads, dtype=np.uint32)[None],
            "%ctaid.x": (numbers % grid[0]).astype(np.uint32)[:, None],
            "%ctaid.y": (numbers // grid[0] % grid[1]).astype(np.uint32)[:, None],
            "%ctaid.z": (numbers // grid[0] // grid[1]).astype(np.uint32)[:, None],
            "%nctaid.x": np.array([[grid[0]]], np.uint32),
        }
        self.shared = np.zeros((len(numbers), SHARED), np.uint8)

    def run(self, place: int = 0) -> None:
        """From an instruction on to the end."""
        while True:
            instruction = self.program.instructions[place]
            place += 1
            kind = instruction.parts[0]
            if kind not in ("ret", "bra"):
                self.execute(instruction)
                continue
            taken = self.taking(instruction)
            if taken.any() and not taken.all():  # each goes its own way from here
                self.part(~taken).run(place)
                self.part(taken).run(place - 1)
                return
            if taken.all() and kind == "ret":
                return
            if taken.all():
                place = self.program.labels[instruction.operands[0]]

    def taking(self, instruction: Instruction) -> np.ndarray:
        """Which blocks take a branch, (blocks,): a block's threads all do, or none."""
        executing = self.executing(instruction)
        threads = np.broadcast_to(True if executing is None else executing, self.shape)
        if (threads.any(axis=1) != threads.all(axis=1)).any():
            raise Refused(f"only some threads of a block take a branch: {instruction}")
        return threads.all(axis=1)

    def part(self, chosen: np.ndarray) -> Blocks:
        """Some of the blocks, as they are now."""
        made = copy(self)
        made.shape = int(chosen.sum()), self.shape[1]
        made.shared = self.shared[chosen]
        made.registers = {
            name: value if value.shape[0] == 1 else value[chosen] for name, value in self.registers.items()
        }
        return made

    def executing(self, instruction: Instruction) -> np.ndarray | None:
        """Which threads execute it; None: all."""
        if instruction.guard is None:
            return None
        value = self.registers[instruction.guard.removeprefix("!")]
        return ~value if instruction.guard.startswith("!") else value

    def execute(self, instruction: Instruction) -> None:
        kind, operands = instruction.parts[0], instruction.operands
        special = getattr(self, f"do_{kind}", None)
        if special:
            special(instruction)
        elif instruction.type in ("f32", "f32x2"):
            self.write(operands[0], self.floats(instruction), instruction)
        elif instruction.type.removesuffix("x2") in WIDEN:
            self.write(operands[0], self.halves(instruction), instruction)
        elif instruction.type == "pred":
            a = [self.registers[operand] for operand in operands[1:]]
            self.write(operands[0], INTEGERS[kind](*a), instruction)
        else:
            self.write(operands[0], self.integers(instruction), instruction)

    def read(self, operand: str, bits: int) -> np.ndarray:
        """An operand's value: unsigned integers of so many bits; booleans of a predicate."""
        if operand in self.registers:
            value = self.registers[operand]
            return value if bits == 1 else value.astype(UNSIGNED[bits], copy=False)
        if operand == "global_smem":
            return np.zeros((1, 1), UNSIGNED[bits])
        if operand.startswith("0f"):
            return np.array([[int(operand[2:], 16)]], np.uint32)
        if re.fullmatch(r"-?(0x)?[0-9a-fA-F]+", operand):
            return np.array([[int(operand, 0) % 2**bits]], UNSIGNED[bits])
        if bits > 1 and re.fullmatch(r"%(r|rs|rd)\d+", operand):
            # Never written, as a lane that nobody looks at: a NaN, that it may be seen if somebody does.
            return np.full((1, 1), 0x7FF57FF57FF57FF5 & (2**bits - 1), UNSIGNED[bits])
        raise Refused(f"operand {operand}")

    def write(self, register: str, value: np.ndarray, instruction: Instruction) -> None:
        if register == "_":
            return
        width = WIDTHS[re.sub(r"\d+$", "", register)]
        value = value if width == 1 else value.astype(UNSIGNED[width], copy=False)
        executing = self.executing(instruction)
        if executing is not None:
            value = np.where(executing, value, self.registers.get(register, np.zeros_like(value)))
        self.registers[register] = value

    # Arithmetic

    def floats(self, instruction: Instruction) -> np.ndarray:
        kind, *how, form = instruction.parts
        if instruction.name == "sqrt.rn.f32":
            return np.sqrt(self.read(instruction.operands[1], 32).view(np.float32)).view(np.uint32)
        if how != ["rn"] or kind not in FLOATS:
            raise Refused(str(instruction))
        bits = 64 if form == "f32x2" else 32  # two floats in a register
        given = np.broadcast_arrays(*(self.read(operand, bits) for operand in instruction.operands[1:]))
        a, b = (np.ascontiguousarray(value).view(np.float32) for value in given)
        return FLOATS[kind](a, b).view(UNSIGNED[bits])

    def halves(self, instruction: Instruction) -> np.ndarray:
        """A product of halves, or the sum of a half and a float32."""
        _, a, b, *c = instruction.operands
        form = instruction.type.removesuffix("x2")
        if instruction.name == f"add.rn.f32.{form}":
            return (WIDEN[form](self.read(a, 16)) + self.read(b, 32).view(np.float32)).view(np.uint32)
        bits = 32 if instruction.type.endswith("x2") else 16
        a, b, *c = np.broadcast_arrays(*(self.read(operand, bits) for operand in (a, b, *c)))
        a, b, *c = (np.ascontiguousarray(value).view(np.uint16) for value in (a, b, *c))
        if instruction.parts[:2] == ["mul", "rn"] or (
            instruction.parts[:2] == ["fma", "rn"]
            and (c[0] == 0x8000).all()  # minus zero, which adds nothing
        ):
            return NARROW[form](WIDEN[form](a) * WIDEN[form](b)).view(UNSIGNED[bits])
        raise Refused(str(instruction))

    def integers(self, instruction: Instruction) -> np.ndarray:
        kind, *how, form = instruction.parts
        name = f"{kind}.{how[0]}" if how else kind
        bits = int(form[1:])
        if name in ("mul.wide", "mad.wide"):
            a, b = (self.signed_or_not(o, form).astype(np.int64) for o in instruction.operands[1:3])
            product = (a * b).view(np.uint64)
            return product + self.read(instruction.operands[3], 64) if kind == "mad" else product
        if instruction.name == "mul.hi.u32":
            a, b = (self.read(o, 32).astype(np.uint64) for o in instruction.operands[1:])
            return a * b >> np.uint64(32)
        if name not in INTEGERS:
            raise Refused(str(instruction))
        a = [self.signed_or_not(operand, form) for operand in instruction.operands[1:]]
        return INTEGERS[name](*a).view(UNSIGNED[bits])

    def signed_or_not(self, operand: str, form: str) -> np.ndarray:
        value = self.read(operand, int(form[1:]))
        return value.view(SIGNED[int(form[1:])]) if form[0] == "s" else value

    def do_shl(self, instruction: Instruction) -> None:
        target, a, count = instruction.operands
        bits = int(instruction.type[1:])
        distance = self.read(count, 32)
        value = self.read(a, bits) << np.minimum(distance, bits - 1).astype(UNSIGNED[bits])
        self.write(target, np.where(distance < bits, value, UNSIGNED[bits](0)), instruction)

    def do_shr(self, instruction: Instruction) -> None:
        target, a, count = instruction.operands
        bits = int(instruction.type[1:])
        value, distance = self.signed_or_not(a, instruction.type), self.read(count, 32)
        shifted = value >> np.minimum(distance, bits - 1).astype(value.dtype)
        if value.dtype.kind == "u":
            shifted = np.where(distance < bits, shifted, value.dtype.type(0))
        self.write(target, shifted.view(UNSIGNED[bits]), instruction)

    def do_bfe(self, instruction: Instruction) -> None:
        """`length` bits from `place` on, with the sign of their first if they are signed."""
        target, a, place, length = instruction.operands
        bits, place, length = int(instruction.type[1:]), int(place, 0), int(length, 0)
        value = self.signed_or_not(a, instruction.type)
        value = (value << (bits - place - length)) >> (bits - length)
        self.write(target, value.view(UNSIGNED[bits]), instruction)

    def do_setp(self, instruction: Instruction) -> None:
        target, *operands = instruction.operands
        _, how, form = instruction.parts
        if form == "f32":
            a, b = (self.read(operand, 32).view(np.float32) for operand in operands)
        else:
            a, b = (self.signed_or_not(operand, form) for operand in operands)
        self.write(target, COMPARE[how](a, b), instruction)

    def do_selp(self, instruction: Instruction) -> None:
        target, a, b, choice = instruction.operands
        bits = int(instruction.type[1:])
        chosen = np.where(self.registers[choice], self.read(a, bits), self.read(b, bits))
        self.write(target, chosen, instruction)

    def do_cvt(self, instruction: Instruction) -> None:
        target, *sources = instruction.operands
        source = sources[-1]
        _, *how, to, of = instruction.parts
        if (
            how == ["rn"] and of == "f32" and to.removesuffix("x2") in NARROW
        ):  # one, or the upper and the lower
            narrow = NARROW[to.removesuffix("x2")]
            parts = [narrow(self.read(each, 32).view(np.float32)) for each in reversed(sources)]
            value = sum(part.astype(np.uint32) << np.uint32(16 * i) for i, part in enumerate(parts))
        elif not how and to == "f32" and of in WIDEN:
            value = WIDEN[of](self.read(source, 16)).view(np.uint32)
        elif how or to[0] not in "us" or of[0] not in "us":
            raise Refused(str(instruction))
        else:
            value = self.signed_or_not(source, of)
            value = value.astype((SIGNED if of[0] == "s" else UNSIGNED)[int(to[1:])]).view(
                UNSIGNED[int(to[1:])]
            )
        self.write(target, value, instruction)

    # Moving: between registers, threads and memories

    def do_mov(self, instruction: Instruction) -> None:
        target, source = instruction.operands
        if instruction.type == "pred":
            known = {"0": np.array([[False]]), "-1": np.array([[True]])}
            self.write(target, known.get(source, self.registers.get(source)), instruction)
            return
        bits = int(instruction.type[1:])
        if target.startswith("{"):
            names = listed(target)
            value, width = self.read(source, bits), bits // len(names)
            for i, name in enumerate(names):
                self.write(name, value >> UNSIGNED[bits](width * i), instruction)
        elif source.startswith("{"):
            names = listed(source)
            width = bits // len(names)
            parts = [self.read(name, width).astype(UNSIGNED[bits]) for name in names]
            value = sum((part << UNSIGNED[bits](width * i) for i, part in enumerate(parts[1:], 1)), parts[0])
            self.write(target, value, instruction)
        else:
            self.write(target, self.read(source, bits), instruction)

    def do_shfl(self, instruction: Instruction) -> None:
        """Each thread gets the value of the thread whose number differs in the bits of `lane`."""
        target, source, lane, *_ = instruction.operands
        if instruction.parts[2] != "bfly":
            raise Refused(str(instruction))
        warps = np.broadcast_to(self.read(source, 32), self.shape).reshape(self.shape[0], -1, 32)
        value = warps[:, :, np.arange(32) ^ int(lane, 0)].reshape(self.shape)
        self.write(target.split("|")[0], value, instruction)

    def do_redux(self, instruction: Instruction) -> None:
        target, source, _ = instruction.operands
        if instruction.name not in ("redux.sync.add.s32", "redux.sync.add.u32"):
            raise Refused(str(instruction))
        warps = np.broadcast_to(self.read(source, 32), self.shape).reshape(self.shape[0], -1, 32)
        self.write(target, np.repeat(warps.sum(-1, dtype=np.uint32), 32, axis=1), instruction)

    def do_ldmatrix(self, instruction: Instruction) -> None:
        """Matrices of 8 x 8 halves from shared memory into registers."""
        names, address = listed(instruction.operands[0]), instruction.operands[1]
        blocks, places = self.places_in_matrices(instruction, address, len(names))
        low, high = np.moveaxis(self.shared.view(np.uint16)[blocks, places].astype(np.uint32), -1, 0)
        for i, name in enumerate(names):
            self.write(name, (low | high << np.uint32(16))[:, :, i].reshape(self.shape), instruction)

    def do_stmatrix(self, instruction: Instruction) -> None:
        """And back."""
        address, names = instruction.operands[0], listed(instruction.operands[1])
        blocks, places = self.places_in_matrices(instruction, address, len(names))
        values = [np.broadcast_to(self.read(name, 32), self.shape) for name in names]
        words = np.stack([value.reshape(self.shape[0], -1, 32) for value in values], axis=2)
        halves = np.stack([words, words >> np.uint32(16)], axis=-1).astype(np.uint16)
        self.shared.view(np.uint16)[blocks, places] = halves

    def places_in_matrices(
        self, instruction: Instruction, address: str, count: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Blocks, and where in their shared memory each thread's two halves of each matrix are.

        Both (blocks, warps, count, 32, 2). Thread 8 m + r has the address of row r of matrix m. Thread
        4 r + c gets columns 2 c and 2 c + 1 of row r, or, transposed, the same of the transposed matrix.
        """
        form = re.fullmatch(r"\w+\.sync\.aligned\.m8n8\.x(\d)(\.trans)?\.shared\.b16", instruction.name)
        if not form or int(form[1]) != count:
            raise Refused(str(instruction))
        starts = np.broadcast_to(self.address(address), self.shape)
        starts = starts.reshape(self.shape[0], -1, 32)[:, :, : 8 * count].reshape(self.shape[0], -1, count, 8)
        if (starts % np.uint64(16)).any():
            raise Refused(f"a matrix that is not aligned: {instruction}")
        row, column = np.divmod(np.arange(64), 8)
        row, column = (a.reshape(32, 2) for a in ((column, row) if form[2] else (row, column)))
        places = starts[..., row].astype(np.int64) // 2 + column
        return np.arange(self.shape[0])[:, None, None, None, None], places

    def do_bar(self, instruction: Instruction) -> None:
        """All threads are at one instruction always."""

    def do_ld(self, instruction: Instruction) -> None:
        target, source = instruction.operands
        if instruction.parts[1] == "param":
            found = re.fullmatch(r"\[(\w+)\]", source)
            bits = int(instruction.type[1:])
            value = np.array([[self.given[found[1]] % 2**bits]], UNSIGNED[bits])  # type: ignore[index]
            self.write(target, value, instruction)
            return
        for register, memory, places, executing in self.accesses(instruction, source, target):
            value = np.zeros(self.shape, memory.dtype)
            value[executing] = memory[places]
            self.write(register, value, instruction)

    def do_st(self, instruction: Instruction) -> None:
        target, source = instruction.operands
        for register, memory, places, executing in self.accesses(instruction, target, source):
            value = self.read(register, memory.itemsize * 8)
            memory[places] = np.broadcast_to(value, self.shape)[executing]

    def do_atom(self, instruction: Instruction) -> None:
        if not re.fullmatch(r"(atom|red)\.global\.gpu\.\w+\.add\.u64", instruction.name):
            raise Refused(str(instruction))
        *_, target, source = instruction.operands
        plain = Instruction(instruction.guard, "atom.global.b64", [])
        for register, memory, places, executing in self.accesses(plain, target, source):
            value = np.broadcast_to(self.read(register, 64), self.shape)[executing]
            np.add.at(memory, places, value)  # what was there before is not told: nobody asks

    do_red = do_atom

    def address(self, operand: str) -> np.ndarray:
        """[%rd1 + 16]: uint64."""
        found = re.fullmatch(r"\[\s*(%?\w+)\s*(?:\+\s*(-?\w+))?\s*\]", operand)
        return self.read(found[1], 64) + np.uint64(int(found[2] or "0", 0) % 2**64)  # type: ignore[index]

    def accesses(self, instruction: Instruction, address: str, registers: str):
        """(register, memory, its places, threads (blocks, threads)) for every register of an access."""
        space, size = instruction.parts[1], int(instruction.type[1:]) // 8
        names = listed(registers)
        executing = self.executing(instruction)
        threads = np.broadcast_to(True if executing is None else executing, self.shape)
        if not threads.any():
            return
        start = np.broadcast_to(self.address(address), self.shape)[threads]
        if (start % np.uint64(size * len(names))).any():
            raise Refused(f"an access that is not aligned: {instruction}")
        for i, name in enumerate(names):
            places = start + np.uint64(i * size)
            if space == "global":
                yield name, *self.memory.find(places, size), threads
            elif space == "shared":
                whole = self.shared.view(UNSIGNED[8 * size]).reshape(-1)
                block = np.broadcast_to(np.arange(self.shape[0])[:, None], self.shape)[threads]
                if int(places.max()) + size > SHARED:
                    raise Refused("more shared memory than there is")
                yield name, whole, block * (SHARED // size) + places.astype(np.int64) // size, threads
            else:
                raise Refused(str(instruction))


def listed(operand: str) -> list[str]:
    """The registers of {%r1, %r2}, or of %r1 alone."""
    return [name.strip() for name in operand.strip("{} ").split(",")]
