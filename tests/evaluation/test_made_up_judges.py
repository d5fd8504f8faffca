"""What is concluded of judges whose quality is known because they are made up: 20 of an audit, and their siblings."""

from collections.abc import Callable

import numpy as np
import pytest
from synthetic import made_up, predictions_of, without

from prmkit.evaluation import grade, summary
from prmkit.evaluation.evaluate import metrics_of
from prmkit.evaluation.heldout import HeldOut, HeldOutPrompt

HELD_OUT = made_up()
OFTEN = 1000


def measured(rows: list[dict], held_out: HeldOut = HELD_OUT) -> dict:
    return metrics_of(rows, None, held_out, {})


def judge(score: Callable[[float, HeldOutPrompt, np.random.Generator], float]) -> list[dict]:
    """The predictions of a judge that knows the reference, the prompt and a die."""
    generator = np.random.default_rng(11)
    return predictions_of(
        HELD_OUT, lambda prompt, key: float(np.clip(score(prompt.reference[key], prompt, generator), 0, 1))
    )


def of_task(prompt: HeldOutPrompt) -> float:
    scores = [other.reference["quality"] for other in HELD_OUT.prompts if other.task == prompt.task]
    return float(np.mean(scores))


def is_clip(prompt: HeldOutPrompt) -> bool:
    return prompt.evaluation_type == "clip"


def noisy(reference: float, prompt: HeldOutPrompt, die: np.random.Generator) -> float:
    return reference + die.normal(0, 0.1)


JUDGES: dict[str, tuple[Callable, str, str, str]] = {
    # what it is: its scores; the grade on clip and on final; words that must be said
    "decent": (noisy, "useful", "useful", "All conditions are met"),
    "perfect": (lambda r, p, die: r, "useful", "useful", "a model may exceed that"),
    "constant": (lambda r, p, die: 0.65, "not_useful", "not_useful", "It is constant"),
    "constant by type": (lambda r, p, die: 0.65 if is_clip(p) else 0.7, "not_useful", "not_useful", "It is constant"),
    "uniform noise": (lambda r, p, die: die.uniform(), "not_useful", "not_useful", "better than chance"),
    "inverted": (lambda r, p, die: 1.2 - r, "not_useful", "not_useful", "It is inverted"),
    "inverted and noisy": (lambda r, p, die: 1.2 - r + die.normal(0, 0.1), "not_useful", "not_useful", "inverted"),
    "too strict by 0.2": (lambda r, p, die: r - 0.2, "weak", "weak", "its bias is -0.2"),
    "too kind by 0.2, noisy": (lambda r, p, die: r + 0.2 + die.normal(0, 0.05), "weak", "weak", "its bias is 0."),
    "squeezed": (lambda r, p, die: 0.6 + 0.1 * r, "weak", "weak", "this judge also puts 0% below 0.5"),
    "noise on clip": (lambda r, p, die: die.uniform() if is_clip(p) else r, "not_useful", "useful", "than chance"),
    "noise on final": (lambda r, p, die: r if is_clip(p) else die.uniform(), "useful", "not_useful", "than chance"),
    "random within runs": (lambda r, p, die: of_task(p) + die.normal(0, 0.05), "weak", "useful", "Ranking within runs"),
    "random between runs": (
        lambda r, p, die: r - of_task(p) + np.random.default_rng(len(p.task) * 7 + sum(map(ord, p.task))).uniform(),
        "weak", "not_useful", "Its ranking within runs is good",
    ),
    "weak order": (lambda r, p, die: 0.62 + 0.08 * (r - 0.62) / 0.2 + die.normal(0, 0.15), "weak", "weak", "Ranking: "),
    "worst steps praised": (lambda r, p, die: 0.9 if r < 0.4 else noisy(r, p, die), "weak", "weak", "praise"),
    "lenient on bad steps": (lambda r, p, die: max(r, 0.55) + die.normal(0, 0.03), "weak", "weak", "below 0.5"),
    "only two values": (lambda r, p, die: 0.3 if r < 0.5 else 0.75, "weak", "weak", "Ranking within runs"),
    "ties everywhere": (lambda r, p, die: 0.65 if die.uniform() < 0.9 else r, "weak", "weak", "Ranking: "),
    "length alone": (lambda r, p, die: len(p.prompt) / OFTEN, "not_useful", "not_useful", "better than chance"),
    "right on one agent": (
        lambda r, p, die: r if p.metadata["agent"] == "alpha" else die.uniform(),
        "weak", "weak", "Where agent is beta, its ranking is not useful",
    ),
    "right on one task group": (
        lambda r, p, die: r if p.task.startswith("web") else 0.62 + die.normal(0, 0.1),
        "weak", "weak", "Where task_group is code, its ranking is not useful",
    ),
}  # fmt: skip


def said(metrics: dict) -> str:
    notes = [note for each in grade.conclusions(metrics) for note in each.notes]
    sentences = [
        condition["sentence"] for each in metrics["summary"]["types"].values() for condition in each["conditions"]
    ]
    return " ".join([*summary.conclusion_lines(metrics), *notes, *sentences])


