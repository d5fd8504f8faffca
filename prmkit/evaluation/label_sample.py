"""The sample of steps that a person labels, and the file for the labels.

The same number of steps is drawn from each band of a judge's scores, because bad steps are rare and a uniform sample
would contain few. A step's weight is the size of its band divided by the number drawn from it and not skipped; the
weight is in its row, and every metric of an exam uses it. The labels are rows of judged steps, so they can also be
trained on.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prmkit.errors import DataError, UsageError
from prmkit.evaluation.exam import bare_run
from prmkit.evaluation.exam_answers import read_exam_answers
from prmkit.evaluation.statistics import BANDS
from prmkit.files import read_json, read_jsonl, sha256_of, write_json
from prmkit.judge.types import SAME_SCORE
from prmkit.prompts.step import Rubric
from prmkit.resumable import appending, check_output, companion_file, replace_rows
from prmkit.trajectories.importing import Options, read_runs
from prmkit.trajectories.rows import rows_of
from prmkit.trajectories.run_fields import label_of
from prmkit.trajectory import Trajectory

_NO_SCORE = "no score"


@dataclass(frozen=True)
class Drawn:
    """One step to label."""

    trajectory_id: str
    n: int
    weight: float
    """The number of steps that this step represents, if no step of its band is skipped."""
    band: str


def draw(
    steps: Sequence[tuple[str, int]], scores: Mapping[tuple[str, int], float] | None, n: int, seed: int
) -> list[Drawn]:
    """Draw steps in random order, so that the first labels are also a sample.

    Args:
        steps: the run's id and the step's number, for all steps.
        scores: a judge's scores; None to sample uniformly.
        n: how many steps to draw; all if there are fewer.
        seed: of the draw.

    Raises:
        UsageError: `n` is smaller than the number of bands, so some bands would be empty.
    """
    bands: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for step in steps:
        bands[_band(scores, step)].append(step)
    if n < len(bands):
        raise UsageError(f"--n {n} is too small. Draw at least {len(bands)} steps, one for each band of scores.")
    chance = random.Random(seed)  # noqa: S311 - a sample, not a secret
    drawn = []
    left, rest = min(n, len(steps)), len(bands)
    for band, members in sorted(bands.items(), key=lambda item: (len(item[1]), item[0])):
        # The smallest band first, so that larger ones can make up for what it lacks.
        size = min(len(members), -(-left // rest))
        left, rest = left - size, rest - 1
        drawn += [Drawn(*step, len(members) / size, band) for step in chance.sample(members, size)]
    chance.shuffle(drawn)
    return drawn


def _band(scores: Mapping[tuple[str, int], float] | None, step: tuple[str, int]) -> str:
    if scores is None:
        return "all"
    score = scores.get(step)
    if score is None:
        return _NO_SCORE
    place = sum(score >= border - SAME_SCORE for border in BANDS)
    low, high = (0.0, *BANDS)[place], (*BANDS, 1.0)[place]
    return f"{low:g} to {high:g}"


@dataclass
class Labels:
    """The steps to label, and the labels so far."""

    file: Path
    runs: Mapping[str, Trajectory]
    sample: Sequence[Drawn]
    rubric: Rubric
    name: str
    """The person's name."""
    done: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    """The rows in the file."""
    skipped: set[tuple[str, int]] = field(default_factory=set)

    @property
    def next(self) -> Drawn | None:
        """The first step that is neither labelled nor skipped."""
        passed = self.done.keys() | self.skipped
        return next((each for each in self.sample if (each.trajectory_id, each.n) not in passed), None)

    def add(self, drawn: Drawn, value: int, error_type: str | None) -> None:
        """Write a label to disk.

        Raises:
            OSError: it cannot be written.
        """
        run = self.runs[drawn.trajectory_id]
        label = replace(label_of(value, "ternary"), by=self.name, type=error_type)
        steps = tuple(replace(step, label=label if step.n == drawn.n else None) for step in run.steps)
        (row,) = rows_of(replace(run, steps=steps), self.rubric)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        row["metadata"] |= {"timestamp": now, "weight": self._weights()[drawn], "band": drawn.band}
        with appending(self.file) as append:
            append(row)
        self.done[drawn.trajectory_id, drawn.n] = row

    def skip(self, drawn: Drawn) -> None:
        """Leave a step out permanently."""
        with appending(_skipped_file(self.file)) as append:
            append({"trajectory_id": drawn.trajectory_id, "step": drawn.n, "by": self.name})
        self.skipped.add((drawn.trajectory_id, drawn.n))
        self.update_weights()

    def update_weights(self) -> None:
        """Let the labelled steps of each band also represent its skipped ones; rows on disk are corrected."""
        changed = False
        for drawn, weight in self._weights().items():
            row = self.done.get((drawn.trajectory_id, drawn.n))
            if row and row["metadata"].get("weight") != weight:
                row["metadata"]["weight"], changed = weight, True
        if changed:
            replace_rows(self.file, self.done.values())

    def _weights(self) -> dict[Drawn, float]:
        size = Counter(each.band for each in self.sample)
        kept = Counter(each.band for each in self.sample if (each.trajectory_id, each.n) not in self.skipped)
        return {each: round(each.weight * size[each.band] / max(kept[each.band], 1), 6) for each in self.sample}

    def undo(self) -> bool:
        """Remove the last label; returns whether there was one."""
        if not self.done:
            return False
        self.done.popitem()
        replace_rows(self.file, self.done.values())
        return True


