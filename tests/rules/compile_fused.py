"""Compiles the fused kernels of rankseg_rma.py for a GPU, which takes no GPU, and prints what they need of one.

    python tests/rules/compile_fused.py             # those of rankseg_rma, for a Hopper GPU
    python tests/rules/compile_fused.py --levels    # those of rankseg_levelset, for an Ampere and a Hopper GPU

The kernels are launched on CPU tensors, but the launches are only noted; each is then compiled as it stands.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import rankseg_rma as module

POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}
TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Notes:
    """Stands in for a kernel: keeps the arguments of its launches."""

    def __init__(self, kernel, launches: list) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append((self.kernel, args, options))


def note_launches(rule, prob: torch.Tensor, **options) -> list:
    """Everything that is launched for a map: (kernel, positional arguments, compile-time arguments)."""
    launches: list = []
    with contextlib.ExitStack() as patches:
        for name in module._KERNELS:
            patches.enter_context(mock.patch.object(module, name, Notes(getattr(module, name), launches)))
        patches.enter_context(mock.patch.object(module, "_on_cpu", return_value=False))
        patches.enter_context(mock.patch.object(module, "_is_fused", return_value=True))
        patches.enter_context(mock.patch.object(torch, "empty", torch.zeros))  # zero flags: all is well
        patches.enter_context(mock.patch.object(torch.cuda, "device", return_value=contextlib.nullcontext()))
        rule(prob, **options)
    return launches


def compile_launch(kernel, args: tuple, options: dict, capability: int = 90):
    """One launch, compiled as Triton would on the device -> the compiled kernel."""
    signature, constants, hints = {}, {}, {}
    for k, name in enumerate(kernel.arg_names):
        value = args[k] if k < len(args) else options[name]
        if isinstance(value, torch.Tensor):
            signature[name], divisible = POINTERS[value.dtype], value.data_ptr() % 16 == 0
        elif k >= len(args) or (value == 1 and name not in module.FUSED_PLAIN):
            signature[name], constants[name], divisible = "constexpr", value, False
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % 16 == 0 and name not in module.FUSED_PLAIN
        if divisible:
            hints[(k,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, hints)
    settings = {name: options[name] for name in ("num_warps", "enable_fp_fusion") if name in options}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=settings)


def resources(compiled) -> str:
    """Registers, stack and shared memory, as cuobjdump names them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        done = subprocess.run([TOOL, "-res-usage", file.name], capture_output=True, text=True, check=True)
    return next(line for line in done.stdout.splitlines() if "REG:" in line).split("LOCAL")[0].strip()


def main() -> None:
    assert module._load_triton()
    last = torch.zeros(1, 150, 96, 96).contiguous(memory_format=torch.channels_last)
    crop = torch.zeros(2, 3, 20, 30, 40)[..., 1:17, :25, :36]
    cases = (
        (torch.zeros(1, 21, 128, 128), {}),
        (last.half(), {"opt_metric": "iou"}),
        (torch.zeros(8, 2, 64, 64, dtype=torch.bfloat16), {}),
        (torch.zeros(1, 3, 1, dtype=torch.float64), {"unassigned": 2**40, "contested": "all"}),
        (crop, {"valid": torch.ones(2, 16, 25, 36, dtype=torch.bool), "to_nonoverlap_method": "weight_prob"}),
        (torch.zeros(1, 1, 7), {"allow_overlap": True, "valid": torch.ones(1, 7, dtype=torch.bool)}),
    )
    of_levels = (
        (torch.zeros(1, 150, 128, 128), {}),
        (last.half(), {"opt_metric": "dice"}),
        (crop.double(), {"valid": torch.ones(2, 16, 25, 36, dtype=torch.bool)}),
        (torch.zeros(8, 2, 64, 64, dtype=torch.bfloat16), {"opt_metric": "dice"}),
        (last.double(), {"allow_overlap": True, "valid": torch.ones(1, 96, 96, dtype=torch.bool)}),
    )
    if "--levels" in sys.argv:
        total = sum(compile_all(module.rankseg_levelset, of_levels, capability) for capability in (80, 90))
    else:
        total = compile_all(module.rankseg_rma, cases, 90)
    print(f"{total} kernels")


def compile_all(rule, cases, capability: int) -> int:
    """Every kernel that the rule launches for these maps -> how many there were."""
    seen = set()
    for prob, options in cases:
        for kernel, args, constants in note_launches(rule, prob, **options):
            key = (kernel.__name__, prob.dtype, tuple(prob.shape), constants.get("FINAL"))
            if key not in seen:
                used = resources(compile_launch(kernel, args, constants, capability))
                print(f"{kernel.__name__:10} {str(prob.dtype)[6:]:9} {tuple(prob.shape)!s:22} {used}", flush=True)
            seen.add(key)
    for kernel, args, constants in note_launches(rule, torch.zeros(1, 3, 1024)):  # as for more than 2^31 pixels
        if "LONG" in constants:
            compile_launch(kernel, args, {**constants, "LONG": True}, capability)
    return len(seen)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
