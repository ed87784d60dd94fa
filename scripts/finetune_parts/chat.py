"""Chats as tokens, with a mask of what the assistant says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from finetune_parts.words import InputError

Message = Mapping[str, Any]

PLAIN = (
    "{% for message in messages %}{{ message['role'] + ':\n' + message['content'] }}"
    "{{ (eos_token or '') + '\n' if message['role'] == 'assistant' else '\n' }}{% endfor %}"
    "{{ 'assistant:\n' if add_generation_prompt else '' }}"
)
"""For a tokenizer without a chat template: a line with the role, the content, and an end after the assistant."""
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
"""What {"from", "value"} call a role, and what templates call it."""


def messages_of(chat: Any, column: str) -> list[dict[str, Any]]:
    """The messages of one row as templates take them; {"from", "value"} becomes {"role", "content"}.

    Raises:
        InputError: for something else than a list of messages.
    """
    if not isinstance(chat, Sequence) or isinstance(chat, str) or not all(isinstance(m, Mapping) for m in chat):
        raise InputError(f"--messages_column {column}: must hold lists of {{role, content}}; one row is {chat!r:.80}.")
    found = [{key: value for key, value in m.items() if value is not None} for m in chat]
    for message in found:
        if "from" in message and "value" in message:
            sender = message.pop("from")
            message |= {"role": ROLES.get(sender, sender), "content": message.pop("value")}
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str | list):
            raise InputError(f"--messages_column {column}: a message has role and content; one is {message!r:.80}.")
    return found


def with_template(tokenizer: Any) -> Any:
    """The tokenizer, with the plain template where it has none."""
    if not tokenizer.chat_template:
        tokenizer.chat_template = PLAIN
    return tokenizer


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two lists have in common from the beginning on."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def chat_tokens(tokenizer: Any, messages: Sequence[Message], first: int = 0) -> tuple[list[int], list[bool]]:
    """A chat as tokens, and for each whether it is learnt: what the assistant says, with the end of its message.

    What it says begins where the template, asked for the beginning of an answer to the messages before, stops to agree
    with the whole chat; so a template that writes earlier answers in another form than the last loses only these.

    Args:
        tokenizer: with a chat template.
        messages: dicts with role and content.
        first: the first message that may be learnt.

    Raises:
        InputError: for a chat that the template refuses.
    """

    def tokens(count: int, asked: bool) -> list[int]:
        try:
            text = tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=asked)
        except Exception as error:  # a template raises errors of jinja and its own
            raise InputError(f"the chat template refuses {list(messages[:count])!r:.80}: {error}") from error
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    whole = tokens(len(messages), False)
    learnt = [False] * len(whole)
    for i in range(first, len(messages)):
        if messages[i]["role"] != "assistant":
            continue
        begin = shared(tokens(i, True), whole) if i else 0
        end = shared(tokens(i + 1, False), whole) if i + 1 < len(messages) else len(whole)
        learnt[begin:end] = [True] * max(0, end - begin)
    return whole, learnt


def question_of(tokenizer: Any, messages: Sequence[Message]) -> str:
    """The text of a chat up to where its first answer is asked for."""
    before = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), len(messages))
    return str(tokenizer.apply_chat_template(list(messages[:before]), tokenize=False, add_generation_prompt=True))
