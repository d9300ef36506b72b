"""What is typed behind a verb: runs and settings."""

from raytrain2p.runs.request import parse, read_request


def test_a_path_with_an_equals_sign_is_a_run_and_not_a_setting() -> None:
    typed = ["/old/lr=0.1/epoch=3", "./lr=0.1", "latest", "output.root=/a=b"]
    request = read_request(parse("list", "list runs", lambda parser: None, typed))
    assert request.names == ["/old/lr=0.1/epoch=3", "./lr=0.1", "latest"]
    assert request.root == "/a=b"
