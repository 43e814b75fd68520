"""From the text that a harness sends to a prompt with instructions: which of its tokens are compressed, and what stands
where in them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeAlias

from ..eviction.fairness import Fair
from ..eviction.layout import PROTECT_WORDS, listed
from ..files import in_home, read_json
from ..prompts.pieces import WAYS, marked
from ..prompts.prompt import Prompt
from ..prompts.spans import find_all, token_spans

SCOPES = ("prompt", "system")
Ranges: TypeAlias = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Marks:
    """What is compressed of a context, and how its instructions are found.

    Attributes
    ----------
    scope : {"prompt", "system"}
        All of the context, or its system message only; what follows then stays whole.
    instructions : str
        "sentences", "lines" or "messages" of what is compressed; or the path of a JSON file of names and texts.
    fair : Fair
    protect : str, int, list of them, or None
        As :func:`kvpitfalls.wrap` takes it.
    texts : mapping of str to str, or None
        What the JSON file holds.
    """

    scope: str = "prompt"
    instructions: str = "sentences"
    fair: Fair = field(default_factory=lambda: Fair.parse(False))
    protect: Any = None
    texts: Mapping[str, str] | None = field(init=False, default=None)

    def __post_init__(self):
        if self.scope not in SCOPES:
            raise ValueError(f"compress is {self.scope!r}; expected one of {', '.join(SCOPES)}")
        if self.instructions not in WAYS:
            object.__setattr__(self, "texts", _read_texts(self.instructions))

    @property
    def needs_spans(self) -> bool:
        """Whether anything depends on where the instructions are."""
        return (
            not self.fair.is_biased
            or self.texts is not None
            or any(isinstance(x, str) and x not in PROTECT_WORDS for x in listed(self.protect))
        )

    def prompt(
        self,
        tokenizer,
        text: str,
        ids: Sequence[int],
        messages=None,
        n_token: int | None = None,
        template=None,
        made: datetime | None = None,
    ) -> Prompt:
        """What is compressed of a context, with its instructions.

        Parameters
        ----------
        tokenizer
            A fast tokenizer of transformers.
        text : str
            The context as the harness tokenizes it; trailing white space may be missing.
        ids : list of int
            The harness's tokens of it.
        messages : list of dict, optional
            What the chat template made ``text`` from, with the header of an answer.
        n_token : int, optional
            Compress these first tokens only.
        template : dict, optional
            Options that the chat template was given, such as ``tools``; with ``continue_final_message`` there is no
            header of an answer.
        made : datetime, optional
            The time that it printed, if it prints any; now by default.

        Raises
        ------
        ValueError
            If there is no system message to compress, or the tokens are not the text's.
        """
        offsets, template, made = _offsets(tokenizer, text, ids), template or {}, made or datetime.now()
        if self.scope == "system":
            of_system = _system(tokenizer, text, ids, messages, template, made)
            n_token, contents = len(of_system), [("system", (of_system.contents[0][0], of_system.contents[-1][1]))]
        elif messages is None or not self.needs_spans:
            contents = [("text", (0, len(text)))]
        else:
            contents = _contents(tokenizer, text, messages, template, made)
        n_token = len(ids) if n_token is None else n_token
        end = offsets[n_token][0] if n_token < len(ids) else len(text)
        roles, own = tuple(role for role, _ in contents), tuple(where for _, where in contents)
        ranges = self._ranges(text, own, roles) if self.needs_spans else {}
        ranges = {name: (a, min(b, end)) for name, (a, b) in ranges.items() if a < end}
        offsets = tuple(offsets[:n_token])
        spans = token_spans(text, offsets, ranges, skip_empty=self.texts is None)
        roles = () if "text" in roles else roles
        return Prompt(text[:end], tuple(ids[:n_token]), offsets, spans, tokenizer, None, own, roles)

    def _ranges(self, text: str, contents: Ranges, roles: Sequence[str]) -> dict[str, tuple[int, int]]:
        """The instructions, by the names that :meth:`.Prompt.from_chat` has for them."""
        if self.texts is not None:
            return find_all(text, contents, self.texts)
        return marked(text, contents, self.instructions, roles)


def _read_texts(path: str) -> dict[str, str]:
    try:
        texts = read_json(in_home(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(
            f"instructions is {path!r}; expected sentences, lines, messages, or a JSON file of names and texts"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}; expected an object of names and texts") from error
    if not isinstance(texts, dict) or not texts or not all(isinstance(text, str) for text in texts.values()):
        raise ValueError(f"{path} holds no object of names and texts; expected one that is not empty")
    return texts


def _offsets(tokenizer, text: str, ids: Sequence[int]) -> list[tuple[int, int]]:
    """Characters of each token; the harness decides by itself whether special tokens are added, so both ways are
    tried."""
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(
            f"the tokenizer is a {type(tokenizer).__name__} without character offsets; expected a fast tokenizer"
        )
    for special in (False, True):
        encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        if list(encoded["input_ids"]) == list(ids):
            return [tuple(pair) for pair in encoded["offset_mapping"]]
    raise ValueError(
        f"the harness has {len(ids)} tokens for a context that the tokenizer splits otherwise; expected all of its "
        "tokens, not truncated: "
        f"{text[:60]!r}"
    )


def _system(tokenizer, text: str, ids: Sequence[int], messages, template: Mapping, made: datetime) -> Prompt:
    """The system message alone, which must be how the context begins."""
    options = {name: value for name, value in template.items() if name != "continue_final_message"}
    is_there = bool(messages) and messages[0]["role"] == "system"
    prompt = Prompt.of_chat_at(made, tokenizer, messages[:1], **options) if is_there else None
    if prompt is None or not prompt.contents:
        raise ValueError(
            f"there is no system message in the context {text[:60]!r}; expected one (lm-eval: --apply_chat_template, "
            "and "
            "--system_instruction or the task's description), or compress=prompt"
        )
    if not text.startswith(prompt.text) or list(ids[: len(prompt)]) != list(prompt.token_ids):
        raise ValueError(
            "the chat template renders the system message alone otherwise than in the conversation; expected how the "
            "conversation begins, "
            "or compress=prompt"
        )
    return prompt


def _contents(tokenizer, text: str, messages, template: Mapping, made: datetime) -> list[tuple[str, tuple[int, int]]]:
    """The role of each message, and where its own text stands."""
    goes_on = template.get("continue_final_message", False)
    prompt = Prompt.of_chat_at(made, tokenizer, messages, add_generation_prompt=not goes_on, **template)
    if not prompt.text.startswith(text):
        raise ValueError(
            "the chat template gives another text than the harness has; expected the same (no chat_template_args, no "
            "begun answer), so "
            "that instructions can be found"
        )
    return list(zip(prompt.roles, prompt.contents, strict=True))
