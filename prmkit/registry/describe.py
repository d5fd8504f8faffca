"""Versions as a person reads them: list, show, diff, history."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prmkit import cli, registered
from prmkit.files import read_json
from prmkit.registered import DATA, RUN, VersionId

_COLUMNS = ("version", "tags", "Spearman", "exams", "rows", "MB", "changed", "added")


def list_versions(folder: Path, *, as_json: bool) -> None:
    """All versions, oldest first, with what each changed against its parent."""
    state = registered.state_of(registered.read_history(folder))
    records = [(version, registered.read_version(version, folder)) for version in state.versions]
    if as_json:
        cli.emit_json([_summary(record) | {"tags": state.tags_of(version)} for version, record in records])
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
            str(len(record["exams"])),
            "?" if record["training_rows"] is None else f"{record['training_rows']:,}",
            f"{record['bytes'] / 1e6:.1f}",
            _changed(record, known.get(str(record["parent"])), folder),
            record["created"][:10],
        ]
        for version, record in records
    ]
    cli.emit_table("", _COLUMNS, rows, numeric=("rows", "MB", "exams"), optional=("MB", "exams", "added", "changed"))


def _summary(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != "files"}


def shown_estimate(estimate: Mapping[str, Any] | None) -> str:
    """`0.84 [0.72, 0.90]`; a question mark for what was not measured."""
    if not estimate or estimate.get("value") is None:
        return "?"
    if estimate.get("low") is None:
        return f"{estimate['value']:.2f}"
    return f"{estimate['value']:.2f} [{estimate['low']:.2f}, {estimate['high']:.2f}]"


def _changed(record: Mapping[str, Any], parent: Mapping[str, Any] | None, folder: Path) -> str:
    if parent is None:
        return ""
    found = differences(record, parent, folder)
    return ", ".join([*found["settings"], *(["data"] if found["data"] else [])]) or "nothing"


def show_version(folder: Path, reference: str, *, as_json: bool) -> None:
    """One version, after its files were checked.

    Raises:
        DataError: a file was changed.
    """
    version = registered.find_version(reference, folder)
    registered.check_files(version, folder)
    record = registered.read_version(version, folder)
    state = registered.state_of(registered.read_history(folder))
    tags = state.tags_of(version)
    if as_json:
        cli.emit_json({**record, "tags": tags})
        return
    rows = [
        ("tags", ", ".join(tags) or "none"),
        ("added", record["created"]),
        ("parent", record["parent"] or "none"),
        ("trained in", record["run"]),
        ("base model", record["base_model"]),
        ("training rows", "not known" if record["training_rows"] is None else f"{record['training_rows']:,}"),
        ("Spearman", shown_estimate(record["spearman"])),
        *((f"  {name}", shown_estimate(estimate)) for name, estimate in record["types"].items()),
        *((f"exam {exam['name']}", str(exam["headline"] or "")) for exam in record["exams"]),
        ("rubrics", ", ".join(each[:12] for each in record["rubrics"]) or "none"),
        ("files", f"{len(record['files'])}, all as they were added"),
        ("folder", str(registered.folder_of_version(version, folder))),
    ]
    cli.emit_table(str(version), ("", " "), [list(row) for row in rows])


def differences(record: Mapping[str, Any], other: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What two versions differ in.

    Returns:
        `settings`: by key the two values; `data`: by figure of the conversion the two values; `agreement`: by
        evaluation type the two estimates.
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


_PLACES = {"output_dir", "dataset_dir", "export_dir", "adapter_name_or_path", "swanlab_run_name", "run_name"}
"""Settings that say where something is, not what is trained."""


def _config(record: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    run = registered.folder_of_version(_id(record), folder) / RUN
    config = read_json(run / "run.json")["config"]
    found = {key: value for key, value in config.items() if key not in _PLACES}
    return found | {"starts from": "an adapter" if config.get("adapter_name_or_path") else "the base model"}


def _data(record: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    file = registered.folder_of_version(_id(record), folder) / DATA / "conversion_report.json"
    if not file.is_file():
        return {"conversion": "not known"}
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
    """Tables of what two versions differ in."""
    versions = [registered.find_version(each, folder) for each in (reference, other)]
    one, another = (registered.read_version(version, folder) for version in versions)
    found = differences(one, another, folder)
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
    """Every action, oldest first."""
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
    """What an action did, in a few words."""
    version = f"{line['judge']}@{line['version']}" if line.get("version") else str(line.get("judge"))
    if line["action"] == "tag":
        return f"{version} is {line['tag']}"
    if line["action"] == "rollback":
        return f"{line['tag']}: from {line['judge']}@{line['was']} to {version}"
    return version + (f" {line['what']}" if line.get("what") else "")


def show_retraining(result: Mapping[str, Any]) -> None:
    """What a retraining found, trained and decided."""
    for sentence in (result["report"] or {}).get("findings", []):
        cli.emit(f"new rows: {sentence}")
    if result["version"]:
        cli.emit(f"{result['version']}: registered; its parent is {result['parent']}.")
    else:
        cli.emit(f"Nothing was trained: {result['parent']} stays as it is.")
    cli.emit("gate: met" if result["gate"]["passed"] else "gate: not met")
    for reason in result["gate"]["reasons"]:
        cli.emit(f"  {reason}")
    if result["promoted"]:
        cli.emit(f"{result['version']}: has the tag now.")
    elif result["gate"]["passed"]:
        cli.emit(f"next: python manage_judges.py tag {result['version']} production")
