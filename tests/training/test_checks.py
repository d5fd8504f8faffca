"""Keys that contradict each other; LLaMA Factory finds some of these, one at a time, and others never."""

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest
from complaints import complaint, resolved
from layout import write_config

from prmkit.training.checks import METRICS_OF, check_conflicts

CONTRADICTIONS = {
    "warmup_ratio=0.1 warmup_steps=10": "uses only the ratio",
    "save_strategy=best": "metric_for_best_model",
    "packing=true": "neat_packing",
    "eval_dataset= val_size=1.0": "must be below 1",
    "streaming=true max_steps=5": "Set dataloader_num_workers: 1",
    "neat_packing=true flash_attn=fa2": "per_device_train_batch_size: 1",
    "torch_compile=true enable_liger_kernel=true": "Remove torch_compile",
    "deepspeed=nowhere.json": "no file nowhere.json",
    "dataloader_persistent_workers=true": "dataloader_num_workers",
    "early_stopping_steps=3": "metric_for_best_model",
    "export_dir=model": "folder of model_name_or_path",
    "output_dir=./model": "folder of model_name_or_path",
    "output_dir=data": "is the folder of dataset_dir",
    "output_dir=o1/data dataset_dir=o1/data": "is the folder of dataset_dir",
    "output_dir=o1 dataset_dir=o1/data": "contains the folder of dataset_dir",
    "output_dir=o1 model_name_or_path=o1/model": "contains the folder of model_name_or_path",
    "output_dir=.": "is the current folder",
    "output_dir=..": "is the current folder, or one above it",
    "run_name=data output_dir=run": "run_name (key=value): is the folder of dataset_dir",
    "export_dir=.": "is the current folder",
    "export_dir=data": "is the folder of dataset_dir",
    "export_dir=saves/run": "is the folder of output_dir",
    "export_dir=saves": "contains the folder of output_dir",
    "export_dir=saves/x run_name=x": "is the folder of run_name",
    "report_to=all": "all uses every installed logger",
    "metric_for_best_model=foo": "'foo' is not computed in evaluation. Write metric_for_best_model: loss.",
    "metric_for_best_model=accuracy": "'accuracy' is not computed in evaluation",
    "metric_for_best_model=loss predict_with_generate=true": "rouge-1 or",
    "eval_on_each_dataset=true load_best_model_at_end=true eval_steps=8": "metric_for_best_model: steps_eval_loss.",
    "eval_on_each_dataset=true lr_scheduler_type=reduce_lr_on_plateau": "metric_for_best_model: steps_eval_loss.",
}


@pytest.mark.parametrize("assignments", CONTRADICTIONS)
def test_contradiction(tmp_path: Path, assignments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_config(tmp_path / "config.yaml")
    reported = complaint(path, *assignments.split(" "))
    assert CONTRADICTIONS[assignments] in reported
    assert reported.startswith(f"{path}: 1 error (LLaMA Factory")


def test_what_goes_together(tmp_path: Path) -> None:
    path = write_config(tmp_path / "config.yaml")
    for assignments in (
        "load_best_model_at_end=true eval_steps=4 save_steps=8",
        "neat_packing=true",
        "early_stopping_steps=3 load_best_model_at_end=true eval_steps=8",
        "eval_dataset= val_size=1",
        "use_swanlab=true report_to=[swanlab]",
        "streaming=true max_steps=5 dataloader_num_workers=1",
        "export_dir=saves/run/export",
        "run_name=run output_dir=saves/run",
        "output_dir=saves",
        "use_swanlab=true report_to=all",
        "metric_for_best_model=accuracy compute_accuracy=true",
        "metric_for_best_model=eval_loss",
        "metric_for_best_model=eval_steps_eval_loss eval_on_each_dataset=true",
        "metric_for_best_model=foo eval_strategy=no",
    ):
        resolved(path, *assignments.split(" "))


def test_metrics_are_those_that_llama_factory_measures() -> None:
    source = Path(find_spec("llamafactory").origin).parent / "train" / "sft" / "metric.py"  # type: ignore[union-attr,arg-type]
    nodes = [node for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.Assign)]
    tables = [ast.literal_eval(node.value) for node in nodes if ast.unparse(node.targets[0]) == "self.score_dict"]
    assert sorted(tuple(table) for table in tables) == sorted(METRICS_OF.values())


def test_nothing_contradicts_itself_by_default() -> None:
    """The defaults of LLaMA Factory alone give no cause for complaint."""
    assert check_conflicts({}) == []
