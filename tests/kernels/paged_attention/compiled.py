"""Compiles the Triton kernels for real GPUs, none needed; a program of its own, because TRITON_INTERPRET must not be set.
Prints one JSON object {kernel-capability: {ptx, shared, cubin_bytes}}.
"""

from __future__ import annotations

import json

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.paged_attention import triton as kernels

KINDS = {
    "decode": (kernels._attend, 4, {"BLOCK_Q": 1, "BLOCK_M": 16, "SPLIT_LEN": 256}),
    "prefill": (kernels._attend, 4, {"BLOCK_Q": 16, "BLOCK_M": 64, "SPLIT_LEN": 0}),
    "reduce": (kernels._reduce, 1, {"SPLIT_LEN": 256}),
    "write": (kernels._write_kv, 1, {}),
}
MODEL = {"KV_HEADS": 8, "GROUP": 4, "HEADS": 32, "HEAD_DIM": 64, "PADDED_DIM": 64, "BLOCK_N": 64, "WIDE": False}
POINTERS = {
    **dict.fromkeys(("block_table", "query_start", "context_len"), "*i32"),
    **dict.fromkeys(("q", "k", "v", "kv", "out"), "*bf16"),
    **dict.fromkeys(("partial", "partial_max", "partial_sum"), "*fp32"),
}


def compile_for(kind: str, capability: int) -> dict[str, object]:
    kernel, warps, own = KINDS[kind]
    constants = {**MODEL, **own}
    names = kernel.arg_names
    scalars = {"scale_log2e": "fp32"}
    source = ASTSource(
        fn=kernel,
        signature={n: "constexpr" if n in constants else POINTERS.get(n) or scalars.get(n, "i32") for n in names},
        constexprs={(i,): constants[n] for i, n in enumerate(names) if n in constants},
        attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in POINTERS or n.endswith("_stride")},
    )
    built = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": 2}
    )
    return {"ptx": built.asm["ptx"], "shared": built.metadata.shared, "cubin_bytes": len(built.asm["cubin"])}


if __name__ == "__main__":
    print(
        json.dumps({f"{kind}-{capability}": compile_for(kind, capability) for kind in KINDS for capability in (80, 90)})
    )
