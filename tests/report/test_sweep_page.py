"""A sweep's page from results of every shape: what it says of them, and that it is one whole page."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from mdt_ray.report import figures, html, sweep
from mdt_ray.tuning import compare
from tests.helpers import Page

METRIC = "fid_digits_300"


def trial(point: dict, seed: int, value: float, steps=(100, 200, 300), status: str = "finished") -> dict:
    """A result.json; on the way it was judged higher by a fifth a checkpoint."""
    judged = [{"step": step, "metrics": {METRIC: value * 1.2 ** (len(steps) - 1 - i)}, "images_seen": 96 * step,
               "train_seconds": step / 10} for i, step in enumerate(steps)]
    curve = [{"step": step, "loss": 1 / step + value, "val_loss": 1 / step + value} for step in range(20, steps[-1] + 1, 20)]
    found = {"name": f"{point} {seed}", "status": status, "point": point, "seed": seed, "curve": curve,
             "reason": "asha: its val_loss was among the worse at step 300"}
    ended = {"metrics": judged[-1]["metrics"], "judged": judged, "train_seconds": steps[-1] / 10, "num_parameters": 1000,
             "seconds": 40.0}
    return found | (ended if status == "finished" else {})


def results(trials: list[dict], **more) -> dict:
    """results.json as `tune` makes it."""
    rows = compare.ranked([t for t in trials if t["status"] == "finished"], METRIC, "min")
    points = [{"point": r.point, "mean": r.estimate.mean, "half_width": r.estimate.half_width,
               "num_seeds": r.estimate.num_seeds, "published": None,
               "to_best": r.to_best and vars(r.to_best) | {"is_noise": r.to_best.is_noise}} for r in rows]
    by_status = {status: [t for t in trials if t["status"] == status] for status in ("finished", "stopped", "failed")}
    return {"about": "Space own, search grid", "metric": METRIC, "mode": "min", "paper": None, "points": points,
            "trials": by_status["finished"],
            "stopped": by_status["stopped"], "failed": by_status["failed"], "left": 0, "left_because": None} | more


def page(folder, found: dict, pictures: int = 0) -> Page:
    uri = sweep.write(str(folder / "<b>a sweep"), found, "lr = 0.1\n", ["mdt-ray train --config best.toml"],
                      pictures=lambda name: np.zeros((pictures, 32, 32, 3), np.uint8))
    shown = Page(Path(uri).read_text())
    assert shown.fetched == [], "nothing is loaded from outside"
    assert shown.open == [], "every tag is closed"
    assert "<b>a sweep" in " ".join(shown.text), "strings are shown as they are, not as markup"
    return shown


def test_one_setting_and_seeds(tmp_path):
    """Two kinds with three seeds, one the worse by 5 in each."""
    kinds = {"mdt_v1": 10.0, "dit": 15.0}
    found = results([trial({"model.kind": kind}, seed, value + seed) for kind, value in kinds.items() for seed in range(3)],
                    paper="FID-50K (Table 2)")
    found["points"][0]["published"] = 53.46
    shown = page(tmp_path, found, pictures=15)
    assert shown.headings == ["Points, best first", f"{METRIC} over the settings", "How soon", "Learning",
                              "Quality against cost", "Samples of the best and the worst", "The best point in full"]
    text = " ".join(shown.text)
    for part in ("11 ± 2.5", "53.46", "FID-50K (Table 2)", "+5 ± 0, larger than the noise", "times fewer images",
                 "mdt-ray train --config best.toml", "trials: 6 finished", "All trials have ended."):
        assert part in text, part
    assert "not reached" not in text
    ratios = [3 / _at(15 + seed, 10 + seed) for seed in range(3)]
    assert f"{np.mean(ratios):.4g} ±" in text


def _at(level: float, end: float) -> float:
    """In checkpoints, where a curve of `trial` that ends at `end` reaches the level."""
    values = [end * 1.44, end * 1.2, end]
    return float(np.interp(-level, [-v for v in values], [1, 2, 3]))


def test_two_settings_make_a_map_and_more_make_axes(tmp_path):
    grid = [{"loss.mask_ratio": ratio, "model.decode_layer": depth} for ratio in (0.3, 0.5) for depth in (1, 2, 4)]
    two = page(tmp_path, results([trial(point, 0, 10.0 + i, (300,)) for i, point in enumerate(grid)]))
    assert "How soon" not in two.headings, "one checkpoint is no curve"
    assert f"{METRIC} over loss.mask_ratio, model.decode_layer" in [image["alt"] for image in two.images]
    assert "With one seed a point nobody can say" in " ".join(two.text)
    many = [dict(zip(("optim.lr", "model.kind", "ema.decay"), values, strict=True))
            for values in itertools.product((1e-3, 2e-3), ("dit", "mdt_v1"), (0.9, 0.99))]
    three = page(tmp_path, results([trial(point, 0, 10.0 + i, (300,)) for i, point in enumerate(many)]))
    assert f"{METRIC} over optim.lr, model.kind, ema.decay" in [image["alt"] for image in three.images]
    assert "76%" in " ".join(three.text), "of the variance of 0 .. 7, 16 of 21 parts are the first setting's"


def test_points_that_differ_in_other_keys_are_no_grid(tmp_path):
    """A list of trials: one changes two settings, one a third."""
    points = [{"loss.mask_ratio": 0.3, "model.decode_layer": 2}, {"optim.lr": 1e-3}, {"optim.lr": 2e-3}]
    shown = page(tmp_path, results([trial(point, 0, 10.0 + i) for i, point in enumerate(points)]))
    assert len(shown.images) == 5
    assert page(tmp_path, results([trial({"optim.lr": 1e-3}, 0, 10.0)])).headings == [
        "Points, best first", "How soon", "Learning", "The best point in full"]


def test_where_more_is_better_the_front_is_of_the_highest(tmp_path, monkeypatch):
    """A model that trains for 20 s and gets 9 is beaten by one that trains for 10 s and gets 10."""
    shown = []
    monkeypatch.setattr(figures, "as_png", lambda figure: shown.append(figure) or b"")
    costs = {1e-3: (100,), 2e-3: (200,), 3e-3: (300,)}
    ends = zip(costs, (10.0, 9.0, 12.0), strict=True)
    found = results([trial({"optim.lr": lr}, 0, value, costs[lr]) for lr, value in ends], mode="max")
    sweep._cost(found, "train_seconds")
    (axes,) = shown[0].axes
    front = axes.lines[0]
    assert sorted(zip(front.get_xdata(), front.get_ydata(), strict=True)) == [(-30, -12), (-10, -10)]
    assert [axes.yaxis.get_major_formatter()(y, 0) for y in (-12, -9)] == ["12", "9"]
    assert axes.yaxis.get_inverted(), "the highest above"


def test_a_loss_that_was_measured_once_is_no_curve(tmp_path):
    """Then that of training is shown; in the other trials of this file both are there at every step."""
    once = trial({"optim.lr": 1e-3}, 0, 10.0)
    for row in once["curve"][:-1]:
        del row["val_loss"]
    assert "Training loss: the best point darkest" in " ".join(page(tmp_path, results([once])).text)
    more = results([once, trial({"optim.lr": 2e-3}, 0, 11.0)])
    assert "Loss on held-out images" in " ".join(page(tmp_path, more).text)


@pytest.mark.parametrize("status", ["stopped", "failed"])
def test_what_did_not_finish_is_told(tmp_path, status):
    bad = trial({"optim.lr": 1e9}, 0, 30.0, status=status) | ({"curve": []} if status == "failed" else {})
    found = results([trial({"optim.lr": 1e-3}, 0, 10.0), trial({"optim.lr": 2e-3}, 0, 9.0), bad], left=3,
                    left_because="time")
    shown = page(tmp_path, found)
    text = " ".join(shown.text)
    assert "Trials that did not finish" in shown.headings
    assert "asha: its val_loss was among the worse at step 300" in text
    assert "3 trials are left: time." in text
    assert f"1 {'ended early' if status == 'stopped' else 'failed'}, 3 left" in text


HOSTILE = """x'"><script src="//evil">1</script><img onerror=1>"""
DRAWN = "<b>$\\frac{$"


