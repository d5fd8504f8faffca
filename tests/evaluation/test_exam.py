"""evaluate_judge.py --exam: exams as they are made and typed, and every metric against a plain second computation."""

import importlib
import json
import random
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import exam_fixtures as public
import pytest
from sklearn.metrics import roc_auc_score

from prmkit.errors import DataError, ExitCode, GateError, UsageError
from prmkit.evaluation import command
from prmkit.evaluation.command import execute
from prmkit.evaluation.exam import Exam, ExamRun, ExamStep, read_exam
from prmkit.evaluation.exam_metrics import _by_position, constants
from prmkit.files import write_json
from prmkit.paths import EXPORT_NOTE
from prmkit.prompts.step import load_rubric
from prmkit.rows import SELECTED_BY, WEIGHT, without_selection
from prmkit.trajectories.rows import runs_beside

evaluate = importlib.import_module("evaluate_judge")._parser
imports = importlib.import_module("import_trajectories")
Script = Callable[..., subprocess.CompletedProcess[str]]


def make_exam(folder: Path, name: str, values: list[Any]) -> Path:
    from prmkit.trajectories.command import import_runs

    source = folder / "set"
    source.mkdir()
    if name == "who-and-when":
        for number, value in enumerate(values):
            (source / f"{number}.json").write_text(json.dumps(value))
    else:
        public.write_lines(source / "runs.jsonl", values)
    typed = ["--labels", name, str(source), "--output", str(folder / "exam.jsonl")]
    assert import_runs(imports._parser().parse_args(typed)) == ExitCode.DONE
    return folder / "exam.jsonl"


def take(exam: Path, *arguments: object) -> dict[str, Any]:
    """Take an exam; what `exam.json` says of each entrant."""
    folder = exam.parent / "out"
    typed = ["--exam", exam, "--output", folder, *arguments]
    assert execute(evaluate().parse_args(list(map(str, typed)))) == ExitCode.DONE
    found = json.loads((folder / "exam.json").read_text())
    return {each["name"]: each for each in found["entrants"] if each["kind"] != "published"} | {"json": found}


def value(entrant: dict[str, Any], metric: str) -> float:
    return entrant["metrics"][metric]["value"]


@pytest.fixture
def ternary(tmp_path: Path) -> Path:
    return make_exam(tmp_path, "agentprocessbench", public.every_step_labelled())


# --- what published judges answered -----------------------------------------------------------------------------------


def test_raw_verdicts_give_the_published_metrics(ternary: Path) -> None:
    """StepAcc and FirstErrAcc by a few lines that know nothing of the code."""
    runs, chance = public.every_step_labelled(), random.Random(3)
    verdicts = [
        {key: run[key] for key in ("query_index", "sample_index", "data_source")}
        | {"judge": "J", "step_labels": {place: chance.choice(public.TERNARY) for place in run["step_labels"]}}
        for run in runs
    ]
    found = take(ternary, "--predictions", public.write_lines(ternary.parent / "verdicts.jsonl", verdicts))["J"]

    def first(labels: dict[str, int]) -> str | None:
        return next((place for place in sorted(labels, key=int) if labels[place] == -1), None)

    pairs = [(run["step_labels"], verdict["step_labels"]) for run, verdict in zip(runs, verdicts, strict=True)]
    steps = [true[place] == said[place] for true, said in pairs for place in true]
    assert value(found, "step_accuracy") == pytest.approx(sum(steps) / len(steps))
    hits = [(first(true) is None, first(true) == first(said)) for true, said in pairs]
    assert value(found, "first_error") == pytest.approx(sum(hit for _, hit in hits) / len(hits))
    sides = [[hit for clean, hit in hits if clean is side] for side in (True, False)]
    shares = [sum(side) / len(side) for side in sides]
    assert value(found, "processbench_f1") == pytest.approx(2 * shares[0] * shares[1] / sum(shares))


def test_auroc_and_average_precision_are_those_of_scikit_learn(ternary: Path) -> None:
    from sklearn.metrics import average_precision_score, roc_auc_score

    chance = random.Random(4)
    labelled = [(run.trajectory_id, step) for run, step in read_exam(ternary).labelled]
    scores = [round(chance.random(), 1) for _ in labelled]
    lines = [{"id": run, "step": step.n, "score": score} for (run, step), score in zip(labelled, scores, strict=True)]
    found = take(ternary, "--predictions", public.write_lines(ternary.parent / "mine.jsonl", lines))["mine"]
    bad, suspicion = [step.is_bad for _, step in labelled], [-score for score in scores]
    assert value(found, "auroc") == pytest.approx(roc_auc_score(bad, suspicion))
    assert value(found, "average_precision") == pytest.approx(average_precision_score(bad, suspicion))
    assert found["metrics"]["auroc"]["tasks"] == 12 and found["answered"] == found["asked"] == len(labelled)


