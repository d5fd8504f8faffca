"""Rubrics: the default one, files of users, and the hash that tells them apart."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from prmkit.errors import UsageError
from prmkit.prompts.step import DEFAULT_RUBRIC, load_rubric, step_prompts
from prmkit.trajectory import Step, Trajectory
from prmkit.verdict import Shape, asked_shape


def written(tmp_path: Path, **changes: Any) -> Path:
    content = yaml.safe_load(DEFAULT_RUBRIC.read_text(encoding="utf-8")) | changes
    path = tmp_path / "rubric.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def test_the_default_has_six_anchors_and_types_of_errors() -> None:
    rubric = load_rubric()
    assert rubric.keys == ("step_score",) and rubric.error_types[0] == "none"
    assert [anchor[:4] for anchor in rubric.anchors] == ["0.00", "0.20", "0.40", "0.60", "0.80", "1.00"]


def test_the_hash_follows_what_is_asked_and_not_how_the_file_is_laid_out(tmp_path: Path) -> None:
    default = load_rubric()
    assert load_rubric(written(tmp_path)).sha256 == default.sha256
    others = [{"context_tokens": 5000}, {"keys": ["safety_score"]}, {"anchors": {0.0: "bad", 1.0: "good"}}]
    assert len({default.sha256, *(load_rubric(written(tmp_path, **other)).sha256 for other in others)}) == 4


@pytest.mark.parametrize(
    ("keys", "shape"),
    [
        (["safety_score"], Shape(("safety_score",), False)),
        (["safety"], Shape(("safety",), True)),
        (["progress", "safety"], Shape(("progress", "safety"), True)),
    ],
)
def test_own_keys_are_asked_for(tmp_path: Path, keys: list[str], shape: Shape) -> None:
    rubric = load_rubric(written(tmp_path, keys=keys))
    (prompt,) = step_prompts(Trajectory("r", "t", "Go.", (Step(1, "Done.", last=True),)), rubric)
    assert asked_shape(prompt.text) == shape


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"keys": []}, "keys"),
        ({"keys": ["Step Score"]}, "lower case"),
        ({"keys": ["a_score", "a_score"]}, "different"),
        ({"anchors": {"good": "x"}}, "anchor"),
        ({"anchors": {5: "x"}}, "anchor"),
        ({"context_tokens": "many"}, "context_tokens"),
        ({"context_tokens": 100}, "Set at least"),
        ({"colour": "red"}, "nothing else"),
        ({"instructions": ["a"]}, "instructions"),
    ],
)
def test_what_is_wrong_with_a_rubric_is_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load_rubric(written(tmp_path, **changes))


def test_a_missing_or_broken_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        load_rubric(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("keys: [", encoding="utf-8")
    with pytest.raises(UsageError, match="not YAML"):
        load_rubric(tmp_path / "broken.yaml")
