"""Secrets in runs are masked and counted; what only looks like one is left."""

from collections import Counter

import pytest

from prmkit.trajectories.importing import FileReport
from prmkit.trajectories.secrets import mask
from tests.trajectories.conftest import Read

FAKE = "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8"  # of no issuer


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (f"sk-proj-{FAKE}", "openai key"),
        (f"sk-ant-api03-{FAKE}", "anthropic key"),
        (f"ghp_{FAKE}", "github token"),
        (f"glpat-{FAKE}", "gitlab token"),
        ("AKIA" + "ABCDEFGHIJKLMNOP", "aws key"),
        (f"AIza{FAKE[:35]}", "google key"),
        (f"xoxb-{FAKE}", "slack token"),
        (f"hf_{FAKE}", "hugging face token"),
        (f"npm_{FAKE}", "npm token"),
        (f"sk_live_{FAKE}", "stripe key"),
        (f"eyJ{FAKE}.eyJ{FAKE}.{FAKE}", "json web token"),
        ("postgres://admin:s3cr3t!@db:5432/x", "password in a url"),
        (f"Authorization: Bearer {FAKE}", "authorization header"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----", "private key"),
        (f"GITHUB_TOKEN={FAKE}", "environment variable"),
        ("export MY_SIGNING_KEY=9f8e7d6c5b4a", "environment variable"),
        ("api_key=9f8e7d6c5b4a", "named secret"),
        ('{"client_secret": "correct-horse"}', "named secret"),
        ("export DB_PASSWORD='correct-horse'", "named secret"),
    ],
)
def test_secrets_are_masked(text: str, kind: str) -> None:
    found: Counter[str] = Counter()
    masked = mask(f"before {text} after", found)
    assert found == {kind: 1}
    assert f"[secret: {kind}]" in masked and masked.startswith("before ") and "after" in masked
    assert mask(masked, found) == masked


@pytest.mark.parametrize(
    "text",
    ["password = ask_user()", "api_key=os.environ", 'API_KEY = "YOUR_API_KEY"', "the secret key is lost", "sk-learn",
     "https://example.org/a:b", "token budget: 2048", "TOKEN=$GITHUB_TOKEN", "PAGE_TOKEN=next", "passwd: none"],
)  # fmt: skip
def test_what_is_not_a_secret_stays(text: str) -> None:
    found: Counter[str] = Counter()
    assert mask(text, found) == text and not found


def test_secrets_are_found_everywhere_in_a_run_and_kept_on_request(read: Read, reports: list[FileReport]) -> None:
    key = f"ghp_{FAKE}"
    value = {
        "messages": [
            {"role": "system", "content": key},
            {"role": "user", "content": f"Use {key}."},
            {"role": "assistant", "tool_calls": [
                {"id": "c", "function": {"name": "f", "arguments": {"login": {"password": "hunter-two", "t": key}}}}]},
            {"role": "tool", "tool_call_id": "c", "content": key},
        ],
        "answer": key,
    }  # fmt: skip
    (run,) = read(value)
    assert key not in repr(run) and "hunter-two" not in repr(run)
    assert reports[0].secrets == {"github token": 5, "named secret": 1}
    (kept,) = read(value, keep_secrets=True)
    assert key in kept.task


def test_tasks_whose_ids_look_like_secrets_stay_apart(read: Read) -> None:
    ids = [f"sk-{'abcdefghij' * 3}{number}" for number in range(2)]
    said = [{"role": "user", "content": "Go."}, {"role": "assistant", "content": "Gone."}]
    tasks = [run.task_id for run in read(*({"task_id": each, "messages": said} for each in ids for _ in range(2)))]
    assert tasks[0] == tasks[1] != tasks[2] == tasks[3] and not any("sk-abc" in task for task in tasks)