def test_a_judge_that_knows_the_labels_reaches_everything(ternary: Path) -> None:
    lines = [{"id": f"{run.trajectory_id}#{step.n}", "score": step.label} for run, step in read_exam(ternary).labelled]
    found = take(ternary, "--predictions", public.write_lines(ternary.parent / "all.jsonl", lines))["all"]
    assert {name: each["value"] for name, each in found["metrics"].items() if name != "agent"} == {
        **dict.fromkeys(("auroc", "average_precision", "f1_bad", "f1_good", "step_accuracy"), 1.0),
        **dict.fromkeys(("first_error", "processbench_f1", "silent_recall", "loud_recall"), 1.0),
        "false_alarms": 0.0,
    }


def test_messages_may_be_counted_and_runs_named_by_their_file(tmp_path: Path) -> None:
    exam = make_exam(tmp_path, "who-and-when", public.first_error_marked())
    lines = [
        {"id": str(number), "source_index": place, "score": float(str(place) != run["mistake_step"])}
        for number, run in enumerate(public.first_error_marked())
        for place in range(5)
    ]
    found = take(exam, "--predictions", public.write_lines(tmp_path / "known.jsonl", lines))["known"]
    assert value(found, "located") == value(found, "agent") == value(found, "auroc") == 1


def test_verdicts_on_runs_are_measured_as_trajectory_judge_does(tmp_path: Path) -> None:
    exam = make_exam(tmp_path, "trajectory-judge", public.injected_faults())
    lines = [
        # It flags every loud fault one step late, no silent one, and raises one false alarm without a place.
        {"trajectory_id": run["trajectory_id"], "judge_id": "rules", "faulty": said, "failure_step": place}
        for run in public.injected_faults()
        for loud in [run["label"]["faulty"] and not run["label"]["outcome_correct"]]
        for said in [loud or run["trajectory_id"] == "I-0-clean"]
        for place in [run["label"]["failure_step"] + 1 if loud and run["label"]["failure_step"] < 3 else None]
    ]
    found = take(exam, "--predictions", public.write_lines(tmp_path / "verdicts.jsonl", lines))["rules"]
    assert value(found, "silent_recall") == 0 and value(found, "loud_recall") == 1
    assert value(found, "false_alarms") == pytest.approx(1 / 12)
    assert value(found, "located") == 0 and value(found, "located_1") == pytest.approx(4 / 12)
    assert value(found, "first_error") == pytest.approx(11 / 24)


# --- constants --------------------------------------------------------------------------------------------------------


def test_the_commonest_place_and_agent_come_from_other_tasks(tmp_path: Path) -> None:
    exam = read_exam(make_exam(tmp_path, "who-and-when", public.first_error_marked()))
    found = {each.name: each.metrics for each in constants(exam)}
    mistakes = [int(run["mistake_step"]) for run in public.first_error_marked()]

    agents = [run["mistake_agent"] for run in public.first_error_marked()]

    def share_guessed(given: list[Any]) -> float:
        hits = 0
        for number, right in enumerate(given):
            others = given[:number] + given[number + 1 :]
            hits += right == min(set(others), key=lambda each: (-others.count(each), each))
        return hits / len(given)

    assert found["commonest step elsewhere"]["located"].value == pytest.approx(share_guessed(mistakes)) != 0
    assert found["commonest agent elsewhere"]["agent"].value == pytest.approx(share_guessed(agents)) != 0
    assert found["every step good"]["located"].value == 0


def test_positions_that_mean_nothing_reach_an_auroc_of_one_half() -> None:
    """Excluding only a step's own task gives 0.42, because each good step lowers the fraction that scores it."""

    def auroc(seed: int, worse_at_end: float) -> float:
        chance = random.Random(seed)
        labels = {(str(task), n): 0.2 if chance.random() < 0.3 + worse_at_end * (n == 6) else 1.0
                  for task in range(30) for n in range(1, 7)}  # fmt: skip
        runs = [
            ExamRun(str(task), str(task), None, "", tuple(ExamStep(n, label=labels[str(task), n]) for n in range(1, 7)),
                    is_whole=True)
            for task in range(30)
        ]  # fmt: skip
        scores = _by_position(Exam(Path("exam"), "", tuple(runs))).scores
        return float(roc_auc_score([label > 0.5 for label in labels.values()], [scores[step] for step in labels]))

    assert mean(auroc(seed, 0.0) for seed in range(60)) == pytest.approx(0.5, abs=0.025)
    assert mean(auroc(seed, 0.6) for seed in range(20)) > 0.65


