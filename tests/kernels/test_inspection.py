"""Kernels are captured as they would launch, compiled for GPUs that are not here, and read right.

Nothing here needs a GPU. Whatever compiles does so in processes of its own: in this one
TRITON_INTERPRET may have replaced the kernels.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="compiles Triton kernels")

from mmopt_kernels import InputError, MmoptError
from mmopt_kernels.inspection import CASES, TARGETS, Case, Failure, Inspection, build, inspect
from mmopt_kernels.inspection.cases import case_named
from mmopt_kernels.inspection.machine_code import (
    Resources,
    code_bytes,
    count_matrix_instructions,
    dot_bits,
    parse_amdgcn,
    parse_ptxas,
)
from mmopt_kernels.inspection.occupancy import occupancy

KERNELS = Path(__file__).resolve().parents[2] / "kernels"


def compiling(script: Path, code: str, *arguments: str) -> Any:
    """The JSON that ``code`` prints, run from a file, because Triton reads a kernel's source."""
    script.write_text(code)
    env = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    env |= {"TRITON_CACHE_DIR": str(script.parent / "cache"), "PYTHONPATH": str(KERNELS)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), *arguments],
        capture_output=True, text=True, env=env, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


# --- what is captured -----------------------------------------------------------------------------

# Triton's own `JITFunction.run`, with a driver that says which GPU there is and a hook that takes
# what it is about to compile, against what our recorder and `specialize` make of the same call.
BOTH_WAYS = """
import json, sys
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from mmopt_kernels import _triton
from mmopt_kernels.inspection.capture import capture
from mmopt_kernels.inspection.cases import case_named
from mmopt_kernels.inspection.targets import TARGETS

case, target = case_named(sys.argv[1]), TARGETS[sys.argv[2]]


class Driver:
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self): return GPUTarget(target.backend, target.arch, target.warp_size)


def take(*, fn, compile, **_):
    launched.append([
        fn.name, compile["signature"], shown(compile["constants"]), shown(compile["configs"][0]),
        compile["num_warps"], compile["num_stages"],
    ])
    return True  # and do not compile


def shown(by_path):
    return {str(path): str(value) for path, value in by_path.items()}


launched = []
driver.set_active(Driver())
knobs.runtime.jit_cache_hook = take
with _triton.assuming(target.name):
    case.launch()
captured = [
    [
        one.kernel, one.source.signature, shown(one.source.constants), shown(one.source.attrs),
        one.options["num_warps"], one.options["num_stages"],
    ]
    for one in capture(case, target)
]
print(json.dumps({"launched": launched, "captured": captured}))
"""

ATTENTION = ["forward", "backward_rows", "backward_runs", "backward_dkdv", "backward_dq"]


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_what_is_captured_is_what_triton_would_compile(target: str, tmp_path: Path) -> None:
    """Kernels, types, constants, what is known of the arguments, warps and stages; in order."""
    name = "attention/bf16-d128-everything"
    found = compiling(tmp_path / "both.py", BOTH_WAYS, name, target)
    assert found["captured"] == found["launched"]
    kernels = [launch[0] for launch in found["captured"]]
    assert kernels == [f"attention_{kernel}" for kernel in ATTENTION]


DESCRIPTOR = """
import json
import torch, triton, triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor
from mmopt_kernels.inspection.capture import recording, specialize
from mmopt_kernels.inspection.targets import TARGETS
from mmopt_kernels.inspection.worker import _disassembled


@triton.jit
def copy(p_x, p_y, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(p_y + o[:, None] * BLOCK + o[None, :], p_x.load([0, 0]))


x = torch.empty(256, 256, dtype=torch.bfloat16, device="meta")
with recording() as launches:
    copy[(1,)](TensorDescriptor.from_tensor(x, [64, 64]), x, BLOCK=64, num_warps=4)
one = specialize(launches[0], TARGETS["sm_90"])
compiled = triton.compile(one.source, target=one.target, options=dict(one.options))
print(json.dumps({
    "signature": one.source.signature, "grid": one.grid, "config": one.config,
    "loads": _disassembled(compiled.kernel).count("UTMALDG"),
}))
"""


def test_tensor_descriptors_are_captured_and_compile_to_tma(tmp_path: Path) -> None:
    found = compiling(tmp_path / "descriptor.py", DESCRIPTOR)
    assert found["signature"]["p_x"].startswith("tensordesc<bf16[64, 64]")
    assert found["signature"]["p_y"] == "*bf16"
    assert found["grid"] == [1]
    assert found["config"] == {"num_warps": 4, "num_stages": 3}
    assert found["loads"] > 0


