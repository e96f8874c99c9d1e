"""The leaderboard as static pages: index.html and one file for each paper, each of them self-contained.

Text from records and claims is escaped by Jinja2; styles and script are inside the file, and its policy
(Content-Security-Policy) forbids any other. Imports no torch.
"""

import base64
import contextlib
import functools
import hashlib
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from markupsafe import Markup

from scripts import drawings, views
from scripts.aggregate import Aggregate, HolmVerdict, aggregate, holm_verdicts, why_none
from scripts.claims import Paper
from scripts.errors import UserError
from scripts.external import External
from scripts.maps import EffectMap
from scripts.markdown import MEANINGS, mean_sd
from scripts.pictures import Picture, read_pictures
from scripts.records import ClaimResult
from scripts.sections import ClaimView, claim_views, read_curves
from scripts.verdicts import VERDICTS

TEMPLATES = Path(__file__).parent / "templates"
SIGNS = dict(zip(VERDICTS, ("✓", "✕", "?", "○"), strict=True))
"""Verdicts are told apart by word and sign, colour only helps."""

RESERVED = {"index", "effect_map"}
"""Pages that are no paper's."""

COLUMNS = (
    ("verdict", "Verdict", False),
    ("paper", "Paper", False),
    ("claim", "Claim", False),
    ("scale", "Scale", False),
    ("effect", "Effect [L, U]", True),
    ("treatment", "Treatment", True),
    ("control", "Control", True),
    ("reported", "Paper’s own", True),
    ("seeds", "Seeds", True),
    ("cost", "CPU-s", True),
)


@dataclass(frozen=True)
class ClaimRow:
    """A row of the index; numbers to sort by, empty where there is none."""

    result: ClaimResult
    rank: int
    effect: float | str
    treatment: float | str
    control: float | str
    paper: float | str


def render(
    papers: Sequence[Paper],
    results: Sequence[ClaimResult],
    problems: Sequence[str],
    target: Path,
    external: Sequence[External] = (),
    maps: Sequence[EffectMap] = (),
) -> tuple[dict[Path, str], list[str]]:
    """Text of index.html, of <slug>.html for each paper and, if there are maps, of effect_map.html.

    It depends on the arguments, on recipes and code (what is stale) and on Matplotlib's version alone. Charts that an
    earlier page in `target` holds already are taken from there.

    Args:
        papers: all papers, in the order shown.
        results: the results of their claims, likewise.
        problems: records that could not be used, one line each.
        target: folder of the pages; links to records are relative to it.
        external: reported numbers; shown as such, in a section of their own.
        maps: effect maps of some of the papers, at most one each.

    Returns:
        The pages, index first, and problems found on the way: curves that cannot be read.

    Raises:
        UserError: a paper's slug is `index` or `effect_map`.
    """
    if taken := {paper.slug for paper in papers} & RESERVED:
        name = taken.pop()
        raise UserError(f"a paper's folder must not be named {name!r}: {name}.html is a page of all papers")
    broken: list[str] = []
    holm = dict(zip(map(id, results), holm_verdicts(results), strict=True))
    shown: dict[str, list[ClaimView]] = {}
    own_forests: dict[str, list[drawings.Plan]] = {}
    pictures: dict[str, list[Picture]] = {}
    for paper in papers:
        own = [result for result in results if result.claim.slug == paper.slug]
        curves, unreadable = read_curves(own)
        used = {record.path: record for result in own for record in result.records}
        pictures[paper.slug], missing = read_pictures(used.values(), target)
        broken += [*unreadable, *missing]
        shown[paper.slug] = claim_views(own, curves, holm, external)
        own_forests[paper.slug] = drawings.forests(own, of_paper=True)
    known = [*problems, *broken]
    forests = drawings.forests(results)
    everything = [view for views_of in shown.values() for view in views_of]
    groups = [forests, *own_forests.values(), *(view.plans for view in everything)]
    plans = [plan for group in groups for plan in group]
    drawn = iter(drawings.draw(plans, drawings.drawn_in(_earlier(target, ["index", *shown]))))
    index_drawings = list(itertools.islice(drawn, len(forests)))
    paper_drawings = {slug: list(itertools.islice(drawn, len(group))) for slug, group in own_forests.items()}
    for view in everything:
        view.charts = list(itertools.islice(drawn, len(view.plans)))
    environment = _environment(target)
    pages = {
        target / "index.html": environment.get_template("index.html").render(
            papers=papers,
            families={paper.slug: paper.family for paper in papers},
            results=results,
            rows=[_row(result) for result in results],
            columns=COLUMNS,
            meanings=MEANINGS,
            tallies=_tallies(results),
            forests=index_drawings,
            holm=_holm_lines(list(holm.values())),
            aggregates=[found for scale in _tallies(results) for found in _aggregate(results, scale)],
            external=external,
            maps=maps,
            problems=known,
            num_records=len({record.path for result in results for record in result.records}),
        )
    }
    for paper in papers:
        pages[target / f"{paper.slug}.html"] = environment.get_template("paper.html").render(
            paper=paper,
            views=shown[paper.slug],
            forests=paper_drawings[paper.slug],
            pictures=pictures[paper.slug],
            scales=_by_scale(shown[paper.slug]),
            recipes=views.recipe_rows(paper.slug),
            map=next((found for found in maps if found.paper == paper.slug), None),
            problems=[problem for problem in known if f"/{paper.slug}/" in problem],
        )
    if maps:
        pages[target / "effect_map.html"] = environment.get_template("effect_map.html").render(
            maps=maps, titles={paper.slug: paper.title for paper in papers}
        )
    return pages, broken