def test_steps_after_an_error_are_unknown_and_still_part_of_the_search(tmp_path: Path) -> None:
    file = make_exam(tmp_path, "who-and-when", public.first_error_marked())
    exam = read_exam(file)
    assert all(len(run.steps) == 5 and run.first_error for run in exam.runs)
    assert sum(1 for _ in exam.labelled) == sum(int(run["mistake_step"]) + 1 for run in public.first_error_marked())
    # The lowest score after the error is the wrong answer, though nobody labelled that step.
    lines = [
        {"id": run.trajectory_id, "step": step.n, "score": 0.0 if step.n == 5 else 0.5}
        for run in exam.runs
        for step in run.steps
    ]
    found = take(file, "--predictions", public.write_lines(tmp_path / "late.jsonl", lines))["late"]
    assert value(found, "located") == 0


def test_rows_alone_have_no_first_error_and_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = make_exam(tmp_path, "who-and-when", public.first_error_marked())
    runs_beside(file).unlink()
    exam = read_exam(file)
    assert all(run.first_error is None for run in exam.runs)
    lines = [{"id": run.trajectory_id, "step": step.n, "score": 0.5} for run, step in exam.labelled]
    found = take(file, "--predictions", public.write_lines(tmp_path / "some.jsonl", lines))["some"]
    assert {"auroc", "average_precision"} <= found["metrics"].keys() and "located" not in found["metrics"]
    assert "12 runs are incomplete" in capsys.readouterr().out


def test_steps_that_first_selected_weigh_what_they_represent(tmp_path: Path) -> None:
    file = make_exam(tmp_path, "who-and-when", public.first_error_marked())
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[0]["metadata"] |= {SELECTED_BY: "audit", WEIGHT: 5.0}
    public.write_lines(file, rows)
    assert sorted({step.weight for _, step in read_exam(file).labelled}) == [1.0, 5.0]


