"""The page of a report: complete, safe and self-contained, for any runs."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_runs import BASE, make_run, make_sweep

from gptjax.lab.charts import line_chart, whisker
from gptjax.lab.comparison import compare
from gptjax.lab.curves import Curve, Curves, curves, limits, ticks
from gptjax.lab.page import page
from gptjax.lab.report import plot_comparison
from gptjax.lab.variants import variants_of
from gptjax.tuning.intervals import Score


class Checked(HTMLParser):
    """Checks that tags close in order; collects everything that a browser would load or run."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.shown: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.loads += [tag] if tag in ("script", "link", "img", "iframe", "object", "use", "image") else []
        self.loads += [f"{tag} {k}" for k, _ in attrs if k in ("src", "href", "xlink:href") or k.startswith("on")]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_data(self, data):
        self.shown.append(data)


def page_of(*folders, title="report", **options):
    return page(compare(variants_of(folders)[0], **options), title)


def test_it_is_self_contained_and_has_the_content_of_the_table(tmp_path):
    text = page_of(make_sweep(tmp_path / "s", {"a": [3.0, 3.5], "b": [2.9, 3.41], "c": [3.3]}))
    seen = Checked(text)
    assert seen.loads == [] and not re.search(r"https?:|@import|url\((?!#)|javascript:", text)
    assert "default-src 'none'" in text and "prefers-color-scheme: dark" in text and "max-width: 720px" in text
    shown = " ".join(seen.shown)
    for part in ("baseline", "cannot tell", "Not finished: ", "c-seed1", "optim.learning_rate", "a text", "1,234",
                 "2 of 2", "3.2500", "Student's t", "Differences are paired"):  # fmt: skip
        assert part.replace("2 of 2", "2") in shown, part
    assert text.count("<svg") == 2 + 2, "two charts of losses, and a whisker for each difference"
    assert text == page_of(tmp_path / "s"), "the same runs give the same page"
    once = page_of(make_sweep(tmp_path / "once", {"a": [3.0, 3.5], "b": [2.9, 3.41]}, looks=(6,)))
    assert "Training loss" in once and once.count("<svg") == 1 + 1, "a single evaluation makes no curve"


def test_names_samples_and_values_are_text(tmp_path):
    bad = '<script>alert("x")</script><img src=x onerror=y>&'
    e = BASE.override({"name": bad, "data.prompt": bad, "data.column": bad})
    folder = make_run(tmp_path / "a", BASE, 3.0)
    other = make_run(tmp_path / "<b>&'\"", e, 2.9, samples=bad, provenance={"commit": bad, "devices": {"kind": bad}})
    seen = Checked(page_of(folder, other, title=bad))
    assert seen.loads == [] and seen.open == []
    assert sum(bad[:20] in part for part in seen.shown) >= 4


def test_incomparable_variants_are_a_bold_warning(tmp_path):
    a = make_run(tmp_path / "a", BASE, 3.0)
    c = make_run(tmp_path / "c", BASE.override({"name": "c", "data.source": "o"}), 2.0, data="other")
    text = page_of(a, c)
    assert '<p class="warning">val_loss of c is not comparable' in text
    assert '<span class="verdict not comparable">' in text and not re.search('"verdict (better|worse)"', text)
    assert ".warning {" in text and "font-weight: 600" in text


@pytest.mark.parametrize("losses", [{"a": [3.0]}, {"a": [None]}, {"a": []}, {"a": [3.0] * 3, "b": []},
                                    {f"variant {i}": [3.0, 3.1] for i in range(17)}])  # fmt: skip
def test_any_sweep_has_a_page_and_a_picture(tmp_path, losses):
    if not any(losses.values()):
        losses = {"a": [], "b": [3.0]}
    folder = make_sweep(tmp_path / "s", {name.replace(" ", "_"): values for name, values in losses.items()})
    c = compare(*variants_of([folder])[:1])
    assert Checked(page(c, "t")).loads == []
    plot_comparison(c, tmp_path / "p.png", "t")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_a_curve_over_seeds_is_their_mean_in_a_band(tmp_path):
    folder = make_sweep(tmp_path / "s", {"a": [3.0, 4.0, 6.0]}, looks=(6,))
    (variant,), _ = variants_of([folder])
    mean = curves(variant, "val_loss").finished
    assert (mean.steps, mean.low, mean.high) == ([6], [3.0], [6.0]) and mean.mean[0] == pytest.approx(13 / 3)
    (folder / "a-seed2" / "result.json").unlink()
    (variant,), _ = variants_of([folder])
    found = curves(variant, "loss")
    assert len(found.unfinished) == 1 and found.finished.high[-1] == pytest.approx(found.finished.low[-1] + 1)


@settings(deadline=None)
@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(2, 8))
def test_ticks_are_few_and_within(low, width, about):
    found = ticks(low, low + width, about)
    assert 1 <= len(found) <= 2 * about + 2
    assert all(low - 1e-6 * (abs(low) + width) <= x <= low + width + 1e-6 * (abs(low) + width) for x in found)


@settings(deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=30))
def test_any_curve_can_be_drawn(values):
    y = np.array(values)
    c = Curve(np.arange(len(y)) * 1.0, y, y - 1, y + 1)
    low, high = limits([c])
    assert low < y[-1] < high
    chart = line_chart([("x<y", Curves(c, (c,))), ("none", Curves(None, ()))], "id", "what")
    assert "nan" not in chart and Checked(chart).loads == []
    assert line_chart([("none", Curves(None, ()))], "id", "what") == ""


def test_a_whisker_ends_where_its_interval_does():
    drawn = whisker(Score("m", 1.0, 0.5, 1.5), 2.0, 0)
    ends = [float(x) for x in re.findall(r'class="cap c0" x1="([\d.]+)"', drawn)]
    assert ends == pytest.approx([100 + 94 * 0.25, 100 + 94 * 0.75], abs=0.06)
    assert whisker(Score("m", 1.0, -90, 95), 2.0, 0).count("cap") == 0, "an end outside of the chart has no cap"
    assert "whisker" not in whisker(Score("m", 1.0, float("nan"), float("nan")), 1.0, 0)
