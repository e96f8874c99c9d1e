"""What a paper claims, as predicates read from `recipes/<slug>/claims.yaml`. Imports no torch."""

import dataclasses
import difflib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from scripts import recipes
from scripts.errors import UserError

PAPER_KEYS = ("title", "arxiv", "venue", "family")
REQUIRED = ("id", "text", "scale", "treatment", "metric", "direction", "seeds")
OPTIONAL = ("control", "control_metric", "factor", "margin", "threshold", "paper", "extra")


@dataclass(frozen=True)
class Claim:
    """One predicate: for each seed, the treatment's metric against its control's, or against a threshold.

    Args:
        slug: the paper.
        id: unique within the paper.
        text: the claim in words.
        scale: mini or paper.
        treatment: file name of the recipe, in the paper's folder.
        metric: key of a record's metrics.
        direction: greater or less: what the claim says of the treatment.
        seeds: at least two; a seed's treatment and control form a pair.
        control: file name of the control's recipe; None for a claim against `threshold`.
        control_metric: metric of the control where it is another one.
        factor: the control's metric is multiplied by it: `less` with factor 0.6 claims at most 0.6 times the control's.
        margin: least effect asserted, in the metric's units; negative for "not worse by more than".
        threshold: what the metric is held against where there is no control.
        paper: the paper's own numbers (treatment, control, source), for the reader.
        extra: run only when named or with `--claim all`.
    """

    slug: str
    id: str
    text: str
    scale: Literal["mini", "paper"]
    treatment: str
    metric: str
    direction: Literal["greater", "less"]
    seeds: tuple[int, ...]
    control: str | None = None
    control_metric: str | None = None
    factor: float = 1.0
    margin: float = 0.0
    threshold: float | None = None
    paper: dict[str, Any] = field(default_factory=dict, hash=False)
    extra: bool = False

    @property
    def arms(self) -> list[tuple[str, str]]:
        """(recipe as `<slug>/<name>`, metric) of the treatment and, where there is one, of the control."""
        arms = [(self.treatment, self.metric)]
        if self.control is not None:
            arms.append((self.control, self.control_metric or self.metric))
        return [(f"{self.slug}/{file.removesuffix('.yaml')}", metric) for file, metric in arms]

    def runs(self) -> list[tuple[str, int]]:
        """(recipe, seed) of every run that the claim needs, a seed's pair side by side."""
        return [(recipe, seed) for seed in self.seeds for recipe, _ in self.arms]

    def with_seeds(self, seeds: list[int]) -> "Claim":
        """The same claim for other seeds."""
        return dataclasses.replace(self, seeds=tuple(seeds))


@dataclass(frozen=True)
class Paper:
    """A paper and its claims, in the order of the file; `family` is what kind of noise it is about."""

    slug: str
    title: str
    arxiv: str
    venue: str
    family: str
    claims: tuple[Claim, ...]


def load_paper(slug: str) -> Paper:
    """Reads and checks `recipes/<slug>/claims.yaml`.

    Raises:
        UserError: no such paper, or a value that the file may not have; names file, claim, key, value and the rule.
    """
    path = recipes.ROOT / slug / "claims.yaml"
    if not path.is_file():
        raise UserError(f"no paper {slug!r}: there is no {path}; papers: {', '.join(recipes.papers()) or 'none'}")
    document = recipes.read_yaml(path)
    _check_keys(str(path), document, ("paper", "claims"), ())
    paper, claims = document["paper"], document["claims"]
    if not isinstance(paper, dict):
        raise _wrong(str(path), "paper", f"a mapping with {', '.join(PAPER_KEYS)}", paper)
    _check_keys(f"{path}: paper", paper, PAPER_KEYS, ())
    for key in PAPER_KEYS:
        _check_text(f"{path}: paper", key, paper[key])
    if not isinstance(claims, list) or not claims:
        raise _wrong(str(path), "claims", "a list of at least one claim", claims)
    found: dict[str, Claim] = {}
    for number, entry in enumerate(claims, start=1):
        claim = _claim(path, slug, number, entry)
        if claim.id in found:
            raise UserError(f"{path}: claim {claim.id!r}: id is used twice; each claim needs its own")
        found[claim.id] = claim
    return Paper(slug, paper["title"], paper["arxiv"], paper["venue"], paper["family"], tuple(found.values()))


