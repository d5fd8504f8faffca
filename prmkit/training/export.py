"""Merge an adapter into its base model with `llamafactory-cli export`, and check the result."""

import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prmkit import __version__
from prmkit.errors import DataError, LlamaFactoryError, UsageError
from prmkit.files import read_json, write_json, write_text
from prmkit.llamafactory_schema import setting, trained_dtype
from prmkit.paths import EXPORT_NOTE, RUN_RECORD, base_model_of, record_of
from prmkit.prompts.encoding import ChatEncoding, limited, load_encoding
from prmkit.training import launcher
from prmkit.training.checkpoints import weights_fault
from prmkit.training.config import render_yaml
from prmkit.training.launcher import diagnose
from prmkit.training.portable import make_portable
from prmkit.training.records import read_record
from prmkit.training.resume import back_up

log = logging.getLogger(__name__)

_PART = ".part"
_LONGEST_ANSWER = 512  # tokens; room for the verdict in the exported model's context, unless the config says more
# The training keys that, apart from the paths, decide which model is merged.
_KEPT_KEYS = (
    "template", "default_system", "enable_thinking", "finetuning_type", "trust_remote_code", "resize_vocab",
    "add_tokens", "add_special_tokens", "rope_scaling", "use_fast_tokenizer", "split_special_tokens", "model_revision",
    "cache_dir", "export_size", "export_device",
)  # fmt: skip


EXPORT_KEYS = ("export_dir", "export_size", "export_device", "infer_dtype")
"""The keys that may be set for an export; all other keys keep the values of the training."""


@dataclass(frozen=True)
class Source:
    """What is exported: the last adapter of a training run, or one of its checkpoints."""

    folder: Path
    record: Mapping[str, Any]
    """The content of `run.json`."""

    @property
    def run(self) -> Path:
        """The training run's folder."""
        record = record_of(self.folder)
        return record.parent if record else self.folder


def find_source(folder: Path) -> Source:
    """Find the adapter of a run folder or checkpoint folder, and its base model, wherever the project is now.

    Raises:
        DataError: it has no complete weights, or no `run.json` next to them; or its base model is missing.
    """
    if fault := weights_fault(folder):
        raise DataError(f"{folder}: {fault}. Train first, or pass a run or checkpoint folder.")
    file = record_of(folder)
    record = read_record(file.parent) if file else None
    if file is None or record is None:
        raise DataError(f"{folder}: no {RUN_RECORD}, so its base model and template are unknown.")
    base = base_model_of(file.parent, record)
    if record["base_model"].get("relative") and not base.is_dir():
        raise DataError(f"{base}: no such folder, but {folder} needs this base model. Move it back.")
    return Source(folder, {**record, "config": {**record["config"], "model_name_or_path": str(base)}})


def check_target(target: Path, source: Source | None = None, *, overwrite: bool) -> bool:
    """Check that an export may be written to a folder; called before training, which would otherwise be wasted.

    Args:
        target: the export folder. An earlier export in it will be renamed.
        source: what will be exported; None if it is not trained yet.
        overwrite: rename the folder, whatever is in it.

    Returns:
        Whether the folder already contains this export.

    Raises:
        UsageError: the folder contains something other than a prmkit export, or is not a folder.
    """
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target} is a file. Set a folder for the export with export_dir=FOLDER.")
    if Path.cwd().is_relative_to(target.resolve()):
        raise UsageError(f"{target} is the current folder. Set another one with export_dir=FOLDER.")
    if overwrite or not _contents(target):
        return False
    if not (target / EXPORT_NOTE).exists():
        raise UsageError(
            f"{target} has files that are not an export. Choose another folder with export_dir=FOLDER, "
            "or rename it with --overwrite."
        )
    note = read_json(target / EXPORT_NOTE)
    if source is None or not isinstance(note, dict) or weights_fault(target):
        return False
    same = {
        "run_id": source.record["id"],
        "adapter": str(source.folder),
        "dtype": export_dtype(source.record["config"]),
    }
    return all(note.get(key) == value for key, value in same.items())


