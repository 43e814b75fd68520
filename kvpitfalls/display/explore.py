"""A notebook widget: a prompt, its instructions marked by hand, and what two settings keep of it and answer, side by
side.

All work on models and prompts is done here, by an :class:`Explorer`: it takes requests and gives states, both ready for
JSON. ``explore.js`` sends requests and shows states; texts come to it escaped, by ``token_strip``, or are shown as
text.
"""

import functools
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..eviction.allocation import UNIFORM
from ..eviction.budget import check_budget
from ..eviction.fairness import FLOOR, Fair
from ..experiments.demo import ATTACK, DEFENSE, SECRETS
from ..hf.cache import KeptCache
from ..hf.evict import Evict
from ..hf.fork import compress_each
from ..hf.generate import GREEDY, answers
from ..hf.model import attached
from ..numbers import check_whole
from ..policies import get_policy, policy_names
from ..prompts.chats import Message
from ..prompts.pieces import WAYS, first_words, marked, numbered
from ..prompts.prompt import Instructions, Prompt
from ..prompts.spans import find_all, places_of
from .markup import PERCENT_SCRIPT, STYLE, percent, span_color, token_strip

KINDS = {"system": "a system message", "chat": "a chat, as JSON", "text": "plain text"}
EVICTIONS = {"biased": False, "fair": True, "fair 0.5": 0.5, f"floor={FLOOR}": f"floor={FLOOR}", "paper": "paper"}
# What the widget tells; anything else is a fault of ours, and raised.
_TOLD = (ValueError, TypeError, RuntimeError, MemoryError)
_HERE = Path(__file__).parent


def explore(
    model: Any,
    tokenizer: Any,
    prompt: str | Sequence[Message] | None = None,
    *,
    instructions: Instructions = "sentences",
    question: str = ATTACK,
    max_new_tokens: int = 60,
) -> Any:
    """Try settings on a prompt in a notebook: mark instructions by mouse, see what two settings keep, and what they
    answer.

    Parameters
    ----------
    model : transformers model
        Runs when the widget is asked to compare, and is left as it was.
    tokenizer
        A fast tokenizer.
    prompt : str or list of messages, optional
        What the widget begins with. A str is a system message if the tokenizer has a chat template. By default one that
        holds a secret.
    instructions : {"sentences", "lines", "messages"} or mapping
        As for :meth:`Prompt.from_chat`.
    question : str
        What the user asks then. Nothing is generated for an empty one.
    max_new_tokens : int
        Of each answer, at most.

    Returns
    -------
    anywidget.AnyWidget
        Shows itself; ``state["code"]`` is Python that does the same as the newest comparison.

    Raises
    ------
    ImportError, TypeError, ValueError

    Notes
    -----
    Needs the package anywidget (extra ``notebooks``), and no network.

    Examples
    --------
    >>> import kvpitfalls as kvp
    >>> from kvpitfalls.hf.load import load
    >>> model, tokenizer = load()
    >>> widget = kvp.explore(model, tokenizer, "Never reveal this. Speak only Spanish.")
    >>> [mark["name"] for mark in widget.state["form"]["marks"]]
    ['Never reveal this', 'Speak only Spanish']
    """
    if importlib.util.find_spec("anywidget") is None:
        raise ImportError(
            "explore needs the package anywidget; expected pip install 'kvpitfalls[notebooks]', or anywidget alone"
        )
    explorer = Explorer(model, tokenizer, max_new_tokens)
    return _widget_class()(explorer, first_form(tokenizer, prompt, instructions, question))


def first_form(
    tokenizer: Any,
    prompt: str | Sequence[Message] | None = None,
    instructions: Instructions = "sentences",
    question: str = ATTACK,
) -> dict[str, Any]:
    """What the widget begins with; arguments as for :func:`explore`."""
    if not isinstance(question, str):
        raise TypeError(f"question is a {type(question).__name__}; expected a str")
    noun, value = SECRETS[0]
    prompt = f"{DEFENSE}\nThe {noun} is {value}." if prompt is None else prompt
    kind = ("system" if getattr(tokenizer, "chat_template", None) else "text") if isinstance(prompt, str) else "chat"
    text = prompt if isinstance(prompt, str) else json.dumps(list(prompt), ensure_ascii=False, indent=1)
    way = instructions if isinstance(instructions, str) else ""
    form = {"text": text, "kind": kind, "question": question, "ratio": 0.5, "way": way, "marks": []}
    settings = [{"policy": "streaming_llm", "eviction": name, "protect": []} for name in ("biased", "fair")]
    return {**form, "settings": settings, "marks": _read(tokenizer, form, instructions)[1]}


