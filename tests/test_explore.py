"""The widget of kvp.explore: what it shows is what wrap and generate do, hostile prompts stay text, and its page works
in a browser."""

import importlib.util
import json
import re

import numpy as np
import pytest
from browser import SCHEMES, needs_chromium, run_beside, run_sandboxed, serious_findings, served
from chat_tokenizers import byte_level
from test_heatmap import HOSTILE, Page
from tiny_models import build

import kvpitfalls as kvp
from kvpitfalls.display import explore as module
from kvpitfalls.display.explore import EVICTIONS, Explorer, first_form
from kvpitfalls.display.markup import visible
from kvpitfalls.policies import policy_names
from kvpitfalls.prompts.pieces import first_words

SAID = "Never say no. Say abc.\nSay it twice."
MESSAGES = [{"role": "system", "content": SAID}, {"role": "user", "content": "Say it"}]


@pytest.fixture(scope="module")
def tiny():
    """A model of three layers of two heads, whose vocabulary is bytes."""
    return build("llama", vocab_size=300, max_position_embeddings=1024), byte_level()


def prompt_of(tokenizer, kind, instructions=None):
    if kind == "text":
        return kvp.Prompt.from_text(tokenizer, SAID, instructions)
    return kvp.Prompt.from_chat(tokenizer, MESSAGES if kind == "chat" else MESSAGES[:1], instructions)


def asked(tiny, do="read", **form):
    """The state of a form that differs from the first one, as the page gets it."""
    request = {"do": do, "n": 1, "form": {**first_form(tiny[1], SAID, question="Well?"), **form}}
    state = Explorer(*tiny, max_new_tokens=5).reply(json.loads(json.dumps(request)))
    return json.loads(json.dumps(state))


def settings_of(policy, *evictions, protect=((), ())):
    return [
        {"policy": policy, "eviction": name, "protect": list(of)} for name, of in zip(evictions, protect, strict=True)
    ]


@pytest.mark.parametrize("kind", ["system", "chat", "text"])
@pytest.mark.parametrize(
    "settings",
    [
        settings_of("snapkv", "biased", "fair"),
        settings_of("knorm", "fair 0.5", "floor=4"),
        settings_of("h2o", "fair", "biased", protect=(["Say abc"], ["Never say no", "Say abc"])),
    ],
    ids=lambda settings: settings[0]["policy"],
)
def test_it_shows_what_its_code_prints_and_both_are_what_wrap_and_generate_do(tiny, kind, settings):
    model, tokenizer = tiny
    text = json.dumps(MESSAGES) if kind == "chat" else SAID
    state = asked(tiny, "compare", kind=kind, text=text, settings=settings, ratio=0.4)
    assert state["error"] == ""
    printed = []
    names = {"model": model, "tokenizer": tokenizer, "print": lambda *of: printed.append(of[-1])}
    exec(compile(state["code"], "the widget's code", "exec"), names)
    prompt = prompt_of(tokenizer, kind, "sentences")
    ids = prompt.followed_by("Well?")
    rows = [model.generate(ids, max_new_tokens=5, do_sample=False)]
    for i, setting in enumerate(settings):
        fair, protect = EVICTIONS[setting["eviction"]], setting["protect"] or None
        with kvp.wrap(model, setting["policy"], compression_ratio=0.4, fair=fair, protect=protect) as handle:
            cache = handle.compress(prompt)
            rows.append(model.generate(ids, past_key_values=cache.copy(), max_new_tokens=5, do_sample=False))
        kept = np.zeros((3, 2, len(prompt)))
        for layer in range(3):
            np.put_along_axis(kept[layer], cache.positions(layer)[0], 1, -1)
        shares = [float(share) for share in re.findall(r"--k: ([\d.]+)", state["result"]["strips"][i])]
        assert shares == pytest.approx(list(kept.mean((0, 1))), abs=6e-4)
        assert state["result"]["kept"][i] == printed[i] == cache.report()["spans"]
    answers = [tokenizer.decode(row[0, ids.shape[1] :], skip_special_tokens=True) for row in rows]
    assert printed[2:] == answers
    assert [answer.removesuffix(" …") for _, answer in state["result"]["answers"]] == [
        answer.strip() for answer in answers
    ]
    assert [name for name, _ in state["result"]["answers"]] == ["full cache", *state["result"]["names"]]
    n_kept = cache.report()["layers"][0]["kept"][0][0]
    assert state["result"]["about"] == f"{n_kept} of {len(prompt)} tokens are kept, in each of 3 layers."


