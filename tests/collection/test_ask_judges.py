"""ask_judges.py as it is typed, against a real chat endpoint."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from chat_server import Endpoint, chat_endpoint
from preloaded import PRELOADED

ROOT = Path(__file__).resolve().parents[2]
KEY = "sk-very-secret"


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with chat_endpoint() as found:
        yield found


def write_runs(folder: Path, *runs: list[str]) -> None:
    lines = []
    for number, said in enumerate(runs):
        messages = [{"role": "user", "content": f"Task {number}."}]
        messages += [{"role": "assistant", "content": text} for text in said]
        lines.append(json.dumps({"task_id": f"t{number}", "messages": messages, "ground_truth": "the solution is 42"}))
    (folder / "runs.jsonl").write_text("\n".join(lines) + "\n")


def write_judges(folder: Path, endpoint: Endpoint, *models: str, **settings: Any) -> None:
    common = {"base_url": endpoint.url, "api_key_env": "JUDGE_KEY", "json": "prompt"} | settings
    judges = [{"name": f"judge-{model}", "model": model, **common} for model in models or ("a",)]
    (folder / "judges.yaml").write_text(yaml.safe_dump(judges))


def command(*more: str) -> list[str]:
    fixed = ["runs.jsonl", "--judges", "judges.yaml", "--output", "rows.jsonl"]
    return [sys.executable, str(ROOT / "ask_judges.py"), *fixed, *more]


def typed(folder: Path, *more: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = PRELOADED.run(*command(*more)[1:], cwd=folder, env=os.environ | {"JUDGE_KEY": KEY})
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and KEY not in done.stdout + done.stderr
    return done


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def score(row: dict[str, Any]) -> float:
    return float(json.loads(row["conversations"][1]["value"])["step_score"])


def test_every_step_of_every_judge_becomes_a_row_that_is_converted(tmp_path: Path, endpoint: Endpoint) -> None:
    write_runs(tmp_path, ["good", "bad", "good again"], ["bad"])
    write_judges(tmp_path, endpoint, "a", "b", json="schema", price_in=1, price_out=2)
    done = typed(tmp_path, "--yes")
    found = rows(tmp_path)
    assert [(row["metadata"]["model_name"], score(row)) for row in found[:3]] == [
        ("judge-a", 0.9),
        ("judge-a", 0.2),
        ("judge-a", 0.9),
    ]
    assert len(found) == 8 and "8 rows from 8 requested verdicts" in done.stdout
    assert "0.00 spent" in done.stdout  # 8 answers of 100 and 10 tokens
    value = found[0]["conversations"][1]["value"]
    assert value.index("step_score") < value.index("reasoning")  # whatever the order in which it was asked
    sent = endpoint.asked[0]
    assert next(iter(sent["response_format"]["json_schema"]["schema"]["properties"])) == "reasoning"
    assert sent["authorization"] == f"Bearer {KEY}"
    assert "42" not in sent["messages"][0]["content"]
    convert = [sys.executable, str(ROOT / "convert_dataset.py"), "--input", "rows.jsonl", "--eval-ratio", "0.5"]
    converted = subprocess.run(convert, cwd=tmp_path, capture_output=True, text=True)
    assert converted.returncode == 0 and "8 kept, 0 rejected" in converted.stdout, converted.stdout + converted.stderr
    assert not any(KEY in path.read_text() for path in tmp_path.glob("*.*"))


def test_the_row_has_the_prompt_that_scoring_makes(tmp_path: Path, endpoint: Endpoint) -> None:
    from prmkit.prompts.step import load_rubric
    from prmkit.scoring.rows import RunsToScore

    write_runs(tmp_path, ["good", "bad"])
    write_judges(tmp_path, endpoint)
    for how in (("--per", "step"), ("--per", "run")):
        typed(tmp_path, "--yes", *how)
        scored = RunsToScore(str(tmp_path / "runs.jsonl"), load_rubric(), 0.5, "a judge").rows()
        asked = [row.request.prompt for row in scored if row.request]
        assert [row["conversations"][0]["value"] for row in rows(tmp_path)] == asked
        assert [row["metadata"]["per"] for row in rows(tmp_path)] == [how[1]] * 2
    assert len(endpoint.asked) == 3 and [score(row) for row in rows(tmp_path)] == [0.9, 0.2]


def test_a_dry_run_asks_nothing_and_says_what_it_would_cost_and_who_gets_the_data(
    tmp_path: Path, endpoint: Endpoint
) -> None:
    write_runs(tmp_path, ["good", "bad"])
    write_judges(tmp_path, endpoint, "a", "b", price_in=10, price_out=30)
    shown = typed(tmp_path, "--dry-run").stdout
    assert not endpoint.asked and not (tmp_path / "rows.jsonl").exists()
    for words in ("judge-a", "127.0.0.1", "<= 0.0", "Judge step 1 (more steps follow)", "sent to: 127.0.0.1"):
        assert words in shown
    refused = typed(tmp_path, code=2).stderr  # nobody at a terminal, and no --yes
    assert "--yes" in refused and not endpoint.asked


def test_a_terminal_is_asked_first_and_shows_what_each_judge_has_cost(tmp_path: Path, endpoint: Endpoint) -> None:
    write_runs(tmp_path, ["good", "bad"])
    write_judges(tmp_path, endpoint, "a", "b", price_in=1000, price_out=1000)
    ours, theirs = os.openpty()
    environment = os.environ | {"JUDGE_KEY": KEY, "COLUMNS": "100", "TERM": "xterm"}
    with subprocess.Popen(
        command(), cwd=tmp_path, env=environment, stdin=theirs, stdout=theirs, stderr=theirs
    ) as asking:
        os.close(theirs)
        shown = ""
        with suppress(OSError):  # the end of a terminal
            while text := os.read(ours, 1 << 16).decode(errors="replace"):
                if "[y/N]" in text:
                    os.write(ours, b"y\n")
                shown += text
    os.close(ours)
    assert asking.returncode == 0 and "0.44 spent" in shown  # 4 answers of 110 tokens
    assert {"0.22"} <= set(re.findall(r"judge-[ab] ([\d.]+)", shown)) <= {"0.11", "0.22"}


def test_what_judges_do_wrong_is_asked_again_or_counted(tmp_path: Path, endpoint: Endpoint) -> None:
    good = ["good"] * 40
    write_runs(tmp_path, ["good fenced", "good prose", "good cut", *good], ["bad stubborn"], ["bad html"])
    write_judges(tmp_path, endpoint, "a", "busy", concurrency=2)
    done = typed(tmp_path, "--yes")
    found = Counter((row["metadata"]["model_name"], score(row)) for row in rows(tmp_path))
    assert found == {("judge-a", 0.9): 43, ("judge-busy", 0.9): 43}  # and never a number for the other two
    assert "unreadable" in done.stdout and "not the response" in done.stdout
    assert endpoint.most_at_once <= 4
    attempts = Counter(
        json.loads(line)["question"] for line in (tmp_path / "rows.answers.jsonl").read_text().splitlines()
    )
    assert attempts["t0.1#2"] == attempts["t0.1#3"] == 4 and attempts["t1.1#1"] == 6  # of two judges
    again = [body for body in endpoint.asked if len(body["messages"]) > 1]
    assert "cannot be used" in again[0]["messages"][-1]["content"]


def test_more_than_a_twentieth_missing_is_an_error_and_one_judge_does_not_stop_the_others(
    tmp_path: Path, endpoint: Endpoint
) -> None:
    write_runs(tmp_path, ["good", "bad"])
    write_judges(tmp_path, endpoint, "a", "locked", "gone")
    done = typed(tmp_path, "--yes", code=1)
    assert {row["metadata"]["model_name"] for row in rows(tmp_path)} == {"judge-a"}
    assert "67% of the verdicts are missing" in done.stderr and "judge-locked" in done.stdout
    assert endpoint.refused <= 8  # each stops at once


def test_what_helps_depends_on_what_is_missing(tmp_path: Path, endpoint: Endpoint) -> None:
    again, final = "Run the same command again", "Answers about 1 steps stayed unreadable"
    write_runs(tmp_path, ["good", "bad stubborn"])
    write_judges(tmp_path, endpoint, "a")
    said = typed(tmp_path, "--yes", code=1).stderr
    assert final in said and again not in said
    asked = len(endpoint.asked)
    typed(tmp_path, "--yes", code=1)
    assert len(endpoint.asked) == asked
    write_judges(tmp_path, endpoint, "a", "locked")
    said = typed(tmp_path, "--yes", code=1).stderr
    assert final in said and again in said


def test_what_only_some_providers_answer(tmp_path: Path, endpoint: Endpoint) -> None:
    write_runs(tmp_path, ["good"])
    write_judges(tmp_path, endpoint, "overloaded", "parts", "moved", "broke")
    done = typed(tmp_path, "--yes", code=1)
    assert [row["metadata"]["model_name"] for row in rows(tmp_path)] == ["judge-overloaded", "judge-parts"]
    assert "redirects (307)" in done.stdout and "no credits" in done.stderr


def test_rows_are_a_function_of_runs_and_answers(tmp_path: Path, endpoint: Endpoint) -> None:
    write_runs(tmp_path, ["good", "bad prose"], ["bad"])
    write_judges(tmp_path, endpoint)
    typed(tmp_path, "--yes", "--repeat", "1")
    first, asked = (tmp_path / "rows.jsonl").read_bytes(), len(endpoint.asked)
    typed(tmp_path, "--no-asking", "--repeat", "1")
    typed(tmp_path, "--yes", "--repeat", "1")
    assert (tmp_path / "rows.jsonl").read_bytes() == first and len(endpoint.asked) == asked
    found = json.loads(typed(tmp_path, "--no-asking", "--repeat", "1", "--json").stdout)
    assert found["self_agreement"] == {"judge-a": {"pairs": 3, "mean_difference": 0.0, "equal": 1.0}}
    with (tmp_path / "rows.answers.jsonl").open("ab") as stream:
        stream.write(b'{"key": "half a li')  # what a kill leaves
    typed(tmp_path, "--yes", "--repeat", "1")
    (tmp_path / "rows.answers.jsonl").write_text('{"key": 7}\n')
    assert "damaged" in typed(tmp_path, "--yes", code=1).stderr


@pytest.mark.slow
def test_twenty_kills_lose_nothing_that_was_written_and_pay_for_nothing_twice(
    tmp_path: Path, endpoint: Endpoint
) -> None:
    write_runs(tmp_path, *([f"good {run} {step}" for step in range(10)] for run in range(20)))
    write_judges(tmp_path, endpoint, concurrency=4)
    endpoint.seconds = 0.04
    answers = tmp_path / "rows.answers.jsonl"
    kills = 0
    while kills < 20:
        before = len(answers.read_bytes()) if answers.exists() else 0
        process = subprocess.Popen(
            command("--yes"), cwd=tmp_path, env=os.environ | {"JUDGE_KEY": KEY},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 20
        while (len(answers.read_bytes()) if answers.exists() else 0) <= before and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.01 * (kills % 5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    endpoint.seconds = 0.0
    time.sleep(0.2)  # the requests that were under way
    written = len(answers.read_text().splitlines())
    typed(tmp_path, "--yes")
    assert len(rows(tmp_path)) == 200
    keys = [json.loads(line)["key"] for line in answers.read_text().splitlines()]
    assert len(keys) == len(set(keys)) == 200
    assert len(endpoint.asked) <= 200 + kills * 4  # at most what was in flight at each kill
    assert written > 20


@pytest.mark.parametrize("key", ["s\u00e9cret", "se\ncret"])
def test_a_key_that_cannot_be_sent_is_not_repeated(tmp_path: Path, endpoint: Endpoint, key: str) -> None:
    write_runs(tmp_path, ["good"])
    write_judges(tmp_path, endpoint)
    done = subprocess.run(
        command("--yes"), cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL,
        env=os.environ | {"JUDGE_KEY": key},
    )  # fmt: skip
    assert (
        done.returncode == 2 and "JUDGE_KEY contains an invalid character" in done.stderr and "cret" not in done.stderr
    )


def test_runs_that_begin_alike_pay_once(tmp_path: Path, endpoint: Endpoint) -> None:
    endpoint.seconds = 0.2
    runs = [
        {"task_id": "t", "messages": [{"role": "user", "content": "Task."}, {"role": "assistant", "content": "good"}]}
    ]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs * 6))
    write_judges(tmp_path, endpoint, concurrency=6)
    typed(tmp_path, "--yes")
    assert len(endpoint.asked) == 1 and len(rows(tmp_path)) == 6


def test_the_end_of_the_last_line_may_be_missing(tmp_path: Path, endpoint: Endpoint) -> None:
    write_runs(tmp_path, ["good", "good too"])
    write_judges(tmp_path, endpoint)
    typed(tmp_path, "--yes")
    answers = tmp_path / "rows.answers.jsonl"
    answers.write_bytes(answers.read_bytes()[:-1])
    write_runs(tmp_path, ["good", "good too", "good three"])
    typed(tmp_path, "--yes")
    assert len(endpoint.asked) == 4 and len(answers.read_text().splitlines()) == 4  # step 2 is no longer the last one


def test_no_output_replaces_what_is_read_or_was_paid_for(tmp_path: Path, endpoint: Endpoint) -> None:
    write_runs(tmp_path, ["good"])
    write_judges(tmp_path, endpoint)
    more = tmp_path / "more"
    more.mkdir()
    (more / "b.json").write_text((tmp_path / "runs.jsonl").read_text().strip())
    for flags in (
        ["--answers", "rows.jsonl"], ["--answers", "more/b.json", "more/b.json"], ["--output", "judges.yaml"],
        ["--output", "more/b.json", "more/b.json"], ["--output", "more/rows.jsonl", "more"],
    ):  # fmt: skip
        before = {file: file.read_bytes() for file in tmp_path.rglob("*.*") if file.is_file()}
        assert "output" in typed(tmp_path, "--yes", *flags, code=2).stderr
        assert before == {file: file.read_bytes() for file in tmp_path.rglob("*.*") if file.is_file()}


def test_json_is_all_of_stdout(tmp_path: Path, endpoint: Endpoint) -> None:
    write_runs(tmp_path, ["good", "good too"])
    write_judges(tmp_path, endpoint, price_in=1, price_out=1000, parameters={"max_tokens": 100})
    planned = json.loads(typed(tmp_path, "--dry-run", "--json").stdout)
    (judge,) = planned["judges"]
    assert (
        judge["open"] == 2
        and 0.2 < judge["most_cost_asked_once"] < 0.21
        and "Task 0." in planned["first_prompt"]["text"]
    )
    done = typed(tmp_path, "--yes", "--json")
    assert json.loads(done.stdout)["rows"] == 2 and "2 requests, for at most 0.20" in done.stderr


@pytest.mark.parametrize("moment", [None, "noon", 1e300, -1e300])
def test_an_answer_without_its_time_is_damaged(tmp_path: Path, endpoint: Endpoint, moment: Any) -> None:
    write_runs(tmp_path, ["good"])
    write_judges(tmp_path, endpoint)
    typed(tmp_path, "--yes")
    answers = tmp_path / "rows.answers.jsonl"
    answers.write_text(json.dumps(json.loads(answers.read_text()) | {"time": moment}) + "\n")
    assert "rows.answers.jsonl:1: damaged line" in typed(tmp_path, "--no-asking", code=1).stderr


def test_the_budget_is_never_overrun(tmp_path: Path, endpoint: Endpoint) -> None:
    write_runs(tmp_path, ["good"] * 3 + [f"good {n}" for n in range(60)])
    write_judges(tmp_path, endpoint, price_in=0, price_out=1000, parameters={"max_tokens": 100}, concurrency=8)
    done = typed(tmp_path, "--yes", "--max-cost", "0.25", code=1)  # an answer costs 0.01, and up to 0.1
    spent = sum(json.loads(line)["cost"] for line in (tmp_path / "rows.answers.jsonl").read_text().splitlines())
    assert 0.1 < spent <= 0.25 and "--max-cost 0.25 reached; sending no more requests" in done.stderr
    assert "not asked: --max-cost was reached" in done.stdout
    for amount in ("nan", "-1", "inf"):
        assert "--max-cost" in typed(tmp_path, "--yes", "--max-cost", amount, code=2).stderr
    typed(tmp_path, "--yes", "--max-cost", "9")
    assert len(rows(tmp_path)) == 63


def test_a_long_run_has_room_for_its_answer(tmp_path: Path, endpoint: Endpoint) -> None:
    write_runs(tmp_path, [f"good {n}" for n in range(40)], ["good"])
    write_judges(tmp_path, endpoint)
    typed(tmp_path, "--yes", "--per", "run")
    assert sorted(body["max_tokens"] for body in endpoint.asked) == [1024, 4000]  # side by side, in any order
    write_judges(tmp_path, endpoint, parameters={"max_tokens": 500}, price_in=1, price_out=1)
    (judge,) = json.loads(typed(tmp_path, "--dry-run", "--json", "--per", "run").stdout)["judges"]
    assert judge["tokens_out"] == 1000


def test_an_answer_that_is_cut_off_every_time_says_what_to_raise(tmp_path: Path, endpoint: Endpoint) -> None:
    write_runs(tmp_path, ["cut"])
    write_judges(tmp_path, endpoint, parameters={"max_tokens": 100})
    assert "cut off at 200 tokens; raise max_tokens" in typed(tmp_path, "--yes", code=1).stdout


def test_the_solution_is_sent_to_the_judge_alone(tmp_path: Path, endpoint: Endpoint) -> None:
    write_runs(tmp_path, ["good"])
    write_judges(tmp_path, endpoint)
    typed(tmp_path, "--yes", "--teacher-sees", "reference")
    assert "the solution is 42" in endpoint.asked[0]["messages"][0]["content"]
    (row,) = rows(tmp_path)
    assert row["metadata"]["reference_shown"] is True and "the solution is" not in json.dumps(row)


def test_only_what_the_own_judge_is_unsure_of_and_an_audit(tmp_path: Path, endpoint: Endpoint) -> None:
    write_runs(tmp_path, [f"good {n}" for n in range(60)])
    write_judges(tmp_path, endpoint)
    lines = [
        {
            "metadata": {"trajectory_id": "t0.1", "step": n + 1},
            "status": "unsure" if n < 3 else "ok",
            "std": 0.3 if n == 3 else 0.05,
        }
        for n in range(60)
    ]
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    typed(tmp_path, "--yes", "--first", "scores.jsonl", "--audit-share", "0.2")
    chosen = Counter(row["metadata"]["selected_by"] for row in rows(tmp_path))
    assert chosen["unsure"] == 4 and 4 <= chosen["audit"] <= 20
    weights = {row["metadata"]["selected_by"]: row["metadata"]["selection_weight"] for row in rows(tmp_path)}
    assert weights == {"unsure": 1.0, "audit": 5.0}
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:-1]))
    assert "no score for step t0.1#60" in typed(tmp_path, "--yes", "--first", "scores.jsonl", code=1).stderr
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, lines[0]]))
    assert "scores.jsonl:61: a second line" in typed(tmp_path, "--yes", "--first", "scores.jsonl", code=1).stderr
    (tmp_path / "scores.jsonl").write_text("{}\n")
    assert "scores.jsonl:1" in typed(tmp_path, "--yes", "--first", "scores.jsonl", code=1).stderr


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[]", "a list of judges"),
        ("- {name: a, base_url: 'http://x/v1'}", "model missing"),
        ("- {name: a, base_url: 'http://x/v1', model: m, concurency: 3}", "Did you mean concurrency?"),
        ("- {name: a, base_url: 'ftp://x', model: m}", "judge 1: base_url ftp://x: not the URL"),
        ("- {name: a, base_url: 'http://u:p@x/v1', model: m}", "api_key_env"),
        ("- {name: a, base_url: 'http://x/v1', model: m, json: yaml}", "schema, object or prompt"),
        ("- {name: a, base_url: 'http://x/v1', model: m, price_in: 1}", "or neither"),
        ("- {name: a, base_url: 'http://x/v1', model: m, parameters: {stream: true}}", "stream is set"),
        ("- {name: a, base_url: 'http://x/v1', model: m, api_key_env: 'sk-abc-def'}", "environment variable"),
        ("- {name: a, base_url: 'http://x/v1', model: m, api_key_env: NOT_SET_ANYWHERE}", "NOT_SET_ANYWHERE"),
        ("- &a {name: a, base_url: 'http://x/v1', model: m}\n- *a", "two judges have the name a"),
        ("- {name: a, base_url: 'http://x/v1?key=abc', model: m}", "base_url must not contain ? or #"),
        ("- {name: a, base_url: 'http://x/v1', model: ' '}", "model missing"),
        ("- {name: a, base_url: 'http://x/v1', model: m, timeout: .nan}", "timeout must be above zero"),
        (
            "- {name: a, base_url: 'http://x/v1', model: m, price_in: .nan, price_out: 1}",
            "price_in and price_out must be numbers",
        ),
        (
            "- {name: a, base_url: 'http://x/v1', model: m, price_in: 1, price_out: .inf}",
            "price_in and price_out must be numbers",
        ),
        ("- {name: a, base_url: 'http://x/v1', model: m, parameters: {max_tokens: many}}", "an integer"),
        ("- {name: a, base_url: 'http://x/v1', model: m, parameters: {max_tokens: null}}", "an integer"),
        ("- {name: a, base_url: 'http://x/v1', model: m, parameters: {temperature: .nan}}", "as JSON"),
        ("- {name: a, base_url: 'http://x/v1', model: m, parameters: {since: 2024-01-01}}", "as JSON"),
        ("- {name: a, base_url: 'http://x/v1', model: m, parameters: {1: 2, a: 3}}", "as JSON"),
        (
            "- {name: a, base_url: 'http://x/v1', model: m}\n- {name: b, base_url: 'http://y/v1', model: m}",
            "cannot be distinguished",
        ),
        ("a: [", "not YAML"),
    ],
)
def test_a_wrong_judges_yaml_is_one_sentence(tmp_path: Path, content: str, says: str) -> None:
    write_runs(tmp_path, ["good"])
    (tmp_path / "judges.yaml").write_text(content)
    done = typed(tmp_path, "--yes", code=2)
    assert says in done.stderr


def test_rows_stay_if_a_later_call_has_no_verdict(tmp_path: Path, endpoint: Endpoint) -> None:
    write_runs(tmp_path, ["good", "bad"])
    write_judges(tmp_path, endpoint, price_in=1, price_out=2)
    typed(tmp_path, "--yes")
    before = rows(tmp_path)
    write_judges(tmp_path, endpoint, "b", price_in=1, price_out=2)
    done = typed(tmp_path, "--yes", "--max-cost", "0", code=1)
    assert "no rows were written" in done.stderr and rows(tmp_path) == before


def test_judges_whose_names_look_the_same_are_refused(tmp_path: Path) -> None:
    """In rows, spaces around a name do not count: both would become one judge."""
    write_runs(tmp_path, ["good"])
    judge = "- {name: '%s', base_url: 'http://x/v1', model: '%s'}\n"
    (tmp_path / "judges.yaml").write_text(judge % ("a", "m") + judge % ("a ", "n"))
    assert "two judges have the name a" in typed(tmp_path, "--yes", code=2).stderr