def test_capturing_interpreted_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmopt_kernels.inspection.capture import recording

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(MmoptError, match="TRITON_INTERPRET is set"), recording():
        pass


def test_every_launcher_stands_in_a_case_and_cases_have_names_of_their_own() -> None:
    """A kernel that no case launches is compiled nowhere without a GPU."""
    assert len({case.name for case in CASES}) == len(CASES)
    text = Path(build.__file__).with_name("cases.py").read_text()
    for path in sorted((KERNELS / "mmopt_kernels").glob("*/kernel*.py")):
        for name, body in re.findall(
            r"^def (\w+)\((.*?)(?=^def |^@|\Z)", path.read_text(), re.MULTILINE | re.DOTALL
        ):
            # A function that looks up its tile launches with it, but for the one that only looks.
            chooses = re.search(r"\b(?:tuning\.lookup|shipped_tile)\(", body) is not None
            chooses &= not name.startswith("_") and name != "shipped_tile"
            if name.startswith("launch") or chooses:
                assert f"{path.stem}.{name}(" in text, f"{path}: {name}"
    ops = {case.name.split("/")[0] for case in CASES}
    for target in TARGETS:
        assert {case.name.split("/")[0] for case in CASES if target in case.default} == ops


# --- what is compiled -----------------------------------------------------------------------------

SMALL = "lora_linear/bf16-m16-r16"
KERNEL = f"{SMALL}/lora_linear_forward"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Inspection, Path, Path]:
    """The cheapest kernel with a matrix product, for every target; its files, its kept figures."""
    folder = tmp_path_factory.mktemp("compiled")
    emit, kept = folder / "emitted", folder / "kept"
    found = inspect(list(TARGETS.values()), cases=[case_named(SMALL)], jobs=1, emit=emit, kept=kept)
    return found, emit, kept


@pytest.mark.parametrize(("target", "instruction"), [
    ("sm_80", "HMMA"), ("sm_90", "HMMA"), ("sm_100", "HMMA"), ("sm_120", "HMMA"),
    ("gfx942", "MFMA"),
])  # fmt: skip
def test_figures_of_a_compiled_kernel_are_those_of_its_files(
    compiled: tuple[Inspection, Path, Path], target: str, instruction: str
) -> None:
    found, emit, _ = compiled
    assert found.failures == ()
    kernel = next(one for one in found.kernels if one.target == target)
    assert (kernel.name, kernel.kernel) == (KERNEL, "lora_linear_forward")
    assert kernel.dot_bits == 16
    assert kernel.matrix_instructions[instruction] >= 8
    assert 32 < kernel.registers <= TARGETS[target].registers
    assert kernel.config["BLOCK_M"] in (16, 32, 64)
    assert kernel.compile_seconds > 0
    stem = emit / target / KERNEL
    document = json.loads(stem.with_name(f"{stem.name}.json").read_text())
    assert document["figures"]["registers"] == kernel.registers
    assert document["shared"] == kernel.shared_bytes
    assert document["num_warps"] == kernel.config["num_warps"]
    assert document["constants"]["BLOCK_M"] == kernel.config["BLOCK_M"]
    assert document["signature"]["p_x"] == "*bf16"
    assert document["attributes"]["p_x"] != []
    assert document["symbol"] == "lora_linear_forward"
    binary = stem.with_name(f"{stem.name}.{'hsaco' if target == 'gfx942' else 'cubin'}")
    assert 0 < kernel.code_bytes == code_bytes(binary.read_bytes()) < binary.stat().st_size
    assembly = stem.with_name(f"{stem.name}.{'amdgcn' if target == 'gfx942' else 'ptx'}")
    text = assembly.read_text()
    assert "lora_linear_forward" in text
    # Where the checkout lies would decide what ptxas makes of it.
    assert str(KERNELS) not in text
    assert ".loc" not in text


def test_amd_occupancy_is_what_llvm_writes_beside_its_code(
    compiled: tuple[Inspection, Path, Path],
) -> None:
    """LLVM knows the registers, not the shared memory, which Triton asks for at launch."""
    found, emit, _ = compiled
    kernel = next(one for one in found.kernels if one.target == "gfx942")
    text = (emit / "gfx942" / f"{KERNEL}.amdgcn").read_text()
    waves = int(re.findall(r"^; Occupancy: (\d+)", text, re.MULTILINE)[0])
    fits = occupancy(TARGETS["gfx942"], registers=kernel.registers, shared=0, warps=4)
    assert fits.warps / 4 == waves


