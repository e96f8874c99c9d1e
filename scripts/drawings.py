"""Charts of the pages: which are drawn, from what, and their words.

They are planned first and drawn together, by several processes if they are many.
"""

import functools
import gc
import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from markupsafe import Markup

from scripts import charts, views
from scripts.claims import Claim
from scripts.published import Curves
from scripts.records import ClaimResult

MANY = 64
"""From so many charts on they are drawn by several processes."""


@dataclass(frozen=True)
class Plan:
    """A chart to be drawn: what kind, from what, and its words."""

    kind: str
    arguments: tuple[Any, ...]
    title: str
    caption: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Drawing:
    """A chart: inline SVG, what it shows in words, and its key and hash, by which a later build finds it again."""

    title: str
    caption: str
    svg: Markup
    stamp: str
    wide: bool = False


def forests(results: Sequence[ClaimResult], of_paper: bool = False) -> list[Plan]:
    """Effects of the claims that have one: a plot for each scale, and one more where numbers exceed 1.

    Accuracies and shares would be invisible beside effects in other units.

    Args:
        results: the claims, in the order drawn.
        of_paper: all are of one paper, whose name need not stand before each.
    """
    groups: dict[tuple[str, bool], list[charts.ForestRow]] = {}
    for result in results:
        claim, verdict = result.claim, result.verdict
        if verdict.effect is None:
            continue
        name = claim.id if of_paper else f"{claim.slug}/{claim.id}"
        seeds = tuple(row.effect for row in views.seed_rows(result) if row.effect is not None)
        row = charts.ForestRow(name, verdict.effect, verdict.lower, verdict.upper, claim.margin, verdict.name, seeds)
        numbers = [verdict.effect, claim.margin, verdict.lower or 0, verdict.upper or 0, *seeds]
        large = any(1 < abs(number) < math.inf for number in numbers)
        groups.setdefault((claim.scale, large), []).append(row)
    return [
        Plan(
            "forest",
            (rows,),
            f"Effects at {scale} scale{', beyond 1' if large else ''}",
            f"{scale.capitalize()} scale{', effects or margins beyond 1' if large else ''}: effects with one-sided 95 %"
            " bounds, in units of each claim’s metric. Claims that are not run have no effect and are not drawn.",
            wide=True,
        )
        for (scale, large), rows in groups.items()
    ]


def of_claim(
    result: ClaimResult, curves: dict[Path, Curves], drawn: dict[tuple[str, frozenset[Path]], str]
) -> tuple[list[Plan], list[str]]:
    """Charts of one claim, and the earlier claims where the rest of its curves are drawn."""
    claim, labels = result.claim, _arm_labels(result.claim)
    if not result.records:
        return [], []
    plans: list[Plan] = []
    runs = [[r for r in result.records if r.run[0] == recipe and curves.get(r.path)] for recipe, _ in claim.arms]
    keys = list(dict.fromkeys(key for arm in runs for record in arm for key in curves[record.path]))
    see: dict[str, None] = {}
    for metric in views.curve_metrics(claim, keys):
        arms = {
            label: [
                {key: curves[record.path][key] for key in ("epoch", metric)}
                for record in arm
                if metric in curves[record.path]
            ]
            for label, arm in zip(labels, runs, strict=True)
        }
        shown = frozenset(record.path for arm in runs for record in arm)
        before = next((id_ for (key, paths), id_ in drawn.items() if key == metric and shown <= paths), None)
        if before is not None:
            see[before] = None
            continue
        drawn[metric, shown] = claim.id
        label = views.METRICS.get(metric, metric)
        shown_arms = {name: runs_of for name, runs_of in arms.items() if runs_of}
        legend = not plans or not _complete(arms.values(), metric)  # it counts what is missing
        plans.append(Plan("curves", (shown_arms, metric, label, legend), f"{label} by epoch"))
    return plans, list(see)


def _complete(arms: Iterable[list[dict[str, list[float]]]], metric: str) -> bool:
    """Whether all runs have a finite value in the same epochs."""
    runs = [run for arm in arms for run in arm]
    return len({tuple(run["epoch"]) for run in runs}) == 1 and all(all(map(math.isfinite, run[metric])) for run in runs)


def _arm_labels(claim: Claim) -> list[str]:
    """Names of the arms: their recipes, or metrics where both arms are the same recipe."""
    names = [recipe.partition("/")[2] for recipe, _ in claim.arms]
    return names if len(set(names)) == len(names) else [metric for _, metric in claim.arms]


def picture(results: Sequence[ClaimResult], earlier: Path) -> str | None:
    """The first forest of all claims as an SVG file on white; the one at `earlier` if it shows the same.

    None where no claim has been run.
    """
    plans = forests(results)
    if not plans:
        return None
    mark = f"<!-- {_key(plans[0])} {_hash(_drawn_by())} -->\n"
    if earlier.is_file() and (text := earlier.read_text(encoding="utf-8")).endswith(mark):
        return text
    figure = charts.forest(*plans[0].arguments)
    figure.set_facecolor("white")
    return charts.to_svg(figure, plans[0].title, inline=False) + mark


def draw(plans: Sequence[Plan], earlier: Mapping[str, str] | None = None) -> list[Drawing]:
    """The charts of the plans, in order.

    Args:
        plans: what to draw.
        earlier: charts of an earlier build by their keys, see `drawn_in`; those are not drawn again.
    """
    ready = dict(earlier or {})
    keys = [_key(plan) for plan in plans]
    todo = {key: plan for key, plan in zip(keys, plans, strict=True) if key not in ready}
    if len(todo) < MANY:
        ready |= zip(todo, map(_svg, todo.values()), strict=True)
    else:
        with ProcessPoolExecutor(initializer=_draw_many) as pool:
            ready |= zip(todo, pool.map(_svg, todo.values(), chunksize=8), strict=True)
    return [
        Drawing(plan.title, plan.caption, Markup(ready[key]), f"{key} {_stamp(ready[key])}", plan.wide)
        for key, plan in zip(keys, plans, strict=True)
    ]


def drawn_in(pages: Iterable[str]) -> dict[str, str]:
    """Charts of pages written earlier, by their keys; left out: changed by hand, or drawn by other code."""
    found = {}
    for page in pages:
        for key, digest, text in re.findall(
            r'<figure data-chart="(\w+) (\w+)"[^>]*>.*?(<svg.*?</svg>\n)', page, re.DOTALL
        ):
            if _stamp(text) == digest:
                found[key] = text
    return found


def _draw_many() -> None:
    """Prepares a process that draws nothing but charts."""
    # a figure makes some ten thousand objects; looking for garbage after every 700, as is usual, costs a tenth
    gc.set_threshold(1_000_000)
    charts.stay_styled()


def _svg(plan: Plan) -> str:
    return charts.to_svg(getattr(charts, plan.kind)(*plan.arguments), plan.title)


def _key(plan: Plan) -> str:
    """Hash of what a chart shows."""
    return _hash(f"{plan.kind} {plan.title} {plan.arguments!r}")


def _stamp(text: str) -> str:
    """Hash of a chart as drawn, and of the code and library that drew it."""
    return _hash(f"{_drawn_by()} {text}")


@functools.cache
def _drawn_by() -> str:
    code = [Path(__file__).with_name(name).read_text() for name in ("charts.py", "svg.py")]
    return " ".join([metadata.version("matplotlib"), *code])


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:20]
