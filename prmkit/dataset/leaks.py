"""Is anything that is held out also in the training rows: a task, a prompt, or nearly the same prompt?

The audit reads the written files and knows nothing about how the split was made. It also reads datasets that prmkit did
not write: without a sidecar that traces the rows back to tasks, only prompts are compared.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

from prmkit.dataset_info import Entry, identities, read_entries, read_sidecar, texts_of
from prmkit.errors import DataError
from prmkit.paths import HELD_OUT_SUFFIX, INFO
from prmkit.rows import prompt_hash, task_of

_PROMPTS_A_PASS = 200_000
"""The most held-out prompts to compare in one pass over the files (100 bytes each)."""
_EXAMPLES = 5
_HELD_OUT_ELSEWHERE = re.compile(r"[_-](?:eval|val|valid|validation|test|dev|held_?out)$", re.IGNORECASE)


# --- the same task, the same prompt -------------------------------------------------------------------------------


def is_held_out(entry: Entry) -> bool:
    """Whether the name of a dataset says that its rows are for evaluation."""
    if entry.sidecar:
        return entry.name.endswith(HELD_OUT_SUFFIX)
    return bool(_HELD_OUT_ELSEWHERE.search(entry.name))


def audit_folder(folder: Path) -> dict[str, Any]:
    """Audit the datasets that a folder's dataset_info.json lists, near duplicates included.

    Raises:
        DataError: there is no dataset_info.json, or it is damaged, or it names a file that is missing.
    """
    entries = [entry for entry in read_entries(folder).values() if entry.file is not None]
    for entry in entries:
        if entry.file is not None and not entry.file.is_file():
            raise DataError(f"{entry.file}: missing, though {folder / INFO} lists it as {entry.name}. Convert again.")
    found = audit(entries)
    near = find_near_duplicates(lambda held_out: _prompts_of(entries, held_out=held_out))
    return {**found, "near_duplicates": near.as_json()}


def audit(entries: Sequence[Entry]) -> dict[str, Any]:
    """Compare every held-out dataset with every training dataset.

    Returns:
        `passed`, what was compared, and examples of what is on both sides. `passed` is None if no row names a task:
        steps of one task may then be on both sides under different prompts, without any way to tell.

    Raises:
        DataError: a file is damaged.
    """
    held_out = [entry for entry in entries if is_held_out(entry)]
    training = [entry for entry in entries if not is_held_out(entry)]
    rows, nameless, tasks = 0, 0, set()
    for entry in held_out:
        for _, task in identities(entry):
            rows += 1
            nameless += task is None
            tasks.add(task)
    tasks.discard(None)
    shared, nameless_trained, trained = _shared(training, held_out, tasks, passes=max(1, -(-rows // _PROMPTS_A_PASS)))
    sees_tasks = not held_out or nameless < rows or nameless_trained < trained
    return {
        "passed": False if shared else (True if sees_tasks else None),
        "training_datasets": len(training),
        "held_out_datasets": len(held_out),
        "held_out_rows": rows,
        "held_out_tasks": len(tasks),
        "rows_without_a_task": nameless,
        "tasks_on_both_sides": sum(what == "task" for what, _ in shared),
        "prompts_on_both_sides": sum(what == "prompt_sha256" for what, _ in shared),
        "examples": [{what: value, "dataset": name} for (what, value), name in list(shared.items())[:_EXAMPLES]],
    }


def _shared(
    training: Iterable[Entry], held_out: Sequence[Entry], tasks: set[str | None], *, passes: int
) -> tuple[dict[tuple[str, str], str], int, int]:
    """What is on both sides, and in which training dataset; how many training rows have no task; how many there are."""
    shared: dict[tuple[str, str], str] = {}
    nameless = trained = 0
    for number in range(passes):
        prompts = {prompt for entry in held_out for prompt, _ in identities(entry)
                   if int(prompt[:8], 16) % passes == number}  # fmt: skip
        nameless = trained = 0
        for entry in training:
            for prompt, task in identities(entry):
                trained += 1
                nameless += task is None
                if task is not None and task in tasks:
                    shared.setdefault(("task", task), entry.name)
                if prompt in prompts:
                    shared.setdefault(("prompt_sha256", prompt), entry.name)
    return shared, nameless, trained


def describe_leaks(found: dict[str, Any]) -> str:
    """An audit's findings in words."""
    examples = "".join(
        f"\n  {what} {value} is in {example['dataset']} and in a held-out dataset"
        for example in found["examples"]
        for what, value in example.items()
        if what != "dataset"
    )
    tasks, prompts = found["tasks_on_both_sides"], found["prompts_on_both_sides"]
    return f"{tasks:,} tasks and {prompts:,} prompts are on both sides.{examples}"


