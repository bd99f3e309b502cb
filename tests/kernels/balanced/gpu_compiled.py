"""Compiles the Triton kernels for real GPUs, none needed; a program of its own, because TRITON_INTERPRET must not be set.
Prints one JSON object {kernel-capability: {ptx, shared, cubin_bytes}}.
"""

from __future__ import annotations

import json

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.balanced.gpu import triton_kernels as kernels

KINDS = {
    "gather": (kernels._gather, 4, 2, {"ROWS": 128, "SAMPLES": 1, "UNROLL": 4}),
    "gather-8-bit": (
        kernels._gather,
        4,
        2,
        {"ROWS": 128, "SAMPLES": 1, "UNROLL": 4, "NIBBLES": False, "K": 8, "B": 32},
    ),
    "gather-16": (kernels._gather, 8, 2, {"ROWS": 128, "SAMPLES": 16, "UNROLL": 1}),
    "decompress": (kernels._decompress, 4, 2, {"PADDED_B": 16, "ROWS": 64, "SAMPLES": 16, "BLOCKS": 4}),
    "vector": (kernels._vector, 8, 3, {"V": 64, "ENTRIES": 64, "SAMPLES": 128}),
    "vector-broad": (kernels._vector, 8, 4, {"V": 64, "ENTRIES": 32, "SAMPLES": 256}),
    "reduce": (kernels._reduce, 4, 2, {"ROWS": 128}),
}
PRODUCT = {
    "K": 4,
    "B": 16,
    "V": 1,
    "CHUNK": 8,
    "NIBBLES": True,
    "SPLIT": True,
    "SCALED": False,
    "BIAS": True,
    "WIDE": False,
}
POINTERS = {
    **dict.fromkeys(("x", "values", "out", "bias"), "*bf16"),
    **dict.fromkeys(("scales", "partial"), "*fp32"),
    "index": "*u8",
}
MULTIPLES_OF_16 = {*POINTERS, "rows", "columns", "x_stride"}


def compile_for(kind: str, capability: int) -> dict[str, object]:
    kernel, warps, stages, own = KINDS[kind]
    constants = {**PRODUCT, **own}
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={n: "constexpr" if n in constants else POINTERS.get(n, "i32") for n in names},
        constexprs={(i,): constants[n] for i, n in enumerate(names) if n in constants},
        attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in MULTIPLES_OF_16},
    )
    target = GPUTarget("cuda", capability, 32)
    built = triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})
    return {"ptx": built.asm["ptx"], "shared": built.metadata.shared, "cubin_bytes": len(built.asm["cubin"])}


if __name__ == "__main__":
    print(
        json.dumps({f"{kind}-{capability}": compile_for(kind, capability) for kind in KINDS for capability in (80, 90)})
    )
