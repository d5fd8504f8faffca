"""Names of variants: safe, unique, and the same in every run."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prmkit.dataset.settings import PREFIX
from prmkit.dataset.write import name_values
from tests.dataset.conftest import Convert, Path, prompt_of, read_lines, row_of

TYPES = ["clip", "category", "final"]
HOSTILE = ["../../etc/x", "/abs", "a" * 5_000, "CON", "nul.txt", "🙂🙃", "\x00\x01", " ", ".", "..", "a/b", "a\\b",
           "-rf", "full", "custom", "consensus", "clip", "eval", "task_eval", "任务", "a\nb", "%s", "*"]  # fmt: skip
SAFE = set(string.ascii_lowercase + string.digits + "_")


def test_the_names_of_the_guide() -> None:
    names = name_values(TYPES, ["deepseek-chat", "kimi-k2-0711-preview"], ["webshaper_qa_0"])
    assert list(names.values()) == [
        "reward_model_clip", "reward_model_category", "reward_model_final", "reward_model_deepseek_chat",
        "reward_model_kimi_k2_0711_preview", "reward_model_webshaper_qa_0",
    ]  # fmt: skip


@given(
    st.lists(st.text(min_size=1) | st.sampled_from(HOSTILE), unique=True), st.lists(st.text(min_size=1), unique=True)
)
def test_names_are_safe_unique_and_stable(tasks: list[str], judges: list[str]) -> None:
    names = name_values(TYPES, judges, tasks)
    assert len(set(names.values())) == len(names) == len(TYPES) + len(tasks) + len(judges)
    for name in names.values():
        assert name.startswith(PREFIX)
        assert set(name) <= SAFE
        assert len(name) < 120
        assert not name.endswith("_eval")
    assert not {PREFIX + taken for taken in ("full", "custom", "consensus", "eval")} & set(names.values())
    again = name_values(TYPES, judges[::-1], tasks[::-1])
    assert {key: again[key] for key in names} == names


def test_values_that_would_share_a_name_all_get_a_hash() -> None:
    names = name_values(TYPES, ["a-b", "clip"], ["a_b", "A b", "clip"])
    assert len(set(names.values())) == 8
    assert names["type", "clip"] == "reward_model_clip"
    assert all(name.startswith("reward_model_a_b_") for (_, value), name in names.items() if value.lower() != value)


def test_hostile_values_stay_inside_the_folder(convert_rows: Convert, data: Path) -> None:
    rows = [row_of(prompt_of(str(number)), task=value) for number, value in enumerate(HOSTILE)]
    rows += [row_of(prompt_of(f"j{number}"), judge=value) for number, value in enumerate(HOSTILE)]
    rows += [row_of(prompt_of(f"t{number}"), kind=value) for number, value in enumerate(HOSTILE)]
    report = convert_rows(rows)
    assert sorted(path.name for path in data.parent.iterdir()) == ["data", "finetune.jsonl"]
    assert all(path.is_file() for path in data.iterdir() if path.name != "tasks")
    assert sum(report["rows"].values()) == len(rows)
    found = {
        row["metadata"]["task_id"]
        for path in data.rglob("*.meta.jsonl")
        if "full" not in path.name
        for row in read_lines(path)
    }
    assert set(HOSTILE) <= found


@pytest.mark.slow
def test_thousands_of_tasks_in_any_order(convert_rows: Convert, data: Path) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    rows = [row_of(prompt_of(f"{clip} {task}"), task=f"task_{task}") for clip in range(2) for task in range(3_000)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    try:
        report = convert_rows(rows)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(report["variants"]) == 3_000 + 3
    assert (
        len(
            read_lines(data / "tasks/reward_model_task_1.jsonl")
            + read_lines(data / "tasks/reward_model_task_2999.jsonl")
        )
        == 4
    )
    for name in ("reward_model_full", "reward_model_full_eval"):
        lines = [trace["line"] for trace in read_lines(data / f"{name}.meta.jsonl")]
        assert lines == sorted(lines)
        assert len(read_lines(data / f"{name}.jsonl")) == len(lines)
    assert report["rows"]["train"] + report["rows"]["held_out"] == 6_000


def test_no_task_variants_on_request(convert_rows: Convert, data: Path) -> None:
    convert_rows([row_of(prompt_of("a"))], task_variants=False)
    names = [path.name for path in sorted(data.glob("*.meta.jsonl"))]
    assert names == [f"reward_model_{name}.meta.jsonl" for name in ("clip", "full", "judge_a")]


@pytest.mark.parametrize("value", ["full", "clip"])
def test_a_judge_named_like_a_variant_gets_another_name(convert_rows: Convert, data: Path, value: str) -> None:
    convert_rows([row_of(prompt_of("a"), judge=value), row_of(prompt_of("b"))])
    assert len(read_lines(data / f"reward_model_{value}.jsonl")) == 2
    (own,) = data.glob(f"reward_model_{value}_????????.jsonl")
    assert len(read_lines(own)) == 1