def _environment(target: Path) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = ("\n" + (TEMPLATES / name).read_text() for name in ("base.css", "page.js"))
    environment.globals |= {
        "signs": SIGNS,
        "style": Markup(style),
        "script": Markup(script),
        "style_hash": _digest(style),
        "script_hash": _digest(script),
    }
    environment.filters |= {
        "mean_sd": mean_sd,
        "short": lambda value: _minus(f"{value:.4g}"),
        "signed": lambda value: _minus(f"{value:+.4g}"),
        "brief": lambda value: _minus(f"{value:+.{0 if abs(value) >= 100 else 2}f}"),
        "seconds": lambda value: f"{value:,.0f}",
        "utc": lambda text: re.sub(r"^(\d{4}-\d\d-\d\d)T(\d\d:\d\d).*\+00:00$", r"\1 \2 UTC", text),
        "slug": lambda name: name.replace(" ", "-"),
        "page": lambda slug: quote(f"{slug}.html"),
        "reported": _reported,
        "commit": views.commit,
        "commit_of": views.commit_of,
        "href": functools.partial(views.href, target=target),
    }
    environment.tests["web_address"] = lambda url: str(url).lower().startswith(("https://", "http://"))
    return environment


def _digest(text: str) -> Markup:
    """How the page's policy names the one style sheet or script that it allows."""
    return Markup(f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}")


def _minus(text: str) -> str:
    """A true minus sign, and the sign of infinity."""
    return text.replace("-", "−").replace("inf", "∞")


def _reported(numbers: dict[str, Any]) -> str:
    """The paper's own numbers: `0.8915 vs 0.8188`, or by name where they are others."""
    given = {key: value for key, value in numbers.items() if key != "source"}
    if not given:
        return "–"
    if given.keys() == {"treatment", "control"}:
        return f"{given['treatment']} vs {given['control']}"
    return ", ".join(f"{value}" if key == "treatment" else f"{key} {value}" for key, value in given.items())


def _row(result: ClaimResult) -> ClaimRow:
    claim, verdict = result.claim, result.verdict
    reported = claim.paper.get("treatment")
    return ClaimRow(
        result,
        rank=VERDICTS.index(verdict.name),
        effect="" if verdict.effect is None else verdict.effect,
        treatment=_mean(result.treatment),
        control=claim.threshold if claim.threshold is not None else _mean(result.control or ()),
        paper=reported if isinstance(reported, int | float) else "",
    )


def _mean(values: Sequence[float | None]) -> float | str:
    found = [value for value in values if value is not None and math.isfinite(value)]
    return math.fsum(found) / len(found) if found else ""


def _tallies(results: Sequence[ClaimResult]) -> dict[str, Counter[str]]:
    """How many claims of each scale have each verdict."""
    scales = dict.fromkeys(result.claim.scale for result in results)
    return {scale: Counter(r.verdict.name for r in results if r.claim.scale == scale) for scale in scales}


def _by_scale(shown: Sequence[ClaimView]) -> dict[str, list[ClaimView]]:
    scales = dict.fromkeys(view.result.claim.scale for view in shown)
    return {scale: [view for view in shown if view.result.claim.scale == scale] for scale in scales}


def _holm_lines(adjusted: Sequence[HolmVerdict]) -> list[str]:
    """For each scale with runs: how many verdicts survive Holm's adjustment, and which do not."""
    lines = []
    for scale in dict.fromkeys(verdict.claim.scale for verdict in adjusted):
        family = [v for v in adjusted if v.claim.scale == scale and v.p is not None]
        held = [v for v in family if v.p is not None and v.p < 0.05]
        lost = [f"{v.claim.slug}/{v.claim.id}" for v in held if v.name != "reproduced"]
        if family:
            lines.append(
                f"{scale.capitalize()} scale: {len(held)} of the {len(family)} claims that were run are reproduced, "
                f"each judged alone at 5 %; {len(held) - len(lost)} remain if the chance of even one false "
                f"“reproduced” among all of them is held below 5 % (Holm)"
                + (f". Not among them: {', '.join(lost)}." if lost else ".")
            )
    return lines


def _earlier(target: Path, names: Sequence[str]) -> Iterator[str]:
    """The pages as they were, for the charts that they share with the new ones."""
    for file in (target / f"{name}.html" for name in names):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            yield file.read_text(encoding="utf-8")


def _aggregate(results: Sequence[ClaimResult], scale: str) -> list[Aggregate | str]:
    """Probability of improvement over papers, or why there is none; nothing where no claim of the scale was run."""
    if not any(result.records for result in results if result.claim.scale == scale):
        return []
    return [aggregate(results, scale) or why_none(results, scale)]
