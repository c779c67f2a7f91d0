"""Prompts as a model was trained on them: a document, a question about it, a turn of a conversation."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from headsink.errors import HeadsinkError

MARK = "\ue000"  # of the characters for private use: where a document ends within the chat format


def encode(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = False) -> list[int]:
    """Tokens of a text, special: with those that begin one. Raises HeadsinkError for what is no text."""
    half = next((n for n, character in enumerate(text) if "\ud800" <= character <= "\udfff"), None)
    if half is not None:
        raise HeadsinkError(
            f"prompt: character {half + 1} is U+{ord(text[half]):04X}, half of a character; give text that was read as UTF-8"
        )
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def document_prompt(tokenizer: PreTrainedTokenizerBase, document: str, raw: bool = False) -> tuple[str, list[int]]:
    """What comes before any question about a document: text and tokens, in the model's chat format if it has one."""
    if raw or tokenizer.chat_template is None:
        return document, encode(tokenizer, document, special=True)
    text = chat_prompt(tokenizer, [{"role": "user", "content": document + MARK}]).rpartition(MARK)[0]
    return text, encode(tokenizer, text)


def question_prompt(tokenizer: PreTrainedTokenizerBase, before: str, question: str) -> list[int]:
    """Tokens of a question that comes after the text of `document_prompt`, in the format that this has."""
    text = f"\n\n{question}"
    if tokenizer.chat_template is not None:
        start, _, rest = chat_prompt(tokenizer, [{"role": "user", "content": MARK + text}]).partition(MARK)
        text = rest if start and before.startswith(start) else text
    return encode(tokenizer, text)


def chat_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    """The conversation as text, ready for the model's answer, in its own chat format."""
    if tokenizer.chat_template is None:
        raise HeadsinkError("this model has no chat format: it continues text but was not made to chat")
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
