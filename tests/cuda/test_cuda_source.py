"""Every CUDA source, compiled (not run) for each architecture that it is for; and what the machine code shows.

No GPU is needed for that, only nvcc. What nvcc said is read from the reports beside the objects in build/cuda, which
are those that a wheel is linked from.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import ptxas
import pytest

from benchmarks.gpu_suite.plan import OUR_KERNELS

cuda_build = ptxas.load_cuda_build()
WHY_NOT = cuda_build.missing()
pytestmark = [
    pytest.mark.cuda_source,
    pytest.mark.skipif(WHY_NOT is not None, reason=f"the CUDA sources cannot be compiled here: {WHY_NOT}"),
]
needs_disassembler = pytest.mark.skipif(
    ptxas.disassembler() is None, reason="needs cuobjdump and nvdisasm (pip install triton brings them)"
)

# Sources whose products run on tensor cores through mma.sync.
TENSOR_CORE_SOURCES = {"attention_forward.cu", "attention_backward.cu", "gelu_ffn_sm80.cu"}
# Kernels with shared variables of more than 4 KiB, which are launched without dynamic shared memory beside them.
SHARED_VARIABLES_ALONE = re.compile(
    r"join_pieces_kernel|add_partials_kernel|sum_row_blocks_kernel|gelu_backward_kernel"
)


def architectures() -> list[str]:
    """That the sources are compiled for here: "sm_80", ..."""
    return [f"sm_{one.name}" for one in cuda_build.listed_architectures(cuda_build.find_nvcc())]


@pytest.fixture(scope="module")
def compiled() -> tuple[list[ptxas.Usage], dict[str, Path], dict[str, str]]:
    return ptxas.compile_and_parse()


def test_every_source_compiles_for_every_architecture_it_is_for(compiled, capsys) -> None:
    usages, objects, _ = compiled
    with capsys.disabled():
        print("\n" + ptxas.table(usages))
    assert set(objects) == set(cuda_build.kernel_sources()), "pip install nvidia-cutlass"
    listed = set(architectures())
    assert "sm_90a" in listed, "TORCH_CUDA_ARCH_LIST leaves out what tests here read"
    for source in objects:
        expected = {"sm_90a"} if source.endswith("_sm90.cu") else listed
        kernels = [u for u in usages if u.source == source and u.is_kernel]
        assert {u.architecture for u in kernels} == expected, source
        assert all(u.registers > 0 for u in kernels)


def test_nothing_spills(compiled) -> None:
    spilling = [str(u) for u in compiled[0] if u.spill_store_bytes or u.spill_load_bytes]
    assert not spilling, "\n".join(spilling)


def test_shared_variables_fit_beside_what_a_launch_need_not_ask_for(compiled) -> None:
    """48 KiB for both together: launch.cuh asks above 44 KiB."""
    large = [u for u in compiled[0] if u.is_kernel and u.shared_bytes > 4096]
    assert large, "nothing was read"
    beside = [str(u) for u in large if not SHARED_VARIABLES_ALONE.search(u.name)]
    assert not beside, "\n".join(beside)


def test_no_array_lives_in_local_memory(compiled) -> None:
    """A stack frame: an array that is indexed by what the compiler does not know, and so is kept in memory."""
    framed = [str(u) for u in compiled[0] if u.stack_bytes]
    assert not framed, "\n".join(framed)


def test_the_compiler_has_nothing_to_say(compiled) -> None:
    said = [f"{source}: {line}" for source, log in compiled[2].items() for line in ptxas.complaints(log)]
    assert not said, "\n".join(said)


@needs_disassembler
def test_the_warpgroup_that_gives_its_registers_away_does_without_them(compiled) -> None:
    """setmaxnreg.dec is obeyed by hardware, whatever the code after it uses."""
    header = (ptxas.ROOT / "csrc/cuda/attention_sm90.cuh").read_text()
    kept = int(re.search(r"kProducerRegisters = (\d+)", header)[1])  # type: ignore[index]
    found = {}
    for source, binary in compiled[1].items():
        if source.startswith("attention") and source.endswith("_sm90.cu"):
            found |= ptxas.registers_after(binary, "sm_90a", "USETMAXREG.DEALLOC")
    assert found
    assert max(found.values()) < kept, found


@needs_disassembler
def test_hopper_kernels_multiply_by_the_warpgroup(compiled) -> None:
    without = []
    for source, binary in compiled[1].items():
        if source.endswith("_sm90.cu") and not sum(ptxas.count_instructions(binary, "sm_90a", "HGMMA").values()):
            without.append(source)
    assert not without, f"no HGMMA in {', '.join(without)}"


def test_the_sanitizer_knows_every_kernel_for_ours(compiled) -> None:
    """The GPU suite has compute-sanitizer look at kernels of this name alone."""
    others = [u.symbol for u in compiled[0] if u.is_kernel and OUR_KERNELS not in u.symbol]
    assert others == []


def test_the_sanitizer_has_faulty_kernels_to_find(tmp_path: Path) -> None:
    """Under the same name, so that it finds them with the same filter (-arch=native needs a GPU: here for all)."""
    source = cuda_build.ROOT / "benchmarks/gpu_suite/canary.cu"
    objects = cuda_build.compile_kernels(cuda_build.parse_architectures("8.0;9.0"), tmp_path / "build", [source])
    usages = ptxas.parse(Path(f"{objects['canary.cu']}.log").read_text(), "canary.cu")
    assert len({u.symbol for u in usages if u.is_kernel and OUR_KERNELS in u.symbol}) == 2


@needs_disassembler
def test_products_run_on_tensor_cores(compiled) -> None:
    without = []
    for source, architecture in itertools.product(TENSOR_CORE_SOURCES & set(compiled[1]), architectures()):
        if not sum(ptxas.count_instructions(compiled[1][source], architecture, "HMMA").values()):
            without.append(f"{source} for {architecture}")
    assert not without, f"no HMMA in {', '.join(without)}"


# ------------------------------------------------------------------------------------------ that a fault would be seen

FAULTY = """
__global__ void spills(float* p, int n) {
    float a[64];
#pragma unroll
    for (int i = 0; i < 64; ++i) a[i] = p[i * n + threadIdx.x];
    for (int k = 0; k < n; ++k)
#pragma unroll
        for (int i = 0; i < 64; ++i) a[i] = a[i] * a[(i + 7) % 64] + p[k];
#pragma unroll
    for (int i = 0; i < 64; ++i) p[i * n + threadIdx.x] = a[i];
}

