"""The held-out prompts and the judges' scores for each: the reference of an evaluation."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import orjson

from prmkit.dataset_info import Entry, RowTexts, label_shape, read_entries, read_sidecar, split_names
from prmkit.errors import DataError, UsageError
from prmkit.evaluation.estimates import Floats
from prmkit.evaluation.statistics import weighted_mean, weighted_median
from prmkit.files import read_json, read_jsonl, sha256_of
from prmkit.leniency import Leniency, corrected_mean, estimate_leniency
from prmkit.paths import FULL, HELD_OUT_SUFFIX, REPORT, sidecar_of
from prmkit.prompts.cleaning import unescape
from prmkit.rows import SELECTED_BY, WEIGHT, task_of, trajectory_of, weight_of, whole_number, without_selection
from prmkit.verdict import Shape, asked_shape

References = Mapping[str, Mapping[str, float]]
"""Judge -> score key -> score."""
Constants = Mapping[str, Mapping[str, tuple[float, float]]]
"""Evaluation type -> score key -> mean and median of the training labels."""

_LabelledRow = tuple[RowTexts, Mapping[str, Any]]
"""A row of the dataset and its line of the sidecar."""

HOW_TO_HOLD_OUT = (
    "Hold some tasks out and train again: python convert_dataset.py --eval-ratio 0.3 "
    "(other tasks: --split-seed N; tasks of your choice: --eval-tasks FILE)."
)


@dataclass(frozen=True)
class HeldOutPrompt:
    """A prompt that was not used in training, and every judge's scores for it."""

    id: str
    """The id of the prompt's first row in the dataset."""
    prompt: str
    """The prompt as the user wrote it."""
    prompt_sha256: str
    shape: Shape
    """The score keys that the prompt asks for."""
    task: str
    """`task_id`; a prompt without a task counts as a separate task, named after its hash."""
    trajectory: str
    """`trajectory_id` in the row's metadata; if it is missing, the task."""
    evaluation_type: str
    clip_number: int | None
    metadata: Mapping[str, Any]
    """The metadata of the prompt's first row, with the lowest weight of all of the prompt's rows."""
    references: References
    reference: Mapping[str, float]
    """Key -> the mean score of the judges that scored it, corrected for their leniency."""
    answers: Mapping[str, str]
    """Judge -> its (first) answer, as in the dataset."""
    system: str | None = None
    """The system prompt of the row; None for the judge's default."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Judge -> its own weight, if some judges, but not all, were asked only about selected prompts."""


@dataclass(frozen=True)
class HeldOut:
    """A held-out dataset."""

    name: str
    file: Path
    rows: int
    prompts: tuple[HeldOutPrompt, ...]
    sha256: str
    """The hash of the prompts and the judges' scores: two evaluations with the same reference have the same hash."""
    file_sha256: str
    """The hash of the dataset file: the prompts as they are scored, after any truncation by the conversion."""
    leniency: Leniency
    """Leniency of each judge on these prompts; the references are corrected for it."""
    self_agreement: Sequence[Mapping[str, Any]] = ()
    """The self-agreement of the judges, from the conversion's report."""

    @property
    def judges(self) -> list[str]:
        """The judges, sorted."""
        return sorted({judge for prompt in self.prompts for judge in prompt.references})


def read_held_out(data_folder: Path, name: str) -> HeldOut:
    """Read a dataset of `convert_dataset.py` with its sidecar; rows with the same prompt become one held-out prompt.

    Raises:
        UsageError: the folder has no such dataset, or its rows are for training.
        DataError: a file is missing or unreadable, or the two files have different rows.
    """
    entry = _held_out_entry(data_folder, name)
    file = entry.file
    if file is None or not file.is_file():
        raise DataError(f"{data_folder}: the file of dataset '{name}' is missing. Convert again.")
    sidecar = sidecar_of(file)
    if sidecar.is_file() and not name.endswith(HELD_OUT_SUFFIX):
        raise UsageError(f"{file}: these rows are for training. {_held_out_split_of(name)}")
    groups: dict[str, list[_LabelledRow]] = defaultdict(list)
    rows = 0
    try:
        for row, meta in zip(read_jsonl(file), read_sidecar(sidecar), strict=True):
            groups[meta["prompt_sha256"]].append((entry.read(row), meta))
            rows += 1
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: its rows do not match those of {sidecar.name}. Convert again.") from error
    if not rows:
        raise DataError(f"{file}: no rows, so there is nothing to evaluate on. {HOW_TO_HOLD_OUT}")
    references = {sha256: _mean_scores_by_judge(group) for sha256, group in groups.items()}
    leniency = estimate_leniency(scores for each in references.values() for scores in _by_key(each).values())
    prompts = tuple(_held_out_prompt(name, groups[name], references[name], leniency) for name in groups)
    return HeldOut(
        name, file, rows, prompts, _reference_hash(prompts), sha256_of(file), leniency, _self_agreement(data_folder)
    )