def _skipped_file(file: Path) -> Path:
    return companion_file(file, "skipped.jsonl")


def _sample_file(file: Path) -> Path:
    return companion_file(file, "sample.json")


def open_labels(
    source: str, file: Path, n: int, name: str, scores: Path | None, seed: int, rubric: Rubric, form: str | None = None
) -> Labels:
    """Read the runs, and draw the steps or find those that were drawn earlier.

    Args:
        source: the file or folder with the runs.
        file: the file for the labels; it is continued if it exists.
        n: how many steps.
        name: the name of the person who labels.
        scores: the file with a judge's scores; None to sample uniformly.
        seed: of the draw.
        rubric: the rubric for the prompts of the rows.
        form: the format of the runs; None to detect it.

    Raises:
        DataError: there are no runs, or a file is damaged.
        UsageError: the file has labels for a different sample.
    """
    check_output(file, Path(source))
    if not name.strip():
        raise UsageError("--name is empty. Rows need the name of the person who labels.")
    runs = {run.trajectory_id: run for run in read_runs([source], Options(form))}
    steps = [(run.trajectory_id, step.n) for run in runs.values() for step in run.steps]
    if not steps:
        raise DataError(f"{source}: no run with a step was found. Check the path, or pass the format with --format.")
    known = None if scores is None else _scores(scores, runs, Path(source))
    wanted = {
        "seed": seed,
        "n": n,
        "scores": sha256_of(scores) if scores else None,
        "rubric": rubric.sha256,
        "steps": len(steps),
    }
    sample = draw(steps, known, n, seed)
    _check_sample(file, wanted | {"sample": [[each.trajectory_id, each.n, each.weight, each.band] for each in sample]})
    labels = Labels(file, runs, sample, rubric, name)
    _read_done(labels)
    return labels


def _scores(file: Path, runs: Mapping[str, Trajectory], source: Path) -> Mapping[tuple[str, int], float]:
    """Return the scores of the only judge in a file; scores of unknown runs are skipped."""
    judges = read_exam_answers(file, [bare_run(run) for run in runs.values()], source)
    if len(judges) > 1:
        raise UsageError(f"{file} has scores of {len(judges)} judges. Keep those of one.")
    return judges[0].scores


def _check_sample(file: Path, wanted: dict[str, Any]) -> None:
    marker = _sample_file(file)
    has_labels = file.is_file() and file.stat().st_size > 0
    if has_labels and not marker.is_file():
        raise UsageError(f"{file}: label_steps.py did not write this file (no {marker.name}). Choose another --output.")
    if (has_labels or _skipped_file(file).is_file()) and read_json(marker) != wanted:
        raise UsageError(
            f"{file}: these labels are for a different sample (other runs, --n, --seed, --scores or --rubric). Repeat "
            "the first command exactly, or choose another --output."
        )
    write_json(marker, wanted)


def _read_done(labels: Labels) -> None:
    labels.done |= _steps_in(labels.file, "clip_number")
    labels.skipped |= _steps_in(_skipped_file(labels.file), "step").keys()
    labels.update_weights()


def _steps_in(file: Path, number: str) -> dict[tuple[str, int], dict[str, Any]]:
    """Return the lines of a file by run and step.

    Raises:
        DataError: a line was not written by this command.
    """
    found = {}
    for place, line in enumerate(_whole_lines(file), start=1):
        about = line.get("metadata", line) if isinstance(line, dict) else None
        run, step = (about.get("trajectory_id"), about.get(number)) if isinstance(about, dict) else (None, None)
        if not isinstance(run, str) or type(step) is not int:
            raise DataError(f"{file}:{place}: not a line of label_steps.py. Repair or delete this line.")
        found[run, step] = line
    return found


def _whole_lines(file: Path) -> list[Any]:
    """Return the lines of a file; an incomplete last line, left by a killed command, is removed."""
    if not file.is_file():
        return []
    with file.open("r+b") as stream:
        stream.truncate(stream.read().rfind(b"\n") + 1)
    return list(read_jsonl(file))
