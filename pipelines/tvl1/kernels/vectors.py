"""How wide the vectors of the compiled loops are, by processor family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

# Of these LLVM uses 256 of 512 bits, for fear of a lower clock. Servers of these families have two 512-bit units, and
# the solver runs 1.4 to 1.5 × as fast with them (docs/measurements.md says where that was measured). A virtual machine
# that hides its model passes for the last.
WIDE_FAMILIES = (
    *("skylake-avx512", "cascadelake", "cooperlake", "icelake-server"),
    *("sapphirerapids", "emeraldrapids", "graniterapids", "rocketlake"),
)


def prefers_512(family: str, features: Sequence[str]) -> bool:
    """Whether loops are to use 512 bits where LLVM by itself would not; `features` as in LLVM, `+avx512f`."""
    return family in WIDE_FAMILIES and "+avx512f" in features


@intrinsic
def use_widest_vectors(_: Any) -> Any:
    """Let the loops of the compiled function that calls this use the processor's widest vectors, where that pays."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, arguments: tuple[ir.Value, ...]) -> ir.Value:
        _, family, features = context.codegen().magic_tuple()
        if prefers_512(family, features.split(",")):
            # set.add, because llvmlite's own add knows no attribute with a value
            set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.none(), emit
