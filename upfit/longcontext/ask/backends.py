"""Who answers the questions: an OpenAI-compatible server, a model in this process, or somebody else by way of files.

Every answer is saved at once in `answers-I-of-N.jsonl`, and a question that has an answer is never asked again.
"""

import asyncio
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from upfit.addresses import public, redacted
from upfit.bounded import DATA_BYTES, MISSHAPEN, read_bytes, read_lines, reason, shaped
from upfit.errors import UpfitError
from upfit.longcontext.ask.model import Request
from upfit.longcontext.options import Options
from upfit.model_files import check_model_files
from upfit.output import Meter
from upfit.text.tokenizer import encode_texts

MOST_TOKENS = 256  # of an answer
RETRIES = 8  # of one request, by the client library, with growing waits
# A slow server that is given up goes on with what it was asked, and is asked it again behind that: waiting is faster.
ANSWER_SECONDS, CONNECT_SECONDS = 6 * 3600, 60
BATCH = 8  # requests at once in this process
KEYS = "OPENAI_API_KEY"


class Answers:
    """The answers of one part: item number → text. A torn last line is cut off."""

    def __init__(self, path: Path) -> None:
        self.path = path
        content = read_bytes(path, DATA_BYTES) if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) != len(content):
            path.write_bytes(whole)
        with shaped(f"{path} does not hold answers that were kept; remove it to ask again"):
            rows = [json.loads(line) for line in whole.decode("utf-8").split("\n") if line]
            self.texts: dict[int, str] = {row["index"]: row["text"] for row in rows}
            self.tokens = sum(row.get("tokens", 0) for row in rows)

    def keep(self, file: IO[str], index: int, text: str, tokens: int = 0) -> None:
        self.texts[index], self.tokens = text, self.tokens + tokens
        file.write(json.dumps({"index": index, "text": text, "tokens": tokens}, ensure_ascii=False) + "\n")
        file.flush()


def ask_server(requests: list[Request], answers: Answers, options: Options, meter: Meter) -> None:
    """Ask a server with `--concurrency` requests at a time. Raises UpfitError when it stays away, or the budget is used up."""
    try:
        from openai import APIError, AsyncOpenAI, Timeout
    except ImportError as error:
        raise UpfitError("--ask openai needs the package openai; install it with: pip install 'upfit[synth]'") from error
    if not options.base_url and not os.environ.get(KEYS):
        raise UpfitError(f"--ask openai needs a key in {KEYS}, or --base-url of a server that wants none")

    async def run() -> None:
        gate = asyncio.Semaphore(options.concurrency)
        key = os.environ.get(KEYS) or "none"
        patience = Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS)
        async with AsyncOpenAI(base_url=options.base_url, api_key=key, max_retries=RETRIES, timeout=patience) as client:
            with open(answers.path, "a", encoding="utf-8") as file:

                async def ask(request: Request) -> None:
                    async with gate:
                        if options.budget_tokens is not None and answers.tokens >= options.budget_tokens:
                            return
                        completion = await client.chat.completions.create(
                            model=str(options.model),
                            messages=[{"role": "user", "content": request.prompt}],
                            max_tokens=MOST_TOKENS,
                            temperature=options.temperature,
                            seed=options.seed + request.index,
                        )
                        used = completion.usage.total_tokens if completion.usage else 0
                        answers.keep(file, request.index, completion.choices[0].message.content or "", used)
                        meter.advance(1, f"{answers.tokens:,} tokens")

                async with asyncio.TaskGroup() as group:
                    for request in requests:
                        group.create_task(ask(request))

    try:
        asyncio.run(run())
    except ExceptionGroup as group:
        failed = group.subgroup(APIError)
        if failed is None:
            raise
        complaint = " ".join(str(failed.exceptions[0]).split())
        server = public(options.base_url) if options.base_url else "the server"
        raise UpfitError(f"{server} does not answer ({redacted(complaint)}); the same command goes on") from group


def ask_here(requests: list[Request], answers: Answers, options: Options, meter: Meter) -> None:
    """Let a local model answer, a few requests at a time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from upfit.architecture.loading import pick_device

    folder = Path(str(options.model)).expanduser()
    if folder.is_dir():
        check_model_files(folder)
    name = str(folder if folder.is_dir() else options.model)
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False, dtype="auto")
    model = model.to(pick_device()).eval()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    chance = {"do_sample": True, "temperature": options.temperature} if options.temperature else {"do_sample": False}
    with open(answers.path, "a", encoding="utf-8") as file:
        for at in range(0, len(requests), BATCH):
            batch = requests[at : at + BATCH]
            inputs = encode_texts(
                tokenizer,
                [_as_prompt(tokenizer, request.prompt) for request in batch],
                return_tensors="pt",
                padding=True,
                add_special_tokens=not tokenizer.chat_template,
            ).to(model.device)
            torch.manual_seed(options.seed + batch[0].index)
            with torch.inference_mode():
                written = model.generate(**inputs, max_new_tokens=MOST_TOKENS, pad_token_id=tokenizer.pad_token_id, **chance)
            for request, ids in zip(batch, written[:, inputs["input_ids"].shape[1] :], strict=True):
                answers.keep(file, request.index, str(tokenizer.decode(ids, skip_special_tokens=True)), len(ids))
                meter.advance(1)


def _as_prompt(tokenizer: Any, text: str) -> str:
    if not tokenizer.chat_template:
        return text + "\n\nQuestion:"
    messages = [{"role": "user", "content": text}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def write_requests(requests: list[Request], path: Path, options: Options) -> None:
    """Requests in the layout of batch services: one JSON object a line, told apart by `custom_id`."""
    with open(path, "w", encoding="utf-8") as file:
        for request in requests:
            body: dict[str, Any] = {"model": options.model, "messages": [{"role": "user", "content": request.prompt}]}
            body |= {"max_tokens": MOST_TOKENS, "temperature": options.temperature}
            row = {"custom_id": f"upfit-{request.index}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def ingest(names: list[str], wanted: set[int], answers: Answers) -> None:
    """Keep the responses of a batch service that belong to this part. Raises UpfitError for a file of another layout."""
    with open(answers.path, "a", encoding="utf-8") as file:
        for name in names:
            for index, text in _responses(Path(name).expanduser()):
                if index in wanted and index not in answers.texts:
                    answers.keep(file, index, text)


def _responses(path: Path) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(read_lines(path, DATA_BYTES), 1):
        try:
            row = json.loads(line)
            index = int(row["custom_id"].removeprefix("upfit-"))
            if row.get("error"):
                continue  # asked again with the requests that are left
            yield index, str(row["response"]["body"]["choices"][0]["message"]["content"])
        except MISSHAPEN as error:
            raise UpfitError(
                f"{path} line {number} is not a response of a batch service ({reason(error)}); see docs/synth.md"
            ) from error


BACKENDS: dict[str, Callable[[list[Request], Answers, Options, Meter], None]] = {"openai": ask_server, "hf": ask_here}
