"""Write one page about all versions: agreement over time, tags, history, the current A/B comparison, drift."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prmkit import registered
from prmkit.errors import DataError, UsageError
from prmkit.files import render_page, write_text
from prmkit.registry import describe, monitor
from prmkit.resumable import check_output

TEMPLATE = Path(__file__).with_name("page.html.j2")
_WIDTH, _HEIGHT, _EDGE = 640, 220, 34


def write_versions_page(folder: Path, output: Path, logs: Sequence[Path], limit: float) -> None:
    """Write the page.

    Args:
        folder: the registry.
        output: the HTML file.
        logs: request logs or scoring outputs, for A/B and drift; may be empty.
        limit: a population stability index above this counts as drift.

    Raises:
        DataError: a version or a log is damaged.
        UsageError: the page would replace a log or a file of the registry.
    """
    _check_output(output, folder, logs)
    history = registered.read_history(folder)
    state = registered.state_of(history)
    versions = [_version(folder, version, state.tags_of(version)) for version in state.versions]
    steps = monitor.read_scored(logs) if logs else []
    actions = [{**line, "what": describe.sentence_of(line)} for line in history[::-1]]
    page = render_page(
        TEMPLATE,
        versions=versions, history=actions, ab=_ab(steps), drifts=_drifts(folder, state, steps, limit), limit=limit,
        points=_points(versions), width=_WIDTH, height=_HEIGHT, edge=_EDGE,
    )  # fmt: skip
    write_text(output, page)


def _check_output(output: Path, folder: Path, logs: Sequence[Path]) -> None:
    for source in (*logs, folder / registered.HISTORY_FILE):
        check_output(output, source)
    if any((parent / registered.VERSION_FILE).is_file() for parent in output.resolve().parents):
        raise UsageError(f"{output} is inside a registered version, which must not change. Choose another --output.")


def _version(folder: Path, version: registered.VersionId, tags: list[str]) -> dict[str, Any]:
    record = registered.read_version(version, folder)
    details = record["details"]
    gate = details.get("gate") or {}
    return {
        "name": str(version), "tags": tags, "parent": record["parent"], "spearman": record["spearman"],
        "exams": describe.exams_of(version, folder), "findings": (details.get("report") or {}).get("findings", []),
        "reasons": gate.get("reasons", []), "passed": gate.get("passed"),
    }  # fmt: skip


def _ab(steps: Sequence[monitor.LoggedStep]) -> Mapping[str, Any] | None:
    if not steps:
        return None
    try:
        return monitor.compare_judges(steps, None)
    except UsageError as error:  # not exactly two judges: the page says that there is nothing to compare
        return {"reason": str(error)}


def _drifts(
    folder: Path, state: registered.RegistryState, steps: Sequence[monitor.LoggedStep], limit: float
) -> list[dict[str, Any]]:
    """Return the drift of every registered version in the logs."""
    found = []
    for version in state.versions:
        scored = [step for step in steps if step.is_logged and step.judge == str(version)]
        if scored:
            try:
                drift = monitor.drift_of(scored, describe.held_out_of(version, folder), limit)
            except DataError as error:
                drift = {"reason": str(error)}
            found.append({"name": str(version), "steps": len(scored), **drift})
    return found


def _points(versions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return each version's position in the plot, in pixels; the axis goes from 1 to 0, and lower only if needed."""
    known = [(index, each["spearman"]) for index, each in enumerate(versions)
             if each["spearman"] and each["spearman"].get("low") is not None]  # fmt: skip
    floor = min([0.0, *(estimate["low"] for _, estimate in known)])
    step = (_WIDTH - 2 * _EDGE) / max(len(versions) - 1, 1)

    def y(value: float) -> float:
        return round(float(_HEIGHT - _EDGE - (value - floor) / (1 - floor) * (_HEIGHT - 2 * _EDGE)), 1)

    return [
        {"x": round(_EDGE + index * step, 1), "y": y(estimate["value"]), "low": y(estimate["low"]),
         "high": y(estimate["high"]), "name": versions[index]["name"], "is_tagged": bool(versions[index]["tags"]),
         "zero": y(0.0), "one": y(1.0), "label": f"{estimate['value']:.2f}"}
        for index, estimate in known
    ]  # fmt: skip