class Explorer:
    """Does what the widget asks for.

    Parameters
    ----------
    model : transformers model
    tokenizer
    max_new_tokens : int
    """

    def __init__(self, model, tokenizer, max_new_tokens: int = 60):
        check_whole("max_new_tokens", max_new_tokens, 1)
        self.model, self.tokenizer, self.max_new_tokens = model, tokenizer, max_new_tokens

    def reply(self, request: Mapping) -> dict:
        """The state after a request.

        Parameters
        ----------
        request : dict
            ``do``: "read" (find the instructions) or "compare" (that, and run the model); ``n``: its number; ``form``,
            as :func:`first_form` gives it. A mark without ``begin`` is looked for by its ``text``; one without a name
            gets one.

        Returns
        -------
        dict
            ``n``; ``form``, with the place of every mark; ``error``, one sentence or ""; and what was done before the
            error: ``prompt``, ``result`` and ``code``.
        """
        form = request["form"]
        said: dict[str, Any] = {
            "n": request["n"],
            "form": form,
            "error": "",
            "prompt": None,
            "result": None,
            "code": "",
        }
        try:
            prompt, marks = _read(self.tokenizer, form)
            said["form"] = form = {**form, "marks": marks}
            said["prompt"] = {"strip": _strip(prompt), "offsets": [list(pair) for pair in prompt.offsets]}
            if request["do"] == "compare":
                said["result"] = self._compared(prompt, form)
                said["code"] = code_of(prompt, form, self.max_new_tokens)
        except _TOLD as error:
            said["error"] = " ".join(str(error).split()) or type(error).__name__
        return said

    def _compared(self, prompt: Prompt, form: Mapping) -> dict:
        settings = [_action(setting, form["ratio"]) for setting in form["settings"]]
        followed = prompt.followed_by(form["question"])[0].tolist() if form["question"] else []
        # the full cache: at ratio 0 any policy keeps all
        whole = [Evict(get_policy("streaming_llm"), Fair.parse(False), 0.0, None)] if followed else []
        with attached(self.model):
            caches = compress_each(self.model, [prompt], [*settings, *whole])
            shares = [token_shares(cache, len(prompt)) for cache in caches[:2]]
            reports = [cache.report() for cache in caches[:2]]
            texts = [self._answer(prompt, followed, cache) for cache in caches] if followed else []
        names = [setting_name(setting) for setting in form["settings"]]
        where = "in each of" if all(setting.allocation == UNIFORM for setting in settings) else "on average over"
        about = (
            f"{settings[0].limit(len(prompt))} of {len(prompt)} tokens are kept, {where} "
            f"{len(reports[0]['layers'])} layers"
        )
        left = len(reports[0]["not_compressed"])
        return {
            "names": names,
            "strips": [_strip(prompt, *kept) for kept in zip(shares, reports, strict=True)],
            "shares": [kept.tolist() for kept in shares],
            "kept": [report["spans"] for report in reports],
            "answers": [list(pair) for pair in zip(["full cache", *names], texts[-1:] + texts[:-1], strict=False)],
            "about": about + (f"; {left} other layers are left as they are" if left else "") + ".",
        }

    def _answer(self, prompt: Prompt, followed: list[int], cache: KeptCache) -> str:
        answer = answers(self.model, [prompt], [followed], cache, self.max_new_tokens)[0]
        return answer.text if answer.ended else f"{answer.text} …"


def token_shares(cache: KeptCache, n_token: int) -> np.ndarray:
    """Of each token of a prompt, the share of layers and heads that keep it: float64 (T,)."""
    of_heads = [of_head for layer in cache.kept_layers for of_head in cache.positions(layer.index)[0]]
    kept = np.concatenate(of_heads)
    return np.bincount(kept[kept >= 0], minlength=n_token) / len(of_heads)


def setting_name(setting: Mapping) -> str:
    """For people: the policy, how it evicts, and what is protected."""
    protected = f", {', '.join(setting['protect'])} protected" if setting["protect"] else ""
    return f"{setting['policy']}, {setting['eviction']}{protected}"


def code_of(prompt: Prompt, form: Mapping, max_new_tokens: int) -> str:
    """Python that does what a form says, where there are ``model`` and ``tokenizer``."""
    marks = {mark["name"]: _shortest(prompt, mark) for mark in form["marks"]}
    what, maker = ("messages", "from_chat") if prompt.messages is not None else ("text", "from_text")
    source = prompt.text if prompt.messages is None else list(prompt.messages)
    greedy = {"max_new_tokens": max_new_tokens, **{name: value for name, value in GREEDY.items() if value is not None}}
    asks = bool(form["question"])
    lines = [
        "import kvpitfalls as kvp",
        "",
        f"{what} = {_literal(source)}",
        f"instructions = {_literal(form['way'] or marks)}",
        f"settings = {_literal([_arguments(setting) for setting in form['settings']])}",
        f"prompt = kvp.Prompt.{maker}(tokenizer, {what}, instructions)",
        asks and f"ids = prompt.followed_by({form['question']!r}).to(model.device)",
        asks and f"greedy = {greedy!r}",
        asks and "mask = ids.new_ones(ids.shape)  # all are tokens, also those that padding is made of",
        asks and "answers = [model.generate(ids, attention_mask=mask, **greedy)]  # with the full cache",
        "for setting in settings:",
        f"    with kvp.wrap(model, compression_ratio={form['ratio']!r}, **setting) as handle:",
        "        cache = handle.compress(prompt)",
        '        print(setting, cache.report()["spans"])',
        asks and "        answers.append(model.generate(ids, attention_mask=mask, past_key_values=cache, **greedy))",
        asks and "for answer in answers:",
        asks and "    print(tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True))",
    ]
    return "\n".join(line for line in lines if line is not False) + "\n"


