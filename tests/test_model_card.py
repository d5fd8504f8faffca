"""The model card: what was trained on, how well it agrees, its limits, and nothing that breaks the page."""

from pathlib import Path

import yaml

from prmkit.model_card import CARD, write_model_card

ESTIMATE = {"value": 0.7, "low": 0.6, "high": 0.8, "n": 40, "tasks": 12}
UNKNOWN = {"value": None, "low": None, "high": None, "n": 0, "tasks": 0, "reason": "nothing to measure"}
RECORD = {
    "run": "my_judge",
    "config": {"lora_rank": 16, "cutoff_len": 4096},
    "dataset": {"name": "reward_model_full", "sha256": "ab12"},
    "base_model": {"path": "Qwen/Qwen2.5-7B-Instruct"},
    "train_loss": 0.39,
}
METRICS = {
    "held_out": {"prompts_evaluated": 50, "tasks_evaluated": 12, "judges": ["judge <one>", "two|three"]},
    "summary": {
        "headline": "Useful on clip.",
        "types": {
            "clip": {
                "grade": "useful", "headline": "It ranks steps.", "spearman": ESTIMATE, "auroc": UNKNOWN,
                "rmse": ESTIMATE, "mae": ESTIMATE,
            }
        },
        "warnings": ["It is more lenient by 0.1."],
    },
}  # fmt: skip


def card(folder: Path, metrics: dict | None, record: dict = RECORD) -> str:
    write_model_card(folder, record, metrics)
    return (folder / CARD).read_text(encoding="utf-8")


def test_it_says_what_was_trained_and_how_well_it_agrees(tmp_path: Path) -> None:
    text = card(tmp_path, METRICS)
    assert "| clip | yes | 0.70 [0.60, 0.80] | – |" in text
    assert "Useful on clip." in text and "more lenient by 0.1" in text
    assert "`reward\\_model" not in text and "dataset: `reward_model_full`" in text
    assert "from 0 (bad) to 1 (good): one step of a run (`clip`).\n" in text
    assert "More information needed" not in text


def test_its_header_is_yaml_and_names_a_hub_model_only(tmp_path: Path) -> None:
    header = yaml.safe_load(card(tmp_path, None).split("---")[1])
    assert header["base_model"] == "Qwen/Qwen2.5-7B-Instruct"
    assert header["library_name"] == "transformers"
    (tmp_path / "adapter_config.json").write_text("{}")
    local = {**RECORD, "base_model": {"path": "./model"}}
    header = yaml.safe_load(card(tmp_path, None, local).split("---")[1])
    assert "base_model" not in header and header["library_name"] == "peft"


def test_a_judge_that_was_not_measured_says_so(tmp_path: Path) -> None:
    assert "Not measured yet" in card(tmp_path, None)
    assert "Not measured yet" in card(tmp_path, None, {})


def test_names_from_outside_open_no_markup(tmp_path: Path) -> None:
    text = card(tmp_path, METRICS, {**RECORD, "run": "x\n# <script>"})
    assert "<script>" not in text and "\n# &lt;" not in text
    assert "judge &lt;one&gt;" in text and "two\\|three" in text


def test_the_card_of_the_trainer_is_replaced(tmp_path: Path) -> None:
    (tmp_path / CARD).write_text("More information needed")
    assert "More information needed" not in card(tmp_path, METRICS)