@pytest.mark.parametrize("policy", policy_names())
def test_whatever_the_policy_it_shows_what_an_audit_says(tiny, policy):
    """Also where layers or heads keep differently much."""
    text = f"{SAID} {' '.join(f'Be kind to all {i} of them, and brief.' for i in range(9))}"
    settings = settings_of(policy, "biased", "fair")
    state = asked(tiny, "compare", text=text, question="", settings=settings, ratio=0.3)
    assert state["error"] == ""
    prompt = kvp.Prompt.from_chat(tiny[1], [{"role": "system", "content": text}], "sentences")
    audit = kvp.audit(tiny[0], prompt, policies=[policy], compression_ratios=[0.3])
    for strip, kept, fair in zip(state["result"]["strips"], state["result"]["kept"], (False, True), strict=True):
        shares = [float(share) for share in re.findall(r"--k: ([\d.]+)", strip)]
        assert shares == pytest.approx(list(audit.kept_mask(policy, 0.3, fair).mean((0, 1))), abs=6e-4)
        assert kept == {row["span"]: row["kept"] for row in audit.rows if row["fair"] is fair}
    n_kept = {int(n) for fair in (False, True) for n in audit.kept_mask(policy, 0.3, fair).sum(-1).flat}
    how = "in each of" if len(n_kept) == 1 else "on average over"
    assert state["result"]["about"] == f"{audit.rows[0]['n_kept']} of {len(prompt)} tokens are kept, {how} 3 layers."


def test_without_a_question_nothing_is_generated(tiny, monkeypatch):
    monkeypatch.setattr(module, "answers", None)
    state = asked(tiny, "compare", question="")
    assert state["error"] == "" and state["result"]["answers"] == [] and len(state["result"]["strips"]) == 2
    exec(state["code"], {"model": tiny[0], "tokenizer": tiny[1]})


@pytest.mark.parametrize("kind", ["system", "text"])
def test_a_mark_is_where_it_was_set_and_is_found_again_in_another_text(tiny, kind):
    prompt = prompt_of(tiny[1], kind)
    start = prompt.text.index("Say it")
    set_by_hand = [{"name": "", "begin": start, "end": start + 6}, {"name": "mine", "text": "Say abc."}]
    state = asked(tiny, "compare", kind=kind, way="", marks=set_by_hand)
    assert [(mark["name"], mark["text"]) for mark in state["form"]["marks"]] == [
        ("mine", "Say abc."),
        ("Say it", "Say it"),
    ]
    assert all(prompt.text[mark["begin"] : mark["end"]] == mark["text"] for mark in state["form"]["marks"])
    moved = [{name: mark[name] for name in ("name", "text")} for mark in state["form"]["marks"]]
    again = asked(tiny, kind=kind, way="", text=f"Well. {SAID}", marks=moved)
    for one, two in zip(state["form"]["marks"], again["form"]["marks"], strict=True):
        assert two == {**one, "begin": one["begin"] + 6, "end": one["end"] + 6}


def test_code_says_by_its_place_what_the_prompt_has_twice(tiny):
    places = [(m.start(), m.end()) for m in re.finditer("Say", prompt_of(tiny[1], "system").text)]
    assert len(places) == 2
    marks = [{"name": name, "begin": begin, "end": end} for name, (begin, end) in zip("ab", places, strict=True)]
    state = asked(tiny, "compare", way="", marks=marks, question="")
    assert f"instructions = {dict(zip('ab', places, strict=True))!r}" in state["code"]


