"""Write the model card: `README.md` next to the weights, for people who do not know this project."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from prmkit.files import write_text
from prmkit.intervals import format_estimate
from prmkit.rows import EVALUATION_TYPES

CARD = "README.md"
_GRADES = {"useful": "yes", "weak": "with care", "not_useful": "no", "unknown": "unknown"}
_SETTINGS = (
    "finetuning_type", "lora_rank", "lora_alpha", "lora_target", "learning_rate", "num_train_epochs", "max_steps",
    "cutoff_len", "template", "seed",
)  # fmt: skip


def write_model_card(folder: Path, record: Mapping[str, Any], metrics: Mapping[str, Any] | None = None) -> None:
    """Write the model card of a training run or an export, replacing a card from the trainer.

    Args:
        folder: `saves/<run>` or the export; it must exist.
        record: the content of the run's `run.json`; what it lacks is left out of the card.
        metrics: the content of the run's `evaluation/metrics.json`; None if the judge was not measured.
    """
    write_text(folder / CARD, model_card(record, metrics, merged=not (folder / "adapter_config.json").is_file()))


def model_card(record: Mapping[str, Any], metrics: Mapping[str, Any] | None, *, merged: bool) -> str:
    """Return the card as Markdown, with the YAML header that model hubs read.

    Args:
        record: see `write_model_card`.
        metrics: see `write_model_card`.
        merged: whether the folder contains a complete model, not an adapter.
    """
    sections = [
        _header(record, merged),
        f"# {_inline(record.get('run') or 'Process reward model')}\n",
        "A judge of AI agents' work, trained to score as strong LLM judges do, from 0 (bad) to 1 (good)"
        f"{_types(metrics)}.\n",
        "## Agreement with the judges\n",
        *_agreement(metrics),
        "## Training\n",
        *_training(record),
        "## How to use it\n",
        *_usage(merged),
        "## Limits\n",
        *_limits(metrics),
    ]
    return "\n".join(sections)


def _types(metrics: Mapping[str, Any] | None) -> str:
    """Describe the evaluation types that were measured."""
    measured = metrics["summary"]["types"] if metrics else {}
    known = [f"{each.meaning} (`{name}`)" for name, each in EVALUATION_TYPES.items() if name in measured]
    return f": {', '.join(known)}" if known else ""


def _header(record: Mapping[str, Any], merged: bool) -> str:
    base = _base_model(record)
    fields: dict[str, Any] = {"library_name": "transformers" if merged else "peft", "pipeline_tag": "text-generation"}
    # A local path is not the name of a model on a hub, which would render it as a broken link.
    if base and not Path(base).exists() and base.count("/") == 1 and not base.startswith((".", "/", "~")):
        fields["base_model"] = base
    fields["tags"] = ["process-reward-model", "llm-as-a-judge", "llama-factory"]
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---\n"


def _base_model(record: Mapping[str, Any]) -> str:
    base = record.get("base_model") or {}
    return str(base.get("name") or base.get("path") or "")


def _agreement(metrics: Mapping[str, Any] | None) -> Iterator[str]:
    if metrics is None:
        yield "Not measured yet. Run `python evaluate_judge.py --run RUN`, which writes the numbers here.\n"
        return
    held_out, summary = metrics["held_out"], metrics["summary"]
    yield (
        f"{_inline(summary['headline'])} Measured on {held_out['prompts_evaluated']} held-out prompts of "
        f"{held_out['tasks_evaluated']} tasks that were not used in training, against the mean of "
        f"{_inline(', '.join(held_out['judges']))}. In brackets: 95 % intervals.\n"
    )
    yield "| scores of | use it? | Spearman | AUROC, step below 0.5 | RMSE | MAE |"
    yield "|---|---|---|---|---|---|"
    for evaluation_type, of_type in summary["types"].items():
        cells = [format_estimate(of_type[name]) for name in ("spearman", "auroc", "rmse", "mae")]
        grade = _GRADES.get(of_type["grade"], of_type["grade"])
        yield f"| {_inline(evaluation_type)} | {grade} | {' | '.join(cells)} |"
    yield ""
    for evaluation_type, of_type in summary["types"].items():
        yield f"- **{_inline(evaluation_type)}**: {_inline(of_type['headline'])}"
    yield ""


def _training(record: Mapping[str, Any]) -> Iterator[str]:
    config = record.get("config") or {}
    dataset, held_out = (record.get(name) or {} for name in ("dataset", "eval_dataset"))
    facts = {
        "base model": _base_model(record),
        "dataset": dataset.get("name"),
        "dataset SHA-256": dataset.get("sha256"),
        "held-out dataset": held_out.get("name"),
        **{name: config.get(name) for name in _SETTINGS},
        "steps": record.get("steps"),
        "last training loss": record.get("train_loss"),
        "held-out loss": record.get("eval_loss"),
        **{f"{name} version": version for name, version in (record.get("versions") or {}).items()},
    }
    for name, value in facts.items():
        if value not in (None, "", [], {}):
            yield f"- {name}: `{_code(value)}`"
    yield ""


def _usage(merged: bool) -> Iterator[str]:
    where = "--model THIS_FOLDER" if merged else "--run THIS_FOLDER"
    yield f"```bash\npython score_trajectories.py {where} steps.jsonl --output scores.jsonl\n```\n"
    yield (
        "The score is the expected value of 0.00 … 1.00 under the model's probabilities at the score's position. "
        "Use the template and system prompt of its training, which are in this folder's `prmkit.json` or `run.json`."
        "\n"
    )


def _limits(metrics: Mapping[str, Any] | None) -> Iterator[str]:
    yield "- It imitates the judges it was trained on, including the mistakes they share. It does not know the truth."
    yield "- It was measured on tasks like its training tasks. On other agents, tools or languages, measure again."
    yield "- As a reward it will be optimised against: watch runs whose score rises while the outcome does not."
    for line in (metrics or {}).get("summary", {}).get("warnings", []):
        yield f"- {_inline(line)}"
    yield ""


def _inline(text: object) -> str:
    """Escape an untrusted string for use within a line, so that it opens no HTML, table cell, link or heading."""
    escaped = "".join(f"\\{letter}" if letter in "\\`*_[]|" else letter for letter in " ".join(str(text).split()))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _code(value: object) -> str:
    return " ".join(str(value).split()).replace("`", "'")