def _self_agreement(data_folder: Path) -> Sequence[Mapping[str, Any]]:
    """Read the judges' self-agreement from the conversion's report, which also counts identical repeated answers."""
    report = data_folder / REPORT
    found = read_json(report).get("self_agreement", []) if report.is_file() else []
    return [entry for entry in found if entry.keys() >= {"evaluation_type", "key", "pairs", "pearson"}]


def _held_out_entry(data_folder: Path, name: str) -> Entry:
    known = read_entries(data_folder)
    if name in known:
        return known[name]
    held_out = [other for other in known if other.endswith(HELD_OUT_SUFFIX)]
    if held_out:
        shown = ", ".join(held_out[:6]) + (", …" if len(held_out) > 6 else "")
        raise UsageError(f"{data_folder}: no dataset '{name}'. The held-out datasets are {shown}.")
    raise UsageError(f"{data_folder}: no dataset '{name}', and no held-out dataset. {HOW_TO_HOLD_OUT}")


def _held_out_split_of(name: str) -> str:
    return f"The held-out split is --dataset {name}{HELD_OUT_SUFFIX}"


def _held_out_prompt(
    sha256: str, rows: list[_LabelledRow], references: References, leniency: Leniency
) -> HeldOutPrompt:
    texts, first = rows[0]
    prompt, metadata = unescape(texts.prompt), _with_weight([meta["metadata"] for _, meta in rows])
    system = unescape(texts.system) if texts.system else None
    task = task_of(metadata) or f"prompt {sha256[:12]}"
    answers: dict[str, str] = {}
    for row, meta in rows:
        answers.setdefault(_judge_of(meta), unescape(row.answer, answer=True))
    return HeldOutPrompt(
        id=first["id"],
        prompt=prompt,
        prompt_sha256=sha256,
        # If a prompt has no schema, the keys (not the values) of its judge's answer are scored.
        shape=asked_shape(prompt, system) or label_shape(texts.answer, first["scores"]),
        task=task,
        trajectory=trajectory_of(metadata) or task,
        evaluation_type=_type_of(metadata),
        clip_number=whole_number(metadata.get("clip_number")),
        metadata=metadata,
        references=references,
        reference={key: corrected_mean(scores, leniency) for key, scores in _by_key(references).items()},
        answers=answers,
        system=system,
        weights=_other_weights(rows, weight_of(metadata)),
    )


def _other_weights(rows: Sequence[_LabelledRow], of_prompt: float) -> Mapping[str, float]:
    weights: dict[str, float] = {}
    for _, meta in rows:
        judge, weight = _judge_of(meta), weight_of(meta["metadata"])
        weights[judge] = min(weight, weights.get(judge, weight))
    return {judge: weight for judge, weight in weights.items() if weight != of_prompt}


