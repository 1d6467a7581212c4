"""Prompts with responses, and conversations, as the parts of a text that are learned and those that are not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from lightning_cl.datamodules.sources.tokens import ByteTokenizer, PretrainedTokenizer

__all__ = ["InstructionFormat", "Part"]


class Part(NamedTuple):
    """A piece of an example.

    Attributes:
        text: The piece.
        response: Whether it is learned.
        begin: Whether the special tokens that begin a document come before it.
        end: Whether the end-of-text token comes behind it.
    """

    text: str
    response: bool = False
    begin: bool = False
    end: bool = False


@dataclass(frozen=True)
class InstructionFormat:
    """Tells where prompts, responses and messages stand in a row, and how they become a text.

    Args:
        prompt: Key of the prompt.
        response: Key of the response.
        input: Key of text that belongs to the prompt and follows it on a new line where there is any; or ``None``.
        messages: Key of a conversation.
        template: Text around a prompt, with ``{prompt}`` in its place.
        tokenizer: Its chat template renders conversations, where it has one.

    Raises:
        ValueError: If the template lacks its place, or the tokenizer an end of a text.
    """

    prompt: str
    response: str
    input: str | None
    messages: str
    template: str
    tokenizer: ByteTokenizer | PretrainedTokenizer

    def __post_init__(self) -> None:
        if "{prompt}" not in self.template:
            raise ValueError(f"`template` must say where the prompt goes by '{{prompt}}', got {self.template!r}.")
        if self.tokenizer.eos_id is None:
            raise ValueError(
                "The tokenizer has no end-of-text token, so a model could not learn to end its responses. Give the"
                " tokenizer an `eos_token`."
            )

    @property
    def identity(self) -> list[Any]:
        """What the texts depend on besides the rows."""
        keys = [self.prompt, self.response, self.input, self.messages, self.template]
        return [*keys, getattr(self._transformers, "chat_template", None)]

    @property
    def _transformers(self) -> Any:
        """The tokenizer of transformers that renders conversations, ``None`` without a chat template."""
        inner = getattr(self.tokenizer, "tokenizer", None)
        return inner if getattr(inner, "chat_template", None) else None

    def parts(self, place: str, row: Any) -> list[Part]:
        """Return the parts of a row; the last one is a response.

        Args:
            place: Where the row stands, for messages.
            row: A mapping of keys to values.

        Raises:
            ValueError: If the row lacks a key, a response is empty, or a conversation has none.
        """
        if not isinstance(row, Mapping):
            raise ValueError(f"{_capital(place)} must have keys and values, got {row!r:.80}.")
        messages = row.get(self.messages)
        if messages is not None:
            return self._conversation(place, messages)
        prompt, response = (self._text(place, row, setting) for setting in ("prompt", "response"))
        if not response:
            raise ValueError(
                f"{_capital(place)} has an empty response in {self.response!r}; take the row out, or write one."
            )
        if self.input is not None:
            further = "" if self.input in row and row[self.input] is None else self._text(place, row, "input")
            prompt = f"{prompt}\n{further}" if further else prompt
        return [
            Part(self.template.replace("{prompt}", prompt), begin=True),
            Part(response, response=True, end=True),
        ]

    def _text(self, place: str, row: Mapping[str, Any], setting: str) -> str:
        key = getattr(self, setting)
        value = row.get(key)
        if not isinstance(value, str):
            has = f"{type(value).__name__} there" if key in row and value is not None else f"keys {sorted(row)}"
            raise ValueError(
                f"`{setting}={key!r}` names no text in {place}, which has {has}. Name the keys of your rows by `prompt`"
                " and `response`, or that of a list of messages by `messages`."
            )
        return value

    def _conversation(self, place: str, messages: Any) -> list[Part]:
        turns = [message for message in messages if _is_message(message)] if isinstance(messages, list) else None
        if turns is None or len(turns) < len(messages):
            raise ValueError(
                f"`messages={self.messages!r}` must be a list of {{'role': ..., 'content': ...}} with text in both; in"
                f" {place} it is {messages!r:.120}."
            )
        answers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
        if not answers or answers[0] == 0:
            roles = [turn["role"] for turn in turns]
            raise ValueError(
                f"The messages of {place} must have an answer of the role 'assistant' to something before it, got the"
                f" roles {roles}; take the row out, or rename its roles."
            )
        if not all(turns[number]["content"] for number in answers):
            raise ValueError(f"A message of the assistant in {place} is an empty response; take the row out.")
        return _plain(turns, answers) if self._transformers is None else self._rendered(place, turns, answers)

    def _rendered(self, place: str, turns: list[Any], answers: list[int]) -> list[Part]:
        """Return what the chat template makes of a conversation, cut where the answers begin and end."""
        render = self._transformers.apply_chat_template
        special = tuple(token.content for token in self._transformers.added_tokens_decoder.values() if token.special)
        parts: list[Part] = []
        done = ""
        for number in answers:
            before = render(turns[:number], tokenize=False, add_generation_prompt=True)
            whole = render(turns[: number + 1], tokenize=False)
            if not before.startswith(done) or not whole.startswith(before):
                raise ValueError(
                    f"The tokenizer's chat template writes the beginning of the conversation in {place} anew when a"
                    " turn follows, so the answers cannot be told apart. Make one row of each answer with what comes"
                    " before it, or give the tokenizer another `chat_template`."
                )
            answer = whole[len(before) :]
            # the mark that ends a turn is learned, the line break that some templates put behind it is not
            marked = answer.rstrip().endswith(special)
            answer = answer.rstrip() if marked else answer
            parts += [Part(before[len(done) :]), Part(answer, response=True, end=not marked)]
            done = before + answer
        return parts


def _plain(turns: list[Any], answers: list[int]) -> list[Part]:
    parts: list[Part] = []
    for number, turn in enumerate(turns[: answers[-1] + 1]):
        role, content = turn["role"], turn["content"]
        if number in answers:
            parts += [Part(f"{role}:\n", begin=number == 0), Part(content, response=True, end=True)]
        else:
            parts.append(Part(f"{role}:\n{content}\n", begin=number == 0))
    return parts


def _is_message(message: Any) -> bool:
    return isinstance(message, Mapping) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def _capital(place: str) -> str:
    return place[:1].upper() + place[1:]
