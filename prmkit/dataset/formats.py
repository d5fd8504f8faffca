"""The two forms of training rows that LLaMA Factory reads, and what dataset_info.json says of them."""

from typing import Any, Literal

import orjson

Format = Literal["alpaca", "sharegpt"]


def training_row(prompt: str, label: str, form: Format) -> bytes:
    """One line of a training file. It has string columns only: Arrow takes a column's type from the first 10 MB."""
    row: dict[str, Any] = (
        {"instruction": prompt, "input": "", "output": label}
        if form == "alpaca"
        else {"conversations": [{"from": "human", "value": prompt}, {"from": "gpt", "value": label}]}
    )
    return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)


def prompt_and_label(row: bytes | memoryview, form: Format) -> tuple[str, str]:
    """What a training row asks and answers: undoes `training_row`."""
    value = orjson.loads(row)
    if form == "alpaca":
        return value["instruction"], value["output"]
    human, gpt = value["conversations"]
    return human["value"], gpt["value"]


def dataset_entry(file_name: str, form: Format) -> dict[str, Any]:
    """The entry of a training file in dataset_info.json."""
    if form == "alpaca":
        columns = {"prompt": "instruction", "query": "input", "response": "output"}
        return {"file_name": file_name, "columns": columns}
    return {
        "file_name": file_name,
        "formatting": "sharegpt",
        "columns": {"messages": "conversations"},
        "tags": {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt"},
    }
