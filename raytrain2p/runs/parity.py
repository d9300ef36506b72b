"""`parity`: whether every way in which a trained model is used gives the same answers to the same questions."""

import argparse
import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from raytrain2p.config import InputError, Problem
from raytrain2p.config.cli import FAILED, report, say
from raytrain2p.config.phases import INSTRUCTION
from raytrain2p.config.settings import Sources
from raytrain2p.data.media import MediaRef
from raytrain2p.data.reading import read_records
from raytrain2p.data.records import USER, Record, spread
from raytrain2p.runs.output import print_json, print_table
from raytrain2p.runs.request import Request
from raytrain2p.tracking.find import find_artifact, read_run
from raytrain2p.tracking.run_directory import RunDirectory

SECONDS_TO_START = 600.0  # of a server, which loads the model
AT_ONCE = 8  # requests to a server
ANSWERS = "ANSWERS "  # begins the line in which a process prints its answers
COLUMNS = ("way", "answers", "differ", "seconds")

PYFUNC = """
import json, sys, mlflow.pyfunc
rows, most = json.load(open(sys.argv[2])), int(sys.argv[3])
print("ANSWERS " + json.dumps(list(mlflow.pyfunc.load_model(sys.argv[1]).predict(rows, params={"max_new_tokens": most, "batch_size": 1}))))
"""
TRANSFORMERS = """
import json, sys
from transformers import AutoModelForImageTextToText, AutoProcessor
import raytrain2p.inference.hf_model
chats, most = json.load(open(sys.argv[2])), int(sys.argv[3])
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], attn_implementation="eager").eval()
processor = AutoProcessor.from_pretrained(sys.argv[1])
found = []
for chat in chats:
    inputs = processor.apply_chat_template([chat], add_generation_prompt=True, tokenize=True, return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=most)[0, inputs["input_ids"].shape[1]:]
    found.append(processor.decode(answer, skip_special_tokens=True).strip())
print("ANSWERS " + json.dumps(found))
"""


