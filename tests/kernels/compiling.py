"""Compiles Triton kernels for GPUs that are not there, in a process where triton interprets not."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from sass import disassemble, spills_of_tiles, undefined_reads

# Bytes of shared memory that one program may have.
SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}


def built_by(script, *arguments):
    """What a test file prints as its last line, as JSON, when it is run as a program."""
    return json.loads(printed_by(script, *arguments).splitlines()[-1])


def printed_by(script, *arguments, under=()):
    """What a test file prints when it is run as a program, by the command `under` if any."""
    root = Path(__file__).parents[2]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    run = subprocess.run(
        [*under, sys.executable, script, *map(str, arguments)],
        env=os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def compile_for(
    arch, kernel, constants, num_warps=4, num_stages=3, types=(), *, aligned="stride_", fuse=True
):
    """What the kernel takes and does, as a dict, and its PTX.

    Arguments whose name starts with `aligned` count as multiples of 16, as they are in practice.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    types = dict(types) | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in names}
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {
            (i,): [["tt.divisibility", 16]]
            for i, (name, kind) in enumerate(signature.items())
            if kind.startswith("*") or name.startswith(aligned)
        },
    )
    options = dict(num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=fuse)
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = built.asm["ptx"]
    report = resources(built, arch) | dict(
        kernel=kernel.fn.__name__,
        constants=str(constants),
        wgmma="wgmma.mma_async" in ptx,
        half_loads=len(re.findall(r"ld\.global\S*\.b16", ptx)),
        half_stores=len(re.findall(r"st\.global\S*\.b16", ptx)),
    )
    return report, ptx


def compile_gluon(kernel, values, constants):
    """What a warp-specialised kernel takes on sm90, as a dict, and its PTX.

    Arguments in neither are int32; strides count as multiples of 16, as they are in practice.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.runtime.jit import native_specialize_impl

    constants = constants | {name: None for name, value in values.items() if value is None}
    types, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            types[name] = "constexpr"
        elif name in values:
            types[name] = native_specialize_impl(CUDABackend, values[name], False, True, True)[0]
        else:
            types[name] = "i32"
        if types[name].startswith("*") or name.startswith("stride"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = GluonASTSource(
        kernel,
        types,
        {(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attributes,
    )
    options = dict(num_warps=4, maxnreg=168, enable_fp_fusion=True)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = built.asm["ptx"]
    code = disassemble(built.asm["cubin"])
    report = resources(built, 90) | dict(
        budgets=sorted({int(n) for n in re.findall(r"setmaxnreg\.\S+\s+(\d+)", ptx)}),
        undefined=undefined_reads(code),
        spilled_by_tile=spills_of_tiles(code),
    )
    return report, ptx


def resources(built, arch):
    """Registers, spilled bytes, shared memory and warnings of a compiled kernel, by ptxas."""
    from triton.backends.nvidia.compiler import get_ptxas

    ptx = built.asm["ptx"]
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        log = subprocess.run(
            [get_ptxas(arch).path, "-v", f"--gpu-name={target}", file.name, "-o", os.devnull],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    return dict(
        registers=int(re.search(r"Used (\d+) registers", log)[1]),
        spilled=int(re.search(r"(\d+) bytes spill stores", log)[1]),
        shared=built.metadata.shared,
        serialized="wgmma.mma_async instructions are serialized" in log,
    )
