"""The command `ask_judges.py`: show the requests and their price, send them, and write the rows."""

import argparse
import logging
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

import orjson

from prmkit import cli
from prmkit.collection.answers import Collection, VerdictCounts, collect, read_answers, rows_of_answers
from prmkit.collection.judges import StrongJudge, load_judges
from prmkit.collection.questions import NextRequest, Question, is_drawn, next_of, questions_of
from prmkit.errors import DataError, ExitCode, UsageError
from prmkit.files import atomic_write, exclusive_lock
from prmkit.prompts.step import Rubric, load_rubric
from prmkit.resumable import check_outputs, companion_file
from prmkit.rows import AUDIT
from prmkit.trajectories.importing import FileReport, Options, read_runs, totals, warn_of_losses

log = logging.getLogger("prmkit")

_MOST_MISSING = 0.05
_LONGEST_REASON = 60
_MOST_REASONS = 20
_COUNTED = ("questions", "open", "tokens in", "tokens out")


@dataclass(frozen=True)
class CollectionPlan:
    """The runs, the judges and the options of a collection."""

    inputs: tuple[str, ...]
    form: str | None
    judges: tuple[StrongJudge, ...]
    rubric: Rubric
    per_run: bool
    with_reference: bool
    repeat: float
    """The fraction of steps about which every judge is asked twice."""
    selected: Mapping[tuple[str, int], tuple[str, float] | None] | None
    """(trajectory, step) -> the reason for its selection, and its weight; None for a step that was not selected. The
    field itself is None if all steps are asked about."""

    def questions(self, reports: list[FileReport] | None = None) -> Iterator[Question]:
        """Yield every question, run by run and judge by judge: always in the same order, with one run in memory.

        Args:
            reports: a list to which a report on each file is appended.
        """
        for run in read_runs(list(self.inputs), Options(self.form), [] if reports is None else reports):
            for judge in self.judges:
                for question in questions_of(
                    run, judge, self.rubric, per_run=self.per_run, with_reference=self.with_reference
                ):
                    yield from self._wanted(question)

    def _wanted(self, question: Question) -> Iterator[Question]:
        if self.selected is not None:
            step = (question.run.trajectory_id, next(iter(question.prompts)))
            if step not in self.selected:
                raise DataError(
                    f"--first has no score for step {question.name}. Score all runs first: score_trajectories.py "
                    f"{' '.join(self.inputs)} --run saves/RUN --output FILE"
                )
            selection = self.selected[step]
            if selection is None:
                return
            question = replace(question, selection=selection)
        yield question
        if is_drawn(self.repeat, "repeat", question.judge.name, question.name):
            yield replace(question, repeat=True)


def ask_judges(arguments: argparse.Namespace) -> ExitCode:
    """Send the requests, or only show them; then write the rows.

    Raises:
        UsageError: the arguments or judges.yaml are invalid, or the price was not confirmed.
        DataError: the runs cannot be read, or more than 5 % of the verdicts are missing.
    """
    plan = _plan(arguments)
    answers_file = arguments.answers or companion_file(arguments.output, "answers.jsonl")
    _check_files(arguments, answers_file)
    lock = f".{answers_file.name}.lock"
    if arguments.dry_run:
        _show(plan, read_answers(answers_file), with_prompt=True, as_json=arguments.json)
        return ExitCode.DONE
    with exclusive_lock(answers_file.parent, f"asking judges for {answers_file.name}", lock=lock):
        state = Collection(read_answers(answers_file), arguments.max_cost)
        if not arguments.no_asking:
            if _show(plan, state.answers, with_prompt=False, as_json=arguments.json):
                _confirm(plan.judges, yes=arguments.yes)
            collect(plan.questions, plan.judges, answers_file, state)
        return _write(plan, state, arguments.output, as_json=arguments.json)


def _check_files(arguments: argparse.Namespace, answers: Path) -> None:
    """Check that no output replaces an input, or answers that were paid for."""
    for folder in filter(Path.is_dir, map(Path, arguments.inputs)):
        if any(folder.resolve() in file.resolve().parents for file in (arguments.output, answers)):
            raise UsageError(
                f"{folder}: the output is inside this input folder, so the next call would read it. "
                "Choose another --output."
            )
    read = [*map(Path, arguments.inputs), arguments.judges, *filter(None, (arguments.first, arguments.rubric))]
    check_outputs([arguments.output, answers], read)


