"""Compile the kernels of the networks for a processor that is not here, and print what came of each, one JSON a line.

Triton brings NVIDIA's assembler, so this needs no GPU; but where its kernels are interpreted, it compiles none.
"""

from __future__ import annotations

import json
import sys

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from models import triton_kernels

POINTERS = ("x", "y", "dx", "dy", "bias")  # of the activations; the others are bytes, numbers, or sums in fp32
TYPES = {
    **dict.fromkeys(POINTERS, "*bf16"),
    **dict.fromkeys(("mean", "variance", "gamma", "beta", "sums"), "*fp32"),
    **dict.fromkeys(("running_mean", "running_var"), "*fp32"),
    **dict.fromkeys(("eps", "momentum"), "fp32"),
    "places": "*u8",
    "tracked": "*i64",
}
CONSTANTS = {"KT": 3, "KH": 3, "KW": 3, "ST": 2, "SH": 2, "SW": 2, "KEEP": True, "ROWS": 16, "COLUMNS": 64}
CONSTANTS |= {"CHANNELS": 3, "DEPTH": 24}
KERNELS = (
    "_max_of_window",
    "_gather_gradient",
    "_bias_relu",
    "_norm_relu",
    "_sum_moments",
    "_finish_moments",
    "_sum_gradient",
    "_norm_relu_gradient",
    "_blocks_of_clip",
)

for name in KERNELS:
    kernel = getattr(triton_kernels, name)
    fixed = {key: value for key, value in CONSTANTS.items() if key in kernel.arg_names}
    types = TYPES | dict.fromkeys(fixed, "constexpr")
    aligned = [
        i for i, arg in enumerate(kernel.arg_names) if types.get(arg, "").startswith("*") or arg in ("C", "pitch")
    ]
    source = ASTSource(
        fn=kernel,
        signature={arg: types.get(arg, "i32") for arg in kernel.arg_names},
        constexprs={(kernel.arg_names.index(arg),): value for arg, value in fixed.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    compiled = compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options=triton_kernels.EXACT)
    vectors = "global.v4" in compiled.asm["ptx"]  # the blocks of a clip are gathered, and stored so
    print(json.dumps({"kernel": name, "bytes": len(compiled.asm["cubin"]), "vectors": vectors}), flush=True)
