"""A scored prompt has the token ids of a trained one: rows with and without a `system` column."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from prmkit.prompts.encoding import load_encoding
from prmkit.prompts.truncation import trim_prompt

PROMPT, ANSWER = "Judge this step: the agent searched.", '{"a_score": 0.50, "summary": "Fine."}'
SYSTEMS = (None, "", "Be strict.", "Be kind.\n\nAnswer in JSON.")


def trained_ids(model: Path, folder: Path, template: str, default_system: str | None) -> list[tuple[list[int], int]]:
    """LLaMA Factory's own token ids of one row for each of `SYSTEMS`, and how many of them are the prompt's."""
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    rows = [{"instruction": PROMPT, "input": "", "output": ANSWER, "system": system} for system in SYSTEMS]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    columns = {"prompt": "instruction", "query": "input", "response": "output", "system": "system"}
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.jsonl", "columns": columns}}))
    arguments = {
        "model_name_or_path": str(model),
        "dataset": "rows",
        "dataset_dir": str(folder),
        "template": template,
        "cutoff_len": 10_000,
        "cache_dir": str(folder / "cache"),
        "output_dir": str(folder / "output"),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "use_cpu": True,
    }
    if default_system is not None:
        arguments["default_system"] = default_system
    model_args, data_args, training_args, _, _ = get_train_args(arguments)
    loaded = load_tokenizer(model_args)
    made = get_template_and_fix_tokenizer(loaded["tokenizer"], data_args)
    written: Any = get_dataset(made, model_args, data_args, training_args, stage="sft", **loaded)["train_dataset"]
    return [(list(row["input_ids"]), row["labels"].count(-100)) for row in written]


@pytest.mark.parametrize(
    ("template", "default_system"),
    [("qwen", None), ("qwen3", None), ("llama3", None), ("mistral", None), ("gemma", None), ("qwen", "You judge.")],
)
def test_a_system_column_is_encoded_as_llamafactory_does(
    tiny_model: Path, tmp_path: Path, template: str, default_system: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llamafactory.data.template import TEMPLATES

    # LLaMA Factory writes the system text into its registry, where later tests of this process would find it.
    monkeypatch.setitem(TEMPLATES, template, copy.deepcopy(TEMPLATES[template]))
    encoding = load_encoding(tiny_model, template, default_system=default_system)
    trained = trained_ids(tiny_model, tmp_path, template, default_system)
    assert len({tuple(ids) for ids, _ in trained}) == 3, "None and an empty column leave the default system"
    for system, (ids, prompt_length) in zip(SYSTEMS, trained, strict=True):
        prompt_ids, answer_ids = encoding.pair_ids(PROMPT, ANSWER, system)
        assert prompt_ids + answer_ids == ids
        assert prompt_ids == encoding.prompt_ids(PROMPT, system) == ids[:prompt_length]
        assert encoding.opened_ids(PROMPT, ANSWER, system) == ids[: len(encoding.opened_ids(PROMPT, ANSWER, system))]


def test_the_system_text_counts_towards_the_room_and_stays(tiny_model: Path) -> None:
    encoding = load_encoding(tiny_model, "qwen")
    prompt = f"Judge.\n\n{'some step. ' * 500}\n\nRate it from 0 to 1."
    rubric = "Be strict. " * 100
    longer = trim_prompt(prompt, encoding, 900)
    shorter = trim_prompt(prompt, encoding, 900, rubric)
    assert longer and shorter
    assert shorter.characters_left_out > longer.characters_left_out
    assert shorter.tokens == len(encoding.prompt_ids(shorter.text, rubric)) <= 900
    assert trim_prompt(prompt, encoding, 100, rubric) is None


def test_of_a_run_in_steps_the_judged_step_is_shortened_first(tiny_model: Path) -> None:
    encoding = load_encoding(tiny_model, "qwen")
    steps = [f'<step n="{n}">\nBEGIN{n} {"it searched again " * 150} END{n}\n</step>\n' for n in (1, 2, 3)]
    prompt = "Rubric.\n\n<task>\nFind it.\n</task>\n" + "".join(steps) + '\nJudge step 3.\n{"a_score": 0.5}'
    tokens = len(encoding.prompt_ids(prompt))
    for room, shortened in ((tokens - 60, 1), (tokens // 3, 2)):
        trimmed = trim_prompt(prompt, encoding, room)
        assert trimmed and trimmed.text.count("characters left out here") == shortened
        assert "left out here" in trimmed.text.partition('<step n="3">')[2]
        for kept in ("Rubric.", "Find it.", "BEGIN1", "BEGIN3", "END3", "Judge step 3."):
            assert kept in trimmed.text
