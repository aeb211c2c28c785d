"""What a kernel's machine code allows on an H200: instructions an element, by pipe, on the way that its warps go.

    make sass                    # compile, count, rewrite bench/results/sass.json; needs no GPU
    python bench/sass.py         # the table of what is recorded, as Markdown

The hot path is found in the disassembly (cuobjdump's text, one kernel) and in nothing else. Back edges make loops. The
hot path is the shortest way once around the innermost loop whose loads of 16 bytes and more are those of one turn
(`TURNS`), else the shortest way through the whole kernel with these loads. It is the shortest way: what it leaves out
are branches that rare rows take, and a subroutine counts as its call. Instructions under a false predicate count, as
they are issued.

What bounds a turn: the rates of the pipes, and the time from a turn's loads to its last instruction, in which no more
bytes are under way than the warps that fit on a multiprocessor have asked for. The chain is the path issued in order,
each instruction waiting for the registers that it reads. What no count knows: conflicts over banks, the order of
warps, what the caches hold, clocks under load.
"""

from __future__ import annotations

import json
import re
import subprocess
from heapq import heappop, heappush
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).parent / "results" / "sass.json"

# An H200. Bandwidth as measured by a copy; the rest is what NVIDIA states for compute capability 9.0.
PROCESSORS, CLOCK, BANDWIDTH = 132, 1.98e9, 4.3e12
BYTES_A_CLOCK = BANDWIDTH / PROCESSORS / CLOCK  # of one multiprocessor: 16.5
REGISTERS, SHARED, WARPS, CTAS = 65536, 227 << 10, 64, 32  # of one multiprocessor
# Clocks that an instruction of one warp keeps its pipe; all pipes together take four instructions a clock.
PIPES = {"alu": 0.5, "fma": 0.25, "imad": 0.5, "mufu": 2.0, "fp64": 0.5, "memory": 1.0, "uniform": 0.5}
# Clocks until a result may be used: assumed, of the order that is usual on Hopper, and measured nowhere here.
LATENCY = {"alu": 4, "fma": 4, "imad": 4, "mufu": 20, "fp64": 16, "uniform": 8, "tensor": 40, "control": 1}
LATENCY |= {"memory": 30, "SHFL": 24, "BAR": 30, "S2R": 20}
L2, DRAM = 270, 700

OPCODES = {
    "alu": "BMSK CREDUX CS2R FMNMX FMNMX3 FSEL FSET FSETP HMNMX2 HSET2 HSETP2 I2FP IABS IADD IADD3 ISETP LEA LOP3 MOV "
    "P2R PLOP3 PRMT R2P SEL SGXT SHF VABSDIFF VIADD VIADDMNMX VIMNMX VIMNMX3 F2FP VOTE VOTEU FADD3 REDUX NOP",
    "fma": "FADD FADD2 FFMA FFMA2 FHADD FMUL FMUL2 FSWZADD HADD2 HFMA2 HMUL2",
    "imad": "IMAD",
    "mufu": "F2F F2I FCHK FLO FRND I2F MUFU POPC",
    "fp64": "DADD DFMA DMUL DSETP",
    "memory": "ATOM ATOMG ATOMS LD LDC LDCU LDG LDGSTS LDL LDS LDSM LDTM RED SHFL ST STG STL STS STSM STTM SYNCS",
    "tensor": "HGMMA HMMA IGMMA IMMA UTCHMMA UTCQMMA UTCIMMA",
    "control": "ACQBULK BAR BRA BREAK BRX BSSY BSYNC CALL CCTL DEPBAR ELECT ENDCOLLECTIVE ERRBAR EXIT FENCE LDGDEPBAR "
    "MEMBAR NANOSLEEP PREEXIT R2UR RET S2R S2UR UTCATOMSWS UTCBAR WARPGROUP WARPSYNC YIELD",
}
PIPE = {name: pipe for pipe, names in OPCODES.items() for name in names.split()}


class Turn(NamedTuple):
    """What a lane does in one turn, or all of a program: the bytes that are read in loads of 16 bytes and more, in
    elements of `element` bytes, for each of which `moved` bytes cross the memory's pins."""

    read: int
    element: int
    moved: int
    turns: int = 1  # of a loop that is not followed to its end: what is outside it is shared among them
    through: str = ""  # an opcode of its loop, where another loop loads as much