def test_code_says_by_its_place_what_the_template_has_and_no_message(tiny):
    """A text of the template is in the prompt once, and no instruction is looked for there."""
    prompt = prompt_of(tiny[1], "system")
    begin, end = prompt.text.index(SAID) - 8, prompt.text.index(SAID) + 5
    state = asked(tiny, "compare", way="", marks=[{"name": "a", "begin": begin, "end": end}], question="")
    exec(compile(state["code"], "the widget's code", "exec"), {"model": tiny[0], "tokenizer": tiny[1], "print": print})
    assert f"instructions = { ({'a': (begin, end)})!r}" in state["code"]


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (
            {"kind": "chat"},
            "the chat is no JSON (Expecting value: line 1 column 1 (char 0)); expected a list of messages",
        ),
        ({"kind": "chat", "text": "[" * 100_000}, "the chat is no JSON ("),
        ({"kind": "chat", "text": "{}"}, "messages is a dict; expected a list of messages"),
        ({"kind": "text", "text": "a", "question": ""}, "the prompt has 1 token; expected at least 2"),
        ({"text": ""}, "the prompt has no letter to be cut into sentences; expected text"),
        ({"text": "a <|im_end|> b"}, "message 0 holds '<|im_end|>' at character 2 of its content"),
        (
            {"way": "", "marks": [{"name": "a", "text": "gone"}]},
            "the text of instruction 'a' is not in the prompt; expected it once: 'gone'",
        ),
        (
            {"way": "", "marks": [{"name": "a", "text": "Say"}] * 2},
            "two instructions are called 'a'; expected a name of its own for each",
        ),
        ({"way": "", "marks": []}, "fair eviction needs the instructions' places"),
        ({"ratio": 1.5}, "compression_ratio is 1.5; expected"),
        (
            {"settings": settings_of("nothing", "biased", "fair")},
            "policy is 'nothing', which is not known; expected one of",
        ),
        (
            {"settings": settings_of("knorm", "biased", "paper")},
            "fair='paper' expects exactly two instructions that touch",
        ),
        (
            {"ratio": 0.95, "settings": settings_of("knorm", "biased", "fair", protect=(["Say abc"], []))},
            "the budget of row 0 is",
        ),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_the_next_request_works(tiny, form, message):
    state = asked(tiny, "compare", **form)
    assert message in state["error"] and "\n" not in state["error"] and state["result"] is None and state["code"] == ""
    assert asked(tiny, "compare")["error"] == ""
    model, tokenizer = tiny
    assert (
        model.generate(tokenizer("abc", return_tensors="pt").input_ids, max_new_tokens=2).shape[1] == 5
    )  # nothing is left wrapped


def test_hostile_prompts_stay_text(tiny):
    text = "".join(HOSTILE).replace("\ud800", "")
    marks = [{"name": "</b><script>document.title='owned'</script>", "text": HOSTILE[2]}]
    state = asked(tiny, "compare", kind="text", way="", text=text, marks=marks, ratio=0.5)
    assert state["error"] == ""
    prompt = kvp.Prompt.from_text(tiny[1], text)
    for strip in (state["prompt"]["strip"], *state["result"]["strips"]):
        page = Page(strip)
        assert page.tokens == [visible(token) for token in prompt.tokens]
        assert set(page.tags) <= {"div", "span", "b", "i", "bdi"} and page.handlers == [] and page.loads == []
    found = {}
    exec(state["code"], {"model": tiny[0], "tokenizer": tiny[1], "print": lambda *of: found.setdefault(len(found), of)})
    assert found[0][1] == state["result"]["kept"][0]


def test_the_widget_answers_requests_by_its_state(tiny):
    widget = kvp.explore(*tiny, SAID, question="Well?", max_new_tokens=3)
    assert (
        widget.state["prompt"]
        and widget.state["result"] is None
        and "export default" in widget._esm
        and ".kvp-tokens" in widget._css
    )
    widget._handle_custom_msg({"do": "compare", "n": 1, "form": widget.state["form"]}, [])
    assert widget.state["error"] == "" and widget.state["n"] == 1 and len(widget.state["result"]["answers"]) == 3
    assert widget._repr_mimebundle_()[0]["application/vnd.jupyter.widget-view+json"]["model_id"] == widget.model_id


def test_a_fault_of_ours_is_told_and_raised(tiny, monkeypatch):
    widget = kvp.explore(*tiny, SAID)
    monkeypatch.setattr(module, "compress_each", lambda *given: [][0])
    with pytest.raises(IndexError):
        widget._receive(widget, {"do": "compare", "n": 1, "form": widget.state["form"]}, [])
    assert widget.state["n"] == 1 and "the log has the traceback" in widget.state["error"]


