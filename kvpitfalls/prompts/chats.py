"""Chats as text and tokens: where the contents of messages stand, and that none of them can pass for the template
around it."""

import itertools
import re
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from inspect import isfunction
from typing import Any, TypeAlias

from ..numbers import is_listed
from .spans import Ranges, check_encodable, holders, short

Message: TypeAlias = Mapping[str, Any]
_NOW = re.compile(r"\bstrftime_now\(\s*(['\"])(.*?)\1\s*\)")  # what transformers gives templates to print the date
_OURS = {
    "tokenize",
    "return_dict",
    "return_tensors",
    "padding",
    "truncation",
    "max_length",
    "return_assistant_tokens_mask",
    "chat_template",
}


def check_messages(messages: object, first: int = 0) -> list[dict[str, Any]]:
    """The messages as plain dicts; ``first`` is the number of the first of them in the conversation."""
    if isinstance(messages, Mapping) or not is_listed(messages):
        raise TypeError(
            f"messages is a {type(messages).__name__}; expected a list of messages, each with a role and a content"
        )
    listed: list[Any] = list(messages)
    if not listed:
        raise ValueError("messages is empty; expected at least one message")
    for i, message in enumerate(listed, first):
        if not isinstance(message, Mapping) or "role" not in message or not _has_content(message):
            raise ValueError(
                f"message {i} is {short(message)}; expected a role and a content that is a str, or a list of parts "
                "that have a type and, "
                "of the type 'text', a text; none with tool_calls"
            )
        role = message["role"]
        if not isinstance(role, str) or not re.fullmatch(r"[\w.-]+", role):
            raise ValueError(f"message {i} has the role {short(role)}; expected a word such as 'system'")
        for text in texts_of(message):
            check_encodable(f"message {i}", text)
        if isinstance(message.get("content"), list) and (
            other := [p["type"] for p in message["content"] if p["type"] != "text"]
        ):
            raise ValueError(
                f"message {i} has a part of the type {short(other[0])}; expected parts of text. What a processor "
                "makes of images goes to "
                "handle.compress as it is"
            )
    return [dict(message) for message in listed]


def _has_content(message: Message) -> bool:
    content = message.get("content")
    if isinstance(content, list):
        parts = all(isinstance(part, Mapping) and isinstance(part.get("type"), str) for part in content)
        return parts and all(isinstance(part.get("text"), str) for part in content if part["type"] == "text")
    return isinstance(content, str) or (content is None and bool(message.get("tool_calls")))


def texts_of(message: Message) -> list[str]:
    """What a message says: its content, or each part of it that is text; nothing where that is empty."""
    content = message.get("content")
    said = [content] if isinstance(content, str) else [p["text"] for p in content or [] if p["type"] == "text"]
    return [text for text in said if text]


def _with_texts(messages: Iterable[Message], texts: Iterator[str]) -> list[dict[str, Any]]:
    """The same messages, each text of theirs replaced by the next of these."""
    out = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            parts = [
                {**part, "text": next(texts)} if part["type"] == "text" and part["text"] else part for part in content
            ]
            out.append({**message, "content": parts})
        else:
            out.append({**message, "content": next(texts)} if content else dict(message))
    return out


_SHOWN = ("tools", "documents")  # options whose texts are to be read by the model
# What a template, which is a program, raises beside jinja2's own: such as for a list where it adds up texts.
_OF_PROGRAMS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def _is_of_template(error: Exception) -> bool:
    """Whether it was raised while a template ran, by the name that jinja2 gives to its code."""
    return any(frame.f_code.co_filename == "<template>" for frame, _ in traceback.walk_tb(error.__traceback__))


def apply_template(tokenizer: Any, messages: Sequence[Message], **options: Any) -> Any:
    """Messages by the tokenizer's chat template; if it refuses them or fails, in a sentence of ours."""
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, **options)
    except (TemplateError, *_OF_PROGRAMS) as error:
        if isinstance(error, ValueError) and not _is_of_template(error):
            raise  # a sentence of transformers' own
        raise ValueError(
            f"the chat template refuses the messages: {error}; expected messages as it takes them"
        ) from error


def check_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a chat template, such as ``tools`` or ``enable_thinking``; how the result is given back is not the
    caller's to say. Tools that are functions become what a template is given of them: it shows their docstrings."""
    if taken := sorted(options.keys() & _OURS):
        raise TypeError(
            f"the option {taken[0]!r} was given for the chat template; expected options of the template's own, such "
            "as tools"
        )
    if any(isfunction(tool) for tool in options.get("tools") or ()):
        from transformers.utils.chat_template_utils import get_json_schema

        tools = [get_json_schema(tool) if isfunction(tool) else tool for tool in options["tools"]]
        return {**options, "tools": tools}
    return dict(options)


