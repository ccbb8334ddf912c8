"""The gate's configuration: what is accepted, and how faults are named."""

from pathlib import Path

import pytest

from mmopt.measure.gate.config import GateConfig, read_config
from mmopt_kernels.errors import InputError


@pytest.mark.parametrize("text", ["3%", "0.03", " 3.0 %"])
def test_a_share_is_a_percentage_or_a_fraction(tmp_path: Path, text: str) -> None:
    assert read_config(tmp_path, None, margin=text).margin == pytest.approx(0.03)


@pytest.mark.parametrize("text", ["3", "0", "-3%", "100%", "abc", "", "nan", "1e999%"])
def test_what_is_no_share_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match=r"margin.*no share, expected 3% or 0\.03"):
        read_config(tmp_path, None, margin=text)


def test_pyproject_is_read_and_options_win(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        '[tool.mmopt.gate]\nmargin = "5%"\nbudget = 60\nsources = ["src"]\n'
    )
    config = read_config(tmp_path, None, margin="4%", suite=None)
    assert (config.margin, config.budget, config.sources) == (0.04, 60.0, (Path("src"),))


def test_a_file_of_its_own_replaces_the_table(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[tool.mmopt.gate]\nbudget = 60\n")
    file = tmp_path / "gate.toml"
    file.write_text('margin = "7%"\n')
    config = read_config(tmp_path, file)
    assert (config.margin, config.budget) == (0.07, GateConfig().budget)


def test_all_faults_come_in_one_message(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        '[tool.mmopt.gate]\nmargins = { "x" = "300%" }\nbudgte = 3\nthreads = 0\n'
    )
    with pytest.raises(InputError) as caught:
        read_config(tmp_path, None)
    for part in ("margins.x", "budgte", "threads", "pyproject.toml"):
        assert part in str(caught.value)


@pytest.mark.parametrize("path", ["/tmp/bench", "../bench", "bench/../../x"])
@pytest.mark.parametrize("key", ["suite", "sources"])
def test_a_path_that_leaves_the_checkout_is_refused(tmp_path: Path, key: str, path: str) -> None:
    """Both sides would be the same files, and pass."""
    file = tmp_path / "gate.toml"
    file.write_text(f"suite = '{path}'" if key == "suite" else f"sources = ['{path}']")
    with pytest.raises(InputError, match=rf"{key}.*leaves the checkout"):
        read_config(tmp_path, file)


@pytest.mark.parametrize(
    ("text", "name"), [("tool = 3", "tool"), ("[tool]\nmmopt = 3", "mmopt"),
                       ("[tool.mmopt]\ngate = 3", "gate")]
)  # fmt: skip
def test_a_value_in_place_of_the_table_is_named(tmp_path: Path, text: str, name: str) -> None:
    (tmp_path / "pyproject.toml").write_text(text)
    with pytest.raises(InputError, match=rf"{name} is 3, expected \[tool\.mmopt\.gate\]"):
        read_config(tmp_path, None)


def test_no_toml_is_named(tmp_path: Path) -> None:
    file = tmp_path / "gate.toml"
    file.write_text("margin = = 3")
    with pytest.raises(InputError, match=r"gate\.toml is no TOML file"):
        read_config(tmp_path, file)
    with pytest.raises(InputError, match=r"nowhere\.toml: there is no such file"):
        read_config(tmp_path, tmp_path / "nowhere.toml")


def test_the_first_pattern_that_fits_gives_the_margin() -> None:
    config = GateConfig(
        skip=("*::bench_slow[big]",),
    )
    config_plain = GateConfig(margins={"*bench_x[small]": "10%", "*bench_x*": "20%"})
    assert config_plain.margin_of("bench/bench_a.py::bench_x[small]") == 0.1
    assert config_plain.margin_of("bench/bench_a.py::bench_x[large]") == 0.2
    assert config_plain.margin_of("bench/bench_a.py::bench_y") == 0.03
    assert config.skips("bench/bench_a.py::bench_slow[big]")
    assert not config.skips("bench/bench_a.py::bench_slow[b]")