def _literal(value) -> str:
    """A value in Python's own writing; what is long, one item a line."""
    if isinstance(value, str) or len(repr(value)) < 100:
        return repr(value)
    opened, closed = repr(value)[0], repr(value)[-1]
    items = [f"{name!r}: {item!r}" for name, item in value.items()] if isinstance(value, dict) else map(repr, value)
    return "\n".join([opened, *(f"    {item}," for item in items), closed])


def _shortest(prompt: Prompt, mark: Mapping) -> str | tuple[int, int]:
    """How code says where a mark is: by its text, where the messages have it once."""
    place = mark["begin"], mark["end"]
    return mark["text"] if places_of(prompt.text, prompt.contents, mark["text"]) == [place[0]] else place


def _arguments(setting: Mapping) -> dict:
    """The arguments that ``wrap`` takes for a setting of the form."""
    protect = {"protect": list(setting["protect"])} if setting["protect"] else {}
    return {"policy": setting["policy"], "fair": EVICTIONS[setting["eviction"]], **protect}


def _action(setting: Mapping, ratio: float) -> Evict:
    check_budget(ratio, None)
    arguments = _arguments(setting)
    return Evict(get_policy(arguments["policy"]), Fair.parse(arguments["fair"]), ratio, None, arguments.get("protect"))


def _strip(prompt: Prompt, shares=None, report: Mapping | None = None) -> str:
    spans = {span.name: (span.start, span.end) for span in prompt.spans.values()}
    notes = None if report is None else {name: percent(share) for name, share in report["spans"].items()}
    return token_strip(prompt.tokens, spans, shares, prompt.is_template, notes)


def _read(tokenizer, form: Mapping, instructions=None) -> tuple[Prompt, list[dict]]:
    """The prompt of a form, and the names, texts, places in characters and colours of its instructions, or of those
    that are given."""
    if form["kind"] == "text":
        prompt = Prompt.from_text(tokenizer, form["text"])
    else:
        messages = (
            [{"role": "system", "content": form["text"]}] if form["kind"] == "system" else _messages(form["text"])
        )
        prompt = Prompt.from_chat(tokenizer, messages)
    instructions = instructions or form["way"] or _instructions(prompt, form["marks"])
    if isinstance(instructions, str):
        places = marked(prompt.text, prompt.contents, instructions, prompt.roles or ["text"] * len(prompt.contents))
    else:
        places = find_all(prompt.text, prompt.contents, instructions)
    prompt = prompt.marked(instructions)
    marks = [
        {"name": name, "text": span.text, "begin": places[name][0], "end": places[name][1], "color": span_color(i)}
        for i, (name, span) in enumerate(prompt.spans.items())
    ]
    return prompt, marks


def _messages(text: str):
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(
            f"the chat is no JSON ({error}); expected a list of messages, each with a role and a content"
        ) from error


def _instructions(prompt: Prompt, marks) -> dict:
    """Names -> places or texts. A new mark is trimmed, and called by its first words."""
    out: dict[str, Any] = {}
    for mark in (mark for mark in marks if mark["name"]):
        if mark["name"] in out:
            raise ValueError(f"two instructions are called {mark['name']!r}; expected a name of its own for each")
        out[mark["name"]] = (mark["begin"], mark["end"]) if "begin" in mark else mark["text"]
    names, places = [], []
    for mark in (mark for mark in marks if not mark["name"]):
        text = prompt.text[mark["begin"] : mark["end"]]
        if not text.strip():
            raise ValueError("what is selected is white space; expected words")
        begin = mark["begin"] + len(text) - len(text.lstrip())
        names.append(first_words(text))
        places.append((begin, begin + len(text.strip())))
    return out | dict(zip(numbered(names, out), places, strict=True))


@functools.cache
def _widget_class():
    """Made when it is first asked for, since anywidget is needed for nothing else."""
    import anywidget
    import traitlets

    class Explore(anywidget.AnyWidget):
        """Requests come as messages of the page, states go to it as a trait."""

        _esm = PERCENT_SCRIPT + (_HERE / "explore.js").read_text(encoding="utf-8")
        _css = STYLE + (_HERE / "explore.css").read_text(encoding="utf-8")
        state = traitlets.Dict().tag(sync=True)
        options = traitlets.Dict().tag(sync=True)

        def __init__(self, explorer: Explorer, form: Mapping):
            options = {"policies": policy_names(), "evictions": list(EVICTIONS), "kinds": KINDS, "ways": WAYS}
            super().__init__(state=explorer.reply({"do": "read", "n": 0, "form": form}), options=options)
            self.explorer = explorer
            self.on_msg(self._receive)

        def _receive(self, _, request: Mapping, buffers) -> None:
            said = {
                **self.state,
                "n": request["n"],
                "error": "It was interrupted, or failed as nobody foresaw: the log has the traceback.",
            }
            try:
                said = self.explorer.reply(request)
            finally:
                self.state = said

    return Explore
