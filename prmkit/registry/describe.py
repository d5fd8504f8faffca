"""Show versions on the terminal (list, show, diff, history), and log them to MLflow."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prmkit import cli, registered
from prmkit.errors import DataError, UsageError
from prmkit.files import read_json, read_jsonl
from prmkit.intervals import format_estimate
from prmkit.paths import PREDICTIONS_FILE, REPORT, RUN_RECORD
from prmkit.registered import DATA, RUN, VersionId

_COLUMNS = ("version", "tags", "Spearman", "exam AUROC", "rows", "MB", "changed", "added")


def list_versions(folder: Path, *, as_json: bool) -> None:
    """List all versions, oldest first, each with its changes from its parent."""
    state = registered.state_of(registered.read_history(folder))
    records = [(version, registered.read_version(version, folder)) for version in state.versions]
    if as_json:
        cli.emit_json(
            [
                {key: value for key, value in record.items() if key != "files"}
                | {"tags": state.tags_of(version), "exams": exams_of(version, folder)}
                for version, record in records
            ]
        )
        return
    if not records:
        cli.emit(f"{folder}: no judge is registered. Add one: python manage_judges.py add saves/RUN")
        return
    known = {str(version): record for version, record in records}
    rows = [
        [
            str(version),
            ", ".join(state.tags_of(version)),
            shown_estimate(record["spearman"]),
            "; ".join(shown_estimate(exam["auroc"]) for exam in exams_of(version, folder)),
            "?" if record["training_rows"] is None else f"{record['training_rows']:,}",
            f"{record['bytes'] / 1e6:.1f}",
            _changed(record, known.get(str(record["parent"])), folder),
            record["created"][:10],
        ]
        for version, record in records
    ]
    cli.emit_table("", _COLUMNS, rows, numeric=("rows", "MB"), optional=("MB", "added", "exam AUROC", "changed"))


def exams_of(version: VersionId, folder: Path) -> list[dict[str, Any]]:
    """Return a version's exams, from before and after its registration: `name`, `auroc`, `sentence`."""
    run = registered.folder_of_version(version, folder) / RUN
    exams: list[dict[str, Any]] = []
    for file in sorted(file for folder in registered.results_of(run) for file in folder.glob("exam_*/exam.json")):
        content = read_json(file)
        exams += [
            {
                "name": file.parent.name.removeprefix("exam_"),
                "auroc": judge["metrics"].get("auroc"),
                "sentence": (content["verdicts"].get(judge["name"]) or {}).get("sentence", ""),
            }
            for judge in content["entrants"]
            if judge["kind"] == "judge"
        ]
    return exams


def held_out_of(version: VersionId, folder: Path) -> list[dict[str, Any]]:
    """Return a version's predictions on its held-out rows, from its registration or later.

    Raises:
        DataError: the version was never measured.
    """
    run = registered.folder_of_version(version, folder) / RUN
    for results in registered.results_of(run):
        if (results / PREDICTIONS_FILE).is_file():
            return list(read_jsonl(results / PREDICTIONS_FILE))
    raise DataError(
        f"{version} was never measured, so there is nothing to compare with. "
        f"Run: python evaluate_judge.py --judge {version}"
    )


def shown_estimate(estimate: Mapping[str, Any] | None) -> str:
    """Format an estimate as `0.84 [0.72, 0.90]`; a question mark if it was not measured."""
    return format_estimate(estimate, none="?")


def _changed(record: Mapping[str, Any], parent: Mapping[str, Any] | None, folder: Path) -> str:
    if parent is None:
        return ""
    differences = version_differences(record, parent, folder)
    return ", ".join([*differences["settings"], *(["data"] if differences["data"] else [])]) or "nothing"


def show_version(folder: Path, reference: str, *, as_json: bool) -> None:
    """Show one version, after checking its files.

    Raises:
        DataError: a file was changed.
    """
    version = registered.find_version(reference, folder)
    registered.check_files(version, folder)
    record = registered.read_version(version, folder)
    state = registered.state_of(registered.read_history(folder))
    tags = state.tags_of(version)
    if as_json:
        cli.emit_json({**record, "tags": tags, "exams": exams_of(version, folder)})
        return
    rows = [
        ("tags", ", ".join(tags) or "none"),
        ("added", record["created"]),
        ("parent", record["parent"] or "none"),
        ("trained in", record["run"]),
        ("base model", record["base_model"]),
        ("training rows", "unknown" if record["training_rows"] is None else f"{record['training_rows']:,}"),
        ("Spearman", shown_estimate(record["spearman"])),
        *((f"  {name}", shown_estimate(estimate)) for name, estimate in record["types"].items()),
        *((f"exam {exam['name']}", exam["sentence"]) for exam in exams_of(version, folder)),
        ("rubrics", ", ".join(each[:12] for each in record["rubrics"]) or "none"),
        ("files", f"{len(record['files'])}, all unchanged"),
        ("folder", str(registered.folder_of_version(version, folder))),
    ]
    cli.emit_table(str(version), ("", " "), [list(row) for row in rows])


