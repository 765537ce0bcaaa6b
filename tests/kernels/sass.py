"""What ptxas makes of matrix products, read from SASS.

Uniform registers that one reads though some path has not set them: ptxas of CUDA 12.8 computed
parts of a tile's descriptor in one branch and used them after it. And values spilled for each tile.
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
    known = _on_every_path(code, labels, [_bits(sets) for sets, _ in effects])
    zero = 1 << NUM_REGISTERS - 1
    return [
        text
        for (_, text), (_, reads), before in zip(code, effects, known, strict=True)
        if before is not None and "GMMA" in text and _bits(reads) & ~(before | zero)
    ]


def spills_of_tiles(sass):
    """Spill stores in the innermost loops around matrix products, as text.

    What is stored once and loaded in a loop is an address or a count.
    """
    code, labels = _parse(sass)
    known = _on_every_path(code, labels, [1 << i for i in range(len(code))])
    before, ends = [[] for _ in code], {}
    for i in range(len(code)):
        for following in _successors(i, code, labels):
            before[following].append(i)
            # A loop's start has been passed wherever a jump leads back to it.
            if known[i] is not None and (known[i] | 1 << i) >> following & 1:
                ends.setdefault(following, []).append(i)
    bodies = [(start, _loop(start, waiting, before)) for start, waiting in ends.items()]
    loops = {start: body for start, body in bodies if any("GMMA" in code[i][1] for i in body)}
    assert loops, "no loop of products"
    inner = [body for start, body in loops.items() if body & loops.keys() == {start}]
    return [code[i][1] for body in inner for i in sorted(body) if code[i][1].startswith("STL")]


def _loop(start, waiting, before):
    """What leads from a loop's start back to it."""
    body = {start}
    while waiting:
        i = waiting.pop()
        if i not in body:
            body.add(i)
            waiting += before[i]
    return body


def _on_every_path(code, labels, gains):
    """Bits that instructions set on every path to each; None where no path leads."""
    known, waiting = [None] * len(code), [0]
    known[0] = 0
    while waiting:
        i = waiting.pop()
        after = known[i] | gains[i]
        for following in _successors(i, code, labels):
            new = after if known[following] is None else known[following] & after
            if new != known[following]:
                known[following] = new
                waiting.append(following)
    return known


def _bits(numbers):
    return sum(1 << number for number in numbers)


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
