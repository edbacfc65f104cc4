"""Compile the GPU kernels for processors that are not here, and print what ptxas says of each, one JSON a line.

Triton brings NVIDIA's assembler, so this needs no GPU: what the interpreter lets pass and the compiler does not,
and registers that would spill to memory, show before a GPU sees them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pipelines.tvl1.gpu_kernels import OPTIONS, iteration, median, resampling, warping

FLOATS = {"theta", "data_step", "dual_step", "scale_y", "scale_x"}
FIELDS = {"flow", "dual", "flow_out", "dual_out", "data", "source", "target"}
ALIGNED = {"pitch"}  # sizes that Triton finds to be multiples of 16
STRIP = {"LEVELS": iteration.LEVELS, "OVERLAP": iteration.LEVELS + 1, "STRIP": iteration.STRIP, "STRIPS": 1}
KERNELS = [
    (iteration.iterate_strips, STRIP, "*fp32", 1),
    (warping.linearise_strips, {"LANES": warping.LANES, "STRIPS": 1}, "*u8", 1),
    (warping.linearise_strips, {"LANES": warping.LANES, "STRIPS": 1}, "*fp32", 1),
    (median.median_pixels, {"PIXELS": 256}, "*fp32", 4),
    (resampling.downscale_pixels, {"PIXELS": 256}, "*u8", 4),
    (resampling.upsample_pixels, {"PIXELS": 256}, "*fp32", 4),
]


def compile_for(target: GPUTarget, kernel: triton.JITFunction, constants: dict, images: str, warps: int) -> object:
    types = dict.fromkeys(FLOATS, "fp32") | dict.fromkeys(FIELDS, "*fp32") | dict.fromkeys(constants, "constexpr")
    types["images"] = images
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in FIELDS | ALIGNED}
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=target, options={"num_warps": warps, **OPTIONS})


def resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread, and bytes of stack (where registers spill) and of shared memory."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        out = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(count) for name, count in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", out)}


for architecture in map(int, sys.argv[1:]):
    for kernel, constants, images, warps in KERNELS:
        compiled = compile_for(GPUTarget("cuda", architecture, 32), kernel, constants, images, warps)
        found = {"kernel": kernel.fn.__name__, "architecture": architecture, **resources(compiled.asm["cubin"])}
        found["carried"] = [
            carried.count("=") for carried in re.findall(r"iter_args\((.*?)\) ->", compiled.asm["ttir"])
        ]
        print(json.dumps(found), flush=True)
