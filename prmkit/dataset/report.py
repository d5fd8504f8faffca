"""What a conversion did: counted while it writes, told in conversion_report.json and in tables."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import orjson

from prmkit.dataset.lengths import quantiles
from prmkit.dataset.stage import Facts, Group

_COVERED = (0.5, 0.9, 0.95, 0.99, 1.0)
_BINS = 10


@dataclass
class Tally:
    """Counts over the rows of a conversion."""

    groups: Counter[Group] = field(default_factory=Counter)
    duplicates: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    """Rows by kind of reason."""
    first_rejected: dict[str, str] = field(default_factory=dict)
    """`source:line: reason` of the first row by kind."""
    repairs: Counter[str] = field(default_factory=Counter)
    repaired: int = 0
    rows_with_markers: int = 0
    markers: int = 0
    rows_with_leaked_scores: int = 0
    leaked_scores: int = 0
    scores: dict[tuple[str | None, str, bool], Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    """How often each score (in hundredths) occurs, by evaluation type, key and side."""
    prompt_characters: Counter[int] = field(default_factory=Counter)
    label_characters: Counter[int] = field(default_factory=Counter)
    tokens: Counter[int] = field(default_factory=Counter)
    trimmed: int = 0
    tokens_left_out: int = 0
    characters_left_out: int = 0

    def add_row(self, group: Group, facts: Facts) -> None:
        """Count a row that is kept."""
        self.groups[group] += 1
        for key, score in facts.scores.items():
            self.scores[group.evaluation_type, key, group.held_out][score] += 1
        self.prompt_characters[facts.prompt_characters] += 1
        self.label_characters[facts.label_characters] += 1
        if facts.tokens:
            self.tokens[facts.tokens] += 1
        if facts.characters_left_out:
            self.trimmed += 1
            self.tokens_left_out += facts.tokens_left_out
            self.characters_left_out += facts.characters_left_out
        if facts.markers:
            self.rows_with_markers += 1
            self.markers += facts.markers
        if facts.leaked_scores:
            self.rows_with_leaked_scores += 1
            self.leaked_scores += facts.leaked_scores
        if facts.repairs:
            self.repaired += 1
            self.repairs.update(facts.repairs)

    def add_rejected(self, kind: str, entry: bytes, tokens: int) -> None:
        """Count a row that is set aside.

        Args:
            kind: of the reason.
            entry: its line of rejected.jsonl.
            tokens: of prompt and label; 0 where they were not measured.
        """
        self.rejected[kind] += 1
        if tokens:
            self.tokens[tokens] += 1
        if kind not in self.first_rejected:
            row = orjson.loads(entry)
            self.first_rejected[kind] = f"{row['source']}:{row['line']}: {row['reason']}"

    def rows(self, *, held_out: bool | None = None) -> int:
        """Rows that are kept, on one side or on both."""
        return sum(n for group, n in self.groups.items() if held_out is None or group.held_out == held_out)

    def values(self, place: str, *, held_out: bool | None = None) -> Counter[Any]:
        """Rows that are kept by evaluation type, judge or task.

        Args:
            place: `evaluation_type`, `judge` or `task`.
            held_out: the side; None counts both.
        """
        counts: Counter[Any] = Counter()
        for group, n in self.groups.items():
            if held_out is None or group.held_out == held_out:
                counts[getattr(group, place)] += n
        return counts

    def tasks(self, *, held_out: bool | None = None) -> int:
        """How many tasks the kept rows name."""
        return len(self.values("task", held_out=held_out).keys() - {None})

    def as_json(self) -> dict[str, Any]:
        """The counts for the report; a missing judge, task or type stands as an empty text."""
        return {
            "rows": {"train": self.rows(held_out=False), "held_out": self.rows(held_out=True)},
            "evaluation_types": _named(self.values("evaluation_type")),
            "judges": _named(self.values("judge")),
            "tasks": self.tasks(),
            "duplicates": self.duplicates,
            "rejected": dict(self.rejected.most_common()),
            "repaired": {"rows": self.repaired, "repairs": dict(self.repairs.most_common())},
            "markers": {"rows": self.rows_with_markers, "markers": self.markers},
            "leaked_scores": {"rows": self.rows_with_leaked_scores, "scores": self.leaked_scores},
            "score_keys": self._score_keys(),
            "score_histograms": self._histograms(),
            "lengths": {
                "prompt_characters": quantiles(self.prompt_characters, _COVERED),
                "label_characters": quantiles(self.label_characters, _COVERED),
                "tokens": quantiles(self.tokens, _COVERED),
            },
            "trimmed": {
                "rows": self.trimmed,
                "tokens_left_out": self.tokens_left_out,
                "characters_left_out": self.characters_left_out,
            },
        }

    def _score_keys(self) -> dict[str, list[str]]:
        keys: dict[str, list[str]] = {}
        for evaluation_type, key, _ in self.scores:
            of_type = keys.setdefault(evaluation_type or "", [])
            if key not in of_type:
                of_type.append(key)
        return keys

    def _histograms(self) -> dict[str, dict[str, list[int]]]:
        """Rows of both sides in ten bins of equal width; the last one includes 1.0."""
        histograms: dict[str, dict[str, list[int]]] = {}
        for (evaluation_type, key, _), counts in self.scores.items():
            bins = histograms.setdefault(evaluation_type or "", {}).setdefault(key, [0] * _BINS)
            for score, n in counts.items():
                bins[min(score * _BINS // 100, _BINS - 1)] += n
        return histograms


def _named(counts: Counter[Any]) -> dict[str, int]:
    return {name or "": n for name, n in counts.most_common()}