def _prompts_of(entries: Iterable[Entry], *, held_out: bool) -> Iterator["Prompt"]:
    """Each distinct prompt of one side of some datasets."""
    seen: set[bytes] = set()
    for entry in entries:
        if is_held_out(entry) != held_out:
            continue
        metadata = (row["metadata"] for row in read_sidecar(entry.sidecar)) if entry.sidecar else repeat({})
        for (number, asked), traced in zip(texts_of(entry), metadata, strict=False):
            if asked and (digest := bytes.fromhex(prompt_hash(asked.prompt, asked.system)[:24])) not in seen:
                seen.add(digest)
                unit = task_of(traced) or digest.hex()
                yield Prompt(asked.prompt, unit, str(traced.get("evaluation_type")), f"{entry.file}:{number}")


# --- nearly the same prompt ---------------------------------------------------------------------------------------

_WORDS = 8
"""The number of consecutive words that are compared together."""
_FEWEST_WORDS = 12
"""A prompt with fewer words outside the template is too short to be recognised."""
_SHARE = 0.8
"""The share of a prompt's own words that another must have in the same order to count as nearly the same."""
_FEWEST_UNITS = 3
"""Evaluation types with fewer tasks are not compared: what only two tasks share may be template or repetition."""
_HELD = 200_000
"""The most word sequences of held-out prompts (30 bytes each); of more, only each second, fourth, … is compared."""
_REMEMBERED = 5_000_000
"""The most word sequences of training prompts to keep for the second pass (8 bytes each); others are computed again."""


class Prompt(NamedTuple):
    """A prompt as the comparison sees it."""

    text: str
    unit: str
    """The unit with which it is held out: its task. Word sequences that many tasks share are a template."""
    evaluation_type: str
    place: Any
    """Its place in the input, for the caller."""


@dataclass(frozen=True)
class NearDuplicates:
    """Training prompts that nearly repeat a held-out one."""

    pairs: Sequence[tuple[Any, Any, float]]
    """The training prompt's place, the held-out prompt's place, and the share of words that they have in common."""
    compared: int
    """How many training prompts were compared."""

    def as_json(self, name_of: Callable[[Any], str] = str) -> dict[str, Any]:
        """Counts and examples for the report, with places as `name_of` shows them."""
        shown = [{"training": name_of(train), "held_out": name_of(held), "share": round(share, 3)}
                 for train, held, share in self.pairs[:_EXAMPLES]]  # fmt: skip
        return {"prompts": len(self.pairs), "compared": self.compared, "examples": shown}


def find_near_duplicates(prompts: Callable[[bool], Iterable[Prompt]]) -> NearDuplicates:
    """Find training prompts that repeat a held-out one with a few words or numbers changed.

    Two prompts are compared by the sequences of 8 words that both have. Sequences that more than a quarter of the
    tasks have (and more than two) come from the prompt template, and their words do not count. Neither do numbers.
    Time is linear in the text; memory is bounded by the number of sequences that are kept.

    Args:
        prompts: gives the held-out side (True) or the training side (False), each distinct prompt once, grouped by
            unit. Called once for the held-out side and twice for training.
    """
    index, places = _Index(), []
    for prompt in prompts(True):
        places.append(prompt.place)
        index.add(prompt)
    index.close()
    pairs, compared = [], 0
    if index.has_grams:
        # Only the whole input shows how common a gram is. Prompts with enough in common are then checked again.
        looks = [index.count(prompt) for prompt in prompts(False)]
        compared = len(looks)
        for prompt, look in zip(prompts(False), looks, strict=True) if any(looks) else ():
            if look and (found := index.nearest(prompt, look)):
                held_out, share = found
                pairs.append((prompt.place, places[held_out], share))
    return NearDuplicates(pairs, compared)