def _plan(arguments: argparse.Namespace) -> CollectionPlan:
    judges = load_judges(arguments.judges)
    if arguments.per == "run" and arguments.first is not None:
        raise UsageError("--first selects single steps, but --per run asks about complete runs. Use only one of them.")
    if arguments.max_cost is not None and not 0 <= arguments.max_cost < math.inf:
        raise UsageError(f"--max-cost {arguments.max_cost}: the amount must be at least zero.")
    if arguments.max_cost is not None and any(judge.price_in is None for judge in judges):
        raise UsageError("--max-cost needs price_in and price_out for every judge in judges.yaml.")
    selected = None
    if arguments.first is not None:
        selected = _selected(arguments.first, arguments.unsure_above, arguments.audit_share)
    return CollectionPlan(
        tuple(arguments.inputs),
        arguments.format,
        tuple(judges),
        load_rubric(arguments.rubric),
        per_run=arguments.per == "run",
        with_reference=arguments.teacher_sees == "reference",
        repeat=arguments.repeat,
        selected=selected,
    )


def _selected(scores: Path, unsure_above: float, audit_share: float) -> dict[tuple[str, int], tuple[str, float] | None]:
    """Return the reason for each step's selection, and its weight (the inverse selection probability), or None."""
    selected: dict[tuple[str, int], tuple[str, float] | None] = {}
    try:
        lines = scores.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"{scores}: {error.strerror}. Check the path.") from error
    for number, text in enumerate(lines, start=1):
        try:
            line = orjson.loads(text)
            step = (str(line["metadata"]["trajectory_id"]), int(line["metadata"]["step"]))
            is_unsure = line["status"] != "ok" or _width(line) > unsure_above
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{scores}:{number}: not a line that score_trajectories.py wrote for runs ({error!r})."
            ) from error
        if step in selected:
            raise DataError(f"{scores}:{number}: a second line for step {step[1]} of {step[0]}. Keep only one.")
        is_audited = is_drawn(audit_share, "audit", *map(str, step))
        selected[step] = ("unsure", 1.0) if is_unsure else (AUDIT, round(1 / audit_share, 6)) if is_audited else None
    return selected


def _width(line: Mapping[str, Any]) -> float:
    """Return the width of a score's interval or else two standard deviations; infinity if there are neither."""
    if line.get("high") is not None:
        return float(line["high"] - line["low"])
    return math.inf if line["std"] is None else 2 * float(line["std"])


# --- before -----------------------------------------------------------------------------------------------------------


def _show(plan: CollectionPlan, answers: Mapping[str, Any], *, with_prompt: bool, as_json: bool) -> int:
    """Report the requests that have no answer yet, and return their number."""
    counts: dict[str, Counter[str]] = {judge.name: Counter() for judge in plan.judges}
    first: Question | None = None
    reports: list[FileReport] = []
    for question in plan.questions(reports):
        count = counts[question.judge.name]
        count["questions"] += 1
        first = first or question
        request = next_of(question, answers)
        if isinstance(request, NextRequest):
            count["open"] += 1
            count["tokens in"] += request.prompt_tokens
            count["tokens out"] += request.most_tokens
    warn_of_losses(reports)
    for line in totals(reports):
        log.info(line)
    if first is None:
        raise DataError(f"{', '.join(plan.inputs)}: there are no steps to ask about. Check the runs and --first.")
    if as_json:
        _show_as_json(plan, counts, first if with_prompt else None)
    else:
        _show_as_table(plan, counts, first if with_prompt else None)
    return sum(count["open"] for count in counts.values())


def _show_as_json(plan: CollectionPlan, counts: Mapping[str, Counter[str]], first: Question | None) -> None:
    """Print to stdout if the price is the result; otherwise to stderr, because the result comes later."""
    judges = [
        {"judge": judge.name, "host": judge.host}
        | {name.replace(" ", "_"): counts[judge.name][name] for name in _COUNTED}
        | {"most_cost_asked_once": None if judge.price_in is None else _most_cost(judge, counts[judge.name])}
        for judge in plan.judges
    ]
    if first is not None:
        cli.emit_json({"judges": judges, "first_prompt": {"question": first.name, "text": first.text}})
        return
    for judge in judges:
        cost = "" if judge["most_cost_asked_once"] is None else f", for at most {judge['most_cost_asked_once']:.2f}"
        log.info("%s (%s): %s requests%s", judge["judge"], judge["host"], f"{judge['open']:,}", cost)


def _show_as_table(plan: CollectionPlan, counts: Mapping[str, Counter[str]], first: Question | None) -> None:
    rows = [_price_row(judge, counts[judge.name]) for judge in plan.judges]
    columns = ("judge", *_COUNTED, "price, no retries", "host")
    cli.emit_table("", columns, rows, numeric=columns[1:6], optional=("questions", "host"))
    hosts = sorted({judge.host for judge in plan.judges})
    cli.emit(
        f"The runs would be sent to: {', '.join(hosts)}. Token counts are estimates (3 bytes per token, "
        "answers of the maximum length). Unreadable answers are retried; --max-cost counts the retries, too."
    )
    if first is not None:
        cli.emit(f"\nThe first prompt ({first.name}):\n\n{first.text}")


def _most_cost(judge: StrongJudge, count: Mapping[str, int]) -> float:
    return judge.cost(count["tokens in"], count["tokens out"])