def _with_weight(of_rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the metadata of a prompt's first row.

    A prompt that was selected both at random and with certainty gets the lowest weight, because its selection was
    certain.

    Raises:
        DataError: a weight is not a positive number.
    """
    metadata = without_selection(of_rows[0])
    weights = [weight_of(of_row) for of_row in of_rows]
    if all(WEIGHT in of_row for of_row in of_rows):
        chosen = of_rows[weights.index(min(weights))]
        metadata |= {name: chosen[name] for name in (SELECTED_BY, WEIGHT) if name in chosen}
    return metadata


def _judge_of(meta: Mapping[str, Any]) -> str:
    return str(meta["metadata"].get("model_name"))


def _mean_scores_by_judge(rows: list[_LabelledRow]) -> References:
    """Return the mean scores of each judge, so that a judge with several answers counts once."""
    by_judge: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for _, meta in rows:
        for key, score in meta["scores"].items():
            by_judge[_judge_of(meta)][key].append(score)
    return {
        judge: {key: round(fmean(scores), 6) for key, scores in by_key.items()} for judge, by_key in by_judge.items()
    }


def _by_key(references: References) -> dict[str, dict[str, float]]:
    by_key: dict[str, dict[str, float]] = defaultdict(dict)
    for judge, scores in references.items():
        for key, score in scores.items():
            by_key[key][judge] = score
    return by_key


def _reference_hash(prompts: tuple[HeldOutPrompt, ...]) -> str:
    references: list[Any] = sorted((prompt.prompt_sha256, sorted(prompt.references.items())) for prompt in prompts)
    # Weights are also part of the reference; without weights, the hash is that of earlier versions.
    if weights := sorted(
        (prompt.prompt_sha256, prompt.metadata[WEIGHT]) for prompt in prompts if WEIGHT in prompt.metadata
    ):
        references.append(weights)
    of_judges = sorted((prompt.prompt_sha256, sorted(prompt.weights.items())) for prompt in prompts if prompt.weights)
    if of_judges:
        references.append(of_judges)
    return hashlib.sha256(orjson.dumps(references, option=orjson.OPT_SORT_KEYS)).hexdigest()


def place_of_held_out(config: Mapping[str, Any], data_folder: Path | None, name: str | None) -> tuple[Path, str]:
    """Return the data folder and dataset name of a training run's held-out rows, unless overridden.

    Args:
        config: the run's configuration; empty for a judge that was not trained by this project.
        data_folder: overrides the configuration's `dataset_dir`.
        name: overrides its `eval_dataset`.

    Raises:
        UsageError: the run has several held-out datasets, so one must be chosen; or it was trained on this dataset.
    """
    names = split_names(config.get("eval_dataset") or FULL + HELD_OUT_SUFFIX)
    if name is None and len(names) > 1:
        raise UsageError(f"this run has {len(names)} held-out datasets. Choose one: --dataset {names[0]}")
    chosen = name or names[0]
    if chosen in split_names(config.get("dataset") or []):
        held_out = "Choose another one." if chosen.endswith(HELD_OUT_SUFFIX) else _held_out_split_of(chosen)
        raise UsageError(
            f"{chosen}: the run was trained on it, so it does not show how well new steps are scored. {held_out}"
        )
    return data_folder or Path(config.get("dataset_dir") or "data"), chosen


# --- baseline constants -----------------------------------------------------------------------------------------------


def training_constants(data_folder: Path, held_out_name: str) -> Constants:
    """Return the mean and median of the training labels by type and key: the constants that a judge must beat.

    Empty if the training split of this held-out dataset is not in `data_folder`.
    """
    name = held_out_name.removesuffix(HELD_OUT_SUFFIX)
    entry = read_entries(data_folder).get(name)
    file = entry.file if entry and entry.file else data_folder / f"{name}.jsonl"
    sidecar = sidecar_of(file)
    if name == held_out_name or not sidecar.is_file():
        return {}
    scores: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in read_sidecar(sidecar):
        for key, score in row["scores"].items():
            scores[_type_of(row["metadata"])][key].append((score, weight_of(row["metadata"])))
    return {
        evaluation_type: {key: _middles(*np.array(pairs).T) for key, pairs in keys.items()}
        for evaluation_type, keys in scores.items()
    }


def _type_of(metadata: Mapping[str, Any]) -> str:
    return str(metadata.get("evaluation_type") or "no type")


def _middles(values: Floats, weight: Floats) -> tuple[float, float]:
    return weighted_mean(values, weight), weighted_median(values, weight)


def by_task(prompts: Iterable[HeldOutPrompt]) -> list[HeldOutPrompt]:
    """Sort the prompts task by task, in an order that depends only on the tasks' names."""
    return sorted(prompts, key=lambda prompt: hashlib.sha256(prompt.task.encode(errors="surrogatepass")).digest())


def sampled(prompts: Iterable[HeldOutPrompt], limit: int | None) -> Iterator[HeldOutPrompt]:
    """Yield at most `limit` prompts of complete tasks, in the order of `by_task`, or a part of the first one.

    A larger limit yields the same prompts and more, so a short evaluation can be extended later.
    """
    taken = 0
    for _, of_task in groupby(by_task(prompts), key=lambda prompt: prompt.task):
        task = list(of_task)
        if limit is not None and taken + len(task) > limit:
            yield from task[:limit] if not taken else ()
            return
        yield from task
        taken += len(task)