__global__ void keeps_an_array_in_memory(float* p, const int* order) {
    float a[32];
    for (int i = 0; i < 32; ++i) a[order[i]] = p[i];
    for (int i = 0; i < 32; ++i) p[i] = a[i] + a[order[i + 32]];
}

template <int N>
__global__ void is_good(float* p) {
    __shared__ float s[N];
    s[threadIdx.x] = p[threadIdx.x];
    __syncthreads();
    p[threadIdx.x] = s[N - 1 - threadIdx.x];
}
template __global__ void is_good<64>(float*);
"""


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[ptxas.Usage], Path, str]:
    directory = tmp_path_factory.mktemp("faulty")
    source = directory / "faulty.cu"
    source.write_text(FAULTY)
    listed = cuda_build.parse_architectures("8.0;9.0a")
    objects = cuda_build.compile_kernels(listed, directory / "build", [source], ("-maxrregcount=24",))
    log = Path(f"{objects['faulty.cu']}.log").read_text()
    return ptxas.parse(log, "faulty.cu"), objects["faulty.cu"], log


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_faults_are_seen(faulty, architecture: str) -> None:
    found = {u.name.split("(")[0]: u for u in faulty[0] if u.architecture == architecture and u.is_kernel}
    assert set(found) == {"spills", "keeps_an_array_in_memory", "void is_good<64>"}
    assert found["spills"].spill_store_bytes > 0
    assert found["spills"].spill_load_bytes > 0
    array = found["keeps_an_array_in_memory"]
    assert array.stack_bytes >= 128
    assert array.spill_store_bytes == array.spill_load_bytes == 0
    good = found["void is_good<64>"]
    assert good.stack_bytes == good.spill_store_bytes == good.spill_load_bytes == 0
    assert good.shared_bytes == 256
    assert 0 < good.registers <= 24


@needs_disassembler
def test_the_absence_of_tensor_cores_is_seen(faulty) -> None:
    for architecture, opcode in (("sm_80", "HMMA"), ("sm_90a", "HGMMA")):
        counts = ptxas.count_instructions(faulty[1], architecture, opcode)
        assert len(counts) == 3
        assert not any(counts.values())
    assert sum(ptxas.count_instructions(faulty[1], "sm_80", "LDG").values()) > 0


def test_complaints_are_seen() -> None:
    log = (
        "ptxas info    : 0 bytes gmem\n"
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ...\n"
        "ptxas warning : Value of threads per SM for entry k is out of range\n"
        'csrc/cuda/a.cu(7): warning #177-D: variable "x" was declared but never referenced\n'
    )
    assert len(ptxas.complaints(log)) == 3


# -------------------------------------------------------------------------------------------------- architecture lists


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("8.0", "8.0"),
        ("8.0;9.0a 10.0+PTX,12.0", "8.0 9.0a 10.0+PTX 12.0"),
        ("7.5 8.0 8.0 9.0", "8.0 9.0"),
        ("10.3f", "10.3f"),
    ],
)
def test_architecture_lists(text: str, names: str) -> None:
    assert " ".join(map(str, cuda_build.parse_architectures(text))) == names


@pytest.mark.parametrize("text", ["Hopper", "9", "sm_90", "", "7.0;7.5"])
def test_architecture_lists_that_mean_nothing(text: str) -> None:
    with pytest.raises(ValueError, match="architecture"):
        cuda_build.parse_architectures(text)


@pytest.mark.parametrize(
    ("text", "hopper"), [("8.0;9.0a", ["90a"]), ("9.0+PTX", ["90a"]), ("9.0;9.0a", ["90a"]), ("8.0;10.0", [])]
)
def test_hopper_sources_are_compiled_for_hopper_alone(text: str, hopper: list[str]) -> None:
    listed = cuda_build.parse_architectures(text)
    assert [a.name for a in cuda_build.architectures_of("attention_sm90.cu", listed)] == hopper
    assert cuda_build.architectures_of("attention_forward.cu", listed) == listed
    assert ("ROBERTA_KERNELS_SM90A" in cuda_build.definitions(listed)) == bool(hopper)


def test_what_needs_cutlass_is_left_out_without_it(monkeypatch) -> None:
    listed = cuda_build.parse_architectures("8.0;9.0a")
    monkeypatch.setenv("ROBERTA_KERNELS_CUTLASS", "/nowhere")
    assert cuda_build.architectures_of("gelu_ffn_sm80.cu", listed) == ()
    assert cuda_build.architectures_of("gelu_ffn_elementwise.cu", listed) == listed
    assert cuda_build.definitions(listed) == ["ROBERTA_KERNELS_SM90A"]


def test_nothing_compiles_without_saying_why(tmp_path: Path, capfd) -> None:
    source = tmp_path / "broken.cu"
    source.write_text("__global__ void broken() { undeclared = 1; }\n")
    with pytest.raises(cuda_build.subprocess.CalledProcessError):
        cuda_build.compile_kernels(cuda_build.parse_architectures("8.0"), tmp_path / "build", [source])
    assert "undeclared" in capfd.readouterr().err