def test_what_explore_takes(tiny, monkeypatch):
    model, tokenizer = tiny
    assert kvp.explore(model, tokenizer, MESSAGES).state["form"]["kind"] == "chat"
    marked = kvp.explore(model, tokenizer, SAID, instructions={"a": "Say abc."}).state["form"]
    assert marked["way"] == "" and [mark["name"] for mark in marked["marks"]] == ["a"]
    monkeypatch.setattr(tokenizer, "chat_template", None)
    assert kvp.explore(model, tokenizer).state["form"]["kind"] == "text"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"explore needs the package anywidget; expected pip install 'kvpitfalls\[notebooks\]'"
    ):
        kvp.explore(model, tokenizer)


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>the widget</title>
<style>%s</style><h1>A notebook</h1><main id="cell"></main>
<script type="module">
import widget from "./explore.js";
const state = %s, listeners = new Set(), sent = [];
const model = {
  get: (name) => state[name],
  on: (name, act) => listeners.add(act),
  off: (name, act) => listeners.delete(act),
  send: async (request) => {
    sent.push(request);
    if (document.held) await document.held;
    const answer = await fetch("/answer", {method: "POST", body: JSON.stringify(request)});
    state.state = await answer.json();
    for (const act of listeners) act();
  },
};
Object.assign(document, {sent, model, end: widget.render({model, el: document.getElementById("cell")}), listeners});
document.body.dataset.ready = "yes";
</script></html>"""
SCRIPT = """
  await wait(() => doc.body?.dataset.ready);
  const window = doc.defaultView, cell = doc.getElementById("cell"), all = (css) => [...cell.querySelectorAll(css)];
  const by = (text) => all("button").find((one) => one.textContent === text || one.getAttribute("aria-label") === text);
  const idle = () => wait(() => !cell.querySelector("[aria-busy]"));
  const put = (element, value) => { element.value = value; element.dispatchEvent(new window.Event("change", {bubbles: true})); };
  const input = (label) => all("label").find((one) => one.textContent.startsWith(label)).querySelector("input, select");
  const names = () => all("tbody td:first-child input").map((one) => one.value);
  const pressed = (key, shiftKey) => new window.KeyboardEvent("keydown", {key, shiftKey, bubbles: true});
  const press = (key, shiftKey) => cell.querySelector(".kvp-tokens").dispatchEvent(pressed(key, shiftKey));
  const chosen = () => all(".kvp-tokens")[0].querySelectorAll(".kvp-chosen").length;
  const pick = (first, begin, last, end) => {
    const nodes = all(".kvp-tokens bdi").map((one) => one.firstChild), range = doc.createRange();
    range.setStart(nodes[first], begin);
    range.setEnd(nodes[last], end);
    doc.getSelection().removeAllRanges();
    doc.getSelection().addRange(range);
  };
