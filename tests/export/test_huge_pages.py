"""Memory on huge pages: what is moved, what is left, and where there are none."""

import mmap
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import onnx
import pytest

from mmopt_export import huge_pages
from mmopt_export.huge_pages import on_huge_pages
from mmopt_export.placement import CPU
from mmopt_export.runtime import open_session

MIB = 1 << 20

pytestmark = pytest.mark.usefixtures("one_thread")


def on_huge(start: int = 0, end: int = 1 << 64) -> int:
    """Bytes of huge pages in the mappings that lie between two addresses."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if header := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(header[1], 16) < end and int(header[2], 16) > start
        elif inside and line.startswith("AnonHugePages:"):
            found += 1024 * int(line.split()[1])
    return found


@pytest.fixture
def system_has_them() -> None:
    if not huge_pages._page_size():
        pytest.skip("this system has no transparent huge pages, or they are off")
    with on_huge_pages(8 * MIB):
        block, _ = allocated(8 * MIB)
    if not on_huge(*span(block)):
        pytest.skip("this kernel does not collapse pages when it is told to")


def allocated(size: int, *, filled: bool = True) -> tuple[np.ndarray, mmap.mmap]:
    """Anonymous memory with numbers in it, behind a gap so that it is a mapping of its own."""
    memory = mmap.mmap(-1, size + 4 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE, 0, 2 * MIB)
    memory.madvise(mmap.MADV_NOHUGEPAGE, size + 2 * MIB, 2 * MIB)
    block = np.frombuffer(memory, np.uint32)[2 * MIB // 4 : (2 * MIB + size) // 4]
    if filled:
        block[:] = np.arange(block.size, dtype=np.uint32)
    return block, memory


def span(block: np.ndarray) -> tuple[int, int]:
    return block.ctypes.data, block.ctypes.data + block.nbytes


@pytest.mark.usefixtures("system_has_them")
def test_what_is_allocated_inside_is_moved_and_keeps_its_values() -> None:
    before, _ = allocated(8 * MIB)
    with on_huge_pages(8 * MIB):
        inside, _ = allocated(8 * MIB)
        unused, _ = allocated(8 * MIB, filled=False)
    assert on_huge(*span(inside)) >= 6 * MIB
    assert on_huge(*span(before)) == 0
    assert on_huge(*span(unused)) == 0
    np.testing.assert_array_equal(inside, np.arange(inside.size, dtype=np.uint32))


@pytest.mark.usefixtures("system_has_them")
@pytest.mark.parametrize("wanted", [True, False])
def test_weights_of_a_session_that_will_run_often_are_on_them(tmp_path: Path, wanted: bool) -> None:
    weight = np.ones((2048, 4096), np.float32)
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
        "matmul",
        [value("x", onnx.TensorProto.FLOAT, [1, 2048])],
        [value("y", onnx.TensorProto.FLOAT, [1, 4096])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    opsets = [onnx.helper.make_opsetid("", 20)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.save(model, tmp_path / "model.onnx")
    # In a process of its own: the allocator of one that ran for long has memory of before to give,
    # which stays where it is.
    with ProcessPoolExecutor(1, get_context("spawn")) as alone:
        moved = alone.submit(moved_and_right, tmp_path / "model.onnx", wanted).result()
    # Of 32 MiB of packed weights all but the ends of a mapping.
    assert (moved >= 24 * MIB) is wanted


def moved_and_right(model: Path, wanted: bool) -> int:
    """Bytes that opening a session moved to huge pages."""
    before = on_huge()
    session = open_session(model, provider=CPU, threads=1, huge_pages=wanted)
    moved = on_huge() - before
    (y,) = session.run(None, {"x": np.ones((1, 2048), np.float32)})
    assert (y == 2048).all()
    return moved


@pytest.fixture(params=["never", "no such kernel", "no /proc"])
def without(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "no /proc":
            patch.setattr(huge_pages, "_PROCESS", tmp_path)
        else:
            patch.setattr(huge_pages, "_KERNEL", tmp_path)
            if request.param == "never":
                (tmp_path / "enabled").write_text("always madvise [never]\n")
                (tmp_path / "hpage_pmd_size").write_text("2097152\n")
        yield


@pytest.mark.usefixtures("without")
def test_nothing_happens_where_there_are_none() -> None:
    with on_huge_pages(8 * MIB):
        inside, _ = allocated(8 * MIB)
    assert on_huge(*span(inside)) == 0


def test_of_less_than_a_huge_page_nothing_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel counts every page of the process for it: longer than a small session takes."""
    read: list[str] = []
    monkeypatch.setattr(huge_pages, "_read", read.append)
    with on_huge_pages(MIB):
        pass
    assert read == []
