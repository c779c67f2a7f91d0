"""Prompts in the model's chat format: a document, a question about it, a turn of a conversation."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from headsink.errors import HeadsinkError

MARK = "\ue000"  # a private-use character that marks where a document ends in the chat format


def encode(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = False) -> list[int]:
    """Token ids of a text. special: add the tokenizer's special tokens. Raises HeadsinkError for lone surrogates."""
    half = next((n for n, character in enumerate(text) if "\ud800" <= character <= "\udfff"), None)
    if half is not None:
        raise HeadsinkError(
            f"prompt: character {half + 1} is U+{ord(text[half]):04X}, half of a character; give text that was read as UTF-8"
        )
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def document_prompt(tokenizer: PreTrainedTokenizerBase, document: str, raw: bool = False) -> tuple[str, list[int]]:
    """The prompt up to a question about a document, as text and tokens, in the model's chat format if it has one.

    There, white space at the end is left out: with what follows it may be other tokens.
    """
    if raw or tokenizer.chat_template is None:
        return document, encode(tokenizer, document, special=True)
    text = chat_prompt(tokenizer, [{"role": "user", "content": document.rstrip() + MARK}]).rpartition(MARK)[0]
    return text, encode(tokenizer, text)


def question_prompt(tokenizer: PreTrainedTokenizerBase, before: str, question: str) -> list[int]:
    """Tokens of a question that follows `before`, the text of `document_prompt`, in the same format."""
    text = f"\n\n{question}"
    if tokenizer.chat_template is not None:
        start, _, rest = chat_prompt(tokenizer, [{"role": "user", "content": MARK + text}]).partition(MARK)
        text = rest if start and before.startswith(start) else text
    return encode(tokenizer, text)


def chat_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    """A conversation as text in the model's chat format, ready for its answer. Raises HeadsinkError if the model has none."""
    if tokenizer.chat_template is None:
        raise HeadsinkError("this model has no chat format: it continues text but was not made to chat")
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