def test_strong_judges_that_first_asked_are_weighed(ternary: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sklearn.metrics import average_precision_score, roc_auc_score

    rows, chance = [json.loads(line) for line in ternary.read_text().splitlines()], random.Random(3)
    kept, bad, suspicion, weights = [], [], [], []
    for number, row in enumerate(rows[:-3]):
        label = json.loads(row["conversations"][1]["value"])["step_score"]
        score, weight = round(min(1.0, max(0.0, label + chance.uniform(-0.7, 0.7))), 2), (1.0, 4.0)[number % 2]
        chosen = {"model_name": "strong", SELECTED_BY: "audit" if number % 2 else "unsure", WEIGHT: weight}
        said = [row["conversations"][0], {"from": "gpt", "value": json.dumps({"step_score": score})}]
        kept.append({"conversations": said, "metadata": row["metadata"] | chosen})
        bad.append(label < 0.5)
        suspicion.append(-score)
        weights.append(weight)
    found = take(ternary, "--predictions", public.write_lines(ternary.parent / "some.jsonl", kept))["strong"]
    assert value(found, "auroc") == pytest.approx(roc_auc_score(bad, suspicion, sample_weight=weights))
    assert value(found, "average_precision") == pytest.approx(
        average_precision_score(bad, suspicion, sample_weight=weights)
    )
    assert found["metrics"].get("first_error", {"value": None})["value"] is None
    assert f"{len(kept)} of these steps were selected by ask_judges.py --first" in capsys.readouterr().out
    asked_anyway = [row | {"metadata": without_selection(row["metadata"])} for row in kept]
    as_chat = [{"messages": [{"role": "user", "content": row["conversations"][0]["value"]},
                             {"role": "assistant", "content": row["conversations"][1]["value"]}],
                "metadata": row["metadata"]} for row in kept]  # fmt: skip
    as_columns = [{"instruction": row["conversations"][0]["value"], "output": row["conversations"][1]["value"],
                   "metadata": row["metadata"]} for row in kept]  # fmt: skip
    for other in (as_chat, as_columns):
        path = public.write_lines(ternary.parent / "other.jsonl", other)
        assert take(ternary, "--predictions", path)["strong"] == found
    both = take(ternary, "--predictions", public.write_lines(ternary.parent / "both.jsonl", kept + asked_anyway))
    assert value(both["strong"], "auroc") == pytest.approx(roc_auc_score(bad, suspicion))


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changed", [{"task_id": "other"}, {"task_id": "other", "clip_number": 9}, {}])
def test_two_runs_with_one_id_are_refused_and_two_people_who_label_one_step_are_not(
    tmp_path: Path, changed: dict[str, Any]
) -> None:
    def row(prompt: str, score: float, **metadata: Any) -> dict[str, Any]:
        said = [{"from": "human", "value": prompt}, {"from": "gpt", "value": json.dumps({"step_score": score})}]
        about = {"model_name": "kim", "task_id": "t", "trajectory_id": "0", "clip_number": 1}
        return {"conversations": said, "metadata": {**about, **metadata}}

    people = [row("A", 1.0), row("A", 0.0, model_name="lee")]
    (run,) = read_exam(public.write_lines(tmp_path / "two.jsonl", people)).runs
    assert [step.label for step in run.steps] == [0.5]
    file = public.write_lines(tmp_path / "same.jsonl", [*people, row("B", 0.0, **changed)])
    with pytest.raises(DataError, match=r"same\.jsonl:3: step \d of run 0 .* own trajectory_id"):
        read_exam(file)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"id": "quiz_0.0", "step": 1, "score": 4}, "must be from 0 to 1"),
        ({"id": "quiz_0.0", "step": "first", "score": 1}, "not a whole number"),
        ({"id": "quiz_0.0", "step": 1}, "no score"),
        ({"id": "quiz_0.0", "step": 6, "score": 1}, "source_index"),
        ({"id": "quiz_0.0", "step": 0, "score": 1}, "source_index"),
        ({"id": "quiz_0.0", "source_index": 3, "score": 1}, "no line scores a step"),
        ({"id": "another run", "step": 1, "score": 1}, "no line scores a step"),
        ({"id": "quiz_0.0", "step": 1, "score": None}, "1 lines without a score"),
        ({"trajectory_id": "quiz_0.0", "step_labels": {"2": 5}}, "not -1, 0 or 1"),
        ([1, 2], "not an object"),
    ],
)
def test_answers_that_cannot_be_right_are_refused(ternary: Path, line: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        take(ternary, "--predictions", public.write_lines(ternary.parent / "bad.jsonl", [line]))


def test_a_line_after_an_empty_one_has_its_own_number(ternary: Path) -> None:
    for name, message in (
        ("bad.jsonl", r"bad\.jsonl:2: not an object"),
        ("exam.jsonl", r"exam\.jsonl:2: not a labelled"),
    ):
        (ternary.parent / name).write_text("\n[1, 2]\n")
        with pytest.raises(DataError, match=message):
            take(ternary, "--predictions", ternary.parent / "bad.jsonl")


def test_two_scores_for_one_step_are_refused_unless_equal(ternary: Path) -> None:
    line = {"id": "quiz_0.0", "step": 1, "score": 0.5}
    take(ternary, "--predictions", public.write_lines(ternary.parent / "twice.jsonl", [line, line]))
    with pytest.raises(DataError, match="already given this step a different score"):
        take(
            ternary, "--predictions", public.write_lines(ternary.parent / "twice.jsonl", [line, line | {"score": 0.6}])
        )


def test_scores_below_zero_beside_others_than_verdicts_are_refused(ternary: Path) -> None:
    lines = [{"id": "quiz_0.0", "step": n, "score": score} for n, score in ((1, -1), (2, 0.5))]
    with pytest.raises(DataError, match="every score must be -1, 0 or 1, but mixed has others"):
        take(ternary, "--predictions", public.write_lines(ternary.parent / "mixed.jsonl", lines))


@pytest.mark.parametrize("content", ["", "{}\n", '{"prompt": "Judge."}\n'])
def test_a_file_that_is_no_exam_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "exam.jsonl").write_text(content)
    with pytest.raises(DataError, match="label"):
        read_exam(tmp_path / "exam.jsonl")


@pytest.mark.parametrize("more", [["--rubric", "x"], ["--baseline"], ["--limit", "3"], ["--by", "agent"]])
def test_arguments_that_an_exam_does_not_use_are_refused(ternary: Path, more: list[str]) -> None:
    answers = public.write_lines(ternary.parent / "a.jsonl", [{"id": "quiz_0.0", "step": 1, "score": 1}])
    with pytest.raises(UsageError):
        take(ternary, "--predictions", answers, *more)


