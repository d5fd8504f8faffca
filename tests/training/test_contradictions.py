"""Keys that contradict each other; LLaMA Factory finds some of these, one at a time, and others never."""

from pathlib import Path

import pytest
from complaints import complaint, resolved
from layout import write_config

from prmkit.training.contradictions import contradictions_in
from prmkit.training.schema import training_keys

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
    "logging_steps=2.5": "whole number",
}


@pytest.mark.parametrize("assignments", CONTRADICTIONS)
def test_contradiction(tmp_path: Path, assignments: str) -> None:
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
    ):
        resolved(path, *assignments.split(" "))


def test_nothing_contradicts_itself_by_default() -> None:
    """The defaults of LLaMA Factory alone give no cause for complaint."""
    assert contradictions_in({}, training_keys()) == []
