"""Keys that contradict each other; LLaMA Factory finds some of these, one at a time, and others never."""

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest
from complaints import complaint, resolved
from layout import write_config

from prmkit.llamafactory_schema import training_keys
from prmkit.training.contradictions import METRICS_OF, contradictions_in

CONTRADICTIONS = {
    "warmup_ratio=0.1 warmup_steps=10": "takes only the ratio",
    "load_best_model_at_end=true eval_strategy=epoch": "must be equal",
    "load_best_model_at_end=true eval_steps=5 save_steps=8": "multiple of eval_steps",
    "save_strategy=best": "metric_for_best_model",
    "packing=true": "neat_packing",
    "val_size=0.1": "cannot stand beside eval_dataset",
    "eval_dataset= val_size=1.0": "must be below 1",
    "streaming=true dataloader_num_workers=1": "Set max_steps",
    "streaming=true max_steps=5": "Set dataloader_num_workers: 1",
    "streaming=true max_steps=5 max_samples=9 dataloader_num_workers=1": "cannot stand beside streaming",
    "mask_history=true train_on_prompt=true": "cannot stand beside train_on_prompt",
    "interleave_probs=0.5,0.5": "mix_strategy",
    "neat_packing=true flash_attn=fa2": "per_device_train_batch_size: 1",
    "bf16=true fp16=true": "cannot stand beside bf16",
    "use_dora=true finetuning_type=full": "means nothing",
    "quantization_bit=4 finetuning_type=full": "finetuning_type: lora",
    "quantization_bit=4 resize_vocab=true": "quantized model",
    "use_galore=true": "full fine-tuning",
    "deepspeed=nowhere.json": "no file nowhere.json",
    "dataloader_prefetch_factor=2": "dataloader_num_workers",
    "dataloader_persistent_workers=true": "dataloader_num_workers",
    "early_stopping_steps=3": "metric_for_best_model",
    "lr_scheduler_type=reduce_lr_on_plateau eval_strategy=no": "held-out loss",
    "predict_with_generate=true compute_accuracy=true": "cannot stand beside predict_with_generate",
    "export_dir=model": "folder of model_name_or_path",
    "output_dir=./model": "folder of model_name_or_path",
    "output_dir=data": "is the folder of dataset_dir",
    "output_dir=o1/data dataset_dir=o1/data": "is the folder of dataset_dir",
    "output_dir=o1 dataset_dir=o1/data": "holds the folder of dataset_dir",
    "output_dir=o1 model_name_or_path=o1/model": "holds the folder of model_name_or_path",
    "output_dir=.": "the folder that you work in",
    "output_dir=..": "the folder that you work in, or one above it",
    "run_name=data output_dir=run": "run_name (key=value): is the folder of dataset_dir",
    "export_dir=.": "the folder that you work in",
    "export_dir=data": "is the folder of dataset_dir",
    "export_dir=saves/run": "is the folder of output_dir",
    "export_dir=saves": "holds the folder of output_dir",
    "export_dir=saves/x run_name=x": "is the folder of run_name",
    "logging_steps=2.5": "whole number",
    "report_to=all": "all takes every logger",
    "metric_for_best_model=foo": "no evaluation gives 'foo'. Write metric_for_best_model: loss.",
    "metric_for_best_model=accuracy": "no evaluation gives 'accuracy'",
    "metric_for_best_model=loss predict_with_generate=true": "rouge-1 or",
    "eval_on_each_dataset=true load_best_model_at_end=true eval_steps=8": "metric_for_best_model: steps_eval_loss.",
    "eval_on_each_dataset=true lr_scheduler_type=reduce_lr_on_plateau": "metric_for_best_model: steps_eval_loss.",
}


@pytest.mark.parametrize("assignments", CONTRADICTIONS)
def test_contradiction(tmp_path: Path, assignments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_config(tmp_path / "config.yaml")
    told = complaint(path, *assignments.split(" "))
    assert CONTRADICTIONS[assignments] in told
    assert told.startswith(f"{path}: 1 problem (LLaMA Factory")


def test_do_eval_without_held_out_data(tmp_path: Path) -> None:
    path = write_config(tmp_path / "c.yaml", eval_dataset=None, eval_strategy=None, do_eval=True)
    assert "do_eval: there is no held-out data" in complaint(path)


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
    assert contradictions_in({}, training_keys()) == []
