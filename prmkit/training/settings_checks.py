"""Settings that LLaMA Factory takes and that do something else than one would think; none of them stops a run."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prmkit.training.check import Check, error, warning
from prmkit.training.runs import read_record

NAME = "settings"


def check_settings(values: Mapping[str, Any]) -> list[Check]:
    """One check for each setting that deserves a word; nothing when there is none."""
    return [*_resuming(values), *_said_differently(values), *_schedule(values), *_method(values)]


def _resuming(values: Mapping[str, Any]) -> Iterator[Check]:
    path = values.get("resume_from_checkpoint")
    if isinstance(path, str) and not (Path(path) / "trainer_state.json").is_file() and not _went_on_from(Path(path)):
        there = sorted(str(found.parent) for found in Path(path).parent.glob("checkpoint-*/trainer_state.json"))
        advice = f"There are: {', '.join(there)}" if there else "Leave it out: the newest whole checkpoint is found."
        yield error(NAME, f"resume_from_checkpoint: {path} is no whole checkpoint", advice)
    adapter = values.get("adapter_name_or_path")
    for folder in adapter.split(",") if isinstance(adapter, str) else ():
        if not (Path(folder.strip()) / "adapter_config.json").is_file():
            yield error(
                NAME, f"adapter_name_or_path: no adapter in {folder}", "Name a folder with adapter_config.json."
            )


def _went_on_from(checkpoint: Path) -> bool:
    """Whether the run beside it went on from this checkpoint before LLaMA Factory removed it as one too old."""
    record = read_record(checkpoint.parent)
    return record is not None and str(checkpoint) in record["resumed_from"]


def _said_differently(values: Mapping[str, Any]) -> Iterator[Check]:
    if "warmup_ratio" in values:
        advice = f"Write warmup_steps: {values['warmup_ratio']} (below 1 it is a share of the run)."
        yield warning(NAME, "warmup_ratio is going away", advice)
    if "logging_dir" in values:
        yield warning(NAME, "logging_dir does nothing", "TensorBoard's folder is set by TENSORBOARD_LOGGING_DIR.")
    if values.get("overwrite_cache"):
        found = "overwrite_cache tokenises everything again at every start; changed files are noticed without it"
        yield warning(NAME, found, "Leave it out.")
    if "tokenized_path" in values and Path(str(values["tokenized_path"])).exists():
        found = f"tokenized_path: the rows in {values['tokenized_path']} are used, whatever dataset and template say"
        yield warning(NAME, found, "Leave it out, or name a new folder.")
    if values.get("overwrite_output_dir"):
        found = "overwrite_output_dir keeps the old run's checkpoints, and a later resume may pick one of them"
        yield warning(NAME, found, "Leave it out; train.py --overwrite moves the old run aside.")


def _schedule(values: Mapping[str, Any]) -> Iterator[Check]:
    rate = values.get("learning_rate", 5e-5)
    full = values.get("finetuning_type", "lora") in ("full", "freeze")
    usual = 1e-4 if full else 5e-3
    if rate > usual:
        kind = "full fine-tuning" if full else "LoRA"
        yield warning(NAME, f"learning_rate {rate:g} is high for {kind}", f"Usual is {1e-5 if full else 1e-4:g}.")
    if values.get("max_steps", -1) > 0 and "num_train_epochs" in values:
        found = f"max_steps: {values['max_steps']} ends the run, whatever num_train_epochs says"
        yield warning(NAME, found, "Leave one of them out.")
    if values.get("torch_compile"):
        yield warning(NAME, "torch_compile compiles anew for every length of row", "Leave it out.")
    if values.get("max_samples"):
        found = f"max_samples: only the first {values['max_samples']} rows of each dataset are used, held-out rows too"
        yield warning(NAME, found, "Leave it out for a real run.")


def _method(values: Mapping[str, Any]) -> Iterator[Check]:
    if values.get("neftune_noise_alpha"):
        yield warning(NAME, "neftune_noise_alpha adds noise that helps chatting, not scores", "Leave it out.")
    if values.get("stage", "sft") != "sft":
        found = f"stage: {values['stage']} learns something else than to write verdicts"
        yield warning(NAME, found, "Write stage: sft.")
    if values.get("train_on_prompt"):
        yield warning(NAME, "train_on_prompt learns to write prompts, not only verdicts", "Leave it out.")
