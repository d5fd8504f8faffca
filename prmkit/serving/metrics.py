"""The counters and histograms of `/metrics`, in Prometheus' text format."""

import math
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import orjson

from prmkit.drift import shift_of
from prmkit.judge.types import Judgement
from prmkit.paths import PREDICTIONS_FILE
from prmkit.registered import results_of
from prmkit.rows import STEP_TYPES
from prmkit.serving.request_log import JudgeRole

_RECENT = 1000
"""The number of most recent scores from which drift is computed."""
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_SHARES = tuple(step / 10 for step in range(1, 11))


class ServerMetrics:
    """Counters and histograms of one server."""

    def __init__(self, depth: Callable[[], int], reference: Sequence[float]) -> None:
        """Start with all counts at zero.

        Args:
            depth: returns the number of prompts that wait or are being judged.
            reference: the judge's scores of its held-out rows; empty if they are unknown.
        """
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self._registry = registry = CollectorRegistry()
        self._reference = reference
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self.requests = Counter(
            "prmkit_requests", "Requests by path and HTTP status.", ["path", "status"], registry=registry
        )
        self.seconds = Histogram(
            "prmkit_request_seconds", "Time until the response.", ["path"], buckets=_SECONDS, registry=registry
        )
        self.steps = Counter(
            "prmkit_steps", "Judged prompts, by status and role.", ["status", "role"], registry=registry
        )
        self.cache_hits = Counter("prmkit_cache_hits", "Prompts answered from the cache.", registry=registry)
        self.batch_size = Histogram(
            "prmkit_batch_size", "Prompts judged together.", buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry
        )
        self.batch_seconds = Histogram(
            "prmkit_batch_seconds", "Time of one batch in the model.", buckets=_SECONDS, registry=registry
        )
        self.score = Histogram("prmkit_score", "Scores of steps.", ["role"], buckets=_SHARES, registry=registry)
        self.label_mass = Histogram(
            "prmkit_label_mass", "Total probability of all scores.", ["role"], buckets=_SHARES, registry=registry
        )
        self.unscored_rewards = Counter(
            "prmkit_unscored_rewards", "Rewards that were requested but not computed.", ["answer"], registry=registry
        )
        self.request_log_lines = Counter(
            "prmkit_request_log_lines", "Lines of the request log, written or lost.", ["outcome"], registry=registry
        )
        for outcome in ("written", "lost"):
            self.request_log_lines.labels(outcome)  # start at zero, for alerts on lost lines
        self.score.labels("production"), self.label_mass.labels("production")
        Gauge("prmkit_queue_depth", "Prompts that wait or are being judged.", registry=registry).set_function(depth)
        drift = Gauge(
            "prmkit_drift_psi",
            f"Population stability index of the last {_RECENT} scores against the held-out scores; NaN if too few.",
            registry=registry,
        )
        drift.set_function(self._drift)

    def _drift(self) -> float:
        psi = shift_of(self._reference, list(self._recent)).psi
        return math.nan if psi is None else psi

    def count(self, judgement: Judgement, role: JudgeRole) -> None:
        """Count one judged prompt. Drift is computed from the production judge's scores only."""
        self.steps.labels(judgement.status, role).inc()
        if judgement.score is not None:
            self.score.labels(role).observe(judgement.score)
            if role == "production":
                self._recent.append(judgement.score)
        if judgement.label_mass is not None:
            self.label_mass.labels(role).observe(judgement.label_mass)

    def count_batch(self, size: int, seconds: float) -> None:
        """Count one batch that the model judged."""
        self.batch_size.observe(size)
        self.batch_seconds.observe(seconds)

    def count_logged(self, outcome: str, lines: int) -> None:
        """Count lines of the request log."""
        self.request_log_lines.labels(outcome).inc(lines)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        from prometheus_client import generate_latest

        return generate_latest(self._registry)


def held_out_scores(run: Path | None) -> list[float]:
    """Return the judge's scores of the held-out steps in a training run's evaluation; empty if it was not evaluated."""
    if run is None:
        return []
    file = next((file for folder in results_of(run) if (file := folder / PREDICTIONS_FILE).is_file()), None)
    if file is None:
        return []
    with file.open("rb") as stream:
        lines: list[Any] = [orjson.loads(line) for line in stream if line.endswith(b"\n")]
    steps = [line for line in lines if line.get("evaluation_type") in STEP_TYPES]
    return [line["score"] for line in steps if line.get("score") is not None]