def _contents(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name not in {".gitkeep", _PART}] if folder.is_dir() else []


def export_run(source: Source, target: Path, *, log_path: Path, overwrite: bool = False) -> Path:
    """Merge the adapter into the base model.

    Args:
        source: from `find_source`.
        target: the export folder.
        log_path: LLaMA Factory's output is appended to this file.
        overwrite: rename `target`, whatever is in it; an earlier export is always renamed.

    Returns:
        The export folder.

    Raises:
        UsageError: the folder contains something other than a prmkit export.
        LlamaFactoryError: the export failed, or left no complete model.
        Interrupted: a signal stopped it.
    """
    if check_target(target, source, overwrite=overwrite):
        log.info("%s: already exported.", target)
        return target
    if _contents(target):
        back_up(target)
    part = target / _PART
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    _run_export(source, part, log_path)
    if fault := weights_fault(part):
        raise LlamaFactoryError(f"{target}: LLaMA Factory reported no error, but {fault}. Log: {log_path}")
    config = source.record["config"]
    encoding = _trained_encoding(part, config)
    matches_training = _fix_chat_template(part, encoding, config)
    _set_num_ctx(part / "Modelfile", config)
    # After all other files, because the tokenizer is saved again if its chat template is replaced.
    portable = make_portable(part, encoding.stop_ids, trust_remote_code=bool(config.get("trust_remote_code")))
    write_json(part / EXPORT_NOTE, {**_note(source, matches_training), "portable": portable})
    # The export note (prmkit.json) is moved last, so a folder that has it is complete.
    for path in sorted(part.iterdir(), key=lambda path: path.name == EXPORT_NOTE):
        path.rename(target / path.name)
    part.rmdir()
    return target


def export_values(source: Source, target: Path) -> dict[str, Any]:
    """Build the export YAML's keys from scratch, because LLaMA Factory rejects training keys in it."""
    config = source.record["config"]
    values: dict[str, Any] = {key: config[key] for key in _KEPT_KEYS if config.get(key) is not None}
    values["export_dir"] = str(target)
    values["infer_dtype"] = export_dtype(config)
    if config.get("finetuning_type", "lora") == "lora":
        return {
            "model_name_or_path": config["model_name_or_path"], "adapter_name_or_path": str(source.folder), **values,
        }  # fmt: skip
    return {"model_name_or_path": str(source.folder), **values}


def export_dtype(config: Mapping[str, Any]) -> str:
    """Return the number format of the exported weights: `infer_dtype` if set, otherwise the format of the training.

    By default, LLaMA Factory chooses bfloat16, float16 or float32 according to the machine it exports on.
    """
    if config.get("infer_dtype", "auto") != "auto":
        return str(config["infer_dtype"])
    if trained := trained_dtype(config):
        return trained
    base = read_json(Path(str(config["model_name_or_path"])) / "config.json")
    return str(base.get("dtype") or base.get("torch_dtype") or "float32")


def _run_export(source: Source, part: Path, log_path: Path) -> None:
    yaml_path = log_path.with_suffix(".export.yaml")
    values = export_values(source, part)
    write_text(yaml_path, render_yaml(values))
    begin = log_path.stat().st_size if log_path.exists() else 0
    log.info("Exporting %s; log: %s", source.folder, log_path)
    with launcher.started(launcher.cli_command("export", yaml_path), log_path) as child:
        code = launcher.run_to_end(child, lambda: None, is_saved=lambda: True, patience=lambda: 0.0)
    if code != 0:
        raise LlamaFactoryError(diagnose(log_path, begin, code, values))