ANSWERS = ("--exam", "e", "--predictions", "p")
SERVER = ("--exam", "e", "--predict-with", "u", "--server-model", "m")
PICKS = ("--best-of-n", "b", "--predictions", "p")
UNUSED = "remove {}, which it does not use."


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ((*ANSWERS, "--min-label-mass", "0"), "--exam with --predictions: " + UNUSED.format("--min-label-mass")),
        ((*ANSWERS, "--mode", "generate", "--max-new-tokens", "9"), UNUSED.format("--mode generate, --max-new-tokens")),
        ((*ANSWERS, "--no-enable-thinking", "--batch-size", "1"), UNUSED.format("--enable-thinking, --batch-size")),
        ((*ANSWERS, "--data-dir", "d"), UNUSED.format("--data-dir")),
        ((*SERVER, "--max-new-tokens", "9"), "--exam with --predict-with: " + UNUSED.format("--max-new-tokens")),
        ((*SERVER, "--baseline"), UNUSED.format("--baseline")),
        ((*PICKS, "--too-long", "report"), "--best-of-n with --predictions: " + UNUSED.format("--too-long")),
        ((*PICKS, "--min-label-mass", "0.1"), UNUSED.format("--min-label-mass")),
        ((*PICKS, "--server-model", "m"), UNUSED.format("--server-model")),
        ((*PICKS, "--data-dir", "d"), "--best-of-n with --predictions: " + UNUSED.format("--data-dir")),
        (("--parity", "--max-new-tokens", "9"), "--parity: " + UNUSED.format("--max-new-tokens")),
        (("--parity", "--min-label-mass", "0", "--too-long", "report"), UNUSED.format("--min-label-mass, --too-long")),
        (("--predict-with", "u", "--server-model", "m"), "--predict-with, --server-model: only used with --exam."),
        (("--api-key-env", "KEY"), "--api-key-env: only used with --predict-with."),
        (
            (*ANSWERS, "--server-model", "m"),
            "--server-model: only used with --predict-with. Add --predict-with, or remove",
        ),
        (("--max-new-tokens", "9"), "--max-new-tokens: only used with --mode generate. Add --mode generate, or remove"),
        (("--mode", "generate", "--min-label-mass", "0"), "--min-label-mass: only used with --mode expected."),
        (("--exam", "e", "--run", "r", "--max-new-tokens", "9"), "--max-new-tokens: only used with --mode generate."),
    ],
)
def test_a_flag_that_would_be_ignored_is_refused(typed: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        execute(evaluate().parse_args(typed))


def test_a_flag_that_would_be_ignored_is_one_line_and_exit_code_2(script: Script) -> None:
    refused = script("evaluate_judge.py", *ANSWERS, "--min-label-mass", "0", code=2).stderr
    assert refused == f"error: --exam with --predictions: {UNUSED.format('--min-label-mass')}\n"


def test_every_flag_is_used_by_some_kind_or_by_all_judges() -> None:
    nothing = evaluate().parse_args([])
    assert vars(nothing).keys() == command._USED_BY.keys() | command._OF_JUDGES.keys()
    assert not [name for name in vars(nothing) if command._is_given(name, nothing)]


def test_the_gate_closes_on_a_low_interval_and_on_missing_answers(ternary: Path) -> None:
    labelled = [(run.trajectory_id, step) for run, step in read_exam(ternary).labelled]
    lines = [{"id": run, "step": step.n, "score": step.label} for run, step in labelled]
    answers = public.write_lines(ternary.parent / "a.jsonl", lines)
    take(ternary, "--predictions", answers, "--min-auroc", 0.9)
    with pytest.raises(GateError, match="labelled steps"):
        take(ternary, "--predictions", public.write_lines(answers, lines[: len(lines) // 2]), "--min-auroc", 0.5)
    constant = [line | {"score": 0.5} for line in lines]
    with pytest.raises(GateError, match=r"lower bound, 0\.500"):
        take(ternary, "--predictions", public.write_lines(answers, constant), "--min-auroc", 0.6)


# --- a real judge -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def export(model_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported judge that was trained with the default rubric."""
    folder = tmp_path_factory.mktemp("judge") / "exported"
    shutil.copytree(model_folders["qwen"], folder)
    settings = {"template": "qwen", "cutoff_len": 4096, "dtype": "float32", "rubrics": [load_rubric().sha256]}
    write_json(folder / EXPORT_NOTE, settings)
    return folder


def test_a_model_takes_an_exam_and_continues_where_it_stopped(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exam = make_exam(tmp_path, "who-and-when", public.first_error_marked(4))
    found = take(exam, "--model", export)["exported"]
    file = tmp_path / "out" / "exam_answers.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    assert len(lines) == 20 and found["answered"] == found["asked"]
    file.write_text("".join(lines[:7]) + lines[7][:20])  # as a killed command leaves it
    assert take(exam, "--model", export)["exported"] == found
    assert sorted(file.read_text().splitlines(keepends=True)) == sorted(lines)
    with pytest.raises(GateError, match=f"It is unknown whether the judge was trained on tasks of {exam}"):
        take(exam, "--model", export, "--min-auroc", 0.0)


def test_a_judge_that_was_trained_on_a_task_is_refused(tmp_path: Path, model_folders: dict[str, Path]) -> None:
    """By the text of the task, though the training data calls it by another name."""
    exam = make_exam(tmp_path, "who-and-when", public.first_error_marked(4))
    row = json.loads(exam.read_text().splitlines()[0])
    run, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(model_folders["qwen"], run)
    config = {
        "model_name_or_path": str(run), "template": "qwen", "finetuning_type": "full", "dataset": "mine",
        "dataset_dir": str(data), "cutoff_len": 4096,
    }  # fmt: skip
    write_json(run / "run.json", {"config": config, "rubrics": [load_rubric().sha256]})
    data.mkdir()
    write_json(data / "dataset_info.json", {"mine": {"file_name": "mine.jsonl", "columns": {"prompt": "instruction"}}})
    metadata = row["metadata"] | {"task_id": "by another name", "provider": "another set"}
    public.write_lines(data / "mine.meta.jsonl", [{"prompt_sha256": "p", "metadata": metadata}])
    public.write_lines(data / "mine.jsonl", [{"instruction": "x"}])
    with pytest.raises(UsageError, match="trained on 1 of these 4 tasks, for example q0"):
        take(exam, "--run", run)
    other = metadata | {"task_hash": "task-0"}
    public.write_lines(data / "mine.meta.jsonl", [{"prompt_sha256": "p", "metadata": other}])
    take(exam, "--run", run)
    # The same id in another set is another task; without a hash, nobody knows.
    public.write_lines(data / "mine.meta.jsonl", [{"prompt_sha256": "p", "metadata": other | {"task_id": "q1"}}])
    take(exam, "--run", run)
    public.write_lines(
        data / "mine.meta.jsonl", [{"prompt_sha256": "p", "metadata": other | {"task_id": "q1", "task_hash": None}}]
    )
    with pytest.raises(UsageError, match="q1"):
        take(exam, "--run", run)
    picks = ("--best-of-n", public.write_lines(tmp_path / "picks.jsonl", attempts("q1")))
    typed = list(map(str, (*picks, "--output", tmp_path / "out", "--run", run)))
    with pytest.raises(UsageError, match=r"picks.jsonl: the judge was trained on 1 of these 2 tasks, for example q1"):
        execute(evaluate().parse_args(typed))
    # Rows that were converted again since then say nothing of the training.
    public.write_lines(data / "mine.meta.jsonl", [{"prompt_sha256": "p", "metadata": other}])
    record = {"config": config, "rubrics": [load_rubric().sha256], "dataset": {"name": "mine", "sha256": "0" * 64}}
    write_json(run / "run.json", record)
    with pytest.raises(GateError, match="converted again"):
        take(exam, "--run", run, "--min-auroc", 0)


def attempts(task: str) -> list[dict[str, Any]]:
    """Two runs of a task and of another one, with outcomes."""
    return [
        {"task_id": name, "trial": trial, "reward": float(trial), "info": {"task": {"actions": []}},
         "traj": [{"role": "user", "content": f"Do {name}."}, {"role": "assistant", "content": f"Done, {trial}."}]}
        for name in (task, "another") for trial in range(2)
    ]  # fmt: skip


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_escapes_names_and_has_a_ladder(ternary: Path) -> None:
    line = {"id": "quiz_0.0", "step": 1, "score": 1, "judge": "<script>alert(1)</script>"}
    take(ternary, "--predictions", public.write_lines(ternary.parent / "a.jsonl", [line]))
    page = (ternary.parent / "out" / "exam.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "Gemini-3-Flash thinking" in page and "people with people" in page and "http" not in page
