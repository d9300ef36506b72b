"""What is typed behind a verb: runs and settings."""

import pytest

from raytrain2p.config import InputError
from raytrain2p.runs import verify
from raytrain2p.runs.request import parse, read_request


def test_a_path_with_an_equals_sign_is_a_run_and_not_a_setting() -> None:
    typed = ["/old/lr=0.1/epoch=3", "./lr=0.1", "latest", "output.root=/a=b"]
    request = read_request(parse("list", "list runs", lambda parser: None, typed))
    assert request.names == ["/old/lr=0.1/epoch=3", "./lr=0.1", "latest"]
    assert request.root == "/a=b"


@pytest.mark.parametrize(("verb", "typed"), [("prune", []), ("verify", ["--repair"])])
def test_a_verb_that_writes_to_runs_is_refused_where_they_are_in_an_object_storage(verb: str, typed: list[str]) -> None:
    pytest.importorskip("obstore")
    options = parse(verb, "does", verify.add_arguments, [*typed, "output.root=s3://bucket/a"])
    with pytest.raises(InputError, match=rf"s3://bucket/a\s+is an object storage, where `{' '.join([verb, *typed])}` does not work"):
        read_request(options)
