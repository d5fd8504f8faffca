"""All rows of a conversion in one SQLite file, and the decisions about a row that need the complete input.

Rows cannot be assigned to variants while they are read, because it depends on all rows whether a prompt is also held
out, and whether a judge repeats itself or answers on another scale. Until the end, SQLite keeps the rows on disk, so
memory does not grow with the input, and finds rows that belong together.
"""
# ruff: noqa: S608 - queries consist of strings of this module; values from the data are bound

import hashlib
import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from statistics import fmean, median
from typing import Any

import orjson

from prmkit.dataset.lengths import Measured
from prmkit.dataset.prepare import PreparedRow, RejectedRow, ScaleProblem, rejected_entry, row_id
from prmkit.dataset.settings import Aggregate, Split
from prmkit.errors import DataError
from prmkit.leniency import Leniency, estimate_leniency
from prmkit.rows import STEP_TYPES, WEIGHT, without_selection

DUPLICATE = "duplicate"
BOTH_SIDES = "the prompt is also held out"
NEAR_DUPLICATE = "nearly repeats a held-out prompt"
CONTESTED = "judges differ too much"
OTHER_SCALE = "the judge uses another scale"
JUDGES_COMPARED = 50
"""Compare at most this many judges, those with the most rows, because the number of pairs grows quadratically."""

_LINE_BITS = 40
"""A row's number is `source << _LINE_BITS | line`."""

_SCHEMA = """
CREATE TABLE prompt (id INTEGER PRIMARY KEY, digest BLOB UNIQUE, system TEXT, text TEXT);
CREATE TABLE row (
    number INTEGER PRIMARY KEY, source INTEGER, line INTEGER, prompt INTEGER, wanted INTEGER, unit TEXT, task TEXT,
    judge TEXT, evaluation_type TEXT, trajectory TEXT, slot TEXT, question BLOB, verdict BLOB, answer BLOB,
    prompt_characters INTEGER, label_characters INTEGER, tokens INTEGER, tokens_left_out INTEGER,
    characters_left_out INTEGER, markers INTEGER, leaked_scores INTEGER, repairs TEXT,
    weight REAL, held_out INTEGER DEFAULT 0, status TEXT, reason TEXT
);
CREATE TABLE body (number INTEGER PRIMARY KEY, label TEXT, trimmed TEXT, sidecar BLOB);
CREATE TABLE score (number INTEGER, place INTEGER, key TEXT, value INTEGER, PRIMARY KEY (number, place)) WITHOUT ROWID;
CREATE TABLE rejected (number INTEGER PRIMARY KEY, kind TEXT, reason TEXT, judge TEXT, tokens INTEGER, entry BLOB);
CREATE TABLE unit (name TEXT PRIMARY KEY, is_task INTEGER, held_out INTEGER) WITHOUT ROWID;
CREATE TABLE consensus (number INTEGER PRIMARY KEY, scores TEXT, judges INTEGER, lightest INTEGER);
CREATE VIEW kept AS SELECT * FROM row WHERE wanted AND status IS NULL;
"""
# unit: the unit of the split: the task; for a row without a task, the prompt. slot: the clip of its trajectory.
# question: a hash of the prompt without its system prompt. answer: a hash of the judge's text and of the metadata
# without the selection. weight: `prmkit.rows.WEIGHT`, 0 for a row without a weight. lightest: the prompt's row with the
# lowest weight. Scores are in hundredths.