NO_VECTORS = Turn(0, 0, 0)  # no wide load is on its way: the shortest way through, and no share
TURNS = {  # of a program
    "tilt_blocks_kernel": Turn(4096, 4, 4),  # 1,024 logits and values
    "tilt_draw_kernel": NO_VECTORS,
    "fold_kernel": Turn(8192, 2, 2),  # all its 4,096 logits: what comes before and behind its loop is counted, too
    "grad_kernel": Turn(8192, 2, 4),  # read and written
    "finish_kernel": NO_VECTORS,
    "tilt_sums<true, true, 1>": Turn(4096, 4, 4, 2, "MUFU.EX2"),  # bf16; a block of each warp in two turns
    "tilt_sums<false, true, 1>": Turn(2048, 2, 2, 2, "MUFU.EX2"),
    "tilt_draw": NO_VECTORS,
    "choose": NO_VECTORS,
    "head_kernel": Turn(32768, 2, 0),  # hidden states and weights, which for the most part come from L2
    "head tilt bf16 16 rows, head_tilt_kernel": Turn(36864, 2, 0),
    "head_tilt_kernel": Turn(49152, 2, 0),
    "head_merge_kernel": NO_VECTORS,
    "append_kernel": NO_VECTORS,
    "tree_attention_kernel": Turn(16384, 2, 2),  # 32 keys and values of 128 numbers
    "merge_kernel": Turn(4096, 16, 0),  # eight parts of 128 sums
    "select_block_kernel": NO_VECTORS,
}


