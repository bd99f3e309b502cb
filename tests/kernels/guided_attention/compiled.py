"""Compiles the Triton kernels for real GPUs, none needed; a program of its own, because TRITON_INTERPRET must not be set.

Prints one JSON object {kernel-capability: {shared, cubin_bytes, tensor_cores}}.
"""

from __future__ import annotations

import json

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.guided_attention import triton as kernels

KINDS = {"forward": kernels._forward, "backward_q": kernels._backward_q, "backward_k": kernels._backward_k}
CONSTANTS = {
    "HEADS": 3, "HEAD_DIM": 64, "PADDED_DIM": 64, "BLOCK_M": 16, "BLOCK_N": 64, "HAS_SECOND": True, "RENORMALISE": True,
}  # fmt: skip
POINTERS = {
    **dict.fromkeys(("q", "k", "dq", "dk"), "*bf16"),
    **dict.fromkeys(("out", "lse_a", "lse_t", "given_of"), "*fp32"),
    **dict.fromkeys(("position_of", "start", "first_of", "second_of", "ids", "document"), "*i32"),
    **dict.fromkeys(("table", "kept"), "*i8"),
}
SCALARS = dict.fromkeys(("scale", "first_weight", "second_weight"), "fp32")


def compile_for(kind: str, capability: int) -> dict[str, object]:
    names = KINDS[kind].arg_names
    source = ASTSource(
        fn=KINDS[kind],
        signature={n: "constexpr" if n in CONSTANTS else POINTERS.get(n) or SCALARS.get(n, "i32") for n in names},
        constexprs={(i,): CONSTANTS[n] for i, n in enumerate(names) if n in CONSTANTS},
        attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in POINTERS or "stride" in n},
    )
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4, "num_stages": 2})
    ptx = built.asm["ptx"]
    cores = "mma.sync" in ptx or "wgmma" in ptx
    return {"shared": built.metadata.shared, "cubin_bytes": len(built.asm["cubin"]), "tensor_cores": cores}


if __name__ == "__main__":
    print(
        json.dumps({f"{kind}-{capability}": compile_for(kind, capability) for kind in KINDS for capability in (80, 90)})
    )