"""


@pytest.fixture
def page(tiny, tmp_path):
    """A page that holds the widget, and the address where it is answered by the explorer itself."""
    widget = kvp.explore(*tiny, SAID, question="Well?", max_new_tokens=3)
    (tmp_path / "explore.js").write_text(widget._esm, "utf-8")
    state = json.dumps({"state": widget.state, "options": widget.options}).replace("<", "\\u003c")
    (tmp_path / "page.html").write_text(PAGE % (widget._css, state), "utf-8")
    with served(tmp_path, widget.explorer.reply) as address:
        yield tmp_path / "page.html", address


@needs_chromium
def test_mark_compare_and_copy_in_a_browser(tiny, page, tmp_path):
    """By mouse, by keyboard and by form; what it shows in the end is what the explorer says of the form that was sent
    last."""
    script = """
      const out = {first: names()};
      pick(21, 0, 27, 1);
      await wait(() => chosen() === 7);
      by("Mark what is selected").click();
      await idle();
      out.mouse = names();
      for (let i = 0; i < 3; i++) press("ArrowRight");
      for (let i = 0; i < 4; i++) press("ArrowRight", true);
      press("ArrowLeft", true);
      out.walked = [chosen(), cell.querySelector("[aria-live]").textContent];
      by("Mark what is selected").click();
      await idle();
      out.keyboard = [by("Mark what is selected").disabled, input("Its instructions are").value, names()];
      put(all("tbody td:first-child input")[1], "mine");
      await idle();
      by("unmark " + names()[0]).click();
      await idle();
      all("tbody input[type=checkbox]")[1].click();
      put(all("select")[2], "knorm");
      all("input[type=range]")[0].value = 0.3;
      all("input[type=range]")[0].dispatchEvent(new window.Event("input"));
      let go;
      doc.held = new Promise((done) => (go = done));
      by("Compare").click();
      out.busy = [by("Compare").disabled, cell.querySelector("[role=status]").textContent];
      go();
      await idle();
      out.last = doc.sent.at(-1);
      out.said = [by("Compare").disabled, cell.querySelector("[role=status]").textContent, cell.querySelector("[role=alert]").textContent];
      out.strips = all(".kvp-tokens").map((strip) => strip.outerHTML.replace(/ (tabindex|role|aria-label|data-lm[\\w-]*)="[^"]*"/g, ""));
      out.titles = all(".kvp-tokens").map((strip) => strip.getAttribute("aria-label"));
      out.table = all("tbody tr").map((row) => [...row.querySelectorAll("td.n")].map((one) => one.textContent));
      out.answers = all(".kvp-answers > div").map((one) => [one.querySelector("b").textContent, one.querySelector("p").textContent]);
      out.code = cell.querySelector("pre").textContent;
      out.checked = all("input[type=checkbox]").map((one) => one.checked);
      cell.querySelector("summary").click();
      by("Copy").click();
      await wait(() => cell.querySelector("details span").textContent);
      doc.end();
      out.left = doc.listeners.size;
      return out;
    """
    out = json.loads(run_beside(page[0], SCRIPT + script, tmp_path, page[1]))
    prompt = prompt_of(tiny[1], "system")
    by_mouse, by_key = ("".join(prompt.tokens[begin:end]).strip() for begin, end in ((21, 28), (2, 6)))
    assert out["walked"] == [4, f"token 5 \u201c\u2068{prompt.tokens[5]}\u2069\u201d"]
    assert out["keyboard"] == [True, "", [by_key, "Never say no", first_words(by_mouse)]]
    assert out["mouse"] == out["keyboard"][2][1:]
    assert out["busy"] == [True, "The model runs\u2026"] and out["left"] == 0
    last = out["last"]
    assert last["do"] == "compare" and last["form"]["ratio"] == 0.3 and last["form"]["marks"][0]["name"] == "mine"
    assert last["form"]["settings"] == [
        {"policy": "knorm", "eviction": "biased", "protect": []},
        {"policy": "streaming_llm", "eviction": "fair", "protect": ["mine"]},
    ]
    state = Explorer(*tiny, max_new_tokens=3).reply(last)
    result = state["result"]
    assert out["said"] == [False, result["about"], ""]
    assert [tags(strip) for strip in out["strips"]] == [tags(strip) for strip in result["strips"]]
    assert out["titles"] == [f"A: {result['names'][0]}", f"B: {result['names'][1]}"]
    assert out["table"] == [
        [f"{100 * kept[mark['name']]:.0f} %" for kept in result["kept"]] for mark in state["form"]["marks"]
    ]
    assert (
        out["answers"] == result["answers"]
        and out["code"] == state["code"]
        and out["checked"] == [False, True, False, False]
    )


def tags(text):
    """Tags with their styles, and texts, however a serializer writes them."""
    return re.findall(r"<(/?\w+)|--([ck]: [\w.#]+)|>([^<]+)", text.replace("&gt;", ">").replace("&lt;", "\ue000"))


@needs_chromium
def test_hostile_prompts_stay_text_in_a_browser(tiny, page, tmp_path):
    text = "".join(HOSTILE).replace("\ud800", "").replace("\x00", "")
    script = """
      put(input("The prompt is"), "text");
      put(cell.querySelector("textarea"), %s);
      await idle();
      by("Compare").click();
      await idle();
      const out = [doc.title, document.title, all("img, script, iframe").length, cell.querySelector("[role=alert]").textContent];
      return [...out, all(".kvp-tokens").map((strip) => [...strip.querySelectorAll("bdi")].map((one) => one.textContent))];
    """
    script = SCRIPT + script % json.dumps(text).replace("<", "\\u003c")
    title, outer, n_made, error, shown = json.loads(run_beside(page[0], script, tmp_path, page[1]))
    tokens = kvp.Prompt.from_text(tiny[1], text).tokens
    assert (title, outer, n_made, error) == ("the widget", "", 0, "") and shown == [
        [visible(token) for token in tokens]
    ] * 2


@needs_chromium
def test_the_widget_works_in_a_frame_that_may_run_scripts_alone(tiny, page, tmp_path):
    """As notebooks on the web show it: of no origin, without a clipboard."""
    script = """
      pick(21, 0, 27, 1);
      await wait(() => chosen() === 7);
      by("Mark what is selected").click();
      await idle();
      by("Compare").click();
      await idle();
      cell.querySelector("summary").click();
      by("Copy").click();
      const said = cell.querySelector("details span"), answers = all(".kvp-answers > div p").map((one) => one.textContent);
      await wait(() => said.textContent);
      const copied = [said.textContent, doc.getSelection().toString().trim() === cell.querySelector("pre").textContent.trim()];
      return [self.origin, copied, names(), answers, doc.sent.at(-1)];
    """
    origin, copied, names, answers, last = json.loads(run_sandboxed(page[0], SCRIPT + script, tmp_path, page[1]))
    state = Explorer(*tiny, max_new_tokens=3).reply(last)
    assert origin == "null" and copied == ["selected: press Ctrl+C", True]
    assert names == [mark["name"] for mark in state["form"]["marks"]] and len(names) == 2
    assert last["do"] == "compare" and answers == [answer for _, answer in state["result"]["answers"]]


@needs_chromium
def test_errors_overtaken_answers_and_a_second_view_in_a_browser(tiny, page, tmp_path):
    script = """
      const out = [];
      let go;
      doc.held = new Promise((done) => (go = done));
      by("Compare").click();
      put(cell.querySelector("textarea"), "Say abc. Say no.");
      put(input("Its instructions are"), "messages");
      go();
      await idle();
      out.push(names(), all(".kvp-answers > div").length, doc.sent.map((request) => request.do));
      put(input("The prompt is"), "chat");
      await idle();
      out.push(cell.querySelector("[role=alert]").textContent, all(".kvp-tokens").length, by("Compare").disabled);
      put(input("The prompt is"), "system");
      await idle();
      out.push(cell.querySelector("[role=alert]").textContent);
      const second = doc.createElement("div"), {default: widget} = await window.eval('import("./explore.js")');
      doc.body.append(second);
      widget.render({model: doc.model, el: second});
      const field = second.querySelector("tbody input");
      field.focus();
      put(field, "all of it");
      await wait(() => names()[0] === "all of it");
      out.push(names(), doc.activeElement === second.querySelector("tbody input"), cell.querySelector("textarea").value);
      return out;
    """
    names, n_answer, sent, error, n_strip, is_off, gone, renamed, is_focused, text = json.loads(
        run_beside(page[0], SCRIPT + script, tmp_path, page[1])
    )
    assert names == ["system: Say abc. Say no"] and n_answer == 0 and sent == ["compare", "read", "read"]
    assert error.startswith("the chat is no JSON (") and n_strip == 0 and not is_off and gone == ""
    assert renamed == ["all of it"] and is_focused and text == "Say abc. Say no."


@needs_chromium
def test_what_is_done_before_an_answer_comes_in_a_browser(page, tmp_path):
    """An instruction is renamed twice and stays protected; tokens that may be another text's are not marked."""
    script = """
      let go;
      doc.held = new Promise((done) => (go = done));
      all("tbody input[type=checkbox]")[0].click();
      put(cell.querySelector("textarea"), "Well. " + cell.querySelector("textarea").value);
      pick(21, 0, 27, 1);
      await wait(() => chosen() === 7);
      by("Mark what is selected").click();
      press("Enter");
      const out = [by("Mark what is selected").disabled, doc.sent.length], field = all("tbody input")[0];
      put(field, "one");
      put(field, "two");
      go();
      await idle();
      out.push(names(), doc.sent.at(-1).form.settings.map((setting) => setting.protect));
      return [...out, cell.querySelector("[role=alert]").textContent];
    """
    is_off, n_sent, names, protected, error = json.loads(run_beside(page[0], SCRIPT + script, tmp_path, page[1]))
    assert is_off and n_sent == 1 and error == ""
    assert names == ["two", "Say abc", "Say it twice"] and protected == [["two"], []]


@needs_chromium
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_widget_has_no_serious_fault_for_who_cannot_see_it(page, tmp_path, scheme):
    compared = "by('Compare').click(); await idle(); cell.querySelector('summary').click();"
    assert serious_findings(page[0], tmp_path, SCRIPT + compared, page[1], scheme=scheme) == []
