"""Leak audit: tasks, prompts and near-duplicate prompts that are in both splits.

The audit reads the written files and is independent of the code that splits the rows. It also reads datasets that
prmkit did not write: without a sidecar that traces the rows back to tasks, only prompts are compared.
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

_PROMPTS_PER_PASS = 200_000
"""The maximum number of held-out prompts to compare in one pass over the files (100 bytes each)."""
_EXAMPLES = 5
_HELD_OUT_ELSEWHERE = re.compile(r"[_-](?:eval|val|valid|validation|test|dev|held_?out)$", re.IGNORECASE)


# --- the same task, the same prompt -------------------------------------------------------------------------------


def is_held_out(entry: Entry) -> bool:
    """Whether a dataset is for evaluation, by its name."""
    if entry.sidecar:
        return entry.name.endswith(HELD_OUT_SUFFIX)
    return bool(_HELD_OUT_ELSEWHERE.search(entry.name))


def audit_folder(folder: Path) -> dict[str, Any]:
    """Audit the datasets that a folder's dataset_info.json lists, near duplicates included.

    Raises:
        DataError: there is no dataset_info.json, it is damaged, or it lists no file or one that is missing.
    """
    entries = [entry for entry in read_entries(folder).values() if entry.file is not None]
    if not entries:
        raise DataError(f"{folder / INFO} lists no files, so there is nothing to check. Convert the data first.")
    for entry in entries:
        if entry.file is not None and not entry.file.is_file():
            raise DataError(f"{entry.file}: missing, though {folder / INFO} lists it as {entry.name}. Convert again.")
    result = audit(entries)
    near = find_near_duplicates(lambda held_out: _prompts_of(entries, held_out=held_out))
    return {**result, "near_duplicates": near.as_json()}


def audit(entries: Sequence[Entry]) -> dict[str, Any]:
    """Compare every held-out dataset with every training dataset.

    Returns:
        `passed`, counts of what was compared, and examples of what is in both splits. `passed` is None if no row has a
        task: steps of one task may then be in both splits with different prompts, which cannot be detected.

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
    shared, nameless_trained, trained = _shared(training, held_out, tasks, passes=max(1, -(-rows // _PROMPTS_PER_PASS)))
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
    """Return what is in both splits (-> training dataset), the training rows without a task, and all training rows."""
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


def describe_leaks(result: dict[str, Any]) -> str:
    """Describe an audit's findings."""
    examples = "".join(
        f"\n  {what} {value} is in {example['dataset']} and in a held-out dataset"
        for example in result["examples"]
        for what, value in example.items()
        if what != "dataset"
    )
    tasks, prompts = result["tasks_on_both_sides"], result["prompts_on_both_sides"]
    return f"{tasks:,} tasks and {prompts:,} prompts are in both splits.{examples}"


def _prompts_of(entries: Iterable[Entry], *, held_out: bool) -> Iterator["Prompt"]:
    """Yield each distinct prompt of one split of some datasets."""
    seen: set[bytes] = set()
    for entry in entries:
        if is_held_out(entry) != held_out:
            continue
        metadata = (row["metadata"] for row in read_sidecar(entry.sidecar)) if entry.sidecar else repeat({})
        for (number, texts), traced in zip(texts_of(entry), metadata, strict=False):
            if texts and (digest := bytes.fromhex(prompt_hash(texts.prompt, texts.system)[:24])) not in seen:
                seen.add(digest)
                unit = task_of(traced) or digest.hex()
                yield Prompt(texts.prompt, unit, str(traced.get("evaluation_type")), f"{entry.file}:{number}")


# --- nearly the same prompt ---------------------------------------------------------------------------------------

_WORDS = 8
"""The number of words in a sequence (n of the n-grams)."""
_FEWEST_WORDS = 12
"""A prompt with fewer words outside the template is too short for a comparison."""
_SHARE = 0.8
"""The minimum fraction of shared, ordered words, of the words outside the template, for a near duplicate."""
_FEWEST_UNITS = 3
"""Evaluation types with fewer tasks are not compared: text that only two tasks share may be template or repetition."""
_HELD = 200_000
"""The maximum number of sequences of held-out prompts (30 bytes each); of more, every second, fourth, … is compared."""
_REMEMBERED = 5_000_000
"""The maximum number of sequences of training prompts to keep for the second pass (8 bytes each)."""


class Prompt(NamedTuple):
    """A prompt for the comparison."""

    text: str
    unit: str
    """The unit of the split (the task). Sequences that many tasks share belong to the prompt template."""
    evaluation_type: str
    place: Any
    """The location of the prompt in the input, for the caller."""


@dataclass(frozen=True)
class NearDuplicates:
    """Training prompts that nearly repeat a held-out one."""

    pairs: Sequence[tuple[Any, Any, float]]
    """Location of the training prompt, location of the held-out prompt, and the fraction of words in common."""
    compared: int
    """The number of training prompts that were compared."""

    def as_json(self, name_of: Callable[[Any], str] = str) -> dict[str, Any]:
        """Return counts and examples for the report, with locations formatted by `name_of`."""
        shown = [{"training": name_of(train), "held_out": name_of(held), "share": round(share, 3)}
                 for train, held, share in self.pairs[:_EXAMPLES]]  # fmt: skip
        return {"prompts": len(self.pairs), "compared": self.compared, "examples": shown}


def find_near_duplicates(prompts: Callable[[bool], Iterable[Prompt]]) -> NearDuplicates:
    """Find training prompts that repeat a held-out one with a few words or numbers changed.

    Two prompts are compared by the sequences of 8 words that both have. Sequences that more than a quarter of the
    tasks have (and more than two) come from the prompt template and are ignored, as are numbers. Time is linear in the
    length of the text; memory is bounded by the number of sequences that are kept.

    Args:
        prompts: yields the held-out prompts (True) or the training prompts (False), each distinct prompt once, grouped
            by unit. Called once for the held-out prompts and twice for the training prompts.
    """
    index, locations = _Index(), []
    for prompt in prompts(True):
        locations.append(prompt.place)
        index.add(prompt)
    index.close()
    pairs, compared = [], 0
    if index.has_grams:
        # Only the complete input shows how common a gram is. Prompts with enough in common are then checked again.
        candidates = [index.count(prompt) for prompt in prompts(False)]
        compared = len(candidates)
        for prompt, grams in zip(prompts(False), candidates, strict=True) if any(candidates) else ():
            if grams and (nearest := index.nearest(prompt, grams)):
                held_out, share = nearest
                pairs.append((prompt.place, locations[held_out], share))
    return NearDuplicates(pairs, compared)


class _PromptNgrams(NamedTuple):
    """The n-grams ("grams") of a training prompt."""

    numbers: Any
    """The index of each gram among the held-out ones, int32; -1 if it is not among them."""
    starts: Any
    """The word at which each gram begins, int32."""


_RECOMPUTE = _PromptNgrams(None, None)
"""Sentinel: the grams were not kept and must be computed again."""


class _Index:
    """The word sequences ("grams") of the held-out prompts, each with its prompts and its number of units."""

    def __init__(self) -> None:
        self._held: list[tuple[Prompt, Any, Any]] = []  # without text; hashes of its grams, and their first words
        self._every, self._size, self._remembered = 1, 0, 0
        self._units_of_type: Counter[str] = Counter()
        self._last_unit_of_type: dict[str, str] = {}
        self._unit, self._unit_number = "", -1
        # Arrays that `close` makes.
        self._grams: Any  # the distinct grams, sorted
        self._units: Any  # how many units have each gram
        self._last_unit: Any  # the number of the last unit with each gram
        self._owners: Any  # the prompts that have each gram, gram after gram
        self._owners_from: Any  # the index of each gram's first owner
        self._owners_of: Any  # how many owners each gram has
        self._numbers: Any  # the index in `_grams` of every prompt's grams, prompt after prompt
        self._from: Any  # the index of each prompt's first gram

    @property
    def has_grams(self) -> bool:
        """Whether any held-out prompt has a gram."""
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
        for index, (prompt, _, _) in enumerate(self._held):
            self._count(prompt, self._numbers[self._from[index] : self._from[index + 1]])

    def count(self, prompt: Prompt) -> _PromptNgrams | None:
        """Add the unit of a training prompt to the unit counts of the grams that it shares with held-out prompts.

        Returns:
            None if it shares too little, template included, to nearly repeat one of them.
        """
        grams = self._ngrams_of(prompt)
        known = grams.numbers >= 0
        self._count(prompt, grams.numbers[known])
        if _covered(grams.starts[known]) < _SHARE * _covered(grams.starts):
            return None
        self._remembered += len(grams.starts)
        return grams if self._remembered <= _REMEMBERED else _RECOMPUTE

    def _count(self, prompt: Prompt, numbers: Any) -> None:
        if prompt.unit != self._unit:
            self._unit, self._unit_number = prompt.unit, self._unit_number + 1
        if self._last_unit_of_type.get(prompt.evaluation_type) != prompt.unit:
            self._last_unit_of_type[prompt.evaluation_type] = prompt.unit
            self._units_of_type[prompt.evaluation_type] += 1
        new = numbers[self._last_unit[numbers] != self._unit_number]
        self._last_unit[new] = self._unit_number
        self._units[new] += 1  # once, even where a gram occurs twice in the prompt: numpy adds to a copy

    def _ngrams_of(self, prompt: Prompt) -> _PromptNgrams:
        import numpy as np

        grams, starts = self._sampled(*_grams(prompt.text))
        numbers = np.minimum(np.searchsorted(self._grams, grams), len(self._grams) - 1)
        return _PromptNgrams(np.where(self._grams[numbers] == grams, numbers, -1).astype(np.int32), starts)

    def nearest(self, prompt: Prompt, grams: _PromptNgrams) -> tuple[int, float] | None:
        """Return the index of the held-out prompt that a training prompt nearly repeats, and the fraction in common."""
        import numpy as np

        units = self._units_of_type[prompt.evaluation_type]
        if units < _FEWEST_UNITS:
            return None
        limit = max(2, units // 4)
        numbers, starts = self._ngrams_of(prompt) if grams is _RECOMPUTE else grams
        known = numbers >= 0
        template = known & (self._units[numbers] > limit)
        shared, own = numbers[known & ~template], _covered(starts) - _covered(starts[template])
        if _WORDS * len(shared) < _SHARE * own:
            return None
        begin, size = self._owners_from[shared], self._owners_of[shared]
        indices = np.repeat(begin - np.cumsum(size) + size, size) + np.arange(size.sum())
        counts = np.bincount(self._owners[indices], minlength=1)
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
    """Count the words in the grams that begin at `starts`, which is in ascending order."""
    import numpy as np

    return int(np.minimum(np.diff(starts), _WORDS).sum()) + _WORDS if len(starts) else 0


def _words_of(starts: Any, chosen: Any) -> Any:
    """Return a mask of the words in the chosen grams."""
    import numpy as np

    words = np.zeros((int(starts[-1]) if len(starts) else 0) + _WORDS, bool)
    for offset in range(_WORDS):
        words[starts[chosen] + offset] = True
    return words


# Every ASCII character that is not a letter separates words, and letters become lower case: numbers do not count.
_LETTERS = bytes(code if code >= 0x80 or chr(code).isalpha() else ord(" ") for code in range(256)).lower()
_WITHOUT_SPACES = re.compile(r"([\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af])")
_FACTOR = 0x9E3779B97F4A7C15


def _grams(text: str) -> tuple[Any, Any]:
    """Return the uint64 hashes of all 8-word sequences in text order, and the index of each one's first word."""
    import numpy as np

    if not text.isascii() and _WITHOUT_SPACES.search(text):
        text = " ".join(_WITHOUT_SPACES.split(text))  # Chinese, Japanese and Korean: each character is a word
    words = text.encode(errors="surrogatepass").translate(_LETTERS).split()
    count = max(len(words) - _WORDS + 1, 0)
    codes = np.fromiter(map(crc32, words), np.uint64, len(words))  # not hash(), which differs between processes
    hashes = np.zeros(count, np.uint64)
    for offset in range(_WORDS):
        hashes = (hashes + codes[offset : offset + count]) * np.uint64(_FACTOR)  # wraps around, as it should
    return hashes ^ (hashes >> np.uint64(32)), np.arange(count, dtype=np.int32)
