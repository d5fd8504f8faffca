"""`evaluate_judge.py --exam`: a judge, or answers from a file, compared with constants, published judges and people."""

import argparse
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from prmkit import cli
from prmkit.errors import DataError, ExitCode, GateError, UsageError
from prmkit.evaluation import exam_report
from prmkit.evaluation.exam import Exam, Task, check_not_trained_on, data_of_judge, read_exam, training_of
from prmkit.evaluation.exam_answers import JudgeScores, read_exam_answers
from prmkit.evaluation.exam_asking import ask_server, endpoint_of, prompts_of, score_steps
from prmkit.evaluation.exam_metrics import Entrant, constants, examine
from prmkit.evaluation.summary import MIN_SCORED
from prmkit.files import write_json
from prmkit.judge.scorer import DEFAULT_RUN, judge_source
from prmkit.judge.sources import JudgeSource, check_folders
from prmkit.layouts import bare_name
from prmkit.prompts.step import Rubric, load_rubric
from prmkit.registered import results_folder
from prmkit.scoring.rows import check_rubric

log = logging.getLogger("prmkit")

JSON_FILE, PAGE = "exam.json", "exam.html"


def take_exam(arguments: argparse.Namespace) -> ExitCode:
    """Examine a judge, show the table, and check `--min-auroc`.

    Raises:
        DataError: there is no exam or no judge, or there are no answers.
        UsageError: the judge was trained on a task of the exam, or the arguments contradict each other.
        GateError: the lower bound of AUROC is below the threshold or unknown.
    """
    exam = read_exam(arguments.exam)
    unchecked = None
    folder = arguments.output or folder_of(arguments, "exam", arguments.exam)
    judges: list[tuple[str, JudgeScores]] = []
    if asks_judge(arguments):
        source = judge_source(arguments)
        check_folders(source)
        unchecked = check_training(exam.file, [run.identity for run in exam.runs], source, arguments.data_dir)
        judges += _asked_judges(exam, source, folder, arguments)
    if arguments.predictions:
        others = read_exam_answers(arguments.predictions, exam.runs, exam.file)
        for each in others:
            for reason, count in each.unplaced.items():
                log.warning("%s: %d lines %s", each.name, count, reason)
        judges += [("other" if judges else "judge", each) for each in others]
    if arguments.predict_with:
        endpoint = endpoint_of(arguments)
        scores = ask_server(exam, endpoint, load_rubric(arguments.rubric), folder / "exam_answers_server.jsonl")
        judges.append(("other" if judges else "judge", JudgeScores(endpoint.model, scores)))
    entrants = [examine(exam, answers, kind) for kind, answers in judges]
    entrants += [*constants(exam), *exam_report.published(exam)]
    write_json(folder / JSON_FILE, exam_report.exam_as_json(exam, entrants))
    exam_report.write_exam_page(folder / PAGE, exam, entrants)
    if arguments.json:
        cli.emit_json(exam_report.exam_as_json(exam, entrants))
    else:
        _show(exam, entrants, folder / PAGE)
    if unchecked:
        log.warning("%s", unchecked)
    if arguments.min_auroc is not None:
        _check_gate(entrants, arguments.min_auroc, unchecked)
    return ExitCode.DONE


def asks_judge(arguments: argparse.Namespace) -> bool:
    """Return whether a judge is loaded and asked, instead of only reading answers from a file."""
    return bool(arguments.run or arguments.model or not (arguments.predictions or arguments.predict_with))


def check_training(file: Path, tasks: Sequence[Task], source: JudgeSource, data_dir: Path | None) -> str | None:
    """Reject a judge that was trained on tasks of a file. Returns a sentence if that cannot be checked."""
    judge = source.adapter or source.model
    try:
        check_not_trained_on(file, tasks, training_of(judge), data_dir or data_of_judge(judge) or Path("data"))
    except DataError as error:
        return f"It is unknown whether the judge was trained on tasks of {file}: {error}"
    return None


