"""A config is read as LLaMA Factory reads it; an error names the place."""

import ast
import re
from collections.abc import Set
from functools import cache
from pathlib import Path

import pytest

from prmkit.errors import UsageError
from prmkit.llamafactory_schema import read_yaml, split_assignment, training_keys, value_of

KEYS = set(Path(__file__).with_name("llamafactory_keys.txt").read_text(encoding="utf-8").split())
"""The keys of the LLaMA Factory that this project was last adapted to."""


def test_a_key_that_the_code_names_is_still_one_of_llama_factorys(root: Path) -> None:
    """A key that the next version renames would else be looked up and never found."""
    assert not _named(KEYS - training_keys().keys(), root)
    assert training_keys().keys() == KEYS, "look at the new keys, then bring llamafactory_keys.txt up to date"


def _named(keys: Set[str], root: Path) -> dict[str, set[str]]:
    """Those of `keys` that the package, a script or a benchmark names, each with the files."""
    named: dict[str, set[str]] = {}
    patterns = ("prmkit/**/*.py", "tools/**/*.py", "benchmarks/*.py", "*.py", "*.sh", "benchmarks/*.sh")
    for path in (path for pattern in patterns for path in root.glob(pattern)):
        for key in keys & _words(path):
            named.setdefault(key, set()).add(str(path.relative_to(root)))
    return named


@cache
def _words(path: Path) -> set[str]:
    """What a file may name a key by: its strings, and words of sentences in them."""
    text = path.read_text(encoding="utf-8")
    nodes = ast.walk(ast.parse(text)) if path.suffix == ".py" else [ast.Constant(text)]
    strings = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return {name for string in strings for name in (string, *_keys_in_a_sentence(string))}


def _keys_in_a_sentence(text: str) -> set[str]:
    """Words with an underscore, and others if a value follows: `template=qwen`, but not "the template: qwen"."""
    words = re.finditer(r"(?<![\w-])(\w+)\b(?!-|\.\w)(=|: true\b)?", text)
    return {word[1] for word in words if "_" in word[1] or word[2]}


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("Set logging_steps=1", {"logging_steps"}),
        ("Write lora_rank.", {"lora_rank"}),
        ("set template=qwen, or write bf16: true.", {"template", "bf16"}),
        ("max_steps=", {"max_steps"}),
        ("the template: qwen", set()),
        ("its stage and seed. --template=x", set()),
        ("generation_config.json, --lora_rank", set()),
    ],
)
def test_keys_are_seen_inside_sentences(text: str, keys: set[str]) -> None:
    assert _keys_in_a_sentence(text) == keys


def test_the_places_that_name_a_key_are_found(root: Path) -> None:
    named = _named({"logging_steps", "model_name_or_path", "infer_dtype", "save_total_limit", "stage"}, root)
    assert "prmkit/training/run.py" in named["logging_steps"]  # "Set logging_steps=1"
    assert "run_training.sh" in named["model_name_or_path"]  # "write model_name_or_path=FOLDER"
    assert "prmkit/llamafactory_schema.py" in named["infer_dtype"]  # in REPLACEMENTS
    assert "prmkit/training/launcher.py" in named["save_total_limit"]
    assert "prmkit/dataset/stage.py" not in named["stage"]  # the word alone


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "not YAML"),
        ("seed: 1\nseed: 2", "duplicate key seed"),
        ("- a\n- b", "not a mapping"),
        ("\tseed: 1", "line 1"),
        ("seed: \xff", "not YAML"),
        ('run_name: "a\\0b"', "run_name: a NUL character"),
        ("{a: " * 3000 + "1" + "}" * 3000, "nested too deeply"),
        ("\n".join(" " * depth + "-" for depth in range(1200)), "nested too deeply"),
        ("seed: " + "9" * 5000, "not YAML"),
        ("# " + "x" * (1 << 20), "larger than 1 MiB"),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=message) as caught:
        read_yaml(path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(UsageError, match="directory"):
        read_yaml(tmp_path)


def test_the_file_is_read_as_llama_factory_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("learning_rate: 1e-4\neval_strategy: no\nrun_name: ${oc.env:HOME}\n")
    assert read_yaml(path) == {"learning_rate": 1e-4, "eval_strategy": False, "run_name": "${oc.env:HOME}"}


@pytest.mark.parametrize("text", ["lora_rank", "=4", "--verbose", ""])
def test_what_is_not_an_assignment_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not key=value"):
        split_assignment(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("8", 8), ("'8'", "8"), ("no", False), ("", None), ("[1, a]", [1, "a"]), ("a=b", "a=b")],
)
def test_a_value_is_typed_as_llama_factory_types_it(text: str, value: object) -> None:
    assert value_of(text) == value


def test_a_string_that_is_not_a_value() -> None:
    with pytest.raises(ValueError, match="parsing"):
        value_of("[1")
    with pytest.raises(ValueError, match="nested"):
        value_of("[" * 3000 + "]" * 3000)
