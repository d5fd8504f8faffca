"""The held-out prompts, and what the judges said about each: the yardstick of an evaluation."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import fmean, median
from typing import Any

import orjson

from prmkit.errors import DataError, UsageError
from prmkit.files import read_json, read_jsonl, sha256_of
from prmkit.paths import HELD_OUT_SUFFIX, INFO, SIDECAR_SUFFIX, sidecar_of
from prmkit.prompts.special_tokens import restore
from prmkit.scoring.rows import whole_number
from prmkit.verdict import Shape, Unreadable, asked_shape, read_verdict

References = Mapping[str, Mapping[str, float]]
"""Judge -> score key -> score."""
Medians = Mapping[str, Mapping[str, float]]
"""Evaluation type -> score key -> the median of the training labels."""

DEFAULT_HELD_OUT = "reward_model_full_eval"


@dataclass(frozen=True)
class HeldOutPrompt:
    """One prompt that never reached training, and every judge's scores for it."""

    id: str
    """The id of its first row in the dataset."""
    prompt: str
    """As the user wrote it."""
    prompt_sha256: str
    shape: Shape
    """The scores that it asks for."""
    task: str
    """`task_id`; for a prompt without one, a name of its own."""
    evaluation_type: str
    clip_number: int | None
    category: str | None
    references: References

    @property
    def reference(self) -> dict[str, float]:
        """By key, the mean of the judges that gave this key a score."""
        by_key: dict[str, list[float]] = defaultdict(list)
        for scores in self.references.values():
            for key, score in scores.items():
                by_key[key].append(score)
        # Rounded, so that the mean of 0.75 and 0.85 is 0.8 and not a hair less, which would be another band.
        return {key: round(fmean(scores), 6) for key, scores in by_key.items()}


@dataclass(frozen=True)
class HeldOut:
    """A held-out dataset."""

    name: str
    file: Path
    rows: int
    prompts: tuple[HeldOutPrompt, ...]
    sha256: str
    """Of the prompts and the judges' scores: equal for two runs that are measured with the same yardstick."""
    file_sha256: str
    """Of the dataset file: the prompts as they are scored, after any trimming by the converter."""

    @property
    def judges(self) -> list[str]:
        """The judges, sorted."""
        return sorted({judge for prompt in self.prompts for judge in prompt.references})


def read_held_out(data_folder: Path, name: str) -> HeldOut:
    """Read a dataset of `convert_dataset.py` with its sidecar; rows of one prompt become one held-out prompt.

    Raises:
        UsageError: the folder knows no such dataset, or its rows are for training.
        DataError: a file is missing or unreadable, or the two have not the same rows.
    """
    entry = _entry(data_folder, name)
    file = data_folder / str(entry["file_name"])
    sidecar = sidecar_of(file)
    if sidecar.is_file() and not name.endswith(HELD_OUT_SUFFIX):
        raise UsageError(f"{file}: rows for training, of which nothing is held out. {_held_out_side_of(name)}")
    groups: dict[str, list[tuple[str, str, dict[str, Any]]]] = defaultdict(list)
    rows = 0
    try:
        for row, meta in zip(read_jsonl(file), read_jsonl(sidecar), strict=True):
            prompt, label = _prompt_and_label(entry, row)
            groups[meta["prompt_sha256"]].append((prompt, label, meta))
            rows += 1
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: its rows and those of {sidecar.name} do not fit. Convert again.") from error
    if not rows:
        raise DataError(f"{file}: no rows, so nothing to evaluate on. Convert with a larger --eval-ratio.")
    prompts = tuple(_held_out_prompt(sha256, group) for sha256, group in groups.items())
    return HeldOut(name, file, rows, prompts, _yardstick_hash(prompts), sha256_of(file))


def _entry(data_folder: Path, name: str) -> Mapping[str, Any]:
    known: dict[str, Any] = read_json(data_folder / INFO)
    if name in known:
        entry: dict[str, Any] = known[name]
        return entry
    held_out = [other for other in known if other.endswith(HELD_OUT_SUFFIX)]
    if held_out:
        shown = ", ".join(held_out[:6]) + (", …" if len(held_out) > 6 else "")
        raise UsageError(f"{data_folder}: no dataset '{name}'. Held out are: {shown}.")
    raise UsageError(f"{data_folder}: no dataset '{name}', and none held out. Convert with --eval-ratio 0.1.")


def _held_out_side_of(name: str) -> str:
    return f"The held-out side is --dataset {name}{HELD_OUT_SUFFIX}"


def _prompt_and_label(entry: Mapping[str, Any], row: Mapping[str, Any]) -> tuple[str, str]:
    columns = entry.get("columns", {})
    if entry.get("formatting") == "sharegpt":
        turns = row[columns.get("messages", "conversations")]
        (_, prompt), (_, label) = (turn.values() for turn in turns[-2:])
        return prompt, label
    return row[columns.get("prompt", "instruction")], row[columns.get("response", "output")]


