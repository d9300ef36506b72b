"""Text from data cannot control a terminal, a page or a plot, and is still readable there."""

import json

import pytest
from matplotlib.figure import Figure

from raytrain2p.config.escaping import code_block, code_span, json_line, plot_text, printable

HOSTILE = "a\x1b[31m\x9b2J\x07\r\u202e\u2028\ud800$\\frac$ `x` <img src=x> [/INST]"
CONTROLS = ("\x1b", "\x9b", "\x07", "\r", "\u202e", "\u2028", "\ud800")


@pytest.mark.parametrize("escape", [printable, json_line, code_span, code_block, plot_text])
def test_no_control_character_remains(escape: object) -> None:
    assert callable(escape)
    assert [character for character in CONTROLS if character in escape(HOSTILE)] == []


@pytest.mark.parametrize("text", ["", "plain", "two\nlines\tand a tab", "Ünïcödé 日本 🦊 [bold] 50 %"])
def test_harmless_text_is_unchanged(text: str) -> None:
    assert printable(text) == plot_text(text) == text
    assert json_line(text) == json.dumps(text, ensure_ascii=False)


def test_a_line_of_json_is_read_back_as_it_was() -> None:
    assert json.loads(json_line({"answer": HOSTILE})) == {"answer": HOSTILE}
    assert "🦊" in json_line("🦊")


@pytest.mark.parametrize(
    ("text", "shown"),
    [("plain", "`plain`"), ("a`b", "``a`b``"), ("`", "`` ` ``"), ("a``b`", "``` a``b` ```"), ("two\n# lines", "`two # lines`")],
)
def test_inline_code_of_markdown_ends_where_it_should(text: str, shown: str) -> None:
    assert code_span(text) == shown


def test_every_line_of_a_block_of_code_is_code() -> None:
    assert code_block("one\n# two\r\n<script>") == "    one\n    # two\\r\n    <script>"


@pytest.mark.parametrize("text", [HOSTILE, "$", "$$", "$x", "$\\bad{$", "costs $5 or $6", "a\\$b"])
def test_any_text_can_be_the_title_of_a_plot(text: str) -> None:
    figure = Figure()
    figure.subplots().set_title(plot_text(text))
    figure.canvas.draw()