def test_kept_figures_are_used_and_broken_ones_compiled_anew(
    compiled: tuple[Inspection, Path, Path],
) -> None:
    found, _, kept = compiled
    again = inspect([TARGETS["sm_80"]], cases=[case_named(SMALL)], jobs=1, kept=kept)
    before = next(one for one in found.kernels if one.target == "sm_80")
    assert again.kernels == (before,)  # the seconds too: it was not compiled
    assert len(list(kept.iterdir())) == len(TARGETS)
    for path in kept.iterdir():
        path.write_text("{broken")
    again = inspect([TARGETS["sm_80"]], cases=[case_named(SMALL)], jobs=1, kept=kept)
    assert again.kernels[0].registers == before.registers
    assert again.kernels[0].code_bytes == before.code_bytes


def test_a_folder_that_cannot_keep_figures_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/kept cannot be written"):
        inspect([TARGETS["sm_80"]], cases=[], kept=tmp_path / "file" / "kept")


def test_a_case_that_cannot_launch_is_a_failure_with_its_reason() -> None:
    case = Case("no/such", lambda: None, "bf16", None, frozenset())
    found = inspect([TARGETS["sm_80"]], cases=[case], jobs=1)
    assert found.kernels == ()
    assert found.failures == (Failure("sm_80", "no/such", "KeyError: 'no/such'"),)


WORKER = """
import json, os, sys, time
for line in sys.stdin:
    request = json.loads(line)
    if request["do"] == "plan":
        names = ["crashes", "hangs", "works", "works"]
        answer = [{"kernel": n, "config": {}, "key": n} for n in names]
    elif request["index"] == 0:
        print("loc(here): error: no such layout", file=sys.stderr, flush=True)
        os.abort()
    elif request["index"] == 3:
        os.abort()  # the key is that of index 2: the same code is compiled once
    elif request["index"] == 1:
        time.sleep(60)
    else:
        answer = dict(registers=40, spilled_bytes=0, shared_bytes=0, tensor_memory_columns=0,
            warps=4, dot_bits=None, matrix_instructions={}, code_bytes=1, compile_seconds=0.1)
    print(json.dumps({"result": answer}), flush=True)
"""


def test_a_compiler_that_crashes_or_hangs_fails_its_kernel_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    monkeypatch.setattr(build, "_WORKER", (sys.executable, str(worker)))
    monkeypatch.setattr(build, "_LONGEST_SECONDS", 3.0)
    found = inspect([TARGETS["sm_80"]], cases=[case_named(SMALL)], jobs=1)
    assert [kernel.name for kernel in found.kernels] == [f"{SMALL}/works", f"{SMALL}/works-2"]
    assert found.failures == (
        Failure(
            "sm_80",
            f"{SMALL}/crashes",
            "the compiler ended with code -6: no such layout",
        ),
        Failure("sm_80", f"{SMALL}/hangs", "the compiler hung"),
    )


def test_kernels_are_compiled_without_random_addresses() -> None:
    """By which Triton orders what it emits: with them the same kernel differs from run to run."""

    def said(*code: str) -> int:
        asked = [sys.executable, "-c", *code]
        ran = subprocess.run(asked, capture_output=True, text=True, check=True)
        return int(ran.stdout, 16)

    if said("import ctypes; print(ctypes.CDLL(None).personality(0x0040000))") == -1:
        pytest.skip("this sandbox does not let a process choose its addresses")
    read = "print(open('/proc/self/personality').read())"
    assert said(build._REPEATABLY, "-c", read) & 0x0040000


def test_a_worker_that_does_not_start_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys; sys.exit('no module named triton')"
    monkeypatch.setattr(build, "_WORKER", (sys.executable, "-c", code))
    with pytest.raises(MmoptError, match="did not start: no module named triton"):
        inspect([TARGETS["sm_80"]], cases=[case_named(SMALL)], jobs=1)


