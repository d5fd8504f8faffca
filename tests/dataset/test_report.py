"""The report: every figure counted from the rows themselves."""

import json
from collections import Counter

from prmkit.dataset.settings import Split
from tests.dataset.conftest import Convert, Path, many_rows, prompt_of, read_lines, row_of


def test_histograms_and_keys(convert_rows: Convert, data: Path) -> None:
    report = convert_rows(many_rows(tasks=40))
    train, held_out = (read_lines(data / f"reward_model_full{side}.meta.jsonl") for side in ("", "_eval"))
    for kind in ("clip", "final"):
        everything = [
            row["scores"]["reasonableness_score"]
            for row in train + held_out
            if row["metadata"]["evaluation_type"] == kind
        ]
        bins = Counter(min(round(score * 100) // 10, 9) for score in everything)
        assert report["score_histograms"][kind]["reasonableness_score"] == [bins[place] for place in range(10)]
    assert report["score_keys"] == {"clip": ["reasonableness_score"], "final": ["reasonableness_score"]}
    assert report["rows"] == {"train": len(train), "held_out": len(held_out)}
    assert report["tasks"] == 40
    assert report["judges"] == {"judge-a": 120, "judge-b": 120}
    assert report["held_out"]["tasks"] == len({row["metadata"]["task_id"] for row in held_out})
    assert report["held_out"]["rows"] == len(held_out)


def test_the_held_out_hash_follows_the_held_out_rows_only(convert_rows: Convert) -> None:
    split = Split(tasks=frozenset({"task_1", "task_2"}))
    rows = many_rows(tasks=4)
    first = convert_rows(rows, split=split)["held_out"]["sha256"]
    training = row_of(prompt_of("one more"), task="task_3")
    assert convert_rows([*rows, training], split=split)["held_out"]["sha256"] == first
    held_out = row_of(prompt_of("one more"), task="task_1")
    assert convert_rows([*rows, held_out], split=split)["held_out"]["sha256"] != first


def test_repairs_are_counted(convert_rows: Convert) -> None:
    plain = json.dumps({"reasonableness_score": 0.5, "summary": "s"})
    rows = [
        row_of(prompt_of(str(number)), answer)
        for number, answer in enumerate((plain, f"```\n{plain}\n```", plain[:-1]))
    ]
    assert convert_rows(rows)["repaired"] == {"rows": 2, "repairs": {"fenced": 1, "cut off": 1}}


def test_quantiles_cover_their_share(convert_rows: Convert) -> None:
    rows = [row_of(prompt_of("x" * number)) for number in range(37)]
    lengths = sorted(len(row["conversations"][0]["value"]) for row in rows)
    found = convert_rows(rows)["lengths"]["prompt_characters"]
    for share, length in found.items():
        wanted = float(share.removesuffix("%")) / 100 * len(lengths)
        assert sum(value <= length for value in lengths) >= wanted - 1e-9
        assert sum(value < length for value in lengths) < wanted
