"""MLflow's real judges and traces, in an environment apart from ours: feedback of people in, a trained judge out."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.network, pytest.mark.huge, pytest.mark.llamafactory]

ALIGN = """
import json, os, sys
os.environ |= {"MLFLOW_ENABLE_ASYNC_TRACE_LOGGING": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
import mlflow
from mlflow.entities import AssessmentSource
from mlflow.genai.judges import make_judge
from prmkit.errors import UsageError
from prmkit.rewards.mlflow import make_optimizer

toolkit, model, python, folder = sys.argv[1:]
mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
mlflow.set_experiment("aligned")
person = AssessmentSource(source_type="HUMAN", source_id="someone")
model_as_judge = AssessmentSource(source_type="LLM_JUDGE", source_id="a model")
words = {"sound": 0.9, "poor": 0.1}

def traced(number, word):
    with mlflow.start_span("answer") as span:
        span.set_inputs({"question": f"Question {number}"})
        span.set_outputs(f"{word} " * 12)
    mlflow.log_feedback(trace_id=span.trace_id, name="right", value=1 - words[word], source=model_as_judge)
    return span.trace_id

ids = [traced(number, word) for number in range(24) for word in words]
judge = make_judge(
    name="right", instructions="Is {{ outputs }} right for {{ inputs }}?", model="openai:/none",
    feedback_value_type=float,
)
optimizer = make_optimizer(
    toolkit, f"{toolkit}/configs/cpu_demo.yaml", f"{folder}/aligned", python=python,
    settings=[f"model_name_or_path={model}", "num_train_epochs=14", "cutoff_len=1536"],
)
found = {}
try:
    judge.align([mlflow.get_trace(each) for each in ids], optimizer)
except UsageError as error:
    found["nothing to learn"] = str(error)
for place, each in enumerate(ids):
    mlflow.log_feedback(trace_id=each, name="right", value=list(words.values())[place % 2], source=person)
aligned = judge.align([mlflow.get_trace(each) for each in ids], optimizer)
for word in words:
    feedback = aligned(inputs={"question": "Question 99"}, outputs=f"{word} " * 12)
    found[word] = feedback.value if feedback.error is None else feedback.error.error_message
found["scorer"] = [aligned.name, isinstance(aligned, type(judge).__mro__[1])]
print(json.dumps(found))
"""


def test_align_trains_on_what_people_said_and_returns_the_served_judge(
    installed_alone: Callable[..., Path], output_of: Callable[..., Any], tiny_model: Path, tmp_path: Path
) -> None:
    python = installed_alone("mlflow==3.17.2", "pyyaml")
    found = output_of(python, ROOT, ALIGN, ROOT, tiny_model, sys.executable, tmp_path, timeout=900)
    assert "no trace has feedback from a person" in found["nothing to learn"]  # a model's feedback teaches nothing
    assert found["sound"] > 0.7 and found["poor"] < 0.3, found
    assert found["scorer"] == ["right", True]