def grades(metrics: dict) -> tuple[str, ...]:
    return tuple(each["grade"] for each in metrics["summary"]["types"].values())


@pytest.mark.parametrize("name", JUDGES)
def test_a_made_up_judge_gets_the_grade_that_it_deserves(name: str) -> None:
    score, clip, final, words = JUDGES[name]
    metrics = measured(judge(score))
    assert grades(metrics) == (clip, final), metrics["summary"]["types"]
    assert words in said(metrics)


def test_missing_scores_are_never_useful() -> None:
    rows = judge(noisy)
    some = without(rows, lambda row: int(row["prompt_sha256"], 16) % 10 < 3)
    bad = without(rows, lambda row: row["reference"]["quality"] < 0.5)
    for unread in (some, bad):
        metrics = measured(unread)
        assert "useful" not in grades(metrics)
        assert "at least 95% must be" in said(metrics)


def test_scores_that_are_not_numbers_are_missing() -> None:
    rows = judge(noisy)
    for row in rows[::4]:
        for score in row["scores"].values():
            score["mean"] = float("nan")
    metrics = measured(rows)
    assert "useful" not in grades(metrics)
    assert "at least 95% must be" in said(metrics)


@pytest.mark.parametrize("on_one_key", ["noise", "constant", "inverted"])
def test_a_judge_that_is_wrong_on_one_key_is_not_useful_and_the_key_is_named(on_one_key: str) -> None:
    held_out = made_up(keys=("first", "second"), final=False)
    die = np.random.default_rng(2)
    wrong = {"noise": lambda r: die.uniform(), "constant": lambda r: 0.6, "inverted": lambda r: 1 - r}[on_one_key]
    rows = predictions_of(
        held_out, lambda prompt, key: wrong(prompt.reference[key]) if key == "second" else prompt.reference[key]
    )
    metrics = measured(rows, held_out)
    assert grades(metrics) == ("not_useful" if on_one_key == "inverted" else "weak",)
    assert any("second" in line for line in grade.conclusions(metrics)[0].notes)


def test_a_judge_that_is_right_on_the_one_large_task_alone_is_not_useful() -> None:
    held_out = made_up(tasks=30, clips=2, final=False)
    large = made_up(tasks=1, clips=150, final=False, seed=5)
    both = type(held_out)(**{**vars(held_out), "prompts": held_out.prompts + large.prompts})
    die = np.random.default_rng(3)
    names = {prompt.prompt_sha256 for prompt in large.prompts}
    rows = predictions_of(
        both, lambda prompt, key: prompt.reference[key] if prompt.prompt_sha256 in names else die.uniform()
    )
    for row in rows:
        if row["prompt_sha256"] in names:
            row |= {"task_id": "large", "trajectory_id": "large"}
    metrics = measured(rows, both)
    assert grades(metrics) != ("useful",)
    assert "One task (large) has 7" in said(metrics)


def test_an_overconfident_judge_is_called_so() -> None:
    rows = judge(lambda r, p, die: r + die.normal(0, 0.12))
    for row in rows:
        for score in row["scores"].values():
            score["std"] = 0.005
    assert "overconfident" in said(measured(rows))


# --- odd data ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tasks", [1, 2, 9])
def test_few_tasks_are_too_few(tasks: int) -> None:
    held_out = made_up(tasks=tasks, clips=12)
    metrics = measured(predictions_of(held_out, lambda prompt, key: prompt.reference[key]), held_out)
    assert set(grades(metrics)) == {"unknown"}
    assert "Too little held-out data" in said(metrics)


def test_steps_that_are_never_bad_leave_open_whether_bad_ones_are_found() -> None:
    held_out = made_up(grid=0.05, final=False)
    good = tuple(prompt for prompt in held_out.prompts if prompt.reference["quality"] >= 0.5)
    held_out = type(held_out)(**{**vars(held_out), "prompts": good})
    metrics = measured(predictions_of(held_out, lambda prompt, key: prompt.reference[key]), held_out)
    assert grades(metrics) == ("unknown",)
    assert "0 bad and" in said(metrics)


def test_judges_that_gave_everything_one_score_leave_nothing_to_check() -> None:
    held_out = made_up(noise=0.0, grid=2.0, final=False)
    metrics = measured(predictions_of(held_out, lambda prompt, key: len(prompt.prompt) / OFTEN), held_out)
    assert grades(metrics) == ("unknown",)
    assert "The judges gave everything the same score" in said(metrics)
    assert metrics["groups"][0]["judge"]["pairwise_accuracy"]["value"] is None


def test_a_calibrated_judge_of_labels_that_are_0_or_1_has_skill() -> None:
    held_out = made_up(judges=("one",), noise=0.0, final=False)
    die = np.random.default_rng(4)
    prompts, probability = [], {}
    for prompt in held_out.prompts:
        probability[prompt.prompt_sha256] = die.uniform(0.55, 0.95)
        label = float(die.uniform() < probability[prompt.prompt_sha256])
        given = {"references": {"one": {"quality": label}}, "reference": {"quality": label}}
        prompts.append(type(prompt)(**{**vars(prompt), **given}))
    held_out = type(held_out)(**{**vars(held_out), "prompts": tuple(prompts)})
    rows = predictions_of(held_out, lambda prompt, key: probability[prompt.prompt_sha256])
    for row in rows:
        for score in row["scores"].values():
            score["median"] = 1.0
    of_judge = measured(rows, held_out)["groups"][0]["judge"]
    assert of_judge["skill"]["value"] > 0
    assert of_judge["skill_mae"]["value"] == pytest.approx(0, abs=0.01)


