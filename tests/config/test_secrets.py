"""No password and no token is shown; everything else is shown as it is."""

import json
import random
import string
import subprocess
import sys
from base64 import b64encode
from pathlib import Path
from urllib.parse import quote

import pytest

from raytrain2p.__main__ import main
from raytrain2p.config import InputError, Problem, load_settings
from raytrain2p.config.secrets import mask_error, masked


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:secret@db:5432/mlflow", "postgresql://me:***@db:5432/mlflow"),
        ("postgresql+psycopg2://me:secret@db/mlflow", "postgresql+psycopg2://me:***@db/mlflow"),
        ("postgresql://me:se:secret@db/mlflow", "postgresql://me:***@db/mlflow"),
        ("postgresql://me:secret@secret@db/mlflow", "postgresql://me:***@db/mlflow"),
        ("https://:secret@server/path?a=b", "https://:***@server/path?a=b"),
        ("http://me:s3cr%2Ft@127.0.0.1:5000", "http://me:***@127.0.0.1:5000"),
        ("http://me:x@server", "http://me:***@server"),
    ],
)
def test_the_whole_password_of_a_uri_is_hidden_and_nothing_else(text: str, shown: str) -> None:
    assert masked(text) == shown


def test_every_password_of_a_text_is_hidden() -> None:
    text = "from postgresql://me:first@one/mlflow to http://you:second@two:5000, and s3://bucket/path"
    assert masked(text) == "from postgresql://me:***@one/mlflow to http://you:***@two:5000, and s3://bucket/path"


def test_a_password_in_a_command_is_hidden() -> None:
    command = "python -m raytrain2p.train --phase 2 'tracking.uri=postgresql://me:hunter2@db/mlflow' seed=3"
    assert masked(command) == "python -m raytrain2p.train --phase 2 'tracking.uri=postgresql://me:***@db/mlflow' seed=3"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("token=abcdef123", "token=***"),
        ("MLFLOW_TRACKING_TOKEN=abcdef123 python", "MLFLOW_TRACKING_TOKEN=*** python"),
        ("MLFLOW_TRACKING_PASSWORD: hunter22", "MLFLOW_TRACKING_PASSWORD: ***"),
        ("hf_token = 'hf_abcdef'", "hf_token = '***'"),
        ('api_key="abcdef", seed=3', 'api_key="***", seed=3'),
        ("client-secret: abcdef", "client-secret: ***"),
        ("http://server/path?token=abcdef&run=1", "http://server/path?token=***&run=1"),
    ],
)
def test_the_value_of_a_token_is_hidden_and_nothing_else(text: str, shown: str) -> None:
    assert masked(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "",
        "an ordinary line",
        "sqlite:////data/a:b@c.db",
        "http://server:5000",
        "http://server:5000/path",
        "postgresql://me@server/path",
        "file:///data/mlruns",
        "databricks",
        "see http://server:5000 and write to me@lab",
        "max_new_tokens: 16",
        "soft_tokens=16",
        "evaluation.max_new_tokens=1600 model.soft_tokens=1600",
        "the token limit",
        "a secret garden, no password",
        "its tokenizer has no end token",
        "write for example key=value",
        "the key: value pairs of a record, sorted by key",
        "Bearer certificates are papers",
        "RAY_AUTH_MODE=token",
        "token = None",
        "write data.train={path: FILE, weight: 2}",
        "s3://bucket/a:b@c and http://[::1]:5000/x@y",
        '{"evaluation": {"max_new_tokens": 16}, "tracking": {"uri": "sqlite:///mlflow.db"}}',
        "step 12:30 of 16@2",
    ],
)
def test_a_text_without_any_is_unchanged(text: str) -> None:
    assert masked(text) == text


def test_what_is_masked_stays_as_it_is() -> None:
    once = masked("http://me:hunter2@server token=abcdef")
    assert masked(once) == once


def test_a_token_in_the_place_of_a_user_is_hidden() -> None:
    assert masked("clone https://ghp_hunter2@host/x") == "clone https://***@host/x"


# fuzzed

PUNCTUATION = "-_.~!*+/=$#:;,^%()[]{}|<>?@"
SCHEMES = ("postgresql", "postgresql+psycopg2", "mysql", "mssql+pyodbc", "http", "https", "redis", "mongodb+srv", "ftp", "s3")
QUERY = (
    "pwd",
    "passwd",
    "password",
    "token",
    "sig",
    "access_token",
    "X-Amz-Signature",
    "X-Amz-Security-Token",
    "X-Goog-Signature",
    "api_key",
)
NAMES = ("AccountKey", "DB_PASSWORD", "tracking.pwd", "client-secret", "HF_TOKEN", "aws_secret_access_key", "apikey", "SharedAccessKey")
BEFORE = ("", "given ", "tracking.url=", "cannot reach ", '{"seed": 3, "uri": "', "two\nlines\n")
AFTER = ("", "\nseed = 3", " and `model.soft_tokens=16`", "\n    fix: start the server")


