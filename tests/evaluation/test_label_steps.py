"""label_steps.py: the sample and its weights, and the real server driven over HTTP as a browser would."""

import http.client
import json
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import exam_fixtures as public
import pytest

from prmkit.errors import DataError, UsageError
from prmkit.evaluation.exam import read_exam
from prmkit.evaluation.label_sample import draw, open_labels
from prmkit.prompts.step import load_rubric
from prmkit.trajectories.importing import Options, read_runs

ROOT = Path(__file__).resolve().parents[2]


# --- the sample -------------------------------------------------------------------------------------------------------


def test_bands_are_drawn_evenly_and_weighted_back() -> None:
    steps = [("run", n) for n in range(1, 101)]
    scores = {step: 0.1 if step[1] <= 6 else 0.95 for step in steps if step[1] <= 90}
    drawn = draw(steps, scores, 30, 0)
    assert Counter(each.band for each in drawn) == {"0 to 0.2": 6, "no score": 10, "0.8 to 1": 14}
    weights = {each.band: each.weight for each in drawn}
    assert weights == {"0 to 0.2": 1, "no score": 1, "0.8 to 1": 6}
    assert sum(each.weight for each in drawn) == 100
    assert draw(steps, scores, 30, 0) == drawn != draw(steps, scores, 30, 1)
    assert len({(each.trajectory_id, each.n) for each in drawn}) == 30
    with pytest.raises(UsageError, match="Draw at least 3 steps"):
        draw(steps, scores, len({step.band for step in drawn}) - 1, 0)
    assert len(draw(steps, None, 1000, 0)) == 100


# --- the page ---------------------------------------------------------------------------------------------------------


@dataclass
class Page:
    """The running command, and a browser that shows its page."""

    process: subprocess.Popen[str]
    address: str

    def ask(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        parts = urlsplit(self.address)
        connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=10)
        sent = {"Origin": f"http://{parts.netloc}"} | {name.replace("_", "-"): value for name, value in headers.items()}
        method = "GET" if body is None else "POST"
        connection.request(method, path if path.startswith("/") else parts.path + path, json.dumps(body), sent)
        answer = connection.getresponse()
        text = answer.read().decode()
        return answer.status, json.loads(text) if answer.headers["Content-Type"] == "application/json" else text


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw runs, with people's labels in them that the page must not show."""
    return public.write_lines(tmp_path_factory.mktemp("runs") / "runs.jsonl", public.injected_faults(6))


@contextmanager
def labelling(runs: Path, folder: Path, *more: object) -> Iterator[Page]:
    command = [sys.executable, ROOT / "label_steps.py", runs, "--output", folder / "labels.jsonl", *more]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield Page(process, process.stdout.readline().strip())
    finally:
        process.kill()
        process.communicate()


def test_steps_are_labelled_and_the_command_continues_after_a_kill(runs: Path, tmp_path: Path) -> None:
    with labelling(runs, tmp_path, "--n", 4, "--name", "kim") as page:
        _, state = page.ask("step")
        first = state["step"]["id"]
        assert page.ask("label", {"id": first, "value": -1, "type": "invalid call"})[1]["labelled"] == 1
        status, refused = page.ask("label", {"id": first, "value": 1})
        assert status == 409 and "Reload" in refused["error"]
        page.process.send_signal(signal.SIGKILL)
        page.process.wait()
    with (tmp_path / "labels.jsonl").open("a") as stream:
        stream.write('{"cut off')
    with labelling(runs, tmp_path, "--n", 4, "--name", "lee") as page:
        _, state = page.ask("step")
        assert state["labelled"] == 1 and state["step"]["id"] != first
        _, state = page.ask("skip", {"id": state["step"]["id"]})
        _, state = page.ask("label", {"id": state["step"]["id"], "value": 1})
        _, state = page.ask("undo", {})
        _, state = page.ask("label", {"id": state["step"]["id"], "value": 0})
        _, state = page.ask("label", {"id": state["step"]["id"], "value": 1})
        assert (state["labelled"], state["skipped"], state["step"]) == (3, 1, None)
        page.ask("finish", {})
        out, _ = page.process.communicate(timeout=10)
        assert page.process.returncode == 0 and "3 of 4 steps are labelled, 1 skipped" in out
    rows = [json.loads(line) for line in (tmp_path / "labels.jsonl").read_text().splitlines()]
    assert [row["metadata"]["model_name"] for row in rows] == ["kim", "lee", "lee"]
    assert [json.loads(row["conversations"][1]["value"])["step_score"] for row in rows] == [0.2, 0.6, 1.0]
    assert all(
        row["metadata"]["timestamp"] and row["metadata"]["weight"] == 16 for row in rows
    )  # 48 steps, of which 3 are labelled
    exam = read_exam(tmp_path / "labels.jsonl")
    assert sorted(step.label for _, step in exam.labelled if step.label is not None) == [0.2, 0.6, 1.0]