# --- judges of the reference ------------------------------------------------------------------------------------------


def ceiling_of(held_out: HeldOut) -> dict:
    metrics = measured(predictions_of(held_out, lambda prompt, key: prompt.reference[key]), held_out)
    return metrics["groups"][0]["ceiling"] | {"said": said(metrics)}


def test_three_judges_of_whom_two_score_a_step_can_be_compared() -> None:
    three = ("a", "b", "c")
    held_out = made_up(judges=three, asked=lambda item, judge: judge != three[item % 3], final=False)
    ceiling = ceiling_of(held_out)
    assert len(ceiling["pairs"]) == 3
    assert ceiling["gap"]["value"] > 0
    assert ceiling["gap"]["n"] == len(held_out.prompts)


def test_no_bound_is_printed_where_few_scores_have_two_judges_or_other_ones() -> None:
    few = ceiling_of(made_up(asked=lambda item, judge: judge == "judge_a" or item % 4 == 0, final=False))
    assert few["bounds"]["pearson"]["mean_judge"]["value"] is None
    assert "The resulting upper bound is unknown: only 2" in few["said"]
    held_out = made_up(final=False)
    easy = tuple(
        prompt
        if prompt.reference["quality"] > 0.55
        else type(prompt)(**{**vars(prompt), "references": {"judge_a": prompt.references["judge_a"]}})
        for prompt in held_out.prompts
    )
    differing = ceiling_of(type(held_out)(**{**vars(held_out), "prompts": easy}))
    assert "the scores given by several judges differ from the others" in differing["said"]


def test_judges_who_agree_with_themselves_raise_the_bound() -> None:
    held_out = made_up(noise=0.12, final=False)
    entry = {"judge": "judge_a", "evaluation_type": "clip", "key": "quality", "pairs": 40}
    bounds = []
    for pearson in (0.75, 1.0):
        known = type(held_out)(**{**vars(held_out), "self_agreement": [entry | {"pearson": pearson}]})
        bounds.append(ceiling_of(known)["bounds"]["pearson"]["mean_judge_by_self"]["value"])
    assert bounds[0] < bounds[1] == pytest.approx(1.0)


@pytest.mark.parametrize("judges", [("judge_a", "judge_b"), ("judge_a",)])
def test_the_agreement_with_themselves_is_always_there_and_says_why_it_is_unknown(judges) -> None:
    """Also where no bound follows, because no prompt has two judges."""
    known = made_up(tasks=12, final=False, judges=judges)
    entry = {"judge": "judge_a", "evaluation_type": "clip", "key": "quality", "pairs": 40, "pearson": 0.8}
    given = ceiling_of(type(known)(**{**vars(known), "self_agreement": [entry]}))["bounds"]
    unknown = ceiling_of(known)["bounds"]
    assert given["pearson"].keys() == unknown["pearson"].keys()
    assert given["pearson"]["self_agreement"]["value"] == 0.8
    assert unknown["pearson"]["self_agreement"]["value"] is None and unknown["pearson"]["self_agreement"]["reason"]


def test_groups_of_the_same_scores_differ_by_what_is_known_of_their_judges() -> None:
    """With one evaluation type and key, all scores are that key's; judges may have repeated others too."""
    held_out = made_up(tasks=12, final=False)
    entry = {"judge": "judge_a", "key": "quality", "pairs": 40}
    entries = [
        entry | {"evaluation_type": "clip", "pearson": 0.8},
        entry | {"evaluation_type": "final", "pearson": 0.4},
    ]
    known = type(held_out)(**{**vars(held_out), "self_agreement": entries})
    every, clip = measured(predictions_of(known, lambda prompt, key: prompt.reference[key]), known)["groups"]
    assert every["judge"] == clip["judge"]
    itself = [each["ceiling"]["bounds"]["pearson"]["self_agreement"]["value"] for each in (every, clip)]
    assert itself == pytest.approx([0.6, 0.8])


def test_leniency_is_taken_off_the_reference_or_said_to_be_unknown() -> None:
    held_out = made_up(kinder=0.25, asked=lambda item, judge: judge == "judge_a" or item % 2 == 0, final=False)
    metrics = measured(predictions_of(held_out, lambda prompt, key: prompt.reference[key]), held_out)
    assert "judge_b +0.1" in " ".join(metrics["leniency"]["sentences"])
    apart = made_up(kinder=0.25, asked=lambda item, judge: (judge == "judge_a") == (item % 2 == 0), final=False)
    metrics = measured(predictions_of(apart, lambda prompt, key: prompt.reference[key]), apart)
    assert any("cannot be corrected" in line for line in metrics["summary"]["warnings"])