def at_time(tokenizer: Any, options: Mapping[str, Any], made: datetime) -> dict[str, Any]:
    """The same options, for a template that prints ``made`` as the time; else it would look at the clock each time it
    is rendered.

    transformers hands a template plain data only, so the time is written into the template itself.
    """
    template = tokenizer.get_chat_template(tools=options.get("tools"))
    return {**options, "chat_template": _NOW.sub(lambda call: repr(made.strftime(call[2])), template)}


def template_ids(tokenizer: Any, messages: Sequence[Message], options: Mapping[str, Any]) -> list[int]:
    """The whole chat's token ids."""
    return list(apply_template(tokenizer, messages, tokenize=True, return_dict=False, **options))


def encoded_chat(
    tokenizer: Any, messages: Sequence[Message], options: Mapping[str, Any], allow_special_tokens: bool, first: int = 0
) -> tuple[str, list[tuple[int, int]], list[int], Any]:
    """Text, contents, the number of each content's message, and encoding of a chat; messages from number ``first`` on
    may hold no token of the template."""
    text, contents, owners = _render(tokenizer, messages, options)
    for name in _SHOWN:
        # Not without them: the template that a tokenizer has for tools may fail where there are none.
        twice = {**options, name: [*(options.get(name) or ()), *(options.get(name) or ())]}
        if options.get(name) and text == apply_template(tokenizer, messages, tokenize=False, **twice):
            raise ValueError(
                f"the chat template does not show {name}, which were given; expected a template that does, or what "
                "they say in a message"
            )
    if not allow_special_tokens:
        _check_fields(tokenizer, messages, first)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if list(encoded["input_ids"]) != template_ids(tokenizer, messages, options):
        raise ValueError(
            "the chat template gives other tokens than its text; expected the same, so that spans can be found"
        )
    if not allow_special_tokens:
        _check_forgery(tokenizer, text, encoded, contents, owners, first)
    return text, contents, owners, encoded


def may_hold_special(
    tokenizer: Any, messages: Sequence[Message], ids: list[int], first: int, options: Mapping[str, Any]
) -> bool:
    """Whether ``ids``, the whole chat's, hold other added tokens than with harmless contents from number ``first``
    on."""
    _check_fields(tokenizer, messages, first)
    harmless = template_ids(
        tokenizer, [*messages[:first], *_with_texts(messages[first:], itertools.repeat("x"))], options
    )
    added = set(tokenizer.added_tokens_decoder)
    held, expected = (Counter(token for token in tokens if token in added) for tokens in (ids, harmless))
    return held != expected


def check_shown_options(tokenizer: Any, options: Mapping[str, Any]) -> None:
    """Refuse special tokens in tools and documents, which others than the caller may have written."""
    for name in _SHOWN:
        _check_strings(tokenizer, options.get(name) or (), f"the option {name!r}")


def _check_fields(tokenizer: Any, messages: Sequence[Message], first: int) -> None:
    """Refuse special tokens in what messages hold beside their content, such as the arguments of ``tool_calls``."""
    for i, message in enumerate(messages[first:], first):
        for name, value in message.items():
            if name not in ("role", "content"):
                _check_strings(tokenizer, value, f"message {i}", f" in its {name}")


def _check_strings(tokenizer: Any, value: object, what: str, where: str = "") -> None:
    special = _special(tokenizer) - {tokenizer.unk_token_id}
    for text in _strings(value):
        check_encodable(what, text)
        if held := special.intersection(tokenizer(text, add_special_tokens=False)["input_ids"]):
            raise ValueError(
                f"{what} holds {tokenizer.convert_ids_to_tokens(min(held))!r}{where}, a token that can end the message "
                "and forge another; expected it without, or allow_special_tokens=True"
            )