def test_nothing_that_a_judge_or_a_person_thought_reaches_the_page(runs: Path, tmp_path: Path) -> None:
    scores = public.write_lines(
        tmp_path / "scores.jsonl",
        [{"id": run["trajectory_id"], "step": n, "score": 0.123} for run in public.injected_faults(6) for n in (1, 2)],
    )
    with labelling(runs, tmp_path, "--n", 3, "--scores", scores) as page:
        state = json.dumps(page.ask("step")[1])
        for secret in ("0.123", '"label":', "outcome", "band", "fault-", "I-"):
            assert secret not in state, secret


def test_another_web_page_cannot_read_or_write(runs: Path, tmp_path: Path) -> None:
    with labelling(runs, tmp_path, "--n", 3) as page:
        _, state = page.ask("step")
        body = {"id": state["step"]["id"], "value": 1}
        assert page.ask("/step")[0] == page.ask("/wrong-token/step")[0] == 403
        assert page.ask("step", Host="evil.example")[0] == 403
        assert page.ask("label", body, Origin="http://evil.example")[0] == 403
        assert page.ask("label", body, Origin="null")[0] == 403
        assert page.ask("label", body | {"value": 5})[0] == 409
        assert page.ask("label", body | {"value": True})[0] == 409
        assert page.ask("label", body | {"type": "x" * 20_000})[0] == 413
        assert page.ask("label", [1])[0] == 400
        status, text = page.ask("")
        assert status == 200 and "Label steps" in text and "http://" not in text.replace(page.address, "")
        assert page.ask("step")[1]["labelled"] == 0


def test_labels_of_another_sample_are_not_continued(runs: Path, tmp_path: Path) -> None:
    file, rubric = tmp_path / "labels.jsonl", load_rubric()
    labels = open_labels(str(runs), file, 4, "kim", None, 0, rubric)
    drawn = labels.next
    assert drawn is not None
    labels.add(drawn, 1, None)
    assert open_labels(str(runs), file, 4, "kim", None, 0, rubric).done.keys() == {(drawn.trajectory_id, drawn.n)}
    with pytest.raises(UsageError, match="a different sample"):
        open_labels(str(runs), file, 5, "kim", None, 0, rubric)
    (tmp_path / "labels.sample.json").unlink()
    with pytest.raises(UsageError, match=r"label_steps\.py did not write this file"):
        open_labels(str(runs), file, 4, "kim", None, 0, rubric)


@pytest.mark.parametrize("name", ["labels.jsonl", "labels.skipped.jsonl"])
@pytest.mark.parametrize("line", ["{}", "[]", '{"metadata": 5}', '{"metadata": {"trajectory_id": "a"}}'])
def test_a_damaged_line_is_named(runs: Path, tmp_path: Path, name: str, line: str) -> None:
    file, rubric = tmp_path / "labels.jsonl", load_rubric()
    labels = open_labels(str(runs), file, 4, "kim", None, 0, rubric)
    for act in (lambda drawn: labels.add(drawn, 1, None), labels.skip):
        assert labels.next is not None
        act(labels.next)
    with (tmp_path / name).open("a") as stream:
        stream.write(line + "\n")
    with pytest.raises(DataError, match=rf"{name}:2: not a line of label_steps"):
        open_labels(str(runs), file, 4, "kim", None, 0, rubric)


def test_skipped_steps_are_represented_by_the_others_of_their_band(runs: Path, tmp_path: Path) -> None:
    file, rubric, names = tmp_path / "labels.jsonl", load_rubric(), []
    steps = [(run.trajectory_id, step.n) for run in read_runs([str(runs)], Options()) for step in run.steps]
    scores = public.write_lines(
        tmp_path / "scores.jsonl",
        [{"id": run, "step": n, "score": 0.1 if place < 8 else 0.9} for place, (run, n) in enumerate(steps)],
    )
    labels = open_labels(str(runs), file, 8, "kim", scores, 0, rubric)
    while drawn := labels.next:  # of the bad ones, only the last is labelled
        if drawn.band == "0 to 0.2" and len([name for name in names if name == drawn.band]) < 3:
            labels.skip(drawn)
        else:
            labels.add(drawn, 1, None)
        names.append(drawn.band)
    assert _weights_in(file) == {"0 to 0.2": [8.0], "0.8 to 1": [(len(steps) - 8) / 4] * 4}
    file.write_text(file.read_text().replace('"weight":8.0', '"weight":2.0'))  # killed before the rows were corrected
    open_labels(str(runs), file, 8, "kim", scores, 0, rubric)
    assert sum(map(sum, _weights_in(file).values())) == len(steps)


def _weights_in(file: Path) -> dict[str, list[float]]:
    found = defaultdict(list)
    for row in map(json.loads, file.read_text().splitlines()):
        found[row["metadata"]["band"]].append(row["metadata"]["weight"])
    return dict(found)


def test_a_person_has_a_name(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--name"):
        open_labels(str(runs), tmp_path / "labels.jsonl", 4, " ", None, 0, load_rubric())