def _note(source: Source, matches_training: bool) -> dict[str, Any]:
    record = source.record
    return {
        "prmkit": __version__,
        "run": record["run"],
        "run_id": record["id"],
        "adapter": str(source.folder),
        "base_model": record["base_model"],
        "template": record["template"],
        "default_system": record["default_system"],
        "enable_thinking": record["enable_thinking"],
        "cutoff_len": record["cutoff_len"],
        "dtype": export_dtype(record["config"]),
        "rubrics": record.get("rubrics", []),
        "label_shapes": record.get("label_shapes"),
        "dataset": record.get("dataset"),
        "eval_dataset": record.get("eval_dataset"),
        "chat_template_renders_as_trained": matches_training,
    }


def _set_num_ctx(modelfile: Path, config: Mapping[str, Any]) -> None:
    """Set `num_ctx`, at which Ollama cuts prompts, to what the training allows: LLaMA Factory always writes 4096."""
    context = int(setting(config, "cutoff_len")) + int(config.get("max_new_tokens", _LONGEST_ANSWER))
    text = modelfile.read_text(encoding="utf-8")
    write_text(modelfile, re.sub(r"PARAMETER num_ctx \d+", f"PARAMETER num_ctx {context}", text))


# --- the chat template --------------------------------------------------------------------------------------------

_LONGEST_RENDERING = 10.0  # seconds
_PROBES = ("Judge this step.", '  {"a": [1.5]}\n\n```py\nx\n```\n步骤 état', "x")


def _trained_encoding(folder: Path, config: Mapping[str, Any]) -> ChatEncoding:
    return load_encoding(
        folder,
        config.get("template"),
        default_system=config.get("default_system"),
        enable_thinking=setting(config, "enable_thinking"),
        trust_remote_code=bool(config.get("trust_remote_code")),
    )


def _fix_chat_template(folder: Path, encoding: ChatEncoding, config: Mapping[str, Any]) -> bool:
    """Make the exported tokenizer's chat template render a prompt exactly as training rendered it.

    LLaMA Factory exports the base model's chat template, whatever template it trained with.

    Returns:
        Whether it now does. If not, a warning says how to prompt the model.
    """
    from transformers import AutoTokenizer

    trust = bool(config.get("trust_remote_code"))
    tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust)
    for candidate in _candidates(tokenizer.chat_template, encoding):
        if _renders_as_in_training(tokenizer, candidate, encoding):
            if candidate != tokenizer.chat_template:
                tokenizer.chat_template = candidate
                tokenizer.save_pretrained(str(folder))
                log.info(
                    "The export's chat template now renders prompts as the template '%s' did in training.",
                    config.get("template"),
                )
            return True
    log.warning(
        "The export's chat template does not render prompts as in training. Use LLaMA Factory's template %s instead.",
        config.get("template"),
    )
    return False


def _candidates(exported: str | None, encoding: ChatEncoding) -> list[str]:
    own = [exported, "{%- set enable_thinking = false -%}" + exported] if exported else []
    return [*own, *_llamafactory_template(encoding), _one_turn_template(encoding)]


def _llamafactory_template(encoding: ChatEncoding) -> list[str]:
    try:
        return [encoding.template._get_jinja_template(encoding.tokenizer)]
    except ValueError:
        return []  # some of its templates cannot be written in Jinja


def _one_turn_template(encoding: ChatEncoding) -> str:
    """Make a chat template for one user turn from a rendered prompt."""
    sentinel = "Vq7mark"
    before, _, after = encoding.tokenizer.decode(encoding.prompt_ids(sentinel)).partition(sentinel)
    return f"{{{{ {json.dumps(before)} + messages[-1]['content'] + {json.dumps(after)} }}}}"


def _renders_as_in_training(tokenizer: Any, chat_template: str, encoding: ChatEncoding) -> bool:
    from jinja2 import TemplateError

    try:
        # A chat template is a program from the internet: it may loop for days.
        with limited("chat template", seconds=_LONGEST_RENDERING):
            rendered = [
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": probe}], chat_template=chat_template, add_generation_prompt=True,
                    tokenize=True, return_dict=False,
                )
                for probe in _PROBES
            ]  # fmt: skip
    except (TemplateError, DataError):
        return False
    return rendered == [encoding.prompt_ids(probe) for probe in _PROBES]