def test_every_string_of_a_sweep_is_shown_as_it_is(tmp_path):
    """Search spaces, reasons and settings may be anybody's. Some are drawn by matplotlib, which has a markup of its own."""
    points = [{DRAWN: f"{DRAWN}{i}", "loss.mask_ratio": ratio} for i in range(2) for ratio in (0.3, 0.5)]
    found = results([trial(point, seed, 10.0 + i) for i, point in enumerate(points) for seed in range(2)] + [
        trial(points[0], 2, 11.0, status="failed") | {"reason": HOSTILE},
        trial(points[0], 3, 11.0, status="stopped") | {"reason": HOSTILE}],
        about=HOSTILE, paper=HOSTILE, left=1, left_because=HOSTILE)
    uri = sweep.write(str(tmp_path / HOSTILE.replace("/", "|")), found, HOSTILE, [HOSTILE],
                      pictures=lambda name: np.zeros((3, 32, 32, 3), np.uint8))
    shown = Page(Path(uri).read_text())
    assert (shown.fetched, shown.open) == ([], [])
    assert shown.tags == {"html", "head", "meta", "title", "style", "body", "main", "h1", "p", "div", "b", "span", "section",
                          "h2", "table", "thead", "tbody", "tr", "th", "td", "img", "pre", "details", "summary"}
    assert " ".join(shown.text).count(HOSTILE) > 6


def test_every_piece_of_a_page_escapes(tmp_path):
    pieces = [html.headline(HOSTILE, "", [(HOSTILE, HOSTILE)]), html.section(HOSTILE, HOSTILE, ""),
              html.table([HOSTILE], [[HOSTILE]]), html.img(b"", HOSTILE)]
    html.write_page(str(tmp_path / "page.html"), HOSTILE, "".join(pieces), inputs=HOSTILE)
    text = (tmp_path / "page.html").read_text()
    shown = Page(text)
    assert not shown.tags & {"script", "onerror"}
    assert [image["alt"] for image in shown.images] == [HOSTILE]
    assert len([part for part in shown.text if part == HOSTILE]) == 8
    assert html.is_current(str(tmp_path / "page.html"), HOSTILE)
