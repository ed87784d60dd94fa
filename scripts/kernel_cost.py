"""What the Triton kernels cost on an H100 or H200 (sm_90), from their machine code: no GPU is needed, and none is used.

    python scripts/kernel_cost.py            # the optimizer's step
    python scripts/kernel_cost.py units      # gradients by unit

The launchers run on tensors of the CPU and hand Triton their own arguments; Triton stops before the launch. For each
form this prints the instructions of each loop that moves words of 16 bytes, divided by the elements of a segment that a
thread reads in one turn; registers, bytes that are spilled, and how many of the 64 warps of a multiprocessor are there
at once. What a division or root does for a rare operand is outside of the loop and not counted. The disassembler comes
with Triton.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from hf_gradclip.kernels.rule import Memory, Places, Rule
from hf_gradclip.types import ClipPlan

REGISTERS, WARPS, BLOCKS = 1 << 16, 64, 32  # of a multiprocessor of sm_90
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
RULES = {"adam": "kk.", "amsgrad": "kkk", "rmsprop": "k..", "centered": "kkk", "sgd": "k..", "nesterov": "k.."}
"""Which moments each keeps."""
NAMES = {"amsgrad": "adam", "centered": "rmsprop"}


class Sm90:
    """What Triton asks of a driver to compile for it."""

    def get_current_target(self) -> GPUTarget:
        """With 32 threads in a warp."""
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        """The first."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The usual one."""
        return 0


def recorded() -> list[tuple[str, Any]]:
    """Where every kernel that is launched from now on leaves its name and what was compiled."""
    found: list[tuple[str, Any]] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, **options: Any) -> None:
        found.append((self.__name__, run(self, *args, **{**options, "warmup": True})))

    driver.set_active(Sm90())
    JITFunction.run = compile_only
    return found


def disassembled(cubin: bytes, tool: str, *options: str) -> str:
    """What a tool of Triton's says of machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        path = Path(triton.__file__).parent / "backends/nvidia/bin" / tool
        return subprocess.run([path, *options, file.name], check=True, capture_output=True, text=True).stdout


def loops(sass: str) -> list[list[str]]:
    """The instructions of each innermost loop, from its label to the last jump back to it."""
    lines = [line.strip() for line in sass.splitlines()]
    places = {found[1]: i for i, line in enumerate(lines) if (found := re.match(r"(\.L_x_\d+):", line))}
    ends: dict[int, int] = {}
    for i, line in enumerate(lines):
        found = re.search(r"\bBRA\S* .*`\((\.L_x_\d+)\)", line)
        if found and places[found[1]] < i:
            ends[places[found[1]]] = i
    inner = [(a, b) for a, b in ends.items() if not any(a < c and d < b for c, d in ends.items())]
    made = [[line for line in lines[a : b + 1] if line.startswith("/*")] for a, b in sorted(inner)]
    return [body for body in made if any("LDG" in line or "LDGSTS" in line for line in body)]


def cost(kernel: Any, size: int) -> str:
    """The columns of one form: instructions per element, registers, spills, occupancy.

    Args:
        kernel: as Triton compiled it.
        size: bytes that are read per element, of all tensors of a segment; 0 where loops differ in it.
    """
    cubin = kernel.asm["cubin"]
    usage = disassembled(cubin, "cuobjdump", "-res-usage")
    registers, stack, shared = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK", "SHARED"))  # type: ignore[index]
    counts = []
    for body in loops(disassembled(cubin, "nvdisasm", "-c")):
        read = sum(16 for line in body if "LDG" in line and ".128" in line)
        read += sum(8 for line in body if "LDG" in line and ".64 R" in line)
        if size and any("LDG" in line and ".128" in line for line in body):
            counts.append(f"{len(body) * size / read:.1f}")
    warps = kernel.metadata.num_warps
    per_warp = -(-registers // 8) * 8 * 32
    blocks = min(BLOCKS, REGISTERS // per_warp // warps, WARPS // warps, (228 << 10) // (shared + 1024))
    return f"{', '.join(counts)} | {registers} | {stack} | {100 * blocks * warps // WARPS} % |"


def step_forms() -> Iterator[tuple[str, Any, int]]:
    """Each form of the step, what launches it, and the bytes that it reads per element."""
    from hf_gradclip.kernels.triton import step

    plan, places = ClipPlan(torch.ones(2, dtype=torch.float64)), Places((0, 1), (0, 1))
    for rule, letters in RULES.items():
        for weights, moments in (("f32", "f32"), ("bf16", "bf16"), ("bf16", "f32")):
            kept = [_column(moments) if letter == "k" else [None] * 2 for letter in letters]
            memory = Memory(_column(weights), _column(weights), *kept)
            name = NAMES.get(rule, rule)
            terms = [(2.0, 0.5), (3.0, 0.5)] if name == "adam" else None
            numbers = Rule(name, 1e-3, 0.1, True, False, 0.9, 0.1, 0.99, 0.01, 1e-8, terms)
            size = DTYPES[weights].itemsize + DTYPES[moments].itemsize * letters.count("k")
            yield (
                f"{rule} | {weights} | {moments} | steps",
                partial(step.step_, numbers, memory, places, plan, None),
                size + DTYPES[weights].itemsize,
            )
            yield (
                f"{rule} | {weights} | {moments} | measures",
                partial(step.measure_update, numbers, memory, places, plan),
                size,
            )


def _column(dtype: str) -> list[torch.Tensor]:
    return [torch.zeros(n, dtype=DTYPES[dtype]) for n in (40, 1 << 14)]


def unit_forms() -> Iterator[tuple[str, Any, int]]:
    """Each form of the kernels by unit: in one dtype, and where a model has both."""
    from hf_gradclip.kernels.triton import units

    cpu = torch.device("cpu")
    for names in (("f32",), ("bf16",), ("f32", "bf16")):
        blocks = [torch.zeros(64, 512, dtype=DTYPES[name]) for name in names]
        kept, counts = [(0,)] * len(blocks), [64] * len(blocks)
        scale_U = torch.ones(sum(counts), dtype=torch.float64)
        size = DTYPES[names[0]].itemsize if len(names) == 1 else 0
        what = " and ".join(names)
        yield f"{what} | measures", partial(units.unit_sums, blocks, kept, counts, torch.float64, cpu), size
        yield f"{what} | writes", partial(units.unit_apply_, blocks, kept, counts, scale_U, scale_U), size


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("step", "units"), default="step")
    what = parser.parse_args().what
    columns = ["rule", "weights", "moments", "kernel"] if what == "step" else ["gradients", "kernel"]
    columns += ["instructions / element", "registers", "bytes of stack", "warps of 64"]
    print("| " + " | ".join(columns) + " |")
    print("|---" * len(columns) + "|")
    found = recorded()
    for name, launch, size in step_forms() if what == "step" else unit_forms():
        found.clear()
        launch()
        for kernel_name, kernel in found:
            if kernel_name != "finish":
                print(f"| {name} | {cost(kernel, size)}", flush=True)


if __name__ == "__main__":
    main()
