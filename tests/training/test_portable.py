"""What transformers 5 writes is rewritten so that version 4 reads it; tools/check_export_transformers4.sh proves it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from prmkit.errors import LlamaFactoryError
from prmkit.files import read_json, write_json
from prmkit.training import portable
from prmkit.training.portable import make_portable


@pytest.fixture
def exported(tiny_model: Path, tmp_path: Path) -> Path:
    """A model as transformers 5 saves it."""
    from transformers import AutoTokenizer

    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    return folder


def change(path: Path, **changes: Any) -> None:
    write_json(path, (read_json(path) if path.exists() else {}) | changes)


def logits(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(torch.arange(5, 45)[None]).logits


def test_the_tokenizer_is_written_as_both_versions_read_it(exported: Path) -> None:
    from transformers import AutoTokenizer

    path = exported / "tokenizer_config.json"
    assert isinstance(read_json(path)["extra_special_tokens"], list), "transformers 4: 'list' object has no 'keys'"
    change(path, tokenizer_class="TokenizersBackend")
    before = AutoTokenizer.from_pretrained(exported)
    make_portable(exported, [])
    written = read_json(path)
    assert written["additional_special_tokens"] and written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not written.keys() & {"extra_special_tokens", "backend", "is_local", "local_files_only"}
    after = AutoTokenizer.from_pretrained(exported)
    assert after("<|im_start|>user\nStep 1<|im_end|>") == before("<|im_start|>user\nStep 1<|im_end|>")
    assert after.all_special_ids == before.all_special_ids


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default", "rope_theta": 1_000_000.0}, {"rope_theta": 1_000_000.0}),
        (
            {"rope_type": "yarn", "rope_theta": 5_000.0, "factor": 4.0, "original_max_position_embeddings": 512},
            {
                "rope_theta": 5_000.0,
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
            },
        ),
        (
            {
                "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            },
            {"rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0},
        ),
    ],
    ids=["default", "scaled", "two kinds of layers"],
)
def test_positions_are_written_as_version_4_reads_them(rope: dict[str, Any], expected: dict[str, Any]) -> None:
    """Version 4 does not know `rope_parameters`, and silently takes 10,000."""
    written = portable._portable_rope({"rope_parameters": rope, "dtype": "bfloat16"})
    assert written == {"rope_parameters": rope, "dtype": "bfloat16", "torch_dtype": "bfloat16", **expected}


def test_the_numbers_stay_the_same(exported: Path) -> None:
    change(exported / "config.json", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 500_000.0})
    before = logits(exported)
    make_portable(exported, [])
    assert read_json(exported / "config.json")["rope_theta"] == 500_000.0
    assert logits(exported).equal(before)


def test_the_config_says_what_the_weights_are(exported: Path) -> None:
    """A base whose embeddings are tied still says so after a training that parted them; version 4 believes it."""
    before = logits(exported)
    change(exported / "config.json", tie_word_embeddings=True)
    change(exported / "config.json", vocab_size=read_json(exported / "config.json")["vocab_size"] - 1)
    note = make_portable(exported, [])
    assert read_json(exported / "config.json")["tie_word_embeddings"] is False
    assert {"config.json: tie_word_embeddings", "config.json: vocab_size"} <= set(note["corrected"])
    assert logits(exported).equal(before)


def test_no_sampling_settings_are_exported(exported: Path) -> None:
    path = exported / "generation_config.json"
    change(path, repetition_penalty=1.05, temperature=0.7, top_p=0.8, top_k=20, do_sample=True, eos_token_id=[7, 8])
    make_portable(exported, [8, 9])
    written = json.loads(path.read_text())
    assert written["eos_token_id"] == [7, 8, 9]
    assert written.keys() <= {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version"}


def test_a_changed_tokenizer_is_an_error(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        portable, "_portable_tokenizer", lambda config: {**config, "add_bos_token": True, "eos_token": "x"}
    )
    with pytest.raises(LlamaFactoryError, match=r"tokenizer_config\.json"):
        make_portable(exported, [])
