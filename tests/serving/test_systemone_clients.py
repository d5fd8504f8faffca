"""The real clients of /v1/systemone, offline, in an environment of their own: MLflow's judges and autorubric."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving_stub import running_server

KEY = "s3cret"
pytestmark = [pytest.mark.huge, pytest.mark.network]

MLFLOW = """
import json, sys
from typing import Literal
from mlflow.genai.judges import make_judge
url, key = sys.argv[1:]
def ask(kind, inputs, outputs, key=key):
    judge = make_judge(
        name="right", instructions="Is {{ outputs }} right for {{ inputs }}?", model="typesafe:/judge", base_url=url,
        extra_headers={"Authorization": f"Bearer {key}"}, feedback_value_type=kind,
    )
    try:
        return judge(inputs=inputs, outputs=outputs).to_dictionary()
    except Exception as error:
        return str(error)
question, chat = {"question": "What?"}, {"messages": [{"role": "user", "content": "What?"}]}
said = {"choices": [{"message": {"role": "assistant", "content": "good"}}]}
print(json.dumps({
    "good": ask(bool, question, {"response": "good"}), "poor": ask(bool, question, "bad"),
    "stars": ask(Literal[1, 2, 3, 4, 5], chat, said), "words": ask(Literal["yes", "no"], question, "good"),
    "unsure": ask(bool, question, "mumble"), "key": ask(bool, question, "good", key="wrong"),
}))
"""

AUTORUBRIC = """
import asyncio, json, sys
from autorubric import Criterion, CriterionOption, Rubric
from autorubric.decision import DecisionModelConfig
from autorubric.graders import CriterionGrader
url, key = sys.argv[1:]
levels = [CriterionOption(label=label, value=value) for label, value in (("1", 0.0), ("2", 0.5), ("3", 1.0))]
yes_no = Criterion(name="right", weight=1.0, requirement="The step is right.")
scale = Criterion(name="how right", weight=1.0, requirement="How right is the step?", options=levels)
found = {}
for name, criterion, framing in (
    ("noul", yes_no, {"binary_framing": "noul"}), ("framed", yes_no, {"binary_framing": "noul_framed"}),
    ("score", scale, {"ordinal_framing": "score"}), ("choice", scale, {"ordinal_framing": "choice"}),
    ("words", yes_no, {"binary_framing": "choice"}),
):
    for said in ("good", "bad", "mumble"):
        config = DecisionModelConfig(model="judge", api_base=url, api_key=key, max_retries=2, **framing)
        grader = CriterionGrader(judge_model_config=config)
        report = asyncio.run(Rubric([criterion]).grade(to_grade=said, grader=grader, query="What?"))
        found[f"{name} {said}"] = report.score if report.error is None else report.error
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with both clients; 1.3 GB."""
    folder = tmp_path_factory.mktemp("systemone")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "autorubric[typesafe]==1.6.1", "mlflow==3.17.2"], check=True, timeout=1800)
    # Of its part mlflow-skinny there was no 3.18.0 yet; the whole package has all of its modules.
    subprocess.run([*pip, "--no-deps", "mlflow==3.18.0"], check=True, timeout=600)
    return python


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running_server(KEY) as url:
        yield url


def answers(python: Path, program: str, folder: Path, *arguments: str) -> Any:
    offline = {"MLFLOW_DISABLE_TELEMETRY": "true", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "PYTHONPATH": ""}
    command = [str(python), "-W", "ignore", "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=os.environ | offline, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_mlflows_judge_gets_values_and_never_one_that_the_judge_is_not_sure_of(
    python: Path, url: str, tmp_path: Path
) -> None:
    found = answers(python, MLFLOW, tmp_path, f"{url}/v1", KEY)
    values = [found[name]["feedback"]["value"] for name in ("good", "poor", "stars")]
    assert values == [True, False, 5] and found["good"]["metadata"]["typesafe.model"] == "stub"
    chances = json.loads(found["stars"]["metadata"]["typesafe.probabilities"])
    assert sum(chances.values()) == pytest.approx(1) and max(chances, key=chances.__getitem__) == "5"
    assert "HTTP 422" in found["words"] and "HTTP 422" in found["unsure"] and "HTTP 401" in found["key"]


def test_autorubric_grades_with_every_framing_that_a_judge_of_scores_can_answer(
    python: Path, url: str, tmp_path: Path
) -> None:
    found = answers(python, AUTORUBRIC, tmp_path, url, KEY)
    for framing in ("noul", "framed", "score"):
        assert (found[f"{framing} good"], found[f"{framing} bad"]) == (1.0, 0.0), framing
        assert "no reliable score" in found[f"{framing} mumble"]
    for framing in ("choice", "words"):  # both offer a choice that is not a number, such as that it cannot be assessed
        assert "names of choices must be numbers" in found[f"{framing} good"]
