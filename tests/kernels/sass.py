"""Uniform registers that a matrix product reads though some path has not set them, in SASS.

ptxas of CUDA 12.8 computed parts of a tile's descriptor in one branch and used them after it.
"""

import re
import subprocess
import tempfile
from pathlib import Path

INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?(\w+)\s+)?(.*?)\s*;")
LABEL = re.compile(r"(\.L_x_\d+)")
NUM_REGISTERS = 64  # the last is the constant zero


def disassemble(cubin):
    """The machine code of a kernel as text, with labels."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True)
        return run.stdout


def undefined_reads(sass):
    """Matrix products with a descriptor that is not set on every path to them, as text."""
    code, labels = _parse(sass)
    effects = [_effects(text) for _, text in code]
    # Set on every path so far; None where no path has come yet.
    known, waiting = [None] * len(code), [0]
    known[0] = frozenset([NUM_REGISTERS - 1])
    while waiting:
        i = waiting.pop()
        after = known[i] | effects[i][0]
        for following in _successors(i, code, labels):
            new = after if known[following] is None else known[following] & after
            if new != known[following]:
                known[following] = new
                waiting.append(following)
    return [
        text
        for (_, text), (_, reads), before in zip(code, effects, known, strict=True)
        if before is not None and "GMMA" in text and reads - before
    ]


def _parse(sass):
    """(predicate, text) of each instruction, and where labels point."""
    code, labels = [], {}
    for line in sass.splitlines():
        if label := re.match(rf"\s*{LABEL.pattern}:", line):
            labels[label[1]] = len(code)
        elif instruction := INSTRUCTION.match(line):
            code.append(instruction.groups())
    return code, labels


def _successors(i, code, labels):
    predicate, text = code[i]
    operation = text.split()[0]
    targets = [labels[name] for name in LABEL.findall(text) if name in labels]
    if not operation.startswith("BR"):
        targets = []
    ends = operation in ("EXIT", "RET", "BRA", "BRX") or operation.startswith("RET.")
    if (predicate or not ends) and i + 1 < len(code):
        targets.append(i + 1)
    return targets


def _effects(text):
    """Uniform registers that an instruction sets and reads; pairs where it says so."""
    operation, _, rest = text.partition(" ")
    operands = [operand.strip() for operand in rest.split(",")]
    sets, reads = set(), set()
    for place, operand in enumerate(operands):
        if descriptor := re.search(r"gdesc\[UR(\d+)\]", operand):
            first = int(descriptor[1])
            # The left operand may be in registers: then only the right one is described.
            left = re.fullmatch(r"R\d+", operands[place - 1]) is not None and place > 1
            reads |= set(range(first + 2 * left, first + 4))
            continue
        pair = ".64" in operation or "WIDE" in operation
        for number in map(int, re.findall(r"\bUR(\d+)\b", operand)):
            if place == 0 and re.fullmatch(r"UR\d+", operand):
                sets |= {number, number + 1} if pair else {number}
            else:
                reads |= {number, number + 1} if pair or "desc[" in operand else {number}
    return sets, reads
