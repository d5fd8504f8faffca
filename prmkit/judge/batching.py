"""Shared by both backends: prepare prompts as in training, judge identical ones once, keep the order, read verdicts."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice

from prmkit.judge.score_trie import answer_ids, label_beginning
from prmkit.judge.types import Distribution, Judgement, Request
from prmkit.prompts.cleaning import escape, unescape
from prmkit.prompts.encoding import ChatEncoding
from prmkit.prompts.truncation import trim_prompt
from prmkit.verdict import Shape, Unreadable, read_verdict


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt that is ready for the model."""

    ids: list[int]
    """Token ids up to the beginning of the answer, as in training."""
    shape: Shape
    trimmed: bool


def make_preparer(
    encoding: ChatEncoding, cutoff_len: int, *, trim: bool
) -> Callable[[Request], EncodedPrompt | Judgement]:
    """Return a function that escapes, trims if needed and encodes a prompt, or returns a judgement that says why not.

    Both modes reserve the same number of tokens for the answer (up to its last score), so both get the same prompt.
    """

    @lru_cache(maxsize=1024)
    def prompt_budget(shape: Shape) -> int:
        return cutoff_len - len(answer_ids(encoding, label_beginning(shape, (0.0,) * len(shape.keys))))

    def prepare(request: Request) -> EncodedPrompt | Judgement:
        if problem := _problem(request):
            return Judgement("error", reason=problem)
        prompt, _ = escape(request.prompt)
        system = escape(request.system)[0] if request.system else None
        ids, budget = encoding.prompt_ids(prompt, system), prompt_budget(request.shape)
        if len(ids) <= budget:
            return EncodedPrompt(ids, request.shape, trimmed=False)
        trimmed = trim_prompt(prompt, encoding, budget, system) if trim else None
        if trimmed is None:
            fits = f"cutoff_len {cutoff_len:,} leaves {max(budget, 0):,} for the prompt"
            reason = f"{len(ids):,} prompt tokens; {fits}"
            return Judgement("too_long", reason=reason, prompt_tokens=len(ids))
        return EncodedPrompt(encoding.prompt_ids(trimmed.text, system), request.shape, trimmed=True)

    return prepare


def _problem(request: Request) -> str | None:
    if not request.prompt.strip():
        return "the prompt is empty"
    if not request.shape.keys:
        return "the prompt asks for no scores"
    try:
        f"{request.system}{request.prompt}".encode()
    except UnicodeEncodeError as error:
        return f"the prompt is not valid Unicode ({error.reason})"
    return None


def judgements_in_order(
    requests: Iterable[Request],
    prepare_one: Callable[[Request], EncodedPrompt | Judgement],
    judge_all: Callable[[Sequence[EncodedPrompt]], Sequence[Judgement]],
    window: int,
) -> Iterator[Judgement]:
    """Judge a stream, one window at a time; identical requests are judged once, wherever they are in the stream.

    Args:
        requests: any number.
        prepare_one: prepares a request, or returns a judgement with the reason why it cannot.
        judge_all: judges prepared requests in any order, and returns the judgements in the order of its argument.
        window: the number of requests to read ahead.

    Yields:
        One judgement per request, in order.
    """
    known: dict[bytes, Judgement] = {}
    requests = iter(requests)
    while group := list(islice(requests, window)):
        keys = [request.digest for request in group]
        new = {key: request for key, request in zip(keys, group, strict=True) if key not in known}
        ready: dict[bytes, EncodedPrompt] = {}
        for key, request in new.items():
            prepared = prepare_one(request)
            if isinstance(prepared, EncodedPrompt):
                ready[key] = prepared
            else:
                known[key] = prepared
        for (key, prepared), judgement in zip(ready.items(), judge_all(list(ready.values())), strict=True):
            known[key] = replace(judgement, prompt_tokens=len(prepared.ids), trimmed=prepared.trimmed)
        yield from (known[key] for key in keys)


def parse_generated(text: str, shape: Shape) -> Judgement:
    """Read a verdict that the model wrote; if a requested score is missing, the verdict is `unparsed`."""
    text = unescape(text, answer=True)  # labels were escaped for training, so the model writes escaped keys
    verdict = read_verdict(text, shape)
    if isinstance(verdict, Unreadable):
        return Judgement("unparsed", reason=verdict.reason, text=text)
    scores = {key: _point(verdict.scores[key]) for key in shape.keys}
    return Judgement("ok", scores, text=text, repaired=bool(verdict.repairs))


def _point(score: float) -> Distribution:
    return Distribution(mean=score, median=score, mode=score, std=None, label_mass=None)
