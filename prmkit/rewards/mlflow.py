"""MLflow: an alignment optimizer that trains a judge on human feedback on traces, and serves it.

optimizer = make_optimizer(toolkit="…/prmkit", config="training_config.yaml", folder="aligned")
aligned = judge.align(traces, optimizer)      # any MLflow judge with the name of the feedback
aligned(inputs={"question": "…"}, outputs="…")
"""

import atexit
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prmkit.client import Judge, client_of
from prmkit.errors import DataError, UsageError

_LABELS = ("--labels", "column", "--label-key", "labels")
_WORDS = {"yes": 1.0, "no": 0.0, "true": 1.0, "false": 0.0, "pass": 1.0, "fail": 0.0}


def make_optimizer(
    toolkit: str | Path,
    config: str | Path,
    folder: str | Path,
    *,
    python: str = sys.executable,
    settings: Sequence[str] = (),
) -> Any:
    """Make an `AlignmentOptimizer` whose `align` trains weights, whereas MLflow's optimizers rewrite the prompt.

    The inputs and outputs of each trace's root span are one step. Human feedback under the judge's name is its label: a
    number from 0 to 1, a boolean, or yes or no. The server ends with the process.

    Args:
        toolkit: the folder with train.py.
        config: the training configuration.
        folder: a folder for rows, data and the training run; use another folder for other feedback.
        python: the interpreter of the toolkit's environment, which need not be MLflow's.
        settings: key=value for train.py.

    Raises:
        UsageError: no trace has such feedback, or a value is not a score.
        DataError: a stage of the training failed; the message says why.
    """
    from mlflow.genai.judges.base import AlignmentOptimizer

    class TrainingOptimizer(AlignmentOptimizer):  # type: ignore[misc]
        """An optimizer that trains a judge with prmkit."""

        def align(self, judge: Any, traces: list[Any]) -> Any:
            work, scripts = Path(folder).resolve(), Path(toolkit).resolve()
            rows = [json.dumps(row) for row in _labelled(judge.name, traces)]
            if not rows:
                raise UsageError(f"no trace has feedback from a person under the judge's name, {judge.name}.")
            work.mkdir(parents=True, exist_ok=True)
            (work / "runs.jsonl").write_text("\n".join(rows), encoding="utf-8")
            training = ["--config", str(Path(config).resolve()), "--dataset", "reward_model_clip", *settings]
            for script, *arguments in (
                ("import_trajectories.py", "runs.jsonl", "--output", "rows.jsonl", *_LABELS),
                ("convert_dataset.py", "--input", "rows.jsonl", "--output-dir", "data"),
                ("train.py", *training, f"dataset_dir={work / 'data'}", f"output_dir={work / 'run'}"),
            ):
                _run([python, str(scripts / script), *arguments], work)
            url = _serve([python, str(scripts / "serve_judge.py"), "--run", "run", "--port", "0"], work)
            return make_judge(url, judge.name, judge.instructions)

    return TrainingOptimizer()


def make_judge(judge: str | Judge, name: str, instructions: str = "") -> Any:
    """Make an MLflow `Judge` from a served judge; its feedback is a score from 0 to 1, or an error if it is unsure."""
    from mlflow.entities import AssessmentSource, Feedback
    from mlflow.genai.judges.base import Judge as MlflowJudge
    from mlflow.genai.judges.base import JudgeField

    client = client_of(judge)

    class ServedJudge(MlflowJudge):  # type: ignore[misc]
        """A judge that sends its questions to `serve_judge.py`."""

        @property
        def instructions(self) -> str:
            return instructions or "The rubric that the judge was trained with."

        @property
        def feedback_value_type(self) -> type:
            return float

        def get_input_fields(self) -> list[Any]:
            return [JudgeField(name=field, description=f"the {field}") for field in ("inputs", "outputs")]

        def __call__(self, *, inputs: Any, outputs: Any, **_more: Any) -> Any:
            prompt, response = _messages(inputs, outputs)
            reward = client.reward(prompt, response)
            source = AssessmentSource(source_type="LLM_JUDGE", source_id=client.url)
            metadata = {"label_mass": str(reward.label_mass)}
            if reward.value is None:
                return Feedback(name=name, error="no reliable score", source=source, metadata=metadata)
            return Feedback(name=name, value=reward.value, source=source, metadata=metadata)

    return ServedJudge(name=name)


def _labelled(name: str, traces: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Yield one labelled run of one step for each trace with human feedback."""
    for trace in traces:
        given = [each for each in trace.search_assessments(name, type="feedback") if each.source.source_type == "HUMAN"]
        root = next((span for span in trace.data.spans if span.parent_id is None), None)
        if given and root:
            latest = max(given, key=lambda each: each.last_update_time_ms or 0)
            prompt, response = _messages(root.inputs, root.outputs)
            label = _score(latest.value, trace.info.trace_id)
            yield {"messages": [*prompt, *response], "labels": {str(len(prompt)): label}}


def _score(value: Any, trace: str) -> float:
    score = _WORDS.get(value.lower()) if isinstance(value, str) else value
    if not isinstance(score, int | float) or not 0 <= score <= 1:
        raise UsageError(
            f"{trace}: the feedback {value!r} is not a score (a number from 0 to 1, a boolean, yes or no)."
        )
    return float(score)


def _messages(inputs: Any, outputs: Any) -> tuple[list[Any], list[Any]]:
    """Return question and answer of a trace as messages, in the same format for training and scoring."""
    asked = inputs.get("messages") if isinstance(inputs, Mapping) else None
    prompt = list(asked) if isinstance(asked, list) and asked else [{"role": "user", "content": _text(inputs)}]
    choices = outputs.get("choices") if isinstance(outputs, Mapping) else None
    said = choices[0].get("message") if isinstance(choices, list) and choices else None
    return prompt, [said or {"role": "assistant", "content": _text(outputs)}]


def _text(value: Any) -> str:
    """Return a value as text: a string, an object's only string, or JSON."""
    parts = list(value.values()) if isinstance(value, Mapping) else [value]
    return parts[0] if len(parts) == 1 and isinstance(parts[0], str) else json.dumps(value, default=str)


def _run(command: Sequence[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise DataError(f"{Path(command[1]).name} failed ({done.returncode}):\n{done.stdout[-3000:]}")


def _serve(command: Sequence[str], folder: Path) -> str:
    """Start a server that ends with this process, and return its URL."""
    log = folder / "server.log"
    with log.open("w") as stream:
        process = subprocess.Popen(command, cwd=folder, stderr=stream)
    atexit.register(process.terminate)
    while process.poll() is None:
        if found := re.search(r"http://\S+?:\d+", log.read_text(encoding="utf-8", errors="replace")):
            return found[0]
        time.sleep(0.1)
    raise DataError(f"the server failed ({process.returncode}):\n{log.read_text(encoding='utf-8')[-3000:]}")
