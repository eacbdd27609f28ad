"""The HTML page of a sweep: its points by the objective, how they learned, what they cost, what the best and worst drew."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mdt_ray import storage
from mdt_ray.evaluation.frontier import Point as Mark
from mdt_ray.report import figures, sweep_figures
from mdt_ray.report.html import headline, img, section, table, text, write_page
from mdt_ray.report.sweep_figures import Curve
from mdt_ray.tuning import compare
from mdt_ray.tuning.lines import brief, named
from mdt_ray.tuning.space import are_numbers

NUM_SAMPLES, PER_ROW = 20, 10
"""Pictures of the best and of the worst point, and of a row."""
COSTS = {"train_seconds": "seconds of training", "num_parameters": "parameters"}


def write(output: str, found: dict[str, Any], settings: str, commands: Sequence[str], pictures: Callable[[str], np.ndarray],
          cost: str = "train_seconds") -> str:
    """Write <output>/report/index.html; returns its path.

    Args:
        found: content of results.json.
        settings: text of best.toml.
        commands: what does the best point again, and judges it in full.
        pictures: gives the first samples of a trial's last checkpoint, (n, H, W, 3) uint8, by the trial's name.
        cost: what quality is drawn against.
    """
    uri = storage.join(output, "report", "index.html")
    body = "".join([
        _headline(output, found), _points(found), _settings(found), _pace(found), _curves(found), _cost(found, cost),
        _samples(found, pictures), _not_finished(found), _again(settings, commands)])
    write_page(uri, f"mdt_ray sweep: {output}", body)
    return uri


def _headline(output: str, found: dict[str, Any]) -> str:
    best, metric = found["points"][0], found["metric"]
    ended = {"finished": len(found["trials"]), "ended early": len(found["stopped"]), "failed": len(found["failed"]),
             "left": found["left"]}
    hours = sum(trial.get("seconds", 0) for trial in found["trials"]) / 3600
    count = len(found["points"])
    cards = [(_with_interval(best["mean"], best["half_width"]), f"{metric} of the best of {count} point{'s' * (count > 1)}"),
             (named(best["point"]), "the best point"),
             (str(sum(ended.values())), "trials: " + ", ".join(f"{n} {what}" for what, n in ended.items() if n)),
             (f"{hours:.2g} h", "of trials that finished, in all")]
    left = f"{found['left']} trials are left: {found['left_because']}." if found["left"] else "All trials have ended."
    note = f"{text(found['about'])}. {text(left)}"
    return headline(f"Sweep: {storage.name(output)}", note, cards)


def points_table(found: dict[str, Any]) -> str:
    """Points by the objective, the best first, beside published numbers where there are some."""
    keys, metric = _keys(found), found["metric"]
    paper = found.get("paper")
    head = [*keys, metric, *([paper] if paper else []), "difference to the best", "seeds", "parameters", "training s"]
    rows = []
    for point in found["points"]:
        trials = _trials_of(found, point)
        to_best = point["to_best"]
        rows.append([*(brief(point["point"].get(key, "-")) for key in keys),
                     _with_interval(point["mean"], point["half_width"]),
                     *(["-" if point["published"] is None else f"{point['published']:g}"] if paper else []),
                     _difference(to_best) if to_best else "", point["num_seeds"], f"{trials[0]['num_parameters']:,}",
                     f"{np.mean([t['train_seconds'] for t in trials]):.0f}"])
    return table(head, rows)


def _points(found: dict[str, Any]) -> str:
    several = any(point["num_seeds"] > 1 for point in found["points"])
    note = ("Means over seeds, with 95% intervals by Student's t; differences are taken seed by seed, for trials of one "
            "seed see the same images, noise and masks. A difference whose interval holds 0 may be noise." if several else
            "With one seed a point nobody can say which differences are larger than the noise: --num-seeds 3 would.")
    return section("Points, best first", note, f'<div class="scroll">{points_table(found)}</div>')


def _difference(to_best: dict[str, Any]) -> str:
    value = _with_interval(to_best["mean"], to_best["half_width"], sign="+")
    return value + {True: ", may be noise", False: ", larger than the noise", None: ""}[to_best["is_noise"]]


def picture(found: dict[str, Any]) -> str:
    """The objective over the settings: values of one, a heat map of two where they form a grid, an axis each for more."""
    keys, metric, points = _keys(found), found["metric"], found["points"]
    choices = {key: _ordered(point["point"].get(key) for point in points) for key in keys}
    keys = [key for key in keys if len(choices[key]) > 1]
    if not keys:
        return ""
    label = ", ".join(keys)
    if len(keys) == 1:
        rows = sorted(points, key=lambda point: choices[keys[0]].index(point["point"].get(keys[0])))
        png = sweep_figures.values([row["point"].get(keys[0]) for row in rows], [row["mean"] for row in rows],
                                   [row["half_width"] for row in rows], keys[0], metric)
    elif len(keys) == 2 and len(points) > max(map(len, choices.values())) and max(map(len, choices.values())) <= 12:
        xs, ys = (choices[key] for key in keys)
        values = np.full((len(ys), len(xs)), np.nan)
        for row in points:
            values[ys.index(row["point"].get(keys[1])), xs.index(row["point"].get(keys[0]))] = row["mean"]
        png = figures.heat_map([brief(x) for x in xs], [brief(y) for y in ys], values, *keys, metric)
    else:
        png = sweep_figures.parallel(keys, [row["point"] for row in points], [row["mean"] for row in points], metric)
    content = img(png, f"{metric} over {label}")
    if len(keys) > 1:
        shares = compare.importance([(row["point"], row["mean"]) for row in points])
        head = ["setting", "share of the variance between points that the means over its values explain"]
        content += table(head, [[key, f"{share:.0%}"] for key, share in shares.items()])
    return content


def _settings(found: dict[str, Any]) -> str:
    content = picture(found)
    return section(f"{found['metric']} over the settings", "", content) if content else ""


def _pace(found: dict[str, Any]) -> str:
    """Checkpoints judged on the way: the objective over images and over time, and how much sooner points get as far."""
    curves = {named(p["point"]): _judged(found, p) for p in found["points"]}
    if max(len(curve) for of in curves.values() for curve in of.values()) < 3:
        return ""
    content = '<div class="pair">'
    for x, label in (("images_seen", "images"), ("train_seconds", "seconds of training")):
        lines = [_mean_curve(of, x, name, place / len(curves))
                 for place, (name, of) in enumerate(curves.items())]
        content += img(sweep_figures.bands(lines, label, found["metric"]), f"{found['metric']} over {label}")
    content += "</div>"
    last, (base, others) = found["points"][-1], (list(curves.values())[-1], list(curves.items())[:-1])
    rows = [[name, *(_sooner(of, base, x, found["mode"]) for x in ("images_seen", "train_seconds"))] for name, of in others]
    return section("How soon", "Each line is a mean over seeds. The table says how many times fewer images, and seconds, a "
                   f"point needs to reach where {named(last['point'])} ends, seed by seed.",
                   content + table(["point", "times fewer images", "times fewer seconds"], rows))


def _judged(found: dict[str, Any], point: dict[str, Any]) -> dict[int, list[dict[str, float]]]:
    """Rows of images, seconds and the objective by seed."""
    return {t["seed"]: [{"y": j["metrics"][found["metric"]]} | j for j in t["judged"]] for t in _trials_of(found, point)}


def _mean_curve(of: dict[int, list[dict[str, float]]], x: str, name: str, rank: float) -> Curve:
    steps = list(zip(*of.values(), strict=True))
    found = [compare.estimate([row["y"] for row in rows]) for rows in steps]
    return Curve([float(np.mean([row[x] for row in rows])) for rows in steps], [e.mean for e in found], name, rank,
                 half_widths=[e.half_width for e in found])


def _sooner(of: dict[int, list], base: dict[int, list], x: str, mode: str) -> str:
    """Mean ratio with its interval, over the seeds that both have."""
    ratios = []
    for seed in of.keys() & base.keys():
        end = base[seed][-1]
        at = compare.reached([row[x] for row in of[seed]], [row["y"] for row in of[seed]], end["y"], mode)
        if at is None:
            return "not reached in every seed"
        ratios.append(end[x] / at)
    if not ratios:
        return "no seed in common"
    found = compare.estimate(ratios)
    return _with_interval(found.mean, found.half_width)


def _curves(found: dict[str, Any]) -> str:
    order = [row["point"] for row in found["points"]]
    trials = [t for t in [*found["trials"], *found["stopped"]] if t["curve"]]
    # One point is no curve. (Of a trial that was ended early it may be all there is.)
    measured = [sum("val_loss" in row for row in t["curve"]) for t in trials]
    name = "val_loss" if min(measured, default=0) > 0 and max(measured) > 1 else "loss"
    curves = []
    for t in trials:
        rows = [row for row in t["curve"] if name in row]
        rank = order.index(t["point"]) / max(len(order) - 1, 1) if t["point"] in order else 1.0
        curves.append(Curve([row["step"] for row in rows], [row[name] for row in rows], rank=rank,
                            stopped=t["status"] == "stopped"))
    what = "Loss on held-out images, with the same noise in all trials" if name == "val_loss" else "Training loss"
    note = f"{what}: the best point darkest, the worst brightest" + (
        "; a cross where a trial was ended early." if found["stopped"] else ".")
    return section("Learning", note, img(sweep_figures.learning(curves, "step", name), "learning curves of all trials"))


def _cost(found: dict[str, Any], cost: str) -> str:
    if len(found["points"]) < 2:
        return ""
    sign = -1 if found["mode"] == "max" else 1
    marks = [Mark(x=-float(np.mean([t[cost] for t in _trials_of(found, p)])), y=sign * p["mean"], group="",
                  label=named(p["point"])) for p in found["points"]]
    png = figures.frontier(marks, COSTS[cost], found["metric"], x_is_cost=True, y_is_gain=found["mode"] == "max")
    note = " Seconds are of the machine as it was: what else ran beside a trial counts." * (cost == "train_seconds")
    return section("Quality against cost", "The line joins the points that no other beats in both." + note,
                   img(png, f"{found['metric']} against {COSTS[cost]}"))


def _samples(found: dict[str, Any], pictures: Callable[[str], np.ndarray]) -> str:
    rows, labels = [], []
    ends = {"best": found["points"][0]} | ({"worst": found["points"][-1]} if len(found["points"]) > 1 else {})
    for what, point in ends.items():
        drawn = pictures(_trials_of(found, point)[0]["name"])[:NUM_SAMPLES]
        parts = [drawn[start:start + PER_ROW] for start in range(0, len(drawn), PER_ROW)]
        rows, labels = rows + parts, labels + [what if i == 0 else "" for i in range(len(parts))]
    if not rows:
        return ""
    title = "Samples of the best" + " and the worst" * (len(ends) > 1)
    return section(title, "The first ones, from the same noise and labels: not chosen.",
                   img(figures.grid(rows, labels), f"{title.lower()} point"))


def _not_finished(found: dict[str, Any]) -> str:
    rows = [[named(t["point"]), t["seed"], t["status"], t["reason"]] for t in [*found["failed"], *found["stopped"]]]
    if not rows:
        return ""
    note = "Failed ones are tried again with --retry-failed." if found["failed"] else ""
    return section("Trials that did not finish", note,
                   f'<div class="scroll">{table(["point", "seed", "what", "why"], rows)}</div>')


def _again(settings: str, commands: Sequence[str]) -> str:
    lines = "\n".join(commands)
    return section("The best point in full", "Trained again, and judged by more samples; lengthen it with --num-steps, and "
                   "with --optim.schedule-steps where its learning rate falls.",
                   f"<pre>{text(lines)}</pre><details><summary>best.toml</summary><pre>{text(settings)}</pre></details>")


def _trials_of(found: dict[str, Any], point: dict[str, Any]) -> list[dict[str, Any]]:
    return [trial for trial in found["trials"] if trial["point"] == point["point"]]


def _keys(found: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(key for row in found["points"] for key in row["point"]))


def _ordered(values: Any) -> list[Any]:
    """Distinct ones: numbers by size, others as they come."""
    distinct: dict[str, Any] = {}
    for value in values:
        distinct.setdefault(repr(value), value)
    return sorted(distinct.values()) if are_numbers(distinct.values()) else list(distinct.values())


def _with_interval(mean: float, half_width: float | None, sign: str = "") -> str:
    return f"{mean:{sign}.4g}" + ("" if half_width is None else f" ± {half_width:.2g}")