# --- occupancy ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "registers", "shared", "warps", "blocks", "limited_by"), [
    # 64 registers for each of 2048 threads are twice the 65536 there are.
    ("sm_80", 64, 0, 8, 4, "registers"),
    # 32 for each of 2048 fit exactly: 8 blocks of 8 warps are all 64 warps.
    ("sm_80", 32, 0, 8, 8, "registers"),
    ("sm_80", 33, 0, 8, 6, "registers"),  # rounded up to 40: 12 warps in each of 4 partitions
    # 255 registers are 256: 2 warps in each of 4 partitions are one block of 8.
    ("sm_90", 255, 0, 8, 1, "registers"),
    ("sm_90", 168, 0, 4, 3, "registers"),  # 512 // 168 = 3 warps in a partition
    # 70 KiB and the driver's 1 KiB: 3 of 71 KiB in 228.
    ("sm_90", 91, 71680, 4, 3, "shared memory"),
    ("sm_90", 24, 0, 1, 32, "blocks"),
    ("sm_90", 24, 227 * 1024 + 1, 4, 0, "shared memory"),
    ("sm_120", 24, 0, 8, 6, "warps"),  # 48 warps
    ("gfx942", 202, 40960, 8, 1, "registers"),  # 2 waves in each of 4 SIMDs
    ("gfx942", 202, 40960, 4, 1, "shared memory"),
    ("gfx942", 513, 0, 4, 0, "registers"),
    ("gfx942", 32, 0, 1, 32, "warps"),  # a workgroup of one wave needs no barrier
    ("gfx942", 32, 0, 2, 16, "warps"),
])  # fmt: skip
def test_occupancy_worked_out_by_hand(
    target: str, registers: int, shared: int, warps: int, blocks: int, limited_by: str
) -> None:
    found = occupancy(TARGETS[target], registers=registers, shared=shared, warps=warps)
    assert (found.blocks, found.limited_by) == (blocks, limited_by)
    assert found.warps == blocks * warps
    assert found.share == found.warps / TARGETS[target].warps


def test_tensor_memory_limits_occupancy_as_well() -> None:
    target = TARGETS["sm_100"]
    assert occupancy(target, registers=64, shared=0, warps=4, tensor_memory=256).blocks == 2
    found = occupancy(target, registers=64, shared=0, warps=4, tensor_memory=512)
    assert (found.blocks, found.limited_by) == (1, "tensor memory")
    assert occupancy(target, registers=64, shared=0, warps=4, tensor_memory=1024).blocks == 0


CALCULATOR = """
#include <stdio.h>
#include <string.h>
#include <limits.h>
#include "cuda_occupancy.h"

int main(void) {
    int major, registers, shared, warps, most_warps, all_shared;
    while (scanf("%d %d %d %d %d %d", &major, &registers, &shared, &warps, &most_warps,
                 &all_shared) == 6) {
        cudaOccDeviceProp gpu;
        cudaOccFuncAttributes kernel;
        cudaOccDeviceState state;
        cudaOccResult result;
        memset(&gpu, 0, sizeof gpu);
        memset(&kernel, 0, sizeof kernel);
        memset(&state, 0, sizeof state);
        gpu.computeMajor = major;
        gpu.maxThreadsPerBlock = 1024;
        gpu.maxThreadsPerMultiprocessor = most_warps * 32;
        gpu.regsPerBlock = gpu.regsPerMultiprocessor = 65536;
        gpu.warpSize = 32;
        gpu.sharedMemPerBlock = 49152;
        gpu.sharedMemPerMultiprocessor = all_shared;
        gpu.sharedMemPerBlockOptin = all_shared - 1024;
        gpu.reservedSharedMemPerBlock = 1024;
        gpu.numSms = 1;
        kernel.maxThreadsPerBlock = 1024;
        kernel.numRegs = registers;
        kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
        kernel.maxDynamicSharedSizeBytes = shared;
        state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
        if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &gpu, &kernel, &state, warps * 32,
                                                    shared) != CUDA_OCC_SUCCESS) return 1;
        printf("%d\\n", result.activeBlocksPerMultiprocessor);
    }
    return 0;
}
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="builds NVIDIA's calculator with cc")
def test_occupancy_is_that_of_nvidias_own_calculator(tmp_path: Path) -> None:
    """`cuda_occupancy.h`, which Triton ships, on draws from all that a kernel may ask for."""
    import triton

    include = Path(triton.__file__).parent / "backends/nvidia/include"
    source = tmp_path / "calculator.c"
    source.write_text(CALCULATOR)
    program = tmp_path / "calculator"
    subprocess.run(["cc", f"-I{include}", "-o", program, source], check=True, capture_output=True)
    draw = random.Random(0)
    asked, ours = [], []
    for target in TARGETS.values():
        if target.backend != "cuda":
            continue
        for _ in range(500):
            registers = draw.randint(16, 255)
            shared = draw.choice([0, draw.randint(1, target.shared_per_block)])
            warps = draw.choice([1, 2, 4, 8, 12, 16, 32])
            asked.append(
                f"{int(target.arch) // 10} {registers} {shared} {warps} {target.warps} "
                f"{target.shared}"
            )
            ours.append(occupancy(target, registers=registers, shared=shared, warps=warps).blocks)
    done = subprocess.run(
        [program], input="\n".join(asked), capture_output=True, text=True, check=True
    )
    theirs = [int(line) for line in done.stdout.split()]
    assert len(theirs) == len(asked) == 2000
    differing = [line for line, a, b in zip(asked, ours, theirs, strict=True) if a != b]
    assert differing == []


# --- parsers --------------------------------------------------------------------------------------

PTXAS = """\
ptxas-blackwell info    : 11 bytes gmem
ptxas-blackwell info    : Compiling entry function 'attention_backward_dkdv' for 'sm_90a'
ptxas-blackwell info    : Function properties for attention_backward_dkdv
    96 bytes stack frame, 88 bytes spill stores, 136 bytes spill loads