def secret_of(chance: random.Random, alphabet: str) -> str:
    letters = string.ascii_letters + string.digits + alphabet
    return "Zq7" + "".join(chance.choices(letters, k=chance.randint(6, 30))) + "9Kx"


def shown_with(chance: random.Random) -> tuple[str, str]:
    """A secret as it is written somewhere, and that text."""
    plain, any_ = secret_of(chance, "-_.~"), secret_of(chance, PUNCTUATION)
    quoted, spaced = quote(any_, safe=""), secret_of(chance, PUNCTUATION + " '\"&\\")
    scheme, query, name = chance.choice(SCHEMES), chance.choice(QUERY), chance.choice(NAMES)
    base64 = b64encode(any_.encode()).decode()
    return chance.choice(
        [
            (quoted, f"{scheme}://me:{quoted}@host:5432/mlflow"),
            (any_, f"{scheme}://me:{any_}@host/mlflow"),
            (quoted, f"{scheme}://:{quoted}@host/mlflow"),
            (plain, f"https://{plain}@host/x"),
            (quoted, f"{scheme}://host/x?a=1&{query}={quoted}&run=1"),
            (any_, f"{name}={any_}"),
            (any_, f"{name}: {any_}"),
            (any_, f"{name} = '{any_}'"),
            (json.dumps(spaced)[1:-1], json.dumps({name: spaced, "seed": 3})),
            (repr(spaced)[1:-1], repr({name: spaced, "seed": 3})),
            (any_, f"--{query} {any_}"),
            (base64, f"DefaultEndpointsProtocol=https;AccountName=a;AccountKey={base64};EndpointSuffix=core"),
            (plain, f"Authorization: Bearer {plain}"),
            (base64, repr({"authorization": f"Basic {base64}", "seed": 3})),
            ("hf_" + "a1" * 17, "loading hf_" + "a1" * 17),
        ]
    )


@pytest.mark.parametrize("seed", range(8))
def test_no_part_of_a_secret_is_shown_in_any_syntax_and_the_rest_is(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(250):
        secret, text = shown_with(chance)
        before, after = chance.choice(BEFORE), chance.choice(AFTER)
        shown = masked(before + text + after)
        assert not any(secret[start : start + 6] in shown for start in range(len(secret) - 5)), (text, shown)
        assert shown.startswith(before), (text, shown)
        assert shown.endswith(after), (text, shown)
        assert masked(shown) == shown


@pytest.mark.parametrize(
    "name", ["MLFLOW_TRACKING_PASSWORD", "HF_TOKEN", "MY_SECRET", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "MYSQL_PWD"]
)
def test_the_value_of_a_variable_with_such_a_name_is_hidden_wherever_it_occurs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = 'hunt "er/2 ü'
    monkeypatch.setenv(name, secret)
    texts = [f"mlflow says {secret}.", json.dumps({"a": secret}), quote(secret), repr([secret]), str(Problem("here", f"has {secret}"))]
    assert [text for text in map(masked, texts) if "hunt" in text] == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("XKB_KEYMAP", "checkpoints"),
        ("GPG_KEY", "alignment"),
        ("SSH_KEY_NAME", "mlflow"),
        ("GNOME_KEYRING_CONTROL", "/home/me"),
        ("TOKENIZERS_PARALLELISM", "false-value"),
        ("PWD", "/home/me"),
        ("RAY_AUTH_TOKEN_PATH", "/a/token"),
    ],
)
def test_a_variable_without_a_secret_hides_nothing(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert masked(f"in {value}") == f"in {value}"


def test_a_secret_in_bad_input_is_not_in_its_message() -> None:
    with pytest.raises(InputError) as caught:
        load_settings(
            1, None, ["tracking.url=postgresql://me:hunter2@db/x", "tracking.password=hunter2", "sig=hunter2", "data.pwd=hunter2"]
        )
    assert "hunter2" not in str(caught.value)
    assert str(caught.value).startswith("4 problems")


def test_a_secret_in_an_error_and_in_its_causes_is_hidden() -> None:
    error, cause, earlier = (kind(text) for kind, text in ((RuntimeError, "token=hunter2"), (OSError, "//me:hunter2@host"), (KeyError, 3)))
    error.__cause__, cause.__context__ = cause, earlier
    mask_error(error)
    assert (error.args, cause.args, earlier.args) == (("token=***",), ("//me:***@host",), (3,))


@pytest.mark.parametrize("command", ["train", "tune", "predict", "data", "runs"])
def test_a_wrong_argument_is_shown_without_its_secret(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    verb = ["runs", "list"] if command == "runs" else [command]
    with pytest.raises(SystemExit) as exit:
        main([*verb, "--tracking.uri=postgresql://me:hunter2@db/x\x1b[31m"])
    assert exit.value.code == 2
    shown = capsys.readouterr().err
    assert "hunter2" not in shown
    assert "\x1b" not in shown


def test_an_unexpected_error_is_shown_without_secrets(tmp_path: Path) -> None:
    script = "from raytrain2p.config.cli import exit_code; exit_code(lambda: int('http://me:hunt' + 'er2@host'))"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ValueError: invalid literal" in done.stderr
    assert "hunter2" not in done.stderr