def _price_row(judge: StrongJudge, count: Mapping[str, int]) -> Sequence[str]:
    price = "-" if judge.price_in is None else f"<= {_most_cost(judge, count):.2f}"
    numbers = [f"{count[name]:,}" for name in _COUNTED]
    return (judge.name, *numbers, price, judge.host)


def _confirm(judges: Sequence[StrongJudge], *, yes: bool) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        raise UsageError("there is no terminal to confirm the price. Check the price with --dry-run, then add --yes.")
    if not cli.confirm(f"Ask {', '.join(judge.name for judge in judges)}? [y/N] "):
        raise UsageError("not confirmed; nothing was sent.")


# --- after ------------------------------------------------------------------------------------------------------------


def _write(plan: CollectionPlan, state: Collection, output: Path, *, as_json: bool) -> ExitCode:
    tally, written = VerdictCounts(), 0
    reasons = {key: state.stopped.get(key[0], reason) for key, reason in state.failures.items()}
    rows = rows_of_answers(plan.questions(), state.answers, reasons, tally)
    if first := next(rows, None):  # without new rows, keep those of an earlier call
        with atomic_write(output) as stream:
            for row in chain((first,), rows):
                stream.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
                written += 1
    missing = [(judge, _why(state, judge, reason), count) for (judge, reason), count in tally.missing.items()]
    agreement = {judge: {"pairs": len(gaps), "mean_difference": round(fmean(gaps), 4),
                         "equal": round(sum(gap < 0.005 for gap in gaps) / len(gaps), 4)}
                 for judge, gaps in tally.repeated.items()}  # fmt: skip
    if as_json:
        listed = [{"judge": judge, "reason": reason, "steps": count} for judge, reason, count in missing]
        cli.emit_json(
            {"output": str(output), "rows": written, "missing": listed, "share_missing": tally.share_missing,
             "spent": round(state.spent, 6), "self_agreement": agreement}
        )  # fmt: skip
    else:
        _report(output, written, missing, tally, agreement, state.spent)
    if not written:
        raise DataError(f"{output}: there are no verdicts, so no rows were written.")
    if tally.share_missing > _MOST_MISSING:
        share = f"{tally.share_missing:.0%} of the verdicts are missing, more than {_MOST_MISSING:.0%}."
        raise DataError(" ".join([share, *_advice(tally)]))
    return ExitCode.DONE


def _advice(tally: VerdictCounts) -> Iterator[str]:
    if tally.missing.total() > tally.unreadable:
        yield "Run the same command again: it only sends requests that have no answer, so nothing is paid for twice."
    if tally.unreadable:
        yield (
            f"Answers about {tally.unreadable:,} steps stayed unreadable after retries and are not requested again. "
            "Remove the judge from judges.yaml, or change its json or parameters, which repeats all of its requests."
        )


def _why(state: Collection, judge: str, reason: str) -> str:
    if reason != "not asked yet":
        return reason
    if judge in state.stopped:
        return f"stopped: {state.stopped[judge]}"
    return "not asked: --max-cost was reached" if state.is_exhausted else reason


def _report(
    output: Path,
    written: int,
    missing: Sequence[tuple[str, str, int]],
    tally: VerdictCounts,
    agreement: Mapping[str, Mapping[str, Any]],
    spent: float,
) -> None:
    if missing:
        _report_missing(missing)
    for judge, repeated in agreement.items():
        cli.emit(
            f"{judge}, asked twice about {repeated['pairs']} steps: mean difference "
            f"{repeated['mean_difference']:.2f}, {repeated['equal']:.0%} identical"
        )
    cost = f", {spent:.2f} spent" if spent else ""
    cli.emit(f"{output}: {written:,} rows from {tally.asked.total():,} requested verdicts{cost}")


def _report_missing(missing: Sequence[tuple[str, str, int]]) -> None:
    """Print a table of judges and reasons, the most frequent first. Reasons with the same beginning count as one.

    Reasons that are cut off in the table follow it in full.
    """
    counts: Counter[tuple[str, str]] = Counter()
    in_full: dict[tuple[str, str], str] = {}
    for judge, reason, count in missing:
        cell = (judge, reason if len(reason) <= _LONGEST_REASON else f"{reason[: _LONGEST_REASON - 1]}…")
        counts[cell] += count
        in_full.setdefault(cell, reason)
    shown = counts.most_common(_MOST_REASONS)
    if rest := counts.total() - sum(count for _, count in shown):
        shown.append((("…", "other reasons (--json has all of them)"), rest))
    rows = [(*cell, f"{count:,}") for cell, count in shown]
    cli.emit_table("Steps without a verdict", ("judge", "reason", "steps"), rows, numeric=("steps",))
    for cell, _ in shown:
        if cell[1].endswith("…"):
            log.info("%s: %s", cell[0], in_full[cell])
