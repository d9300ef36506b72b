"""`python -m raytrain2p.serve RUN`: a trained assistant behind HTTP, with the API of OpenAI's chat completions and a page."""

import argparse
import ipaddress
import json
import os
import sys
from contextlib import suppress
from pathlib import Path

from raytrain2p.config import Findings, InputError, Problem, load_settings
from raytrain2p.config.cli import Parser, exit_code, report
from raytrain2p.config.phases import INSTRUCTION
from raytrain2p.tracking.run_directory import RUN_DIRECTORY, RUN_ID_LENGTH

TOKEN_VARIABLE, SHORTEST_TOKEN = "RAYTRAIN2P_SERVE_TOKEN", 16
REGISTERED = "models:/"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m raytrain2p.serve", description="Serve a trained assistant over HTTP.")
    run_help = "phase 2 run: ID or its start, launch ID, path, `latest` (default), or models:/NAME@ALIAS of MLflow's Model Registry"
    parser.add_argument("run", nargs="?", default="latest", metavar="RUN", help=run_help)
    parser.add_argument("--root", default="checkpoints", help="where run directories are (output.root of training)")
    parser.add_argument("--tracking-uri", metavar="URI", help="MLflow store of models:/... (default: as in training)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s); another one needs a token")
    parser.add_argument("--port", type=int, default=8000, help="default %(default)s; 0: a free one")
    token_help = f"file with the token that requests must bring (default: the variable {TOKEN_VARIABLE})"
    parser.add_argument("--token-file", metavar="FILE", type=Path, help=token_help)
    parser.add_argument("--replicas", type=int, default=1, help="processes with the model (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="most answers written together (default %(default)s; 1: no batches)")
    parser.add_argument("--max-queue", type=int, default=256, help="most requests at once, the others get 429 (default %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=256, help="longest answer in tokens (default %(default)s)")
    parser.add_argument("--ray-logs", action="store_true", help="print Ray's own output too")
    options = parser.parse_args(arguments)
    for name in ("replicas", "batch_size", "max_queue", "max_tokens"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code: 0 after a signal stopped it, 2 (bad input)."""
    options = parse(arguments)
    return exit_code(lambda: serve(options))


def serve(options: argparse.Namespace) -> int:
    """Check, start the server, and serve until it is stopped.

    Raises:
        InputError: bad input; nothing was started.
    """
    from raytrain2p.serving.run import check_installed, check_port, check_replicas, run_server

    findings = Findings()
    with findings:
        check_installed()
    with findings:
        token = read_token(options)
        check_host(options.host, token)
    with findings:
        port = check_port(options.host, options.port)
    with findings:
        check_replicas(options.replicas)
    with findings:
        name, path = find_model(options)
    findings.raise_any()

    from raytrain2p.inference.model_file import ModelFile
    from raytrain2p.serving.guard import digest_of_token
    from raytrain2p.serving.limits import Limits

    ModelFile(path)  # what is wrong with it is found before Ray is started
    limits = Limits(max_queue=options.max_queue, max_tokens=options.max_tokens)
    digest = digest_of_token(token) if token else None
    return run_server(path, name, options.host, port, limits, digest, options.replicas, options.batch_size, options.ray_logs, report)


def read_token(options: argparse.Namespace) -> str | None:
    """The token of the file, else of the environment.

    Raises:
        InputError: the file cannot be read, or the token is short.
    """
    where, token = f"--token-file {options.token_file}", os.environ.get(TOKEN_VARIABLE)
    if options.token_file is None:
        where = TOKEN_VARIABLE
    else:
        try:
            token = options.token_file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            what = f"cannot be read: {getattr(error, 'strerror', None) or 'it is not text'}"
            raise InputError(Problem(where, what, "write a token into it")) from None
    if token is not None and (len(token) < SHORTEST_TOKEN or not token.isascii() or any(map(str.isspace, token))):
        what = f"holds no token of at least {SHORTEST_TOKEN} characters without blanks"
        raise InputError(Problem(where, what, "make one: python -c 'import secrets; print(secrets.token_hex(32))'"))
    return token


def check_host(host: str, token: str | None) -> None:
    """Check that strangers need a token.

    Raises:
        InputError: the address is not this machine's own, and there is none.
    """
    loopback = host == "localhost"
    with suppress(ValueError):
        loopback = loopback or ipaddress.ip_address(host).is_loopback
    if not loopback and token is None:
        what = "others can reach it, and there is no token that they must bring"
        raise InputError(Problem(f"--host {host}", what, f"set {TOKEN_VARIABLE} or --token-file, or listen on 127.0.0.1"))


def find_model(options: argparse.Namespace) -> tuple[str, Path]:
    """The name of the model for clients, and its path.

    Raises:
        InputError: there is none.
    """
    if options.run.startswith(REGISTERED):
        from raytrain2p.tracking.registered_model import registered_artifact

        overrides = [] if options.tracking_uri is None else [f"tracking.uri={json.dumps(options.tracking_uri)}"]
        return registered_artifact(options.run, load_settings(INSTRUCTION.number, None, overrides).tracking.uri)
    from raytrain2p.inference import model_file

    path = model_file.find_model(options.run, options.root, "RUN")
    if options.run == "latest":
        report(f"RUN=latest is {path}")
    folder = path.parent.name
    return folder[:RUN_ID_LENGTH] if RUN_DIRECTORY.fullmatch(folder) else path.stem, path


if __name__ == "__main__":
    sys.exit(main())
