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
    """Make a reward function for `GRPOTrainer`, for plain-text and conversational prompts.

    TRL 1.x excludes a completion whose reward is None from its group. TRL 0.24 turns None into 0, which would teach the
    policy to avoid what the judge could not score; so with TRL 0.x, the completion gets the mean of its group, so that
    its advantage is almost zero. In a group without any score, all rewards stay None.

    Args:
        judge: the URL of `serve_judge.py`, or a client.
        aggregate: how the scores of several steps become one number: min, mean, product or last.
        when_unscored: `none` or `group_mean`; with None, the installed TRL decides.

    Raises:
        JudgeUnavailable, RequestRefused: raised by the returned function, which stops the training.
        UsageError: there is no such `aggregate` or `when_unscored`.
    """
    client = client_of(judge, aggregate)
    if when_unscored not in (None, *get_args(WhenUnscored)):
        raise UsageError(f"when_unscored: {when_unscored!r:.40} is unknown. Use {' or '.join(get_args(WhenUnscored))}.")
    choice = when_unscored or _fitting_trl()

    def judge_reward(prompts: Sequence[Any], completions: Sequence[Any], **_columns: Any) -> list[float | None]:
        rewards = client.rewards(list(zip(prompts, completions, strict=True)), aggregate=aggregate)
        return reward_values(prompts, rewards, fill=choice == "group_mean")

    return judge_reward


def reward_values(groups: Sequence[Any], rewards: Sequence[Reward], *, fill: bool) -> list[float | None]:
    """Return rewards as plain numbers.

    Args:
        groups: a key for each sample, equal within a group; groups are contiguous.
        rewards: the samples' rewards.
        fill: whether to give a sample without a score the mean of its group.
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
