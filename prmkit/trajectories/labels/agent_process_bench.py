"""AgentProcessBench: runs with tools, and a human label for every step.

`step_labels` maps the index of the agent's message in `messages`, from 0, to 1, 0 or -1. `query_index` is the task:
each task was run five times, distinguished by `sample_index`.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from prmkit.trajectories.content import as_text, is_message_list, turns_of
from prmkit.trajectories.run import FieldNames, Reader, Run
from prmkit.trajectories.run_fields import id_of, label_of, outcome_of, tools_of


def recognises(value: Any) -> bool:
    """Return whether a value has messages, `step_labels` and `query_index`."""
    return (
        isinstance(value, dict)
        and {"step_labels", "query_index"} <= value.keys()
        and isinstance(value["step_labels"], dict)
        and is_message_list(value.get("messages"))
    )


def read(value: Any, _keys: FieldNames) -> Iterator[Run]:
    """Yield the run of one line."""
    lost: Counter[str] = Counter()
    source = as_text(value.get("data_source") or value.get("dataset"))
    task = "_".join(filter(None, (source, id_of(value, "query_index"))))
    sample = id_of(value, "sample_index")
    truth = value.get("ground_truth")
    yield Run(
        turns_of(value["messages"], lost),
        lost,
        task=as_text(value.get("question")) or None,
        task_id=task,
        trajectory_id=f"{task}.{sample}" if sample else None,
        outcome=outcome_of({"success": value["final_label"] == 1 if "final_label" in value else None}),
        reference=as_text(truth.get("target") if isinstance(truth, dict) else truth) or None,
        tools=tools_of(value.get("tools")),
        labels={int(index): label_of(label, "ternary") for index, label in value["step_labels"].items()},
    )


READER = Reader("agentprocessbench", recognises, one=read)
