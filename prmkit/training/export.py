"""Merge an adapter into its base model by `llamafactory-cli export`, and check what came out."""

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
from prmkit.prompts.encoding import ChatEncoding, load_encoding
from prmkit.training import launcher
from prmkit.training.config import render_yaml
from prmkit.training.launcher import diagnose
from prmkit.training.records import RECORD, read_record
from prmkit.training.resume import back_up, weights_fault

log = logging.getLogger(__name__)

NOTE = "prmkit.json"
"""Written last: an export folder without it is not whole."""

_PART = ".part"
_LONGEST_ANSWER = 512  # tokens; what the exported model's context leaves for a verdict unless the config says more
# What, besides the paths, makes the model that is merged the model that was trained.
_KEPT_KEYS = (
    "template", "default_system", "enable_thinking", "finetuning_type", "trust_remote_code", "resize_vocab",
    "add_tokens", "add_special_tokens", "rope_scaling", "use_fast_tokenizer", "split_special_tokens", "model_revision",
    "cache_dir", "export_size", "export_device",
)  # fmt: skip


EXPORT_KEYS = ("export_dir", "export_size", "export_device", "infer_dtype")
"""What may be said of an export; all else is as it was trained."""


@dataclass(frozen=True)
class Source:
    """What is exported: the last adapter of a run, or one of its checkpoints."""

    folder: Path
    record: Mapping[str, Any]
    """The run's `run.json`."""

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.folder if (self.folder / RECORD).exists() else self.folder.parent


def find_source(folder: Path) -> Source:
    """Find what a run folder or checkpoint folder holds.

    Raises:
        DataError: there are no whole weights there, or no `run.json` beside them.
    """
    if fault := weights_fault(folder):
        raise DataError(f"{folder}: {fault}. Train first, or name a run or checkpoint folder.")
    record = read_record(folder) or read_record(folder.parent)
    if record is None:
        raise DataError(f"{folder}: no run.json there, so its base model and template are not known.")
    return Source(folder, record)


def check_target(target: Path, source: Source | None = None, *, overwrite: bool) -> bool:
    """See whether an export may be written to a folder; done before a training whose export would fail for it.

    Args:
        target: the export folder. An earlier export in it will be moved aside.
        source: what will be exported; None when it is not trained yet.
        overwrite: whatever is in it will be moved aside.

    Returns:
        Whether just this export is there already.

    Raises:
        UsageError: the folder holds something that is no export of ours, or is no folder.
    """
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target}: is a file. Name a folder for the export with export_dir=FOLDER.")
    if Path.cwd().is_relative_to(target.resolve()):
        raise UsageError(f"{target}: is the folder that this was started in. Name another with export_dir=FOLDER.")
    if overwrite or not _contents(target):
        return False
    if not (target / NOTE).exists():
        raise UsageError(
            f"{target}: holds files that are no export. Export elsewhere with export_dir=FOLDER, or move them aside: "
            "--overwrite."
        )
    note = read_json(target / NOTE)
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
        log_path: what LLaMA Factory prints is appended there.
        overwrite: move what stands in `target` aside, whatever it is; an earlier export is moved aside in any case.

    Returns:
        The export folder.

    Raises:
        UsageError: the folder holds something that is no export of ours.
        LlamaFactoryError: the export failed, or did not leave a whole model.
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
        raise LlamaFactoryError(f"{target}: LLaMA Factory ended without an error, but {fault}. Its log: {log_path}")
    renders_alike = _fit_chat_template(part, source.record["config"])
    _fit_context(part / "Modelfile", source.record["config"])
    write_json(part / NOTE, _note(source, renders_alike))
    # The note has a name of its own kind, so it is moved last.
    for path in sorted(part.iterdir(), key=lambda path: path.name == NOTE):
        path.rename(target / path.name)
    part.rmdir()
    return target


def export_values(source: Source, target: Path) -> dict[str, Any]:
    """The keys of the export YAML. It is built from scratch: LLaMA Factory refuses training keys in it."""
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
    """The number format of the exported weights: `infer_dtype` where it is set, else the one that was trained in.

    Left to itself, LLaMA Factory takes bfloat16, float16 or float32 by the machine that it exports on.
    """
    if config.get("infer_dtype", "auto") != "auto":
        return str(config["infer_dtype"])
    if config.get("bf16") or config.get("pure_bf16"):
        return "bfloat16"
    if config.get("fp16"):
        return "float16"
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


def _note(source: Source, renders_alike: bool) -> dict[str, Any]:
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
        "chat_template_renders_as_trained": renders_alike,
    }


def _fit_context(modelfile: Path, config: Mapping[str, Any]) -> None:
    """Ollama cuts prompts at `num_ctx`, which LLaMA Factory always writes as 4096."""
    context = int(config.get("cutoff_len", 2048)) + int(config.get("max_new_tokens", _LONGEST_ANSWER))
    text = modelfile.read_text(encoding="utf-8")
    write_text(modelfile, re.sub(r"PARAMETER num_ctx \d+", f"PARAMETER num_ctx {context}", text))


# --- the chat template --------------------------------------------------------------------------------------------

_PROBES = ("Judge this step.", '  {"a": [1.5]}\n\n```py\nx\n```\n步骤 état', "x")


def _fit_chat_template(folder: Path, config: Mapping[str, Any]) -> bool:
    """Make the exported tokenizer's chat template render a prompt exactly as training rendered it.

    LLaMA Factory exports the base model's chat template, whatever template it trained with.

    Returns:
        Whether it does now. If not, a warning says how to prompt the model.
    """
    from transformers import AutoTokenizer

    trust = bool(config.get("trust_remote_code"))
    encoding = load_encoding(
        folder,
        config.get("template"),
        default_system=config.get("default_system"),
        enable_thinking=config.get("enable_thinking", True),
        trust_remote_code=trust,
    )
    tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust)
    for candidate in _candidates(tokenizer.chat_template, encoding):
        if _renders_as_trained(tokenizer, candidate, encoding):
            if candidate != tokenizer.chat_template:
                tokenizer.chat_template = candidate
                tokenizer.save_pretrained(str(folder))
                log.info(
                    "The chat template of the export now renders what the template '%s' trained.",
                    config.get("template"),
                )
            return True
    log.warning(
        "The chat template of the export does not render what was trained. Use it with LLaMA Factory's template: %s",
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
        return []  # some of its templates cannot be said in Jinja


def _one_turn_template(encoding: ChatEncoding) -> str:
    """A chat template for one user turn, cut out of a rendered prompt."""
    sentinel = "Vq7mark"
    before, _, after = encoding.tokenizer.decode(encoding.prompt_ids(sentinel)).partition(sentinel)
    return f"{{{{ {json.dumps(before)} + messages[-1]['content'] + {json.dumps(after)} }}}}"


def _renders_as_trained(tokenizer: Any, chat_template: str, encoding: ChatEncoding) -> bool:
    from jinja2 import TemplateError

    try:
        return all(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": probe}], chat_template=chat_template, add_generation_prompt=True,
                tokenize=True, return_dict=False,
            ) == encoding.prompt_ids(probe)
            for probe in _PROBES
        )  # fmt: skip
    except TemplateError:
        return False