class _Look(NamedTuple):
    """The grams of a training prompt."""

    numbers: Any
    """The number of each gram among the held-out ones, int32; -1 if it is not among them."""
    starts: Any
    """The word at which each gram begins, int32."""


_AGAIN = _Look(None, None)
"""Marks a prompt that must be read again."""


class _Index:
    """The word sequences ("grams") of the held-out prompts: which prompts have each, and how many units."""

    def __init__(self) -> None:
        self._held: list[tuple[Prompt, Any, Any]] = []  # without text; hashes of the grams, and where each begins
        self._every, self._size, self._remembered = 1, 0, 0
        self._units_of_type: Counter[str] = Counter()
        self._last_unit_of_type: dict[str, str] = {}
        self._unit, self._unit_number = "", -1
        # Arrays that `close` makes.
        self._grams: Any  # the distinct grams, sorted
        self._units: Any  # how many units have each gram
        self._last_unit: Any  # the number of the last of these
        self._owners: Any  # the prompts that have each gram, gram after gram
        self._owners_from: Any  # where each gram's owners begin
        self._owners_of: Any  # how many owners each gram has
        self._numbers: Any  # the place in `_grams` of every prompt's grams, prompt after prompt
        self._from: Any  # where each prompt's grams begin

    @property
    def has_grams(self) -> bool:
        """Whether there is anything to compare with."""
        return len(self._grams) > 0

    def add(self, prompt: Prompt) -> None:
        """Add a held-out prompt."""
        grams, starts = self._sampled(*_grams(prompt.text))
        self._held.append((prompt._replace(text=""), grams, starts))
        self._size += len(grams)
        while self._size > _HELD:
            self._every *= 2
            self._held = [(prompt, *self._sampled(*rest)) for prompt, *rest in self._held]
            self._size = sum(len(grams) for _, grams, _ in self._held)

    def _sampled(self, grams: Any, starts: Any) -> tuple[Any, Any]:
        if self._every == 1:
            return grams, starts
        chosen = grams % self._every == 0
        return grams[chosen], starts[chosen]

    def close(self) -> None:
        """Build the index after the last held-out prompt was added."""
        import numpy as np

        together = np.concatenate([np.empty(0, np.uint64), *(grams for _, grams, _ in self._held)])
        self._grams, self._numbers = np.unique(together, return_inverse=True)
        self._from = np.cumsum([0, *(len(grams) for _, grams, _ in self._held)])
        order = np.argsort(self._numbers, kind="stable")
        self._owners = np.repeat(np.arange(len(self._held)), np.diff(self._from))[order]
        self._owners_from = np.searchsorted(self._numbers[order], np.arange(len(self._grams) + 1))
        self._owners_of = np.diff(self._owners_from)
        self._units = np.zeros(len(self._grams), np.int32)
        self._last_unit = np.full(len(self._grams), -1, np.int64)
        for place, (prompt, _, _) in enumerate(self._held):
            self._count(prompt, self._numbers[self._from[place] : self._from[place + 1]])

    def count(self, prompt: Prompt) -> _Look | None:
        """Count the unit of a training prompt for the grams that it shares with held-out ones.

        Returns:
            None where it shares too little, template included, to nearly repeat one of them.
        """
        look = self._look_at(prompt)
        known = look.numbers >= 0
        self._count(prompt, look.numbers[known])
        if _covered(look.starts[known]) < _SHARE * _covered(look.starts):
            return None
        self._remembered += len(look.starts)
        return look if self._remembered <= _REMEMBERED else _AGAIN

    def _count(self, prompt: Prompt, numbers: Any) -> None:
        if prompt.unit != self._unit:
            self._unit, self._unit_number = prompt.unit, self._unit_number + 1
        if self._last_unit_of_type.get(prompt.evaluation_type) != prompt.unit:
            self._last_unit_of_type[prompt.evaluation_type] = prompt.unit
            self._units_of_type[prompt.evaluation_type] += 1
        new = numbers[self._last_unit[numbers] != self._unit_number]
        self._last_unit[new] = self._unit_number
        self._units[new] += 1  # once, even where a gram occurs twice in the prompt: numpy adds to a copy

    def _look_at(self, prompt: Prompt) -> _Look:
        import numpy as np

        grams, starts = self._sampled(*_grams(prompt.text))
        numbers = np.minimum(np.searchsorted(self._grams, grams), len(self._grams) - 1)
        return _Look(np.where(self._grams[numbers] == grams, numbers, -1).astype(np.int32), starts)

    def nearest(self, prompt: Prompt, look: _Look) -> tuple[int, float] | None:
        """The number of the held-out prompt that a training prompt nearly repeats, and the share of words in common."""
        import numpy as np

        units = self._units_of_type[prompt.evaluation_type]
        if units < _FEWEST_UNITS:
            return None
        limit = max(2, units // 4)
        numbers, starts = self._look_at(prompt) if look is _AGAIN else look
        known = numbers >= 0
        template = known & (self._units[numbers] > limit)
        shared, own = numbers[known & ~template], _covered(starts) - _covered(starts[template])
        if _WORDS * len(shared) < _SHARE * own:
            return None
        begin, size = self._owners_from[shared], self._owners_of[shared]
        places = np.repeat(begin - np.cumsum(size) + size, size) + np.arange(size.sum())
        counts = np.bincount(self._owners[places], minlength=1)
        nearest = int(counts.argmax())
        if _WORDS * counts[nearest] < _SHARE * own:
            return None

        theirs = slice(self._from[nearest], self._from[nearest + 1])
        template_there = self._units[self._numbers[theirs]] > limit
        starts_there = self._held[nearest][2]
        own_there = _words_of(starts_there, ~template_there) & ~_words_of(starts_there, template_there)
        own_here = _words_of(starts, ~template) & ~_words_of(starts, template)
        common = _words_of(starts, np.isin(numbers, self._numbers[theirs]) & known & ~template) & own_here
        fewer, more = sorted((int(own_here.sum()), int(own_there.sum())))
        share = float(common.sum() / max(more, 1))
        return (nearest, min(share, 1.0)) if fewer >= _FEWEST_WORDS and share >= _SHARE else None


def _covered(starts: Any) -> int:
    """How many words are part of the grams that begin at these words, which are in rising order."""
    import numpy as np

    return int(np.minimum(np.diff(starts), _WORDS).sum()) + _WORDS if len(starts) else 0


def _words_of(starts: Any, chosen: Any) -> Any:
    """Which words are part of the chosen grams."""
    import numpy as np

    words = np.zeros((int(starts[-1]) if len(starts) else 0) + _WORDS, bool)
    for place in range(_WORDS):
        words[starts[chosen] + place] = True
    return words


# Everything in ASCII that is not a letter separates words, and letters become lower case: numbers do not count.
_LETTERS = bytes(code if code >= 0x80 or chr(code).isalpha() else ord(" ") for code in range(256)).lower()
_WITHOUT_SPACES = re.compile(r"([\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af])")
_FACTOR = 0x9E3779B97F4A7C15


def _grams(text: str) -> tuple[Any, Any]:
    """The hashes of all sequences of 8 words in order, uint64, and the word at which each begins."""
    import numpy as np

    if not text.isascii() and _WITHOUT_SPACES.search(text):
        text = " ".join(_WITHOUT_SPACES.split(text))  # Chinese, Japanese and Korean: each character is a word
    words = text.encode(errors="surrogatepass").translate(_LETTERS).split()
    count = max(len(words) - _WORDS + 1, 0)
    codes = np.fromiter(map(crc32, words), np.uint64, len(words))  # not hash(), which differs between processes
    hashes = np.zeros(count, np.uint64)
    for place in range(_WORDS):
        hashes = (hashes + codes[place : place + count]) * np.uint64(_FACTOR)  # wraps around, as it should
    return hashes ^ (hashes >> np.uint64(32)), np.arange(count, dtype=np.int32)