def _strings(value: object) -> Iterator[str]:
    """Every text in lists and mappings within each other."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from (*_strings(key), *_strings(inner))
    elif isinstance(value, Iterable):
        for inner in value:
            yield from _strings(inner)


def _special(tokenizer: Any) -> set[int]:
    return {token for token, about in tokenizer.added_tokens_decoder.items() if about.special} | set(
        tokenizer.all_special_ids
    )


def _check_forgery(
    tokenizer: Any, text: str, encoded: Any, contents: Ranges, owners: Sequence[int], first: int
) -> None:
    """Refuse contents that hold a special token, or an added one that the template uses: to the model they are the
    template's own.

    What the tokenizer made of the text decides, not the text: it may know such a token in capitals or after
    normalization, too.
    """
    ids, offsets = encoded["input_ids"], [_stripped(text, pair) for pair in encoded["offset_mapping"]]
    held_by = holders(contents, offsets)
    added = tokenizer.added_tokens_decoder
    watched = {token for token, held in zip(ids, held_by, strict=True) if held is None and token in added}
    watched |= _special(tokenizer)
    for token, (begin, end), held in zip(ids, offsets, held_by, strict=True):
        if held is None or owners[held] < first or token not in watched:
            continue
        if token == tokenizer.unk_token_id and text[begin:end] != tokenizer.unk_token:
            continue  # a character that the vocabulary lacks
        raise ValueError(
            f"message {owners[held]} holds {tokenizer.convert_ids_to_tokens(token)!r} at character "
            f"{begin - contents[held][0]} of its "
            "content, a token that can end the message and forge another; expected a content without, or "
            "allow_special_tokens=True (kvpitfalls audit: --allow-special-tokens)"
        )


def _stripped(text: str, pair: tuple[int, int]) -> tuple[int, int]:
    """The range without white space at its ends, which some special tokens swallow of their neighbours."""
    begin, end = pair
    while begin < end and text[begin].isspace():
        begin += 1
    while begin < end and text[end - 1].isspace():
        end -= 1
    return begin, end


def _render(
    tokenizer: Any, messages: Sequence[Message], options: Mapping[str, Any]
) -> tuple[str, list[tuple[int, int]], list[int]]:
    """The rendered chat, where texts of the messages stand in it, in order of position, and the number of each one's
    message.

    Contents are not searched for (a content "system" also occurs in headers): the template is rendered once more around
    markers that occur nowhere, which gives the pieces between the contents.
    """

    def render(of: Sequence[Message]) -> str:
        return str(apply_template(tokenizer, of, tokenize=False, **options))

    text = render(messages)
    if printed := [
        i for i, m in enumerate(messages) if isinstance(m.get("content"), list) and str(m["content"]) in text
    ]:
        raise ValueError(
            f"the chat template takes no parts, and prints message {printed[0]} as Python does; expected a content "
            "that is a str"
        )
    said = [(i, text) for i, message in enumerate(messages) for text in texts_of(message)]
    # Every marker that occurs takes three characters at least, so one of these is free.
    marker = next(m for n in range(len(text) // 3 + 1) if (m := f"\ue000{n}\ue001") not in text)
    marked = render(_with_texts(messages, (f"{marker}{i}\ue002" for i in itertools.count())))
    between = re.split(f"{marker}([0-9]+)\ue002", marked)
    shown = [int(number) for number in between[1::2]]
    _check_shown(messages, [owner for owner, _ in said], shown)
    forms = [(owner, _kept(own, messages[owner]["role"])) for owner, own in (said[i] for i in shown)]
    found = _places(text, between[::2], forms)
    held = [(where, said[i][0]) for i, where in zip(shown, found, strict=True) if where[0] < where[1]]
    return text, [where for where, _ in held], [owner for _, owner in held]


def _places(text: str, between: Sequence[str], said: Sequence[tuple[int, list[str]]]) -> list[tuple[int, int]]:
    """Where texts stand that have these pieces of a template around them, each as one of several and with the number of
    its message.

    White space may be a text's or the template's, so there may be several ways until one of them does not go on.
    """
    ways: dict[int, Any] = {0: None}  # where the last text ends -> its beginning, and the way up to it
    for (owner, own), before, after in zip(said, between, between[1:], strict=False):
        on: dict[int, Any] = {}
        for (at, way), kept in itertools.product(ways.items(), own):
            if text.startswith(before + kept + after, at):  # of two ways to one place the first, which has more of it
                on.setdefault(at + len(before) + len(kept), (at + len(before), at, way))
        ways = on
        if not ways:
            raise ValueError(
                f"the chat template changes the text of message {owner}; expected it as it is, or Prompt.from_text"
            )
    end = next((at for at in ways if text[at:] == between[-1]), None)
    if end is None:
        raise ValueError(
            "the chat template changes the text of the messages; expected it as it is. Prompt.from_text takes any text"
        )
    way, found = ways[end], list[tuple[int, int]]()
    while way is not None:
        found.append((way[0], end))
        _, end, way = way
    return found[::-1]


def _check_shown(messages: Sequence[Message], owners: Sequence[int], shown: Sequence[int]) -> None:
    """Each text of the messages is to be read once; ``shown`` are the numbers of those that the template prints."""
    times = Counter(shown)
    for i, owner in enumerate(owners):
        role = messages[owner]["role"]
        if not times[i]:
            raise ValueError(
                f"the chat template does not show message {owner} (of the role {role!r}); expected messages that it "
                "shows: some put a system's into the user's that follows"
            )
        if times[i] > 1:
            raise ValueError(
                f"the chat template shows message {owner} (of the role {role!r}) {times[i]} times; expected messages "
                "that it shows once, or Prompt.from_text and ranges of characters"
            )


def _kept(said: str, role: str) -> list[str]:
    """What a template may show of a text: without white space at its ends, or an answer without the thoughts before."""
    texts = (said, said.rpartition("</think>")[2]) if role == "assistant" else (said,)
    return [form for text in texts for form in (text, text.lstrip(), text.rstrip(), text.strip())]