def _claim(path: Path, slug: str, number: int, entry: Any) -> Claim:
    place = f"{path}: claim number {number}"
    if not isinstance(entry, dict):
        raise UserError(f"{place} must be a mapping with {', '.join(REQUIRED)}, got {entry!r}")
    if isinstance(entry.get("id"), str):
        place = f"{path}: claim {entry['id']!r}"
    _check_keys(place, entry, REQUIRED, OPTIONAL)
    for key in ("id", "text", "metric", "control_metric"):
        if key in entry:
            _check_text(place, key, entry[key])
    if entry["id"] == "all" or entry["id"].split() != [entry["id"]]:
        raise _wrong(place, "id", "one word other than 'all' (`--claim` takes it)", entry["id"])
    for key, choices in (("scale", ("mini", "paper")), ("direction", ("greater", "less"))):
        if entry[key] not in choices:
            raise _wrong(place, key, " or ".join(choices), entry[key])
    for key in ("treatment", "control"):
        if key in entry:
            _check_recipe(place, slug, key, entry[key])
    for key in ("factor", "margin", "threshold"):
        if key in entry:
            _check_number(place, key, entry[key])
    _check_arms(place, entry)
    seeds = entry["seeds"]
    if not isinstance(seeds, list) or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise _wrong(place, "seeds", "a list of whole numbers, none below 0", seeds)
    if len(seeds) < 2 or len(set(seeds)) < len(seeds):
        raise _wrong(place, "seeds", "at least two, all different", seeds)
    if not isinstance(entry.get("paper", {}), dict):
        raise _wrong(place, "paper", "a mapping such as {treatment: 0.89, source: Table 1}", entry["paper"])
    if not isinstance(entry.get("extra", False), bool):
        raise _wrong(place, "extra", "true or false", entry["extra"])
    return Claim(slug, **{**entry, "seeds": tuple(seeds)})


def _check_arms(place: str, entry: dict[str, Any]) -> None:
    """A control or a threshold, not both."""
    if ("control" in entry) == ("threshold" in entry):
        given = "both" if "control" in entry else "neither"
        raise UserError(f"{place}: give either control (a recipe) or threshold (a number), got {given}")
    for key in ("control_metric", "factor"):
        if key in entry and "control" not in entry:
            raise UserError(f"{place}: {key} needs a control, got {entry[key]!r} alone")
    if entry.get("factor", 1.0) <= 0:
        raise _wrong(place, "factor", "above 0", entry["factor"])


def _check_keys(place: str, mapping: dict[str, Any], required: tuple[str, ...], optional: tuple[str, ...]) -> None:
    for key in mapping:
        if key not in (*required, *optional):
            close = difflib.get_close_matches(str(key), (*required, *optional), n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise UserError(f"{place}: unknown key {key!r}; {hint}accepted: {', '.join((*required, *optional))}")
    for key in required:
        if key not in mapping:
            raise UserError(f"{place}: key {key!r} is missing; required: {', '.join(required)}")


def _check_text(place: str, key: str, value: Any) -> None:
    if not isinstance(value, str) or not value.strip():
        raise _wrong(place, key, "text (in quotes if it looks like a number)", value)


def _check_number(place: str, key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _wrong(place, key, "a finite number (YAML reads 1.0e-3 as one, 1e-3 not)", value)


def _check_recipe(place: str, slug: str, key: str, value: Any) -> None:
    names = [file.name for file in recipes.recipe_files(slug)]
    if value not in names:
        close = difflib.get_close_matches(str(value), names, n=3)
        hint = f"did you mean {', '.join(close)}?" if close else f"there are {len(names)} recipes"
        raise _wrong(place, key, f"the file name of a recipe in {recipes.ROOT / slug}", value, hint)


def _wrong(place: str, key: str, accepted: str, value: Any, hint: str = "") -> UserError:
    return UserError(f"{place}: {key} must be {accepted}, got {value!r}{'; ' + hint if hint else ''}")
