"""The smallest honest completions server: it runs real models, and answers as other people's servers do.

    python completions_server.py NAME=MODEL_FOLDER …

The models' completions endpoints are at `/NAME/FLAVOUR/v1/completions`. The flavours:

vllm        names tokens by their ids; its model brings a repetition penalty, as generation_config.json may
exact       the same, and knows logprob_token_ids and lists of prompts
busy        the same, and every second answer is damaged as while another client uses logprob_token_ids
sglang      names tokens by their texts
scoring     the same, with SGLang's /v1/score beside it, which takes the labels of every item
delimited   the same, started with a delimiter that it puts before what it scores
llama       logprobs in the form of llama-server, as many as asked for, and no echo
wordless    no logprobs
echoless    no logprobs of a prompt
boolean     wants `logprobs` to be true or false
textual     takes no token ids

`POST /trouble` with {"status", "times"} makes it fail that often first. Its port is the first line that it writes.
"""

import asyncio
import math
import socket
import sys
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

MOST_LOGPROBS = 20


def complete(tokenizer: Any, model: Any, flavour: str, body: dict[str, Any]) -> dict[str, Any]:
    """The answer to one request, computed without any cache."""
    import torch

    def name(token: int) -> str:
        return f"token_id:{token}" if flavour in ("vllm", "busy", "exact") else tokenizer.decode([token])

    def entry(logits: Any, token: int, count: int) -> tuple[float, dict[str, float]]:
        shares = logits.float().log_softmax(-1)
        values, tokens = shares.topk(count)
        shown = {name(each): value for each, value in zip(tokens.tolist(), values.tolist(), strict=True)}
        if flavour == "exact" and "logprob_token_ids" in body:
            wanted = {token, *body["logprob_token_ids"]}
            shown = {name(each): shares[each].item() for each in wanted}
        return shares[token].item(), shown

    ids, count = list(body["prompt"]), body.get("logprobs")
    with torch.inference_mode():
        prompt_logits = model(torch.tensor([ids])).logits[0]
        written: list[int] = []
        last = prompt_logits[-1]
        places = []
        penalty = body.get("repetition_penalty", 1.5)
        while True:
            places.append(last)
            written.append(int(penalised(last, [*ids, *written], penalty).argmax()))
            if len(written) >= body["max_tokens"] or written[-1] in body.get("stop_token_ids", ()):
                break
            last = model(torch.tensor([[*ids, *written]])).logits[0, -1]
    text = tokenizer.decode([token for token in written if token not in body.get("stop_token_ids", ())])
    choice: dict[str, Any] = {"index": 0, "text": text, "finish_reason": "length", "logprobs": None}
    if count is not None and flavour != "wordless":
        tokens, rows = written, places
        if body.get("echo") and flavour != "echoless":
            tokens, rows = [*ids[1:], *tokens], [*prompt_logits[:-1], *rows]
        entries = [entry(row, token, count) for row, token in zip(rows, tokens, strict=True)]
        first: list[Any] = [None] if body.get("echo") and flavour != "echoless" else []
        choice["logprobs"] = {
            "tokens": [*([name(ids[0])] if first else []), *map(name, tokens)],
            "token_logprobs": [*first, *(value for value, _ in entries)],
            "top_logprobs": [*first, *(shown for _, shown in entries)],
        }
        if flavour == "llama":
            choice["logprobs"] = {"content": [llama_entry(tokenizer, row, count) for row in rows]}
    return {"object": "text_completion", "model": "tiny", "choices": [choice]}


def penalised(logits: Any, seen: list[int], penalty: float) -> Any:
    """Logits as a repetition penalty changes them."""
    logits = logits.clone()
    logits[seen] = (
        logits[seen].where(logits[seen] < 0, logits[seen] / penalty).where(logits[seen] > 0, logits[seen] * penalty)
    )
    return logits


def llama_entry(tokenizer: Any, logits: Any, count: int) -> dict[str, Any]:
    """One place of an answer in llama-server's form."""
    values, tokens = logits.float().log_softmax(-1).topk(count)
    shown = [
        {"id": token, "token": tokenizer.decode([token]), "bytes": [], "logprob": value}
        for token, value in zip(tokens.tolist(), values.tolist(), strict=True)
    ]
    return shown[0] | {"top_logprobs": shown}


