"""A registered version as an MLflow run, for teams that compare models there."""

import sys
from pathlib import Path
from typing import Any

from prmkit import registered
from prmkit.errors import DataError, UsageError
from prmkit.files import read_json
from prmkit.registered import RUN, VersionId
from prmkit.registry.describe import PLACES, exams_of

EXPERIMENT = "prmkit"


def log_version(version: VersionId, folder: Path) -> str:
    """Log a version's settings and measurements to the server of MLFLOW_TRACKING_URI.

    The registry remains authoritative: MLflow gets no weights and no rows.

    Returns:
        The id of MLflow's run.

    Raises:
        UsageError: mlflow is not installed.
        DataError: the server does not answer, or refuses the request.
    """
    try:
        import mlflow
    except ImportError as error:
        raise UsageError(
            f"mlflow is not installed for {sys.executable} ({error}). {version} is registered; install mlflow-skinny, "
            f"then: python manage_judges.py mlflow {version}"
        ) from error
    record = registered.read_version(version, folder)
    config = read_json(registered.folder_of_version(version, folder) / RUN / "run.json")["config"]
    try:
        mlflow.set_experiment(EXPERIMENT)
        with mlflow.start_run(run_name=str(version)) as run:
            mlflow.set_tags({"prmkit.version": str(version), "prmkit.parent": record["parent"] or "none",
                             "prmkit.data": record["conversion_report_sha256"] or "not known"})  # fmt: skip
            mlflow.log_params({key: value for key, value in config.items() if key not in PLACES})
            mlflow.log_metrics(_metrics(version, record, folder))
    except mlflow.exceptions.MlflowException as error:
        raise DataError(
            f"MLflow: {str(error).splitlines()[0]:.300} {version} is registered; once this is fixed, run: "
            f"python manage_judges.py mlflow {version}"
        ) from error
    return str(run.info.run_id)


def _metrics(version: VersionId, record: dict[str, Any], folder: Path) -> dict[str, float]:
    estimates = {"spearman": record["spearman"]}
    estimates |= {f"spearman.{name}": estimate for name, estimate in record["types"].items()}
    estimates |= {f"exam.{exam['name']}.auroc": exam["auroc"] for exam in exams_of(version, folder)}
    return {
        name if part == "value" else f"{name}.{part}": float(estimate[part])
        for name, estimate in estimates.items()
        for part in ("value", "low", "high")
        if estimate and estimate.get(part) is not None
    }