def _held_out_prompt(sha256: str, rows: list[tuple[str, str, dict[str, Any]]]) -> HeldOutPrompt:
    neutralised, label, first = rows[0]
    prompt, metadata = restore(neutralised), first["metadata"]
    by_judge: dict[str, list[Mapping[str, float]]] = defaultdict(list)
    for _, _, meta in rows:
        by_judge[str(meta["metadata"].get("model_name"))].append(meta["scores"])
    return HeldOutPrompt(
        id=first["id"],
        prompt=prompt,
        prompt_sha256=sha256,
        shape=asked_shape(prompt) or _shape_of(label, first["scores"]),
        task=f"prompt {sha256[:12]}" if metadata.get("task_id") in (None, "") else str(metadata["task_id"]),
        evaluation_type=str(metadata.get("evaluation_type")),
        clip_number=whole_number(metadata.get("clip_number")),
        category=metadata.get("category"),
        references={judge: _mean_scores(verdicts) for judge, verdicts in by_judge.items()},
    )


def _shape_of(label: str, scores: Mapping[str, float]) -> Shape:
    # A prompt without a schema is asked for what its judge answered with: the keys, not the values.
    verdict = read_verdict(restore(label, answer=True))
    return Shape(tuple(scores), nested=len(scores) > 1) if isinstance(verdict, Unreadable) else verdict.shape


def _mean_scores(verdicts: list[Mapping[str, float]]) -> dict[str, float]:
    """A judge that answered one prompt more than once counts once."""
    keys = dict.fromkeys(key for verdict in verdicts for key in verdict)
    return {key: round(fmean(verdict[key] for verdict in verdicts if key in verdict), 6) for key in keys}


def _yardstick_hash(prompts: tuple[HeldOutPrompt, ...]) -> str:
    yardstick = sorted((prompt.prompt_sha256, sorted(prompt.references.items())) for prompt in prompts)
    return hashlib.sha256(orjson.dumps(yardstick, option=orjson.OPT_SORT_KEYS)).hexdigest()


def place_of_held_out(config: Mapping[str, Any], data_folder: Path | None, name: str | None) -> tuple[Path, str]:
    """Where the held-out rows of a run are: its own held-out dataset in its own data folder, unless told otherwise.

    Args:
        config: the run's configuration; empty for a judge that no run of this project has trained.
        data_folder: overrides the configuration's `dataset_dir`.
        name: overrides its `eval_dataset`.

    Raises:
        UsageError: the run was trained with several held-out datasets, so one has to be named; or on this very one.
    """
    names = _names(config.get("eval_dataset") or DEFAULT_HELD_OUT)
    if name is None and len(names) > 1:
        raise UsageError(f"this run has {len(names)} held-out datasets. Name one: --dataset {names[0]}")
    chosen = name or names[0]
    if chosen in _names(config.get("dataset") or ()):
        held_out = "Name one that it was not." if chosen.endswith(HELD_OUT_SUFFIX) else _held_out_side_of(chosen)
        raise UsageError(f"{chosen}: the run was trained on it, so it says nothing about new steps. {held_out}")
    return data_folder or Path(config.get("dataset_dir") or "data"), chosen


def _names(value: Any) -> list[str]:
    """Datasets as a configuration lists them: in a text with commas, or one by one."""
    return [str(name).strip() for name in (value.split(",") if isinstance(value, str) else value)]


# --- what the baselines know ------------------------------------------------------------------------------------------


def training_medians(data_folder: Path, held_out_name: str) -> Medians:
    """The median training label by evaluation type and key, of the rows that this dataset is the held-out side of.

    Empty where they do not stand in `data_folder`: then there is no constant to compare with.
    """
    name = held_out_name.removesuffix(HELD_OUT_SUFFIX)
    sidecar = data_folder / f"{name}{SIDECAR_SUFFIX}"
    if name == held_out_name or not sidecar.is_file():
        return {}
    scores: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in read_jsonl(sidecar):
        for key, score in row["scores"].items():
            scores[str(row["metadata"].get("evaluation_type"))][key].append(score)
    return {kind: {key: median(values) for key, values in keys.items()} for kind, keys in scores.items()}


def by_task(prompts: Iterable[HeldOutPrompt]) -> list[HeldOutPrompt]:
    """The prompts task by task, in an order that depends on nothing but the tasks' names."""
    return sorted(prompts, key=lambda prompt: hashlib.sha256(prompt.task.encode(errors="surrogatepass")).digest())


def sampled(prompts: Iterable[HeldOutPrompt], limit: int | None) -> Iterator[HeldOutPrompt]:
    """At most `limit` prompts of whole tasks, in the order of `by_task`; where the first task has more, a part of it.

    A larger limit takes the same prompts and more, so a short evaluation can be made longer later.
    """
    taken = 0
    for _, of_task in groupby(by_task(prompts), key=lambda prompt: prompt.task):
        task = list(of_task)
        if limit is not None and taken + len(task) > limit:
            yield from task[:limit] if not taken else ()
            return
        yield from task
        taken += len(task)
