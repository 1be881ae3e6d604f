"""The emulator that the compiled kernels are tried in: what it computes, and what it refuses."""

from __future__ import annotations

import numpy as np
import ptx
import pytest
import torch

KERNEL = """
.visible .entry kernel(
    .param .u64 .ptr .global .align 1 kernel_param_0,
    .param .f32 kernel_param_1
)
.reqntid 32
{{
    ld.param.b64 %rd1, [kernel_param_0];
    ld.param.b32 %r1, [kernel_param_1];
    mov.u32 %r2, %tid.x;
    mul.wide.u32 %rd2, %r2, 4;
    add.s64 %rd3, %rd1, %rd2;
    ld.global.b32 {{ %r3 }}, [ %rd3 + 0 ];
    {}
    st.global.b32 [ %rd3 + 0 ], {{ %r4 }};
    ret;
}}
"""


def run(lines: str, values: torch.Tensor, number: float = 0.1) -> torch.Tensor:
    """`values` (32,), float32, after the lines, which make %r4 of a value, %r3, and a number, %r1."""
    program = ptx.Program(KERNEL.format(lines))
    program.run((1, 1, 1), [values.data_ptr(), number], ptx.Memory([values]))
    return values


def values() -> torch.Tensor:
    return torch.arange(32, dtype=torch.float32) * 1.1 - 7


def test_each_operation_rounds_once():
    found = run("mul.rn.f32 %r5, %r3, %r1;\nadd.rn.f32 %r4, %r5, %r1;", values())
    assert np.array_equal(found.numpy(), values().numpy() * np.float32(0.1) + np.float32(0.1))
    fused = (values().double() * float(np.float32(0.1)) + float(np.float32(0.1))).float()
    assert not torch.equal(found, fused)


def test_subnormals_are_kept():
    assert float(run("mul.rn.f32 %r4, %r3, %r1;", torch.full((32,), 1e-38))[0]) == np.float32(
        1e-38
    ) * np.float32(0.1)


def test_threads_of_one_warp():
    found = run("shfl.sync.bfly.b32 %r4, %r3, 1, 31, -1;", values())
    assert torch.equal(found, values().view(16, 2).flip(1).reshape(-1))


@pytest.mark.parametrize(
    "line, why",
    [
        ("fma.rn.f32 %r4, %r3, %r1, %r1;", "fma"),
        ("mul.rn.ftz.f32 %r4, %r3, %r1;", "ftz"),
        ("rcp.approx.f32 %r4, %r3;", "rcp"),
        ("mul.f32 %r4, %r3, %r1;", "mul"),  # ptxas may fuse it with a sum
        ("ld.global.b32 {%r4}, [ %rd3 + 4 ];", "beyond a tensor"),
        ("ld.global.b32 {%r4}, [ %rd3 + -8 ];", "outside of all tensors"),
        ("ld.global.b32 {%r4}, [ %rd3 + 2 ];", "not aligned|beyond"),
        ("setp.lt.u32 %p1, %r2, 5;\n@%p1 bra $L__1;\nmov.b32 %r4, %r3;\n$L__1:", "only some threads"),
        ("cos.approx.f32 %r4, %r3;", "cos"),
    ],
)
def test_it_refuses(line, why):
    with pytest.raises(ptx.Refused, match=why):
        run(line, values())


def test_a_register_that_was_never_written_is_seen():
    assert run("add.rn.f32 %r4, %r3, %r9;", values()).isnan().all()