def score(model: Any, flavour: str, body: dict[str, Any]) -> dict[str, Any]:
    """SGLang's answer to /v1/score."""
    import torch

    rows = []
    between = [0] if flavour == "delimited" else []
    with torch.inference_mode():
        for item, labels in zip(body["items"], body["label_token_ids"], strict=True):
            shares = model(torch.tensor([[*body["query"], *between, *item]])).logits[0, -1].float().log_softmax(-1)
            rows.append([shares[label].item() for label in labels])
    return {"object": "scoring", "scores": [[math.exp(value) for value in row] for row in rows],
            "token_logprobs": rows if body.get("return_token_logprobs") else None}  # fmt: skip


def score_refusal(flavour: str, body: dict[str, Any]) -> str | None:
    """What SGLang says to a request for scores that it does not like."""
    if flavour not in ("scoring", "delimited"):
        return "not found"
    items, labels = body["items"], body["label_token_ids"]
    if not all(items) or len(items) != len(labels) or any(len(set(each)) < len(each) for each in labels):
        return "items must not be empty, and have labels without duplicates each"
    return None


def damage(answer: dict[str, Any]) -> None:
    """What vLLM's V1 runner leaves of the likeliest tokens next to a request with logprob_token_ids."""
    logprobs = answer["choices"][0]["logprobs"]
    for shown in filter(None, logprobs["top_logprobs"]):
        best = max(shown, key=shown.get)
        value = shown[best]
        shown.clear()
        shown.update({best: value, "token_id:0": -9999.0})


def refusal(body: dict[str, Any], flavour: str, authorization: str | None) -> tuple[int, str] | None:
    """What a server says to a request that it does not like."""
    if flavour == "boolean" and not isinstance(body.get("logprobs", False), bool):
        return 422, "logprobs: Input should be a valid boolean, unable to interpret input"
    if flavour == "textual":
        return 422, "prompt: Input should be a valid string"
    if flavour == "llama" and body.get("echo"):
        return 400, "Only no echo is supported"
    if authorization == "Bearer wrong":
        return 401, "wrong key"
    if body["model"] != "tiny":
        return 404, f"no model {body['model']}"
    if flavour != "llama" and (body.get("logprobs") or 0) > MOST_LOGPROBS:
        return 400, f"at most {MOST_LOGPROBS} logprobs are given"
    if flavour != "exact" and isinstance(body["prompt"][0], list):
        return 400, "one prompt at a time"
    if len(body["prompt"]) > 400:
        return 400, "longer than the model's context"
    return None


def application(models: dict[str, tuple[Any, Any]]) -> Any:
    """The server; `models` holds tokenizer and model by name."""
    app = FastAPI()
    state: dict[str, Any] = {"status": 200, "times": 0, "at_once": 0, "most_at_once": 0, "answers": 0}

    async def completions(name: str, flavour: str, request: Request) -> Any:
        body = await request.json()
        if state["times"]:
            state["times"] -= 1
            return JSONResponse({"error": "trouble"}, status_code=state["status"])
        if refused := refusal(body, flavour, request.headers.get("authorization")):
            return JSONResponse({"error": refused[1]}, status_code=refused[0])
        state["at_once"] += 1
        state["most_at_once"] = max(state["most_at_once"], state["at_once"])
        try:
            prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
            parts = [
                await asyncio.to_thread(complete, *models[name], flavour, body | {"prompt": each}) for each in prompts
            ]
            answer = parts[0]
            answer["choices"] = [part["choices"][0] | {"index": place} for place, part in enumerate(parts)][::-1]
        finally:
            state["at_once"] -= 1
        state["answers"] += 1
        if flavour == "busy" and body.get("logprobs") and state["answers"] % 2:
            damage(answer)
        return answer

    async def scores(name: str, flavour: str, request: Request) -> Any:
        body = await request.json()
        if refused := score_refusal(flavour, body):
            return JSONResponse({"error": refused}, status_code=404 if refused == "not found" else 400)
        state["answers"] += 1
        return await asyncio.to_thread(score, models[name][1], flavour, body)

    async def trouble(request: Request) -> Any:
        state.update(await request.json())
        return state

    app.add_api_route("/{name}/{flavour}/v1/completions", completions, methods=["POST"])
    app.add_api_route("/{name}/{flavour}/v1/score", scores, methods=["POST"])
    app.add_api_route("/trouble", trouble, methods=["POST"])
    return app


def main() -> None:
    import torch
    import uvicorn
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    folders = dict(argument.split("=", 1) for argument in sys.argv[1:])
    models = {
        name: (AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval())
        for name, folder in folders.items()
    }
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(64)
    sys.stdout.write(f"{listener.getsockname()[1]}\n")
    sys.stdout.flush()
    uvicorn.Server(uvicorn.Config(application(models), log_level="warning")).run(sockets=[listener])


if __name__ == "__main__":
    main()
