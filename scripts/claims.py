"""Claims as `recipes/<paper>/claims.yaml` states them. Imports no torch."""

import dataclasses
import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from scripts import recipes
from scripts.errors import UserError


@dataclass(frozen=True)
class Claim:
    """One checked sentence of a paper.

    Attributes:
        slug: the paper.
        id, text: short name and the sentence.
        scale: mini or paper.
        treatment, control: recipes as `<slug>/<recipe>`; without a control the metric is held against `threshold`.
        metric, control_metric: keys of the records' metrics; the control's defaults to the treatment's.
        direction: greater or less.
        margin, threshold: in the metric's unit.
        seeds: seeds of both arms, paired.
        paper: the paper's numbers and where they stand.
        extra: only run when named, or with `--claim all`.
    """

    slug: str
    id: str
    text: str
    scale: str
    treatment: str
    control: str | None
    metric: str
    control_metric: str
    direction: str
    margin: float
    threshold: float
    seeds: tuple[int, ...]
    paper: tuple[tuple[str, Any], ...] = ()
    extra: bool = False

    @property
    def sign(self) -> int:
        """+1 where greater is claimed, -1 where less."""
        return 1 if self.direction == "greater" else -1

    def runs(self) -> list[tuple[str, int]]:
        """(recipe, seed) of every run that the claim needs, pair by pair."""
        arms = [self.treatment] + ([] if self.control is None else [self.control])
        return [(recipe, seed) for seed in self.seeds for recipe in arms]

    def with_seeds(self, seeds: list[int]) -> "Claim":
        """The same claim on other seeds."""
        return dataclasses.replace(self, seeds=tuple(seeds))


@dataclass(frozen=True)
class Paper:
    """A paper and its claims."""

    slug: str
    title: str
    arxiv: str
    venue: str
    claims: tuple[Claim, ...]


def load_paper(slug: str) -> Paper:
    """Reads and checks the claims of one paper.

    Raises:
        UserError: names the file, the claim, the key, its value and what is accepted.
    """
    path = recipes.ROOT / slug / "claims.yaml"
    document = recipes.read_yaml(path)
    _known(f"{path}", document, {"paper", "claims"})
    head, rows = document.get("paper"), document.get("claims")
    if not isinstance(head, dict) or not isinstance(rows, list) or not rows:
        raise UserError(f"{path} needs `paper:` (a mapping) and `claims:` (a list)")
    _known(f"{path}: paper", head, {"title", "arxiv", "venue"})
    claims = [_claim(slug, f"{path}: claim {number}", row) for number, row in enumerate(rows, 1)]
    ids = [claim.id for claim in claims]
    twice = sorted({name for name in ids if ids.count(name) > 1})
    if twice:
        raise UserError(f"{path}: id {twice[0]!r} stands for more than one claim")
    text = {name: str(head.get(name, "")) for name in ("title", "arxiv", "venue")}
    return Paper(slug, text["title"], text["arxiv"], text["venue"], tuple(claims))


KEYS = {
    "id", "text", "scale", "treatment", "control", "metric", "control_metric", "direction", "margin", "threshold",
    "seeds", "paper", "extra",
}  # fmt: skip


def _claim(slug: str, place: str, row: Any) -> Claim:
    if not isinstance(row, dict):
        raise UserError(f"{place} must be a mapping, got {row!r}")
    if isinstance(row.get("id"), str):
        place = f"{place} ({row['id']})"
    _known(place, row, KEYS)

    def field(key: str, accepted: str, check: Callable[[Any], bool], default: Any = None) -> Any:
        value = row.get(key, default)
        if not check(value):
            raise UserError(f"{place}: {key} must be {accepted}, got {value!r}")
        return value

    treatment, control = (_recipe(place, slug, key, row.get(key)) for key in ("treatment", "control"))
    if treatment is None:
        raise UserError(f"{place}: treatment is missing; give the file name of a recipe")
    if (control is None) == ("threshold" not in row):
        raise UserError(f"{place}: give either control or threshold")
    if control is None and "control_metric" in row:
        raise UserError(f"{place}: control_metric needs a control")
    metric = field("metric", "the key of a metric", _is_text)
    return Claim(
        slug,
        field("id", "a short name", _is_text),
        field("text", "a sentence", _is_text),
        field("scale", "mini or paper", lambda v: v in ("mini", "paper")),
        treatment,
        control,
        metric,
        field("control_metric", "the key of a metric", _is_text, metric),
        field("direction", "greater or less", lambda v: v in ("greater", "less")),
        float(field("margin", "a finite number", _is_number, 0.0)),
        float(field("threshold", "a finite number", _is_number, 0.0)),
        tuple(field("seeds", "a list of at least two different seeds >= 0", _are_seeds)),
        tuple(field("paper", "a mapping", lambda v: isinstance(v, dict), {}).items()),
        field("extra", "true or false", lambda v: isinstance(v, bool), False),
    )


def _recipe(place: str, slug: str, key: str, name: Any) -> str | None:
    if name is None:
        return None
    files = {path.name: path for path in recipes.recipe_files(slug)}
    if name not in files:
        close = difflib.get_close_matches(str(name), files, n=3) or sorted(files)[:3]
        raise UserError(f"{place}: {key} names {name!r}, which is no recipe of {slug}; there is {', '.join(close)}")
    return recipes.recipe_name(files[name])


def _known(place: str, mapping: dict[str, Any], keys: set[str]) -> None:
    for key in mapping:
        if key not in keys:
            raise UserError(f"{place}: key {key!r} is not known; accepted are {', '.join(sorted(keys))}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _are_seeds(value: Any) -> bool:
    whole = isinstance(value, list) and all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in value)
    return whole and len(set(value)) == len(value) >= 2
