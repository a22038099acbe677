"""How good is what curation chose? Candidates against the truth of unlabeled items, where their source knows it.

The truth is used for diagnosis only: it is read after curation, from a finished artifact, and nothing that is computed
here chooses, keeps or trains on a candidate. (Upper bounds, which do that on purpose, stand apart in `oracle.py`.)
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from sicog_exp.curation.curate import GROUPS, Group
from sicog_exp.prompts import Kind, final_text, normalize_answer
from sicog_exp.records import read_jsonl
from sicog_exp.row_index import RowIndex

QUALITY_NAMES: dict[Group, str] = {"caption": "precision", "reasoning": "right"}
"""What a candidate's quality means in each group."""


@dataclass(frozen=True)
class Truth:
    """What the source knows of one unlabeled item: its answer, or its description; `chain` is the same in steps, ""
    where the source writes none."""

    text: str
    family: str = ""
    chain: str = ""


@dataclass(frozen=True, slots=True)
class Quality:
    """A candidate's quality in [0, 1]. Answers: 1 if right, precision = recall.

    Captions: stated things are compared as a multiset of comma-separated phrases; `precision` (the share of them that
    is true) is the quality that is reported, `recall` the share of true things that are stated.
    """

    precision: float
    recall: float


@dataclass(frozen=True, slots=True)
class Choice:
    """The chosen candidate of one item; what needs its truth is None where that is unknown.

    `score` is None for a ground truth, which nobody scored. `random` is the mean quality of the item's valid
    candidates: what a random choice gets in expectation; `oracle` is the best of them. `unanimous`: do all of two or
    more valid answers agree (None for captions and for fewer answers)?
    """

    score: float | None
    kept: bool
    family: str = ""
    quality: Quality | None = None
    random: float | None = None
    unanimous: bool | None = None
    oracle: float | None = None


@dataclass(frozen=True)
class Diagnosis:
    """One group of one iteration. Means are None where there is nothing to average; qualities are precision.

    `items` counts all items, `choices` those with a valid candidate, `known` the items whose truth is known.
    """

    group: Group
    items: int
    known: int
    choices: tuple[Choice, ...]

    @property
    def quality_name(self) -> str:
        return QUALITY_NAMES[self.group]

    @property
    def kept(self) -> int:
        return sum(choice.kept for choice in self.choices)

    @property
    def keep_rate(self) -> float | None:
        return self.kept / self.items if self.items else None

    @property
    def mean_score(self) -> float | None:
        """Mean score of all chosen candidates, kept or not."""
        return _mean(choice.score for choice in self.choices)

    @property
    def precision_random(self) -> float | None:
        """Expected quality of a random valid candidate of each item."""
        return _mean(choice.random for choice in self.choices)

    @property
    def precision_chosen(self) -> float | None:
        """Quality over all items: against `precision_random` it says what choosing alone brings."""
        return _precision(self.choices)

    @property
    def precision_oracle(self) -> float | None:
        """Quality over all items of an oracle that picks the best valid candidate of each: the ceiling of choosing."""
        return _mean(choice.oracle for choice in self.choices)

    @property
    def ceiling_share(self) -> float | None:
        """How far choosing goes from a random candidate (0) to the ceiling (1), whatever is kept of it afterwards; None
        where the pool leaves no choice, and for ground truths, which are no choice from it."""
        random, chosen, oracle = self.precision_random, self.precision_chosen, self.precision_oracle
        if random is None or chosen is None or oracle is None or oracle <= random:
            return None
        if any(choice.score is None for choice in self.choices):
            return None
        return (chosen - random) / (oracle - random)

    @property
    def precision_kept(self) -> float | None:
        return _precision(choice for choice in self.choices if choice.kept)

    @property
    def precision_by_family(self) -> dict[str, float]:
        """Quality of the kept items of each question family."""
        families: dict[str, list[Choice]] = defaultdict(list)
        for choice in self.choices:
            if choice.kept and choice.family:
                families[choice.family].append(choice)
        means = {family: _precision(choices) for family, choices in sorted(families.items())}
        return {family: mean for family, mean in means.items() if mean is not None}

    @property
    def unanimous_share(self) -> float | None:
        """Share of unanimous questions among those with two or more valid answers."""
        return _mean(choice.unanimous for choice in self.choices)

    @property
    def unanimous_precision(self) -> float | None:
        """How many of the unanimous answers are right: where it falls, sureness outgrows correctness."""
        return _precision(choice for choice in self.choices if choice.unanimous)