class Instruction(NamedTuple):
    at: int
    guard: str
    opcode: str
    operands: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def pipe(self) -> str:
        if self.name in PIPE:
            return PIPE[self.name]
        if self.name.startswith("U"):
            return "uniform"
        raise ValueError(f"{self.opcode} at {self.at:#x} is of no pipe that bench/sass.py knows")

    @property
    def bytes(self) -> int:
        """Of its result, a lane's."""
        wide = re.search(r"\.(64|128|256)\b|\.(WIDE)", self.opcode)
        return int(wide[1] or 64) // 8 if wide else 8 if self.pipe == "fp64" or self.name == "CS2R" else 4

    @property
    def loads(self) -> int:
        """Bytes that a lane asks memory for, in loads of 16 bytes and more."""
        return self.bytes if self.opcode.startswith(("LDG.", "LDGSTS.")) and self.bytes >= 16 else 0

    def registers(self) -> tuple[list[str], list[str]]:
        """Those that it writes and those that it reads; of a wide source the first, which stands for all."""
        reads = re.findall(r"\bU?[RP]\d+\b", " ".join((self.guard, *self.operands)))
        if self.name in ("STG", "STS", "ST", "STL", "BRA", "EXIT", "LDGSTS", "RED"):
            return [], reads
        pairs = "SETP" in self.name or self.name in ("SHFL", "PLOP3", "IADD3", "LEA", "UIADD3", "ULEA", "UPLOP3")
        first, *rest = [re.findall(r"^U?[RP]\d+", operand) for operand in self.operands[:2]] or [[]]
        writes = [f"R{int(name[1:]) + i}" for name in first if name[0] == "R" for i in range(self.bytes // 4)]
        writes += [name for name in first if name[0] != "R"]
        if pairs and rest:
            writes += [name for name in rest[0] if self.name == "SHFL" or "P" in name]
        return writes, reads


LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?\s*([A-Z][\w.]*)\s*([^;]*);", re.MULTILINE)


def parse(text: str) -> list[Instruction]:
    """The instructions of one kernel in cuobjdump's listing."""
    found = [
        Instruction(int(m[1], 16), (m[2] or "").strip(), m[3], tuple(part.strip() for part in m[4].split(",")))
        for m in LINE.finditer(text)
    ]
    if not found:
        raise ValueError("no machine code in this listing")
    return found


def cuobjdump() -> Path:
    """Triton's wheel has one."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def kernels(cubin: Path) -> dict[str, list[Instruction]]:
    """The instructions of each kernel of a cubin, by its mangled name."""
    text = subprocess.run([cuobjdump(), "-sass", cubin], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^\s+Function : (\S+)$", text, flags=re.MULTILINE)[1:]
    return {name: parse(body) for name, body in zip(parts[::2], parts[1::2], strict=True)}


def successors(code: list[Instruction]) -> list[list[int]]:
    """For each instruction the indices of those that may follow it; none after the end of a kernel."""
    index = {instruction.at: i for i, instruction in enumerate(code)}
    out: list[list[int]] = []
    for i, instruction in enumerate(code):
        follows = [i + 1] if i + 1 < len(code) else []
        if instruction.name == "BRA":
            target = index[int(instruction.operands[-1], 16)]
            always = not instruction.guard and len(instruction.operands) == 1
            follows = [target] if always else [*follows, target]
        elif (
            instruction.name in ("EXIT", "RET")
            and not instruction.guard
            and not instruction.operands[0].startswith("P")
        ):
            follows = []
        out.append(follows)
    return out


def loops(code: list[Instruction]) -> list[tuple[int, set[int]]]:
    """(first instruction, body) of each natural loop, in the order of the code. Loops with one head are one."""
    after = successors(code)
    before: list[list[int]] = [[] for _ in code]
    for i, follows in enumerate(after):
        for j in follows:
            before[j].append(i)
    found: dict[int, set[int]] = {}
    for i, follows in enumerate(after):
        for head in follows:
            if head > i or head == i:  # forward, or the padding behind a kernel
                continue
            body, pending = {head}, [i]
            while pending:
                at = pending.pop()
                if at not in body:
                    body.add(at)
                    pending += before[at]
            if 0 not in body or head == 0:  # else it can be entered past its head
                found[head] = found.get(head, set()) | body
    return sorted(found.items())


def shortest(code: list[Instruction], start: int, inside: set[int], around: bool, loads: int) -> list[Instruction]:
    """The shortest way that loads exactly so much, from `start` back to it (around) or to an end of the kernel behind a
    store; [] where there is none."""
    after, seen, loading = successors(code), set(), [instruction.loads for instruction in code]
    queue: list[tuple[int, int, int, bool, tuple]] = [(1, start, loading[start], False, (start, ()))]
    while queue:
        steps, at, loaded, stored, way = heappop(queue)
        if (at, loaded, stored) in seen:
            continue
        seen.add((at, loaded, stored))
        stored |= code[at].name == "STG"
        done = start in after[at] if around else stored and code[at].name == "EXIT"
        if done and loaded == loads:
            path = []
            while way:
                path.append(code[way[0]])
                way = way[1]
            return path[::-1]
        for i in after[at]:
            if i in inside and not (around and i == start) and loaded + loading[i] <= loads:
                heappush(queue, (steps + 1, i, loaded + loading[i], stored, (i, way)))
    return []


def hot_path(code: list[Instruction], turn: Turn) -> tuple[list[Instruction], bool]:
    """The hot path and whether it is a loop; ValueError where no way loads what a turn does. A loop that was unrolled
    takes up to eight turns."""
    loading = {i for i, instruction in enumerate(code) if instruction.loads}
    found = [(head, body) for head, body in loops(code) if body & loading] if turn.read else []
    innermost = [(head, body) for head, body in found if not any(other in body - {head} for other, _ in found)]
    for candidates in (innermost, found):
        for many in (1, 2, 4, 8):
            for head, body in candidates:
                path = shortest(code, head, body, True, many * turn.read)
                if path and any(instruction.opcode.startswith(turn.through) for instruction in path):
                    return path, True
    if path := shortest(code, 0, set(range(len(code))), False, turn.read):
        return path, False
    raise ValueError(f"no way through this kernel loads {turn.read} bytes a lane")


def chain(path: list[Instruction]) -> int:
    """Clocks from the first instruction of a warp to the last, were it alone on its scheduler. Wide loads wait for DRAM
    and narrow ones for L2; asynchronous copies are waited for by nobody here."""
    ready: dict[str, int] = {}
    free: dict[str, int] = {}
    clock = products = 0
    for instruction in path:
        writes, reads = instruction.registers()
        name, pipe = instruction.name, instruction.pipe
        clock = max([clock + 1, free.get(pipe, 0), *(ready.get(read, 0) for read in reads)])
        free[pipe] = clock + int(4 * PIPES.get(pipe, 0.25))
        latency = LATENCY.get(name) or LATENCY[pipe]
        if name in ("LDG", "LD"):
            latency = DRAM if instruction.loads else L2
        if pipe == "tensor":
            products = clock + latency
        if name == "BAR":
            clock += latency
        elif name == "WARPGROUP" and "DEPBAR" in instruction.opcode:
            clock = max(clock, products)
        ready |= dict.fromkeys(writes, clock + latency)
    return clock


def resident(registers: int, shared: int, warps: int) -> int:
    """Blocks of threads that a multiprocessor of an H200 holds at once; a register file serves warps in steps of 8."""
    by_registers = REGISTERS // (-(-registers // 8) * 8 * 32 * warps)
    return min(CTAS, WARPS // warps, by_registers, SHARED // (shared + 1024))


def counts(code: list[Instruction], turn: Turn, registers: int, shared: int, warps: int) -> dict:
    """What sass.json has of a kernel: instructions an element, by pipe, and the share of the bandwidth they allow."""
    path, loop = hot_path(code, turn)
    outside = 0
    if loop and turn.turns > 1:
        once = shortest(code, 0, set(range(len(code))), False, sum(i.loads for i in path))
        outside = (len(once) - len(path)) / turn.turns
    read = sum(instruction.loads for instruction in path)
    elements = read // turn.element if turn.read else 1
    used = {pipe: sum(i.pipe == pipe for i in path) for pipe in (*PIPES, "tensor", "control")}
    clocks = {"issue": (len(path) + outside) / 4} | {pipe: used[pipe] * rate for pipe, rate in PIPES.items()}
    clocks["fma"] += used["imad"] * PIPES["fma"]  # the half of that pipe which multiplies integers adds floats too
    clocks["memory"] += sum(max(0, i.loads / 4 - 1) for i in path)  # 128 bytes a clock
    ctas, wait = resident(registers, shared, warps), chain(path)
    copied = any(i.name == "LDGSTS" for i in path)
    out = {
        "path": "loop" if loop else "kernel",
        "elements": elements,
        "instructions": round((len(path) + outside) / elements, 2),
        "pipes": {pipe: round(n / elements, 2) for pipe, n in used.items() if n},
        "barriers": sum(i.name == "BAR" for i in path),
        "shuffles": sum(i.name == "SHFL" for i in path),
        "registers": registers,
        "ctas": ctas,
        "chain": wait,
    }
    if turn.moved:
        moved = 32 * elements * turn.moved  # bytes of a warp's turn
        shares = {name: moved / n / BYTES_A_CLOCK for name, n in clocks.items() if n}
        shares["latency"] = ctas * warps * moved / (max(wait, DRAM) if copied else wait) / BYTES_A_CLOCK
        bound = min(shares, key=lambda name: shares[name])
        out |= {"share": round(min(1.0, shares[bound]), 3), "bound": bound if shares[bound] < 1 else "bandwidth"}
        out["allowed"] = {name: round(share, 2) for name, share in shares.items() if share < 2}
    return out


def turn_of(launch: str, kernel: str, warps: int) -> Turn:
    turn = TURNS.get(f"{launch}, {kernel}") or TURNS[kernel]  # KeyError: a new kernel needs its line there
    return turn._replace(read=turn.read // (32 * warps))


def record(compiler: str, version: str, found: dict[str, dict]) -> None:
    """Write what one compiler's kernels have, {kernel: {architecture: counts}}, into sass.json."""
    whole = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    whole[compiler] = {"version": version, "kernels": found}
    TABLE.write_text(json.dumps(whole, indent=1, sort_keys=True) + "\n")


def grown(compiler: str, version: str, found: dict[str, dict]) -> list[str]:
    """What takes more than sass.json says: not at all by the recorded version of the compiler, 5 % by another."""
    recorded = json.loads(TABLE.read_text())[compiler]
    room = 1.0 if version == recorded["version"] else 1.05
    if recorded["kernels"].keys() != found.keys():
        return [f"other kernels: {sorted(recorded['kernels'].keys() ^ found.keys())}"]
    return [
        f"{kernel} on {arch}: {what} rose from {before[what]} to {now[what]}"
        for kernel, by_arch in found.items()
        for arch, now in by_arch.items()
        for before in [recorded["kernels"][kernel][arch]]
        for what in ("instructions", "barriers", "shuffles", "registers", "chain")
        if now[what] > room * before[what]
    ]


def markdown() -> str:
    """The table of sass.json."""
    lines = ["| kernel | | an element | ALU | FMA | MUFU | memory | barriers | shuffles | registers | chain | H200 |"]
    lines.append("| --- " * 12 + "|")
    for whole in json.loads(TABLE.read_text()).values():
        for kernel, by_arch in whole["kernels"].items():
            for arch, row in by_arch.items():
                pipes = [row["pipes"].get(pipe, 0) for pipe in ("alu", "fma", "mufu", "memory")]
                cells = [row["instructions"], *pipes, row["barriers"], row["shuffles"], row["registers"], row["chain"]]
                share = f"{row['share']:.0%}, {row['bound']}" if arch == "sm_90" and "share" in row else ""
                lines.append(f"| {kernel} | {arch} | " + " | ".join(map(str, cells)) + f" | {share} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown())