class Stage:
    """The rows of one conversion. `rows` is the database, for queries that no method covers."""

    def __init__(self, path: Path, sources: Sequence[str] = ()) -> None:
        self.rows = sqlite3.connect(path, isolation_level=None)
        self.sources = list(sources)
        # The file is deleted with the conversion, so nothing in it needs to survive a crash.
        # The page size must come before the cache size, which is immediately converted to a number of pages.
        self.rows.executescript("PRAGMA page_size=16384; PRAGMA cache_size=-32000; PRAGMA journal_mode=OFF;")
        self.rows.executescript("PRAGMA synchronous=OFF; PRAGMA locking_mode=EXCLUSIVE; BEGIN;" + _SCHEMA)

    def add_row(self, source: int, prepared: PreparedRow, measured: Measured) -> None:
        """Add a usable row; later decisions may still reject it because of other rows."""
        row, prompt = prepared.row, prepared.prompt
        number = _number(source, prepared.line)
        scores = [(key, round(score * 100)) for key, score in prepared.scores.items()]
        metadata = orjson.dumps(without_selection(row.metadata), option=orjson.OPT_SORT_KEYS)
        self.rows.execute(
            f"INSERT INTO row VALUES ({', '.join('?' * 23)}, 0, NULL, NULL)",
            (
                number, source, prepared.line, self._prompt_id(prompt.digest, prompt.system, prompt.text),
                prepared.wanted, row.task or prompt.digest[:16], row.task, row.judge, row.evaluation_type,
                row.trajectory, _slot(prepared), _digest(row.prompt), _digest(prepared.canonical),
                _digest(f"{row.answer}\0{metadata!r}"), len(row.prompt),
                len(prepared.label), measured.tokens, measured.tokens_left_out, measured.characters_left_out,
                prompt.markers + prepared.markers, prompt.leaked_scores, ",".join(prepared.repairs),
                float(row.metadata.get(WEIGHT, 0.0)),
            ),
        )  # fmt: skip
        if not prepared.wanted:
            return
        sidecar = {
            "id": row_id(prompt.sha256, row.judge, prepared.label),
            "source": self.sources[source],
            "line": prepared.line,
            "prompt_sha256": prompt.sha256,
            "repairs": prepared.repairs,
            "scores": prepared.scores,
            "metadata": row.metadata,
        }
        if measured.tokens:
            sidecar["tokens"] = measured.tokens - measured.tokens_left_out
        trimmed = measured.prompt if measured.characters_left_out else None
        self.rows.execute(
            "INSERT INTO body VALUES (?, ?, ?, ?)", (number, prepared.label, trimmed, orjson.dumps(sidecar))
        )
        self.rows.executemany(
            "INSERT INTO score VALUES (?, ?, ?, ?)", [(number, position, *pair) for position, pair in enumerate(scores)]
        )

    def _prompt_id(self, digest: str, system: str | None, text: str) -> int:
        key = bytes.fromhex(digest)
        row = self.rows.execute("SELECT id FROM prompt WHERE digest = ?", (key,)).fetchone()
        if row:
            return int(row[0])
        made = self.rows.execute("INSERT INTO prompt (digest, system, text) VALUES (?, ?, ?)", (key, system, text))
        return made.lastrowid or 0

    def add_rejected(self, source: int, row: RejectedRow) -> None:
        """Add a row that is rejected regardless of the other rows."""
        entry = rejected_entry(self.sources[source], row.line, row.reason, row.content)
        values = (_number(source, row.line), row.kind, row.reason, row.judge, row.tokens, entry)
        self.rows.execute("INSERT INTO rejected VALUES (?, ?, ?, ?, ?, ?)", values)

    def index(self) -> None:
        """Create the index that the decisions need, after the last row was added."""
        self.rows.execute("CREATE INDEX row_prompt ON row (prompt, judge)")

    def place(self, number: int) -> str:
        """Return the location of a row in the input, `source:line`."""
        return f"{self.sources[number >> _LINE_BITS]}:{number & (1 << _LINE_BITS) - 1}"

    # --- decisions, in this order ---

    def reject_other_scales(self, problems: Iterable[ScaleProblem]) -> None:
        """Reject the rows of judges that answer a key on an undeclared scale."""
        for problem in problems:
            if problem.is_scale:
                self._reject(
                    OTHER_SCALE, f"{problem.key} of {problem.judge} is on another scale",
                    "judge IS ? AND number IN (SELECT number FROM score WHERE key = ?)", problem.judge, problem.key,
                )  # fmt: skip

    def assign_sides(self, split: Split) -> set[str]:
        """Hold out complete tasks; with two or more tasks, each split gets at least one.

        Returns:
            The tasks on the user's list that no row has.
        """
        # Rows without a task inherit it from rows with the same prompt.
        self.rows.execute(
            "UPDATE row SET unit = named.unit FROM (SELECT prompt, min(unit) AS unit FROM row WHERE task IS NOT NULL "
            "GROUP BY prompt) AS named WHERE row.task IS NULL AND row.prompt = named.prompt"
        )
        units = self.rows.execute(
            "SELECT unit, max(task IS NOT NULL) FROM row WHERE status IS NULL GROUP BY unit ORDER BY unit"
        ).fetchall()
        held_out = {unit for unit, is_task in units if split.holds_out(unit) and (is_task or split.tasks is None)}
        if split.tasks is None and split.ratio > 0 and units:
            tasks = [unit for unit, is_task in units if is_task]
            choice = tasks if len(tasks) > 1 else [unit for unit, _ in units]
            by_hash = sorted((split.place(unit), unit) for unit in choice)
            held_out = held_out or {by_hash[0][1]}
            if held_out.issuperset(choice):
                held_out.discard(by_hash[-1][1])
        self.rows.executemany("INSERT INTO unit VALUES (?, ?, ?)", ((*unit, unit[0] in held_out) for unit in units))
        self.rows.execute("UPDATE row SET held_out = 1 WHERE unit IN (SELECT name FROM unit WHERE held_out)")
        return set(split.tasks or ()) - {unit for unit, is_task in units if is_task}

    def check_trajectories(self) -> None:
        """Check that each clip of a trajectory has only one prompt; otherwise several attempts would be mixed up.

        Raises:
            DataError: a clip has several prompts.
        """
        clips = self.rows.execute(
            "SELECT trajectory, slot, min(number), max(number) FROM kept WHERE slot IS NOT NULL "
            "GROUP BY trajectory, slot HAVING count(DISTINCT question) > 1 ORDER BY min(number)"
        ).fetchall()
        if clips:
            name, slot, *_ = clips[0]
            lines = self.rows.execute(
                "SELECT source, min(line) FROM kept WHERE trajectory = ? AND slot = ? GROUP BY question "
                "ORDER BY min(number) LIMIT 2", (name, slot),
            )  # fmt: skip
            locations = " and ".join(f"{self.sources[source]}:{line}" for source, line in lines)
            raise DataError(
                f"{len(clips):,} clips have more than one prompt, for example {slot.split(chr(0))[0] or 'clip'} number "
                f"{slot.split(chr(0))[-1]} of {name} ({locations}). If these are several attempts at a task, set "
                "metadata.trajectory_id for each."
            )

    def reject_prompts_on_both_sides(self) -> None:
        """Reject training rows whose prompt is held out by another task."""
        held_out = "SELECT prompt FROM row WHERE held_out AND status IS NULL"
        self._reject(BOTH_SIDES, BOTH_SIDES, f"NOT held_out AND prompt IN ({held_out})")

    def reject_prompts(self, prompts: Iterable[tuple[str, int]], kind: str) -> None:
        """Reject the training rows of some prompts.

        Args:
            prompts: the reason for each prompt, and the prompt's id.
            kind: the name under which the report counts these rows.
        """
        self.rows.executemany(
            "UPDATE row SET status = ?, reason = ? WHERE prompt = ? AND wanted AND status IS NULL",
            ((kind, reason, prompt) for reason, prompt in prompts),
        )

    def reject_duplicates(self) -> None:
        """Keep one of the rows in which a judge gives a prompt the same verdict: the first with the lowest weight."""
        again = (
            "SELECT number FROM (SELECT number, row_number() OVER (PARTITION BY prompt, judge, verdict "
            "ORDER BY weight, number) AS place FROM kept) WHERE place > 1"
        )
        self._reject(DUPLICATE, DUPLICATE, f"number IN ({again})")

    def reject_contested(self, limit: float) -> None:
        """Reject prompts on which the judges' scores differ by more than `limit` (0 to 1)."""
        contested = self.rows.execute(
            "SELECT prompt, key, max(spread) FROM (SELECT prompt, key, max(value) - min(value) AS spread FROM voice "
            "GROUP BY prompt, key) GROUP BY prompt HAVING max(spread) > ?", (100 * limit + 1e-9,),
        ).fetchall()  # fmt: skip
        self.reject_prompts(((f"judges differ by {spread / 100:.2f} on {key}", prompt)
                             for prompt, key, spread in contested), CONTESTED)  # fmt: skip
        self.rows.execute("DELETE FROM voice WHERE prompt NOT IN (SELECT prompt FROM kept)")

    def _reject(self, status: str, reason: str, where: str, *values: Any) -> None:
        query = f"UPDATE row SET status = ?, reason = ? WHERE wanted AND status IS NULL AND {where}"
        self.rows.execute(query, (status, reason, *values))

    # --- counts ---

    def answered_again(self) -> int:
        """Count the answers after a judge's first one to a prompt. Call it before duplicates are rejected."""
        (again,) = self.rows.execute(
            "SELECT total(n - 1) FROM (SELECT count(DISTINCT answer) AS n FROM kept GROUP BY prompt, judge)"
        ).fetchone()
        return int(again)

    def count_prompts(self) -> tuple[int, int]:
        """Count the kept prompts, and those to which a judge gave different verdicts."""
        prompts, differently = self.rows.execute(
            "SELECT count(DISTINCT prompt), count(DISTINCT CASE WHEN answers > 1 THEN prompt END) "
            "FROM (SELECT prompt, count(*) AS answers FROM kept GROUP BY prompt, judge)"
        ).fetchone()
        return prompts, differently

    def count_held_out(self) -> tuple[int, int, int, int]:
        """Count the held-out tasks, all tasks, the held-out rows and all rows, of the kept rows."""
        tasks, all_tasks, rows, all_rows = self.rows.execute(
            "SELECT count(DISTINCT CASE WHEN held_out THEN task END), count(DISTINCT task), total(held_out), count(*) "
            "FROM kept"
        ).fetchone()
        return tasks, all_tasks, int(rows), all_rows

    # --- judges ---

    def gather_voices(self) -> None:
        """Average each judge's scores per prompt and key, so that repeated answers do not count more."""
        self.rows.execute(
            "CREATE TABLE voice AS SELECT prompt, key, judge, min(evaluation_type) AS evaluation_type, "
            "avg(value) AS value FROM kept JOIN score USING (number) GROUP BY prompt, key, judge"
        )
        self.rows.execute("CREATE INDEX voice_prompt ON voice (prompt, key)")
        self.rows.execute("CREATE TABLE compared (judge TEXT PRIMARY KEY)")
        self.rows.execute(
            "INSERT INTO compared SELECT judge FROM kept WHERE judge IS NOT NULL GROUP BY judge "
            "ORDER BY count(*) DESC, judge LIMIT ?", (JUDGES_COMPARED,),
        )  # fmt: skip

    def agreement(self) -> Iterator[tuple[Any, ...]]:
        """Yield per evaluation type and pair of judges: prompts, scores, sums of x, y, x², y², xy and |x - y|."""
        return self.rows.execute(
            "SELECT a.evaluation_type, a.judge, b.judge, count(DISTINCT a.prompt), count(*), sum(a.value), "
            "sum(b.value), sum(a.value * a.value), sum(b.value * b.value), sum(a.value * b.value), "
            "sum(abs(a.value - b.value)) FROM voice a JOIN voice b ON a.prompt = b.prompt AND a.key = b.key "
            "AND a.judge < b.judge WHERE a.judge IN compared AND b.judge IN compared "
            "GROUP BY a.evaluation_type, a.judge, b.judge"
        )

    def self_agreement(self) -> Iterator[tuple[Any, ...]]:
        """Yield the same as `agreement` for judges that answered a prompt repeatedly: judge, type, key, n, and sums.

        Call it before duplicates are rejected. An identical copy of a row is not a second answer.
        """
        return self.rows.execute(
            "WITH given AS (SELECT min(number) AS number, prompt, judge, evaluation_type FROM kept "
            "WHERE judge IS NOT NULL GROUP BY prompt, judge, answer), "
            "pairs AS (SELECT judge, evaluation_type, key, 1.0 * value AS x, "
            "lag(value) OVER (PARTITION BY prompt, judge, key ORDER BY number) AS y "
            "FROM given JOIN score USING (number)) "
            "SELECT judge, evaluation_type, key, count(*), sum(x), sum(y), sum(x * x), sum(y * y), sum(x * y), "
            "sum(abs(x - y)) FROM pairs WHERE y IS NOT NULL GROUP BY judge, evaluation_type, key"
        )

    def leniency(self) -> Leniency:
        """Estimate the leniency of each judge, from the prompts that several judges answered."""
        voices = self.rows.execute(
            "SELECT prompt, key, judge, value / 100.0 FROM voice WHERE judge IN compared ORDER BY prompt, key, judge"
        )
        return estimate_leniency(
            {judge: value for _, _, judge, value in voice} for _, voice in groupby(voices, key=itemgetter(0, 1))
        )

    def make_consensus(self, aggregate: Aggregate, leniency: Leniency) -> None:
        """Choose for each prompt the row that represents it in the consensus, and its scores.

        Scores are aggregated key by key, each minus its judge's offset. Of the rows with the most keys, the one nearest
        to the result is chosen, so that its text fits the scores.
        """
        scores = self.rows.execute(
            "SELECT prompt, number, judge, key, value, weight FROM kept JOIN score USING (number) "
            "ORDER BY prompt, number, place"
        )
        self.rows.executemany(
            "INSERT INTO consensus VALUES (?, ?, ?, ?)",
            [_consensus(list(rows), aggregate, leniency) for _, rows in groupby(scores, key=itemgetter(0))],
        )


