"""Lengths and ids without importing LLaMA Factory are LLaMA Factory's own, and where they cannot be had it is asked."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prmkit.dataset.lengths import PROMPT, Pieces, load_pieces, pieces_of
from prmkit.llamafactory_schema import template_names
from prmkit.prompts.encoding import load_encoding

pytestmark = pytest.mark.slow  # every child imports LLaMA Factory
ROOT = Path(__file__).resolve().parents[2]
ROWS = [
    (system, prompt, answer)
    for system in (None, "", "Be  brief.\n", f"a {PROMPT} b")
    for prompt in ("Hello\n\nworld  ", " x", f"{PROMPT}{{{{content}}}}", "äöü 東京 🙂")
    for answer in ('{"s": 0.5}', "", '<think>\nhm\n</think>\n\n{"a": 1}', " </think>")
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prmkit" / "templates"


def test_every_template_of_llama_factory_is_understood_exactly(tiny_model: Path) -> None:
    compared = 0
    for name in template_names():
        for enable_thinking in (True, False):
            encoding = load_encoding(tiny_model, name, enable_thinking=enable_thinking)
            pieces = pieces_of(encoding)
            assert pieces, name
            known = [row for row in ROWS if pieces.knows(row[2])]
            pairs = [encoding.pair_ids(prompt, answer, system) for system, prompt, answer in known]
            assert pieces.pair_lengths(known) == [tuple(map(len, pair)) for pair in pairs], name
            system, prompt, _ = known[-1]
            assert pieces.prompt_ids(prompt, system) == encoding.prompt_ids(prompt, system), name
            compared += len(known)
    assert compared > 100 * len(ROWS)


def test_the_child_is_asked_once_and_damaged_answers_are_not_used(
    tiny_model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_pieces(tiny_model, "qwen3")
    assert first and first.unless == ["<think>", "</think>"]
    (file,) = cache.iterdir()
    runs = subprocess.run

    def fails(*_: Any, **__: Any) -> None:
        raise AssertionError("the child was asked again")

    monkeypatch.setattr(subprocess, "run", fails)
    assert load_pieces(tiny_model, "qwen3") == first
    monkeypatch.setattr(subprocess, "run", runs)
    file.write_text(file.read_text()[:100])
    assert load_pieces(tiny_model, "qwen3") == first


def test_another_tokenizer_or_setting_is_asked_for_again(tiny_model: Path, tmp_path: Path, cache: Path) -> None:
    import shutil

    copy = tmp_path / "model"
    shutil.copytree(tiny_model, copy)
    load_pieces(tiny_model, "qwen")
    load_pieces(copy, "qwen")
    assert len(list(cache.iterdir())) == 1  # the place of a model is of no importance
    content = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps({**content, "changed": True}))
    load_pieces(copy, "qwen")
    with_system = load_pieces(copy, "qwen", default_system="Be strict.")
    assert len(list(cache.iterdir())) == 3
    assert with_system and "Be strict." in json.dumps(with_system.without_system)


@pytest.mark.parametrize("what", ["no tokenizer.json", "no such template"])
def test_what_cannot_be_had_is_left_to_llama_factory(tiny_model: Path, tmp_path: Path, cache: Path, what: str) -> None:
    import shutil

    copy, template = tmp_path / "model", "qwen"
    shutil.copytree(tiny_model, copy)
    if what == "no tokenizer.json":
        (copy / "tokenizer.json").unlink()
    else:
        template = "qwem"
    assert load_pieces(copy, template) is None
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_costs_time_only(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert isinstance(load_pieces(tiny_model, "qwen"), Pieces)


def test_measuring_imports_neither_torch_nor_llama_factory(tiny_model: Path) -> None:
    load_pieces(tiny_model, "qwen")
    program = (
        "import sys; from pathlib import Path\n"
        "from prmkit.dataset.lengths import LengthGuard\n"
        "from prmkit.dataset.settings import LengthSettings\n"
        f"guard = LengthGuard(LengthSettings(Path({str(tiny_model)!r}), 'qwen', 50))\n"
        "print(guard.fit([(None, 'word ' * 100, 'label')]))\n"
        "print([name for name in ('torch', 'transformers', 'llamafactory') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