ptxas-blackwell info    : Used 255 registers, used 1 barriers, 96 bytes cumulative stack size
ptxas-blackwell info    : Compile time = 388.064 ms
"""

SASS = """\
        .global         attention_backward_dkdv
.text.attention_backward_dkdv:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0260*/              @!P1 IADD3 R3, R3, -R8.reuse, RZ ;
        /*1150*/                   HGMMA.64x32x16.F32.BF16 R24, gdesc[UR8].tnspB, R24, gsb0 ;
        /*1160*/             @!UPT HGMMA.64x32x16.F32.BF16 R24, R4, gdesc[UR8], R24, gsb0 ;
        /*1170*/               @P0 HMMA.16816.F32.BF16 R12, R4, R8, R12 ;
        /*3b00*/                   UTCHMMA gdesc[UR22], gdesc[UR10], tmem[UR13], tmem[UR4] ;
        /*3b10*/                   UTCATOMSWS.FIND_AND_SET.ALIGN UP0, UR4, UR4 ;
        /*3b20*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ; // after HGMMA
"""

AMDGCN = """\
attention_forward:
	v_mfma_f32_32x32x8_bf16 v[0:15], v[96:97], v[98:99], v[0:15]
	v_mfma_f32_32x32x8_bf16 v[0:15], v[100:101], v[102:103], v[0:15]
	v_smfmac_f32_16x16x32_bf16 v[0:3], v[4:5], v[6:9], v10
	v_mul_f32_e32 v1, v2, v3 ; not v_mfma_f32
	.set .Lattention_forward.num_vgpr, 202
  - .agpr_count:     96
    .sgpr_count:     92
    .sgpr_spill_count: 5
    .vgpr_count:     298
    .vgpr_spill_count: 7
"""


def test_ptxas_says_registers_and_spills() -> None:
    assert parse_ptxas(PTXAS) == Resources(registers=255, spilled_bytes=88)
    with pytest.raises(ValueError, match="found 0"):
        parse_ptxas("")
    with pytest.raises(ValueError, match="found 2"):
        parse_ptxas(PTXAS + PTXAS)


def test_amd_metadata_says_registers_and_spills() -> None:
    assert parse_amdgcn(AMDGCN) == Resources(registers=298, spilled_bytes=28)


def test_matrix_instructions_are_counted_by_mnemonic() -> None:
    """Not where a name stands inside another, in an operand or a comment."""
    hopper = TARGETS["sm_90"].matrix
    assert count_matrix_instructions(SASS, hopper) == {"HGMMA": 2, "HMMA": 1}
    assert count_matrix_instructions(SASS, TARGETS["sm_100"].matrix) == {"HMMA": 1, "UTCHMMA": 1}
    assert count_matrix_instructions(AMDGCN, TARGETS["gfx942"].matrix) == {"MFMA": 2, "SMFMAC": 1}
    assert count_matrix_instructions("", hopper) == {}


@pytest.mark.parametrize(("line", "bits"), [
    ("%0 = tt.dot %a, %b, %c : tensor<128x64xbf16> * tensor<64x32xbf16> -> tensor<128x32xf32>", 16),
    ("%0 = tt.dot %a, %b, %c, inputPrecision = tf32 : tensor<16x16xf32> * tensor<16x16xf32>", 32),
    ("%0 = tt.dot %a, %b, %c : tensor<16x16xf8E4M3FN> * tensor<16x16xf8E4M3FN>", 8),
    ("%0 = tt.dot %a, %b, %c : tensor<2x16x16xi8> * tensor<2x16x16xi8> -> tensor<16x16xi32>", 8),
    ("%0 = arith.mulf %a, %b : tensor<128x64xbf16>", None),
])  # fmt: skip
def test_the_width_of_a_matrix_product_is_that_of_its_operands(line: str, bits: int | None) -> None:
    assert dot_bits(f"    {line} loc(#loc1)") == bits


def test_only_elf_files_have_a_code_size() -> None:
    with pytest.raises(ValueError, match="ELF"):
        code_bytes(bytes(64))