def _consensus(
    rows: Sequence[tuple[int, int, str | None, str, int, float]], aggregate: Aggregate, leniency: Leniency
) -> tuple[int, bytes, int, int]:
    """Return row number, scores in hundredths, number of judges and lightest row, for the rows of one prompt."""
    values_of: dict[str, dict[str | None, list[float]]] = defaultdict(lambda: defaultdict(list))
    of_row: dict[int, dict[str, int]] = defaultdict(dict)
    for _, number, judge, key, value, _ in rows:
        offset = 100 * leniency.offsets.get(judge, 0.0) if judge is not None else 0.0
        values_of[key][judge].append(value - offset)
        of_row[number][key] = value
    combine = fmean if aggregate == "mean" else median
    combined = {
        key: min(100.0, max(0.0, round(combine([fmean(values) for values in by_judge.values()]), 4)))
        for key, by_judge in values_of.items()
    }

    def distance(number: int) -> tuple[int, float, int]:
        scores = of_row[number]
        return -len(scores), fmean(abs(score - combined[key]) for key, score in scores.items()), number

    nearest = min(of_row, key=distance)
    hundredths = {key: int(combined[key] + 0.5) for key in of_row[nearest]}
    _, lightest = min((weight, number) for _, number, *_, weight in rows)
    return nearest, orjson.dumps(hundredths), len({judge for _, _, judge, *_ in rows}), lightest


def _number(source: int, line: int) -> int:
    """Return a row's number. Numbers sort in the order of the input, and `Stage.place` splits them again."""
    return source << _LINE_BITS | line


def _slot(prepared: PreparedRow) -> str | None:
    """Return the key of a row's clip, with the category unless the row is about a step; None if about all clips."""
    row = prepared.row
    if row.clip_number is None or row.trajectory is None:
        return None
    category = "" if row.evaluation_type in STEP_TYPES else row.metadata.get("category")
    return f"{row.evaluation_type or ''}\0{category}\0{row.clip_number}"


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()


@contextmanager
def open_stage(path: Path, sources: Sequence[str]) -> Iterator[Stage]:
    """Create a stage in a new file.

    Raises:
        OSError: the disk is full.
    """
    stage = Stage(path, sources)
    try:
        yield stage
    except sqlite3.OperationalError as error:
        raise OSError(0, f"{error} ({path.parent})") from error
    finally:
        stage.rows.close()