def version_differences(record: Mapping[str, Any], other: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the differences between two versions.

    Returns:
        `settings`: key -> both values; `data`: number in the conversion report -> both values; `agreement`: evaluation
        type -> both estimates.
    """
    mine, theirs = (_config(each, folder) for each in (record, other))
    own, others = (_data(each, folder) for each in (record, other))
    types = dict.fromkeys([*record["types"], *other["types"]])
    return {
        "settings": {
            key: [mine.get(key), theirs.get(key)] for key in sorted(mine | theirs) if mine.get(key) != theirs.get(key)
        },
        "data": {key: [own.get(key), others.get(key)] for key in own | others if own.get(key) != others.get(key)},
        "agreement": {"all": [record["spearman"], other["spearman"]]}
        | {name: [record["types"].get(name), other["types"].get(name)] for name in types},
    }


PLACES = {"output_dir", "dataset_dir", "export_dir", "adapter_name_or_path", "swanlab_run_name", "run_name"}
"""Settings that are locations and names, and do not affect what is trained."""


def _config(record: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    run = registered.folder_of_version(_id(record), folder) / RUN
    config = read_json(run / RUN_RECORD)["config"]
    found = {key: value for key, value in config.items() if key not in PLACES}
    return found | {"starts from": "an adapter" if config.get("adapter_name_or_path") else "the base model"}


def _data(record: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    file = registered.folder_of_version(_id(record), folder) / DATA / REPORT
    if not file.is_file():
        return {"conversion": "unknown"}
    report = read_json(file)
    return {
        "input": ", ".join(source["sha256"][:12] for source in report["inputs"]),
        "training rows": report["rows"].get("train"),
        "held-out rows": report["rows"].get("held_out"),
        "tasks": report["tasks"],
        "judges": ", ".join(f"{name} {count:,}" for name, count in report["judges"].items()),
        "rejected": sum(report["rejected"].values()),
    }


def _id(record: Mapping[str, Any]) -> VersionId:
    return VersionId(record["judge"], record["version"])


def show_differences(folder: Path, reference: str, other: str, *, as_json: bool) -> None:
    """Show tables of the differences between two versions."""
    versions = [registered.find_version(each, folder) for each in (reference, other)]
    one, another = (registered.read_version(version, folder) for version in versions)
    found = version_differences(one, another, folder)
    if as_json:
        cli.emit_json(found)
        return
    for title, values in found.items():
        shown = [
            [key, *(shown_estimate(each) if title == "agreement" else _cell(each) for each in pair)]
            for key, pair in values.items()
        ]
        cli.emit_table(title.capitalize(), ("", *map(str, versions)), shown or [["no difference", "", ""]])


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:,}" if type(value) is int else str(value)


def show_history(folder: Path, *, as_json: bool) -> None:
    """Show every action, oldest first."""
    lines = registered.read_history(folder)
    if as_json:
        cli.emit_json(lines)
        return
    rows = [
        [
            line["time"].replace("+00:00", "Z"),
            str(line["who"]),
            line["action"],
            sentence_of(line),
            str(line.get("why") or ""),
        ]
        for line in lines
    ]
    cli.emit_table("", ("when", "who", "action", "what", "why"), rows, optional=("who",))


def sentence_of(line: Mapping[str, Any]) -> str:
    """Describe an action in a few words."""
    version = f"{line['judge']}@{line['version']}" if line.get("version") else str(line.get("judge"))
    if line["action"] == "tag":
        return f"{version} is {line['tag']}"
    if line["action"] == "rollback":
        return f"{line['tag']}: from {line['judge']}@{line['was']} to {version}"
    return version + (f" {line['what']}" if line.get("what") else "")


# --- MLflow -----------------------------------------------------------------------------------------------------------


def log_version(version: VersionId, folder: Path) -> str:
    """Log a version's settings and measurements to the server of MLFLOW_TRACKING_URI.

    The registry remains authoritative: MLflow gets no weights and no rows.

    Returns:
        The id of the MLflow run.

    Raises:
        UsageError: mlflow is not installed.
        DataError: the server does not respond, or refuses the request.
    """
    try:
        import mlflow
    except ImportError as error:
        raise UsageError(
            f"mlflow is not installed for {sys.executable} ({error}). {version} is registered; install mlflow-skinny, "
            f"then: python manage_judges.py mlflow {version}"
        ) from error
    record = registered.read_version(version, folder)
    config = read_json(registered.folder_of_version(version, folder) / RUN / RUN_RECORD)["config"]
    try:
        mlflow.set_experiment("prmkit")
        with mlflow.start_run(run_name=str(version)) as run:
            mlflow.set_tags({"prmkit.version": str(version), "prmkit.parent": record["parent"] or "none",
                             "prmkit.data": record["conversion_report_sha256"] or "unknown"})  # fmt: skip
            mlflow.log_params({key: value for key, value in config.items() if key not in PLACES})
            mlflow.log_metrics(_mlflow_metrics(version, record, folder))
    except mlflow.exceptions.MlflowException as error:
        raise DataError(
            f"MLflow: {str(error).splitlines()[0]:.300} {version} is registered; once this is fixed, run: "
            f"python manage_judges.py mlflow {version}"
        ) from error
    return str(run.info.run_id)


def _mlflow_metrics(version: VersionId, record: dict[str, Any], folder: Path) -> dict[str, float]:
    estimates = {"spearman": record["spearman"]}
    estimates |= {f"spearman.{name}": estimate for name, estimate in record["types"].items()}
    estimates |= {f"exam.{exam['name']}.auroc": exam["auroc"] for exam in exams_of(version, folder)}
    return {
        name if part == "value" else f"{name}.{part}": float(estimate[part])
        for name, estimate in estimates.items()
        for part in ("value", "low", "high")
        if estimate and estimate.get(part) is not None
    }
