"""From an instruction record to tokens, through the tokenizer's own chat template."""

from dataclasses import dataclass
from typing import Any

SOFT = -1  # in place of soft tokens until the batch is made
IMAGE_MARK = "\N{OBJECT REPLACEMENT CHARACTER}"  # the image's position in the rendered text


@dataclass(frozen=True)
class ChatFormat:
    """How records become tokens.

    Args:
        tokenizer: of transformers.
        stop_ids: tokens that end an answer.
        soft_tokens: number for an image, before the instruction.
        system_prompt: system message; None leaves it to the template.
    """

    tokenizer: Any
    stop_ids: tuple[int, ...]
    soft_tokens: int
    system_prompt: str | None = None

    def prompt(self, instruction: str, with_image: bool) -> list[int]:
        """Tokens before the answer, with SOFT in place of the image."""
        return self._tokens(self._render(instruction, with_image))

    def response(self, instruction: str, with_image: bool, response: str) -> list[int]:
        """Tokens of the answer, up to and with the stop token: text that the template adds after it is left out."""
        prompt = self._render(instruction, with_image)
        whole = self._render(instruction, with_image, response)
        # some templates rewrite earlier turns
        rest = whole[len(prompt) :] if whole.startswith(prompt) else response.replace(IMAGE_MARK, "")
        tokens = self._tokens(rest)
        stop = next((place for place, token in enumerate(tokens) if token in self.stop_ids), None)
        return tokens[: stop + 1] if stop is not None else [*tokens, *self.stop_ids[:1]]

    def _render(self, instruction: str, with_image: bool, response: str | None = None) -> str:
        response = response and response.replace(IMAGE_MARK, "")
        user = (IMAGE_MARK if with_image else "") + instruction.replace(IMAGE_MARK, "")
        if self.tokenizer.chat_template is None:  # a base model, which has no convention
            return f"{user}\n" + (response or "")
        messages = [{"role": "user", "content": user}]
        if self.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": self.system_prompt.replace(IMAGE_MARK, "")})
        if response is not None:
            messages.append({"role": "assistant", "content": response.replace(IMAGE_MARK, "")})
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=response is None)

    def _tokens(self, text: str) -> list[int]:
        before, image, after = text.partition(IMAGE_MARK)
        tokens = self._plain(before)
        return tokens + [SOFT] * self.soft_tokens + self._plain(after) if image else tokens

    def _plain(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


def load_chat_format(directory: Any, soft_tokens: int, system_prompt: str | None) -> ChatFormat:
    """The format of a model directory, with the stop tokens of its tokenizer and its generation config."""
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(directory)
    stops = [tokenizer.eos_token_id]
    try:
        named = GenerationConfig.from_pretrained(directory).eos_token_id
        stops += named if isinstance(named, list) else [named]
    except OSError:
        pass  # no generation_config.json: only the tokenizer's end token
    return ChatFormat(tokenizer, tuple(dict.fromkeys(stop for stop in stops if stop is not None)), soft_tokens, system_prompt)
