"""No password and no token is shown; everything else is shown as it is."""

import pytest

from raytrain2p.config.secrets import masked


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
