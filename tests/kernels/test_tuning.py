"""Tables of tiles: which entry a launch gets, what a table must hold, and how tuning writes one."""

from __future__ import annotations

import contextlib
import json
import timeit
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mmopt_kernels import candidates, tuning
from mmopt_kernels.errors import InputError, KernelInputError

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
KERNEL = "attention_forward"


def config(block_m: int, tma: bool = False) -> dict[str, int]:
    return {"BLOCK_M": block_m, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2, "TMA": tma}


def row(block_m: int, **changes: Any) -> dict[str, Any]:
    """An entry, told apart from others by its BLOCK_M."""
    plain = {
        "kernel": KERNEL,
        "dtype": "bfloat16",
        "width": 64,
        "features": ["dropout", "softcap"],
        "length": None,
        "config": config(block_m),
        "source": "static",
        "why": "a test",
    }
    return plain | changes


ONE_PASS = "attention_backward_one_pass"


def one_pass(block_m: int) -> dict[str, int]:
    return config(block_m) | {"BULK": False}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder of user tables."""
    monkeypatch.setenv(tuning.TABLES, str(tmp_path))
    tuning.reload()
    yield tmp_path
    monkeypatch.undo()
    tuning.reload()


def write(folder: Path, *rows: dict[str, Any], target: str = "sm_00") -> Path:
    path = folder / f"{target}.json"
    path.write_text(json.dumps({"target": target, "entries": rows}))
    tuning.reload()
    return path


def found(
    dtype: torch.dtype = BF16,
    width: int = 64,
    length: int = 1024,
    *features: str,
    tma: bool = False,
) -> int | None:
    """BLOCK_M of the entry that a launch on sm_00 gets."""
    got = tuning.lookup(KERNEL, "sm_00", dtype, width, length, features, tma)
    return None if got is None else got["BLOCK_M"]


def test_no_table_leaves_the_choice_to_the_heuristic(folder: Path) -> None:
    assert found() is None
    write(folder, row(16), target="sm_01")
    assert found() is None


def test_exact_entry_wins_then_the_nearest_width_from_above(folder: Path) -> None:
    write(folder, row(16, width=256), row(32, width=64), row(64, width=128))
    assert [found(width=w) for w in (16, 32, 64, 128, 256)] == [32, 32, 32, 64, 16]
    assert found(width=512) is None, "an entry too narrow never fits"


def test_entry_with_fewer_features_than_the_launch_never_fits(folder: Path) -> None:
    write(folder, row(16, features=[]), row(32, features=["softcap"]))
    assert found() == 16
    assert found(BF16, 64, 1024, "softcap") == 32
    assert found(BF16, 64, 1024, "dropout") is None
    write(folder, row(16), row(32, features=["softcap"]))
    assert found() == 32, "the entry with the fewest features too many"
    # A narrower width counts for more than spare features do.
    write(folder, row(16), row(32, width=128, features=[]))
    assert found() == 16


def test_an_entry_without_a_configuration_wins_and_gives_none(folder: Path) -> None:
    """Where nothing was better, a farther entry must not come in its place."""
    write(folder, row(16, length=8192), row(32, config=None, length=1024))
    assert found(length=8192) == 16
    assert found(length=1000) is None


def test_an_optional_kernel_is_launched_only_where_its_entry_was_found(folder: Path) -> None:
    """Not at the nearest width, length or features: there two passes may be faster."""
    entry = row(16, kernel=ONE_PASS, config=one_pass(16), features=["softcap"], width=128)

    def fits(width: int, length: int, *features: str, dtype: torch.dtype = BF16) -> bool:
        return tuning.lookup(ONE_PASS, "sm_00", dtype, width, length, features) is not None

    write(folder, entry | {"length": 4096})
    assert fits(128, 4096, "softcap")
    assert fits(128, 2049, "softcap", dtype=FP16)
    assert not fits(128, 2048, "softcap")
    assert not fits(128, 4097, "softcap")
    assert not fits(64, 4096, "softcap")
    assert not fits(128, 4096)
    assert not fits(128, 4096, "softcap", dtype=FP32)
    write(folder, entry)
    assert fits(128, 1, "softcap"), "an entry without a length is for all"
    assert not fits(64, 1, "softcap")


def test_dtypes_of_16_bits_stand_in_for_each_other_and_float32_for_none(folder: Path) -> None:
    write(folder, row(16, dtype="float16"), row(32, dtype="bfloat16"))
    assert (found(FP16), found(BF16), found(FP32)) == (16, 32, None)
    write(folder, row(16, dtype="float16"), row(64, dtype="float32"))
    assert (found(BF16), found(FP32)) == (16, 64)


def test_nearest_length_counts_in_doublings_and_entries_without_one_come_last(folder: Path) -> None:
    write(folder, row(16), row(32, length=512), row(64, length=8192))
    # 2049 to 4096 round up to 4096: one doubling from 8192, three from 512.
    lengths = {1: 32, 513: 32, 1024: 32, 2049: 64, 4096: 64, 65536: 64}
    assert {length: found(length=length) for length in lengths} == lengths
    # Of two equally near the first in the file.
    write(folder, row(16, length=2048), row(32, length=512))
    assert found(length=1024) == 16
    write(folder, row(16))
    assert found(length=1024) == 16


def test_tma_entry_fits_only_where_the_tensors_allow_descriptors(folder: Path) -> None:
    write(folder, row(16, config=config(16, tma=True)), row(32, width=128))
    assert found(tma=True) == 16
    assert found(tma=False) == 32


def test_user_table_wins_over_the_shipped_one(folder: Path) -> None:
    def lookup(width: int) -> Any:
        return tuning.lookup(KERNEL, "sm_90", BF16, width, 1024, (), True)

    shipped = {width: lookup(width) for width in (64, 128)}
    assert all(entry.shipped for entry in tuning.entries("sm_90"))
    assert None not in shipped.values()
    write(folder, row(16, width=128), target="sm_90")
    # Even with features to spare or for another length, but not for another width.
    assert lookup(64) == shipped[64]
    write(folder, row(16, width=128, features=[], length=16), target="sm_90")
    assert lookup(128)["BLOCK_M"] == 16


def test_missing_folder_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tuning.TABLES, str(folder / "nowhere"))
    tuning.reload()
    with pytest.raises(InputError, match=r"MMOPT_TABLES is '.*nowhere', expected a folder"):
        found()


BROKEN = {
    "kernel is 'matmul', expected one of attention_forward": {"kernel": "matmul"},
    "kernel is ['x'], expected one of": {"kernel": ["x"]},
    "dtype is 'bf16', expected one of float32": {"dtype": "bf16"},
    "width is 80, expected a power of two": {"width": 80},
    "length is 1000, expected null or a power of two": {"length": 1000},
    "features is ['softcap', 'dropout'], expected a list, in order": {
        "features": ["softcap", "dropout"]
    },
    "features is 'dropout', expected a list": {"features": "dropout"},
    "source is 'guess', expected 'static' or 'measured'": {"source": "guess"},
    "BLOCK_M is 48, expected a power of two": {"config": config(48)},
    "BLOCK_M is True, expected a power of two": {"config": config(True)},
    "num_stages is 0, expected a positive integer": {"config": config(16) | {"num_stages": 0}},
    "TMA is 1, expected true or false": {"config": config(16) | {"TMA": 1}},
    "expected BLOCK_M, BLOCK_N, num_warps, num_stages, TMA": {"config": {"BLOCK_M": 16}},
    "a static entry says where it comes from in why; this one has nothing": {"why": None},
    "a measured entry says where it comes from in gpu, triton, torch, date, results": {
        "source": "measured"
    },
}


@pytest.mark.parametrize("message", BROKEN, ids=lambda text: text.split(",")[0])
def test_malformed_entry_is_named_with_its_file(folder: Path, message: str) -> None:
    bad = row(16) | BROKEN[message]
    if bad["why"] is None:
        del bad["why"]
    path = write(folder, row(16), bad)
    with pytest.raises(InputError) as caught:
        found()
    assert str(caught.value).startswith(f"{path}, entry 1: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "expected one object with 'target' and 'entries'"),
        ('{"target": "sm_01", "entries": []}', "target is 'sm_01', expected 'sm_00'"),
        ('{"target": "sm_00", "entries": {}}', "entries is not a list"),
        ('{"target": "sm_00", "entries": [3]}', "entry 0: expected an object with config, dtype"),
    ],
)
def test_malformed_table_is_named(folder: Path, text: str, message: str) -> None:
    path = folder / "sm_00.json"
    path.write_text(text)
    tuning.reload()
    with pytest.raises(InputError) as caught:
        found()
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def launch(tma: bool = False) -> tuning.Config | None:
    """Stands for an op that launches the kernel: it asks, and runs what it gets."""
    return tuning.lookup(KERNEL, "sm_00", FP16, 64, 1000, ("dropout",), tma)


def clock_of(milliseconds: dict[int, float | Exception]) -> Any:
    """Times a call of `launch` by its BLOCK_M."""

    def clock(call: Any) -> float:
        took = milliseconds[call()["BLOCK_M"]]
        if isinstance(took, Exception):
            raise took
        return took

    return clock


def test_tuning_writes_the_fastest_candidate_with_its_provenance(folder: Path) -> None:
    clock = clock_of({16: 2.0, 32: 1.0, 64: KernelInputError("too large")})
    candidates = [config(16), config(32), config(64)]
    got = tuning.tune(KERNEL, candidates, launch, clock=clock, gpu="a clock")
    assert got.config == config(32)
    assert got.table == folder / "sm_00.json"
    # The key is the launch's own; the next launch takes it without another word.
    assert launch() == config(32)
    (entry,) = tuning.entries("sm_00")
    assert (entry.dtype, entry.width, entry.length) == (FP16, 64, 1024)
    assert entry.features == ("dropout",)
    assert (entry.source, entry.shipped) == ("measured", False)
    assert entry.provenance["gpu"] == "a clock"
    assert entry.provenance["torch"] == torch.__version__
    timings = json.loads((folder / entry.provenance["results"]).read_text())["timings"]
    assert [timing.get("ms") for timing in timings] == [2.0, 1.0, None]
    assert timings[2]["skipped"] == "KernelInputError: too large"
    assert [path for path in folder.rglob("*") if path.name.startswith(".")] == []


def test_without_a_list_the_known_candidates_for_the_width_are_timed(folder: Path) -> None:
    known = candidates.candidates(KERNEL, 64)
    assert known[0] is None
    assert len(known) > 2
    got = tuning.tune(KERNEL, None, launch, clock=lambda call: float(call() is None), gpu="a clock")
    assert [config for config, _ in got.timings] == list(known)
    with pytest.raises(InputError, match="does not launch attention_forward"):
        tuning.tune(KERNEL, None, lambda: None, clock=lambda call: 1.0)


@pytest.mark.parametrize("kernel", tuning.FIELDS)
@pytest.mark.parametrize("width", [16, 64, 128, 256])
def test_known_candidates_are_well_formed_and_differ(kernel: str, width: int) -> None:
    known = candidates.candidates(kernel, width)
    assert known[0] is None
    with contextlib.ExitStack() as stack:
        for candidate in known:  # refused where it is malformed
            stack.enter_context(tuning.forcing({kernel: candidate}))
    listed = [dict(candidate) for candidate in known if candidate is not None]
    assert len(listed) == len(known) - 1
    assert all(one not in listed[:index] for index, one in enumerate(listed))


@pytest.mark.parametrize("passes", [1, 2])
def test_tuning_says_whether_one_pass_is_faster_than_two(folder: Path, passes: int) -> None:
    """Two passes are the launch without an entry; where they win no other entry may come."""

    def backward() -> tuning.Config | None:
        return tuning.lookup(ONE_PASS, "sm_00", FP16, 64, 1000)

    def clock(call: Any) -> float:
        return float({None: 3 - passes, 16: 3.0, 32: 1.5}[call() and call()["BLOCK_M"]])

    nearer = row(64, kernel=ONE_PASS, config=one_pass(64), dtype="float16", features=[])
    write(folder, nearer)
    assert backward() == one_pass(64)
    candidates = [None, one_pass(16), one_pass(32)]
    got = tuning.tune(ONE_PASS, candidates, backward, clock=clock, gpu="a clock")
    assert got.config == backward() == (one_pass(32) if passes == 1 else None)
    assert got.timings[0] == (None, 3 - passes)
    timings = json.loads(got.results.read_text())["timings"]
    assert [timing["config"] for timing in timings] == candidates


def test_tuning_again_replaces_the_entry_of_the_same_key_alone(folder: Path) -> None:
    others = [row(128), row(256, dtype="float16", features=["dropout"], length=512)]
    write(folder, *others)
    for fastest in (16, 32):
        times = {16: 2.0, 32: 2.0} | {fastest: 1.0}
        tuning.tune(KERNEL, [config(16), config(32)], launch, clock=clock_of(times), gpu="a clock")
        assert launch() == config(fastest)
    assert json.loads((folder / "sm_00.json").read_text())["entries"][1:] == others


def test_tuning_without_tma_keeps_the_entry_with_it(folder: Path) -> None:
    def tune(tma: bool, *candidates: tuning.Config) -> None:
        clock = clock_of({16: 1.0, 32: 2.0})
        tuning.tune(KERNEL, candidates, lambda: launch(tma), clock=clock, gpu="a clock")

    tune(True, config(16, tma=True))
    # Forced where no descriptor can be made, it is passed over.
    tune(False, config(16, tma=True), config(32))
    assert launch(tma=True) == config(32)
    assert launch(tma=False) == config(32)
    tune(True, config(16, tma=True))
    assert launch(tma=True) == config(16, tma=True)
    assert launch(tma=False) is None


def test_a_table_that_cannot_be_written_stays_as_it_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(folder, row(16))
    before = path.read_text()

    def full(*args: object, **kwargs: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(tuning.json, "dump", full)
    with pytest.raises(OSError, match="no space"):
        tuning.tune(KERNEL, [config(16)], launch, clock=clock_of({16: 1.0}), gpu="a clock")
    assert path.read_text() == before
    assert [p for p in folder.rglob("*") if p.is_file()] == [path]


def test_tuning_says_why_it_cannot(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = clock_of({16: KernelInputError("too large")})
    with pytest.raises(InputError, match="no candidates for attention_forward"):
        tuning.tune(KERNEL, [], launch)
    with pytest.raises(InputError, match="candidate 1: BLOCK_M is 48"):
        tuning.tune(KERNEL, [config(16), config(48)], launch)
    with pytest.raises(InputError, match="does not launch attention_forward"):
        tuning.tune(KERNEL, [config(16)], lambda: None, clock=lambda call: 1.0)
    with pytest.raises(InputError, match=r"no candidate .* runs[\s\S]*KernelInputError: too large"):
        tuning.tune(KERNEL, [config(16)], launch, clock=clock)
    monkeypatch.delenv(tuning.TABLES)
    with pytest.raises(InputError, match="Pass folder, or set MMOPT_TABLES"):
        tuning.tune(KERNEL, [config(16)], launch)


def test_forcing_ends_with_its_block_even_after_an_error(folder: Path) -> None:
    def fails() -> None:
        with tuning.forcing({KERNEL: config(16)}) as asked:
            assert launch() == config(16)
            assert asked[KERNEL].length == 1024
            raise RuntimeError("in the block")

    with pytest.raises(RuntimeError, match="in the block"):
        fails()
    assert launch() is None


def test_looking_up_again_takes_less_than_two_microseconds() -> None:
    """It runs before every launch. The least of many, so that a busy machine does not decide."""

    def look() -> object:
        return tuning.lookup(KERNEL, "sm_90", BF16, 128, 4096, (), True)

    look()
    assert min(timeit.repeat(look, number=1000, repeat=50)) / 1000 < 2e-6


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_shipped_tables_are_well_formed(target: str) -> None:
    for entry in tuning.entries(target):
        assert entry.shipped
        assert entry.source in ("static", "measured")
        assert not entry.config.get("TMA") or target in ("sm_90", "sm_100", "sm_120")


@pytest.mark.parametrize("features", [(), ("dropout",), ("softcap",), ("dropout", "softcap")])
@pytest.mark.parametrize("width", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
def test_sm_90_has_an_entry_for_every_launch_in_16_bits(
    dtype: torch.dtype, width: int, features: tuple[str, ...]
) -> None:
    """The heuristic spills there; dK/dV has one for tensors without descriptors as well."""
    for kernel in ("attention_forward", "attention_backward_dq", "attention_backward_dkdv"):
        assert tuning.lookup(kernel, "sm_90", dtype, width, 1024, features, True) is not None
    found = tuning.lookup("attention_backward_dkdv", "sm_90", dtype, width, 1024, features, False)
    assert found is not None
    assert not found["TMA"]
