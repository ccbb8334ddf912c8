"""`mmopt.measure.plot`: one self-contained drawing."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from mmopt.measure.plot import Panel, Strip, distributions, latency_plot
from mmopt.measure.results import Measurement
from mmopt_kernels.errors import InputError

SAMPLES = tuple(0.001 * (1 + index / 100) for index in range(20))


def _measurement(backend: str = "eager", **changes: object) -> Measurement:
    fields = {"source": "models/tiny", "batch": 1, "length": 16, "samples": SAMPLES}
    return Measurement(backend=backend, **{**fields, **changes})  # type: ignore[arg-type]


def test_plot_is_well_formed_and_fetches_nothing() -> None:
    html = latency_plot([_measurement(), _measurement("ort", source="a<b>&\"'")])
    ElementTree.fromstring(html)
    assert not re.search(r"https?:|url\(|@import|<script|<link|<img|src=|href=", html)


def test_plot_follows_light_and_dark() -> None:
    assert "prefers-color-scheme:dark" in latency_plot([_measurement()])


def test_there_is_a_panel_per_grid_point_and_a_row_per_variant() -> None:
    results = [
        _measurement(backend, batch=batch) for batch in (1, 8) for backend in ("eager", "ort")
    ]
    html = latency_plot(results)
    assert re.findall(r"<h3>(.*?)</h3>", html) == ["batch 1, 16 tokens", "batch 8, 16 tokens"]
    assert html.count('class="median"') == 4
    assert html.count('class="ci"') == 4


def test_a_screen_reader_hears_median_and_interval() -> None:
    html = latency_plot([_measurement(samples=(0.002,) * 5)])
    assert 'aria-label="eager median 2.00 ms, 95% interval 2.00 ms to 2.00 ms"' in html


def test_sources_are_told_apart_by_their_last_part_or_in_full() -> None:
    short = latency_plot([_measurement(), _measurement("ort", source="out/artifact")])
    assert "ort · artifact<" in short
    full = latency_plot([_measurement(), _measurement(source="other/tiny")])
    assert "eager · models/<wbr/>tiny<" in full  # long names break where their parts meet


def test_positions_stay_within_the_drawing_and_outliers_are_counted() -> None:
    html = latency_plot([_measurement(samples=(*SAMPLES, *SAMPLES, 0.5))])
    positions = [float(at) for at in re.findall(r'(?:cx|x1|width)="([\d.]+)%"', html)]
    assert positions
    assert all(0 <= at <= 100 for at in positions)
    assert "+1, to 500 ms" in html


def test_a_few_long_samples_leave_room_for_the_difference_between_rows() -> None:
    """On a busy machine a tenth of the samples took 20 times as long."""
    busy = (*(0.001,) * 27, *(0.02,) * 3)
    html = latency_plot([_measurement(samples=busy), _measurement("ort", samples=(0.0005,) * 30)])
    first, second = (float(at) for at in re.findall(r'class="median" x1="([\d.]+)%"', html))
    assert first == pytest.approx(2 * second, abs=0.02)
    assert first > 45
    assert "+3, to 20.0 ms" in html


def test_labels_are_text_and_keep_their_words() -> None:
    panel = Panel("<i>", [Strip("bench/x.py::bench_<b>[a-b]", _measurement(), 1)])
    root = ElementTree.fromstring(distributions([panel], "<u>"))
    assert not {"i", "b", "u"} & {element.tag for element in root.iter()}
    assert "".join(root.itertext()).startswith("<i>bench/x.py::bench_<b>[a-b]")


def test_many_samples_draw_a_bounded_number_of_dots() -> None:
    html = latency_plot([_measurement(samples=SAMPLES * 500)])
    assert 75 <= html.count("<circle") <= 150


@pytest.mark.parametrize("seconds", [2e-7, 3e-5, 0.0123, 0.999, 7.0, 412.0])
def test_axis_has_a_few_round_ticks_from_zero_at_any_scale(seconds: float) -> None:
    html = latency_plot([_measurement(samples=(seconds,) * 3)])
    ticks = re.findall(r'text-anchor="(?:start|middle|end)">([\d.]+)(?: (?:s|ms|µs))?</text>', html)
    assert ticks[0] == "0"
    assert 3 <= len(ticks) <= 7


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(InputError, match="expected at least one"):
        latency_plot([])
