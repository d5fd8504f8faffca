"""TRL's GRPOTrainer: `reward_funcs=make_reward_func(url)`."""

from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from statistics import fmean
from typing import Any, Literal, get_args

from prmkit.client import Judge, Reward, client_of
from prmkit.errors import UsageError

WhenUnscored = Literal["none", "group_mean"]


def make_reward_func(
    judge: str | Judge, *, aggregate: str = "min", when_unscored: WhenUnscored | None = None
) -> Callable[..., list[float | None]]:
    """A reward function for `GRPOTrainer`, for plain-text and conversational prompts.

    TRL 1.x leaves a completion whose reward is None out of its group. TRL 0.24 turns None into 0, which would teach the
    policy to avoid what the judge could not score; with it, the completion gets the mean of its group, and so hardly
    any advantage. In a group without any score, all stay None.

    Args:
        judge: the URL of `serve_judge.py`, or a client.
        aggregate: min, mean, product or last: how the scores of several steps become one number.
        when_unscored: `none` or `group_mean`; None decides by the installed TRL.

    Raises:
        JudgeUnavailable, RequestRefused: raised by the returned function, which stops the training.
        UsageError: there is no such `aggregate` or `when_unscored`.
    """
    client = client_of(judge, aggregate)
    if when_unscored not in (None, *get_args(WhenUnscored)):
        raise UsageError(f"when_unscored: {when_unscored!r:.40} is unknown. Use {' or '.join(get_args(WhenUnscored))}.")
    answer = when_unscored or _fitting_trl()

    def judge_reward(prompts: Sequence[Any], completions: Sequence[Any], **_columns: Any) -> list[float | None]:
        rewards = client.rewards(list(zip(prompts, completions, strict=True)), aggregate=aggregate)
        return reward_values(prompts, rewards, fill=answer == "group_mean")

    return judge_reward


def reward_values(groups: Sequence[Any], rewards: Sequence[Reward], *, fill: bool) -> list[float | None]:
    """Rewards as plain numbers.

    Args:
        groups: a key for each sample, equal within a group; groups are contiguous.
        rewards: of the samples.
        fill: give a sample without a score the mean of its group.
    """
    values = [reward.value for reward in rewards]
    first = 0
    while fill and first < len(values):
        last = first
        while last < len(values) and groups[last] == groups[first]:
            last += 1
        known = [value for value in values[first:last] if value is not None]
        if known:
            values[first:last] = [fmean(known) if value is None else value for value in values[first:last]]
        first = last
    return values


def _fitting_trl() -> WhenUnscored:
    try:
        return "group_mean" if version("trl").startswith("0.") else "none"
    except PackageNotFoundError:
        return "none"