def diagnose(curated: Path, data: Path) -> dict[Group, Diagnosis]:
    """The groups that a curation artifact holds, judged by the data artifact's `truth.jsonl`.

    Where a truth is unknown (a user's own images) only scores and keep rates remain. Texts are read item by item; what
    is held of one is its `Choice`, about 0.2 kB.
    """
    truths = read_truth(data)
    pool, scores = RowIndex([curated / "pool.jsonl"]), RowIndex([curated / "scores.jsonl"])
    choices: dict[Group, list[Choice]] = {group: [] for group in GROUPS}
    items: Counter[str] = Counter()
    known: Counter[str] = Counter()
    for verdict in read_jsonl(curated / "curated.jsonl"):
        id, group, truth = verdict["id"], verdict["kind"], truths.get(verdict["id"])
        items[group] += 1
        known[group] += truth is not None
        if verdict["chosen"] is not None:
            said = pool.rows(id)[0]["candidates"]  # a second row of the same id is none that curation could use
            candidates = [said[at["position"]] for at in scores.rows(id) if at["score"] is not None]
            choices[group].append(choice_of(verdict, candidates, truth))
    return {group: Diagnosis(group, items[group], known[group], tuple(choices[group]))
            for group in GROUPS if items[group]}  # fmt: skip


def read_truth(data: Path) -> Mapping[str, Truth]:
    """Item id -> what the data artifact's `truth.jsonl` knows of it."""
    return Truths(data / "truth.jsonl")


def truth_of(row: Mapping[str, Any]) -> Truth:
    """Of a row of such a file."""
    text = row["answer"] if "answer" in row else row["description"]
    return Truth(str(text), row.get("family", ""), row.get("chain", ""))


class Truths(Mapping[str, Truth]):
    """The truths of a file by item id, read as they are asked for."""

    def __init__(self, file: Path) -> None:
        self._index = RowIndex([file])

    def __getitem__(self, id: str) -> Truth:
        rows = self._index.rows(id)
        if not rows:
            raise KeyError(id)
        return truth_of(rows[-1])

    def __iter__(self) -> Iterator[str]:
        return (id for id, _ in self._index)

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, id: object) -> bool:
        return id in self._index


def quality(group: Group, final: str, truth: str) -> Quality:
    """A final text (answer or description) against the truth."""
    if group == "reasoning":
        right = float(normalize_answer(final) == normalize_answer(truth))
        return Quality(right, right)
    stated, true = _phrases(final), _phrases(truth)
    both = (stated & true).total()
    return Quality(both / max(stated.total(), 1), both / max(true.total(), 1))


def final_of(kind: Kind, text: str) -> str:
    """What curation compared of a valid candidate: without `require_format` a broken one counts as a whole."""
    return final_text(kind, text) or text.strip()


def choice_of(verdict: Mapping[str, Any], candidates: Sequence[Mapping[str, Any]], truth: Truth | None) -> Choice:
    """Judge one item; equal final texts are judged once."""
    group: Group = verdict["kind"]
    finals = Counter(final_of(candidate["kind"], candidate["text"]) for candidate in candidates)
    unanimous = _unanimous(finals) if group == "reasoning" else None
    if truth is None:
        return Choice(verdict["score"], verdict["kept"], unanimous=unanimous)
    judged = {final: quality(group, final, truth.text) for final in finals}
    final = final_of(verdict["chosen_kind"], verdict["chosen"])
    chosen = judged[final] if final in judged else quality(group, final, truth.text)  # a ground truth is no candidate
    random = sum(one.precision * finals[text] for text, one in judged.items()) / finals.total() if judged else None
    oracle = max((one.precision for one in judged.values()), default=None)
    return Choice(verdict["score"], verdict["kept"], truth.family, chosen, random, unanimous, oracle)


def _unanimous(finals: Counter[str]) -> bool | None:
    return len({normalize_answer(final) for final in finals}) == 1 if finals.total() > 1 else None


def _phrases(text: str) -> Counter[str]:
    """The stated things of a description: comma-separated phrases such as "red dog top-left"."""
    parts = (" ".join(part.lower().split()).strip(" .") for part in text.split(","))
    return Counter(part for part in parts if part)


def _precision(choices: Iterable[Choice]) -> float | None:
    return _mean(choice.quality.precision for choice in choices if choice.quality)


def _mean(values: Iterable[float | None]) -> float | None:
    """The mean of the known values, None where there are none."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
