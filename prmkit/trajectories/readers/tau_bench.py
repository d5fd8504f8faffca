"""tau-bench (`traj` and `info.task`) and tau2 (`simulations` and `tasks`): an agent talks to a simulated user.

The task in a step's prompt is the user's first message: the simulated user's instructions are hidden from the agent,
and `info.task.actions` and tau2's `evaluation_criteria` are the solution. tau2 stores the policy, the agent's
system prompt, once for all runs.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from prmkit.trajectories.content import as_text, is_message_list, mapping, turns_of
from prmkit.trajectories.run import FieldNames, Reader, Run, Turn
from prmkit.trajectories.run_fields import id_of, outcome_of


def recognises(value: Any) -> bool:
    """Return whether a value is a run of tau-bench, a results file of tau2, or one of its simulations."""
    if not isinstance(value, dict):
        return False
    return _is_tau_bench(value) or isinstance(value.get("simulations"), list) or _is_simulation(value)


def _is_tau_bench(value: Mapping[str, Any]) -> bool:
    return is_message_list(value.get("traj")) and isinstance(value.get("info"), dict) and "task_id" in value


def _is_simulation(value: Mapping[str, Any]) -> bool:
    return is_message_list(value.get("messages")) and "task_id" in value and "reward_info" in value


def read(value: Any, _keys: FieldNames) -> Iterator[Run]:
    """Yield the runs of one value."""
    if _is_tau_bench(value):
        solution = mapping(value["info"].get("task")).get("actions")
        yield _run(value, value["traj"], value.get("reward"), solution)
        return
    tasks = {id_of(task, "id"): task for task in value.get("tasks") or () if isinstance(task, dict)}
    policy = as_text(mapping(mapping(value.get("info")).get("environment_info")).get("policy"))
    for simulation in value.get("simulations", [value]):
        if isinstance(simulation, dict) and is_message_list(simulation.get("messages")):
            reward = mapping(simulation.get("reward_info")).get("reward")
            solution = tasks.get(id_of(simulation, "task_id"), {}).get("evaluation_criteria")
            run = _run(simulation, simulation["messages"], reward, solution)
            if policy and not any(turn.role == "system" for turn in run.turns):
                run.turns.insert(0, Turn("system", policy))
            yield run
        else:
            yield Run([], Counter())


def _run(value: Mapping[str, Any], messages: list[Any], reward: Any, solution: Any) -> Run:
    lost: Counter[str] = Counter()
    return Run(
        turns_of(messages, lost),
        lost,
        task_id=id_of(value, "task_id"),
        trajectory_id=id_of(value, "id"),
        outcome=outcome_of({"reward": reward}),
        reference=as_text(solution) or None,
    )


READER = Reader("tau-bench", recognises, one=read)