@dataclass(frozen=True)
class Asked:
    """What is asked.

    Args:
        artifact: model.pt.
        rows: questions as fields of records; media are paths, and the text has a placeholder for each.
        chats: the same as messages, whose content is a list of parts.
        most: tokens of an answer.
        folder: for what the ways write.
    """

    artifact: Path
    rows: Sequence[Mapping[str, Any]]
    chats: Sequence[list[dict[str, Any]]]
    most: int
    folder: Path

    def file(self, what: Any) -> str:
        path = self.folder / f"{len(list(self.folder.iterdir()))}.json"
        path.write_text(json.dumps(what))
        return str(path)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Each way runs in processes of its own, as a user would start it; the first one asks one question after the other. Returns 1 if "
        "an answer differs from that of the first. `pyfunc` and `mlflow` install what the model declares into a new virtual environment."
    )
    parser.add_argument("--data", metavar="SOURCE", help="records with questions (default: the first test split of the run)")
    parser.add_argument("--limit", type=int, default=100, help="questions, drawn evenly from the records (default %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="longest answer in tokens (default %(default)s)")
    parser.add_argument("--ways", nargs="+", choices=[*WAYS], default=[*WAYS], metavar="WAY", help=f"some of {', '.join(WAYS)}")


def run(request: Request) -> int:
    """Ask in each way, and compare.

    Raises:
        InputError: no run fits; or the records cannot be read.
    """
    options = request.options
    if len(request.names) > 1 or min(options.limit, options.max_new_tokens) < 1:
        raise InputError(Problem("parity", "takes one RUN, and numbers from 1 on", "see --help"))
    artifact = find_artifact(request.root, INSTRUCTION, (request.names or ["latest"])[0], "RUN")
    sources = [options.data] if options.data else sources_of_test_split(artifact)
    records = [record for source in sources for record in read_records(source, INSTRUCTION.number, "--data", answered=False)]
    with tempfile.TemporaryDirectory(prefix="raytrain2p-parity-") as scratch:
        folder = Path(scratch)
        rows, chats = written(spread(list(filter(asks_once, records)), options.limit), folder)
        found = list(compared(Asked(artifact, rows, chats, options.max_new_tokens, folder), options.ways))
    if options.json:
        print_json(found)
    else:
        print_table(COLUMNS, [[str(one[column]) for column in COLUMNS] for one in found])
        for one in found:
            for example in one["examples"]:
                say(f"{one['way']}: {example}")
    return FAILED if any(one["differ"] or one["problem"] for one in found) else 0


def sources_of_test_split(artifact: Path) -> list[str]:
    """The sources of the first test split of the run that made the artifact.

    Raises:
        InputError: it has none.
    """
    tests = ((RunDirectory(artifact.parent).read_config() or {}).get("data") or {}).get("test") or {}
    if not tests:
        raise InputError(Problem("--data", "is missing, and the run has no test split", "give records with questions"))
    return [source.path for source in TypeAdapter(Sources).validate_python(next(iter(tests.values())))]


def asks_once(record: Record) -> bool:
    """Whether it is a single question, without a system message."""
    return record.messages[0].role == USER and len(record.answers) < 2


def written(records: Sequence[Record], folder: Path) -> tuple[list[dict[str, Any]], list[list[dict[str, Any]]]]:
    """The questions as rows and as chats; their media are written as files that each way can read."""
    rows, chats = list[dict[str, Any]](), list[list[dict[str, Any]]]()
    for record in records:
        row, parts = {"instruction": ""}, list[dict[str, Any]]()
        for part in record.messages[0].parts:
            if isinstance(part, MediaRef):
                path = folder / f"{len(rows)}_{len(parts)}.{part.modality}"
                path.write_bytes(part.read())
                row |= {part.modality: str(path), "instruction": f"{row['instruction']}<{part.modality}>"}
                parts.append({"type": part.modality, part.modality: str(path)})
            else:
                row["instruction"] += part
                parts.append({"type": "text", "text": part})
        rows.append(row)
        chats.append([{"role": USER, "content": parts}])
    return rows, chats


def compared(asked: Asked, ways: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The answers of each way, beside those of the first."""
    expected: list[str] | None = None
    for way in ways:
        report(f"{way}: {len(asked.rows)} questions")
        began, problem, answers = time.monotonic(), "", list[str]()
        try:
            answers = WAYS[way](asked)
        except (OSError, subprocess.SubprocessError, ValueError, LookupError) as error:
            problem = str(error)
            report(f"{way}: {problem}")
        expected = answers if expected is None else expected
        pairs = [(one, other) for one, other in zip(expected, answers, strict=False) if one != other]
        yield {
            "way": way,
            "answers": len(answers),
            "differ": len(pairs) + abs(len(expected) - len(answers)),
            "seconds": round(time.monotonic() - began, 1),
            "problem": problem,
            "examples": [f"{other!r}, {ways[0]} has {one!r}" for one, other in pairs[:3]],
        }


def by_predict(asked: Asked) -> list[str]:
    """`raytrain2p predict`, one question after the other."""
    file = asked.folder / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in asked.rows))
    words = ["--run", str(asked.artifact), "--file", str(file), "--max-new-tokens", str(asked.most), "--batch-size", "1", "--json"]
    done = finished([sys.executable, "-m", "raytrain2p.predict", *words])
    return [json.loads(line)["answer"] for line in done.splitlines()]


def by_pyfunc(asked: Asked) -> list[str]:
    """MLflow's model, in a virtual environment with what it declares alone."""
    python, model = clean_environment(asked)
    words = ["-c", PYFUNC, str(model), asked.file(asked.rows), str(asked.most)]
    return printed(finished([str(python), *words], cwd=asked.folder))


def by_mlflow(asked: Asked) -> list[str]:
    """`mlflow models serve`, from that environment."""
    python, model = clean_environment(asked)
    port = free_port()
    command = [str(python), "-m", "mlflow", "models", "serve", "-m", str(model), "--env-manager", "local", "--port", str(port)]
    path = f"{python.parent}:{os.environ['PATH']}"
    longest = f"{SECONDS_TO_START:.0f}"
    with serving(command, f"http://127.0.0.1:{port}/ping", asked.folder, PATH=path, MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT=longest):
        body = {"dataframe_records": asked.rows, "params": {"max_new_tokens": asked.most, "batch_size": 1}}
        return list(posted(f"http://127.0.0.1:{port}/invocations", body)["predictions"])


def by_transformers(asked: Asked) -> list[str]:
    """The export, through transformers."""
    folder = asked.folder / "exported"
    finished([sys.executable, "-m", "raytrain2p.runs", "export", str(asked.artifact.parent), str(folder)])
    return printed(finished([sys.executable, "-c", TRANSFORMERS, str(folder), asked.file(asked.chats), str(asked.most)]))


def by_serve(asked: Asked) -> list[str]:
    """`raytrain2p serve`, several requests at once."""
    port = free_port()
    command = [sys.executable, "-m", "raytrain2p.serve", str(asked.artifact), "--port", str(port)]
    address = f"http://127.0.0.1:{port}/v1/chat/completions"

    def ask(chat: list[dict[str, Any]]) -> str:
        messages = [message | {"content": [for_openai(part) for part in message["content"]]} for message in chat]
        answer = posted(address, {"messages": messages, "max_tokens": asked.most})
        return str(answer["choices"][0]["message"]["content"])

    with serving(command, f"http://127.0.0.1:{port}/readyz", asked.folder), ThreadPoolExecutor(AT_ONCE) as threads:
        return list(threads.map(ask, asked.chats))


def for_openai(part: Mapping[str, Any]) -> dict[str, Any]:
    """A part of a message in the form of OpenAI's API."""
    if part["type"] == "text":
        return dict(part)
    content = base64.b64encode(Path(part[part["type"]]).read_bytes()).decode()
    if part["type"] == "image":
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{content}"}}
    return {"type": "input_audio", "input_audio": {"data": content, "format": "wav"}}


WAYS: dict[str, Callable[[Asked], list[str]]] = {
    "predict": by_predict,
    "pyfunc": by_pyfunc,
    "mlflow": by_mlflow,
    "transformers": by_transformers,
    "serve": by_serve,
}


def clean_environment(asked: Asked) -> tuple[Path, Path]:
    """The Python of a new virtual environment with the requirements of MLflow's model, and that model."""
    from raytrain2p.runs.register import content_of
    from raytrain2p.tracking.model_package import write_package  # MLflow

    python, model = asked.folder / "venv" / "bin" / "python", asked.folder / "model" / "package"
    if not python.exists():
        model.mkdir(parents=True)
        content = content_of(read_run(asked.artifact.parent))
        write_package(model, content)
        for place, path in content.files().items():
            (model / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, model / place)
        finished([sys.executable, "-m", "venv", str(python.parent.parent)])
        finished([str(python), "-m", "pip", "install", "--quiet", "-r", str(model / "requirements.txt")])
    return python, model


def finished(command: list[str], cwd: Path | None = None) -> str:
    """What a command prints.

    Raises:
        ValueError: it failed, with the last line that it printed.
    """
    environment = {key: value for key, value in os.environ.items() if cwd is None or key != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=environment)
    if done.returncode:
        raise ValueError(f"exit code {done.returncode}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return done.stdout


def printed(output: str) -> list[str]:
    line = next(line for line in output.splitlines() if line.startswith(ANSWERS))
    return list(json.loads(line.removeprefix(ANSWERS)))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(command: list[str], ready: str, folder: Path, **environment: str) -> Iterator[None]:
    """Within, a server runs.

    Args:
        ready: the address that answers 200 once it does.

    Raises:
        ValueError: it does not start.
    """
    log = folder / "server.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(command, env=os.environ | environment, stdout=stream, stderr=stream, start_new_session=True)
    try:
        deadline = time.monotonic() + SECONDS_TO_START
        while not is_up(ready):
            if process.poll() is not None or time.monotonic() > deadline:
                raise ValueError(f"did not start: {(log.read_text(errors='replace').strip().splitlines() or ['no message'])[-1]}")
            time.sleep(0.5)
        yield
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def is_up(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5):  # noqa: S310 - on loopback
            return True
    except OSError:
        return False


def posted(address: str, body: Mapping[str, Any]) -> Any:
    """The JSON that a server answers.

    Raises:
        ValueError: it refuses.
    """
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=SECONDS_TO_START) as answer:  # noqa: S310
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise ValueError(f"{error.code}: {error.read().decode(errors='replace')[:500]}") from None