def folder_of(arguments: argparse.Namespace, what: str, file: Path) -> Path:
    """Return the results folder: one per input, so that answers to one exam never replace those to another one."""
    name = f"{what}_{bare_name(file)}"
    if not (arguments.run or arguments.model):
        if arguments.predictions:
            return Path(arguments.predictions.parent, name)
        if arguments.predict_with:
            return Path("saves", "evaluation_of_server", name)
    if arguments.model:
        return Path("saves", f"evaluation_{Path(arguments.model).name}", name)
    run = Path(arguments.run or DEFAULT_RUN)
    return results_folder(run) / name


# --- asking a judge ---------------------------------------------------------------------------------------------------


def _asked_judges(
    exam: Exam, source: JudgeSource, folder: Path, arguments: argparse.Namespace
) -> Iterator[tuple[str, JudgeScores]]:
    name = (source.adapter or source.model).resolve().name
    rubric = load_rubric(arguments.rubric)
    _check_asks_as_trained(exam, rubric, source, name)
    asked = [("judge", name, source)]
    if arguments.baseline:
        if source.adapter is None:
            raise UsageError("--baseline needs a judge with an adapter, and this one has none.")
        asked.append(("base", f"{source.model.name} (untrained)", replace(source, adapter=None)))
    for kind, judge, of_judge in asked:
        file = folder / ("exam_answers.jsonl" if kind == "judge" else "exam_answers_base.jsonl")
        scores = score_steps(of_judge, prompts_of(exam, rubric), file, arguments)
        yield kind, JudgeScores(judge, scores)


def _check_asks_as_trained(exam: Exam, rubric: Rubric, source: JudgeSource, name: str) -> None:
    if any(run.record for run in exam.runs):
        check_rubric(rubric, source.rubrics, name)
    ready = {run.rubric for run in exam.runs if run.record is None}
    if source.rubrics is not None and (other := ready - set(source.rubrics or [None])):
        raise UsageError(
            f"{exam.file}: its prompts use a rubric (hash {str(next(iter(other)))[:12]}) that {name} was not trained "
            "with. Create the exam with import_trajectories.py --labels --rubric FILE."
        )


# --- the terminal and the gate ----------------------------------------------------------------------------------------


def _show(exam: Exam, entrants: Sequence[Entrant], page: Path) -> None:
    names = exam_report.columns(entrants)
    cli.emit_table("", names, exam_report.table(entrants), numeric=names[1:], optional=exam_report.optional(entrants))
    for line in exam_report.notes(exam, entrants):
        cli.emit(line)
    for each in entrants:
        if each.kind in exam_report.EXAMINED:
            cli.emit(exam_report.conclusion(each, entrants)[1])
    cli.emit(f"report: {page}")


def _check_gate(entrants: Sequence[Entrant], least: float, unchecked: str | None) -> None:
    """Fail unless every judge reaches the threshold; an unknown AUROC does not reach it."""
    failed = [f"--min-auroc {least:g}: {unchecked}"] if unchecked else []
    for judge in (each for each in entrants if each.kind == "judge"):
        auroc = judge.metrics.get("auroc")
        if judge.answered < MIN_SCORED * judge.asked:
            failed.append(
                f"--min-auroc: {judge.name} has scores for {judge.answered} of {judge.asked} labelled steps; at "
                f"least {MIN_SCORED:.0%} are needed."
            )
        elif auroc is None or auroc.low is None:
            failed.append(f"--min-auroc: {judge.name}: cannot be decided ({auroc.reason if auroc else 'no AUROC'}).")
        elif auroc.low < least:
            failed.append(
                f"--min-auroc: {judge.name}: AUROC {auroc.value:.3f}; its lower bound, {auroc.low:.3f}, is below "
                f"{least:g}."
            )
    if failed:
        raise GateError("\n".join(failed))
