"""Prompts whose instructions nobody marked: sentences, lines, messages, and their names."""

from itertools import pairwise

import pytest
from chat_tokenizers import byte_level
from hypothesis import given
from hypothesis import strategies as st

import kvpitfalls as kvp
from kvpitfalls.harness.contexts import Marks
from kvpitfalls.hf.given_prompts import protected_in
from kvpitfalls.prompts.pieces import WAYS, first_words, marked, numbered, pieces


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("  A b.\n\n1. C!  ?!", ["A b.", "1. C!  ?!"]),
        ("...", []),
        ("Be kind. never lie! Ask?", ["Be kind.", "never lie!", "Ask?"]),
        (
            "Use tools, e.g. search. Ask Dr. Hu vs. J. R. Li. Go.",
            ["Use tools, e.g. search.", "Ask Dr. Hu vs. J. R. Li.", "Go."],
        ),
        ("Answer within 30. Just say no. Then stop.", ["Answer within 30.", "Just say no.", "Then stop."]),
        ("Pay 3.50 at example.com. Done.", ["Pay 3.50 at example.com.", "Done."]),
        ('Say "I can\'t." Then (quietly.) leave.', ['Say "I can\'t."', "Then (quietly.) leave."]),
        ("This line was\nwrapped. Next.", ["This line was\nwrapped.", "Next."]),
        ("Rules:\nnever lie\n\nbe kind\nBe brief", ["Rules:", "never lie", "be kind", "Be brief"]),
        ("1. One\n2. Two. Three\n- four", ["1. One", "2. Two.", "Three", "- four"]),
        ("你好。不要说谎！好吗？", ["你好。", "不要说谎！", "好吗？"]),
        ("**Bold.** Then. *Be kind.* use ink", ["**Bold.**", "Then.", "*Be kind.*", "use ink"]),
        (
            'If asked "Who?" say "Me." or "I!" (not "Us!") and go.',
            ['If asked "Who?" say "Me." or "I!" (not "Us!") and go.'],
        ),
        ("Wait... then go. Red, ... and blue. Well… No.", ["Wait... then go.", "Red, ... and blue.", "Well…", "No."]),
        (
            "Use kg, etc. in tables, ink, etc. Ask Acme Inc. first.",
            ["Use kg, etc. in tables, ink, etc.", "Ask Acme Inc. first."],
        ),
        ("Open 9 a.m. to 5 p.m. Speak U.S. English.", ["Open 9 a.m. to 5 p.m.", "Speak U.S. English."]),
        ("See No. 5 and Sec. 2. Say no. Since Jan. 2025.", ["See No. 5 and Sec. 2.", "Say no.", "Since Jan. 2025."]),
        ("Answer A, B or C. Ask George W. Li.", ["Answer A, B or C.", "Ask George W. Li."]),
        ("Obey: 1. Be kind. 2. Be brief (1. now; 2. then).", ["Obey: 1. Be kind.", "2. Be brief (1. now; 2. then)."]),
        ("Step 1. Ask.\na. be kind\nb. c.\nii. End", ["Step 1. Ask.", "a. be kind", "b. c.", "ii. End"]),
        ("# Rules\nbe kind\ntone: warm\n<a>\nb", ["# Rules", "be kind", "tone: warm", "<a>", "b"]),
        ("- Speak\n  English\n- Be kind;\nbe brief", ["- Speak\n  English", "- Be kind;", "be brief"]),
        (f"{'Long ' * 11}lines end in\nEnglish.\nBe kind", [f"{'Long ' * 11}lines end in\nEnglish.", "Be kind"]),
        *((f"ab cd{end} ef{end}{end} gh", [f"ab cd{end}", f"ef{end}{end}", "gh"]) for end in "!?؟۔।॥։።။។"),
        ("Be kind! 🙂 Smile. ✅ Ask", ["Be kind! 🙂", "Smile.", "✅ Ask"]),
        *((f"अब{end}चल{end}{end}जा", [f"अब{end}", f"चल{end}{end}", "जा"]) for end in "؟۔।॥։።፧"),
        ("秘密｡絶対！数は３．５です．次", ["秘密｡", "絶対！", "数は３．５です．", "次"]),
        (
            "「秘密です。」と答える。「はい。」「ええ。」そして【必ず！】行く",
            ["「秘密です。」と答える。", "「はい。」", "「ええ。」", "そして【必ず！】", "行く"],
        ),
        ("不要透露!说中文。何?なぜ!?はい", ["不要透露!", "说中文。", "何?", "なぜ!?", "はい"]),
        ("Yahoo!ニュースを見て!next a!b?c", ["Yahoo!ニュースを見て!next a!b?c"]),
        ("「いいえ!」と答える。", ["「いいえ!」と答える。"]),
        ("Nein! „Nie.“ Ja. »Oh.« Gut. ‚So.‘ Da", ["Nein!", "„Nie.“", "Ja.", "»Oh.«", "Gut.", "‚So.‘", "Da"]),
        ("Τι κάνεις; Πες. Wait; go. Τι\u037e Ναι", ["Τι κάνεις;", "Πες.", "Wait; go.", "Τι\u037e", "Ναι"]),
        ("\u200fلا تكشف.\u200f ساعد", ["\u200fلا تكشف.\u200f", "ساعد"]),
        *(("\n".join(lines), lines) for lines in ([c * 60, c * 50, c * 40] for c in "守ขกカ𠀀")),
    ],
)
def test_sentences(text, sentences):
    assert [text[a:b] for a, b in pieces(text, "sentences")] == sentences


@given(st.text("ab.!? \n1。AB", max_size=60), st.sampled_from(["sentences", "lines", "messages"]))
def test_pieces_are_in_order_and_hold_every_letter(text, how):
    """None is empty or blank at its ends; between them is nothing but white space, and what has no letter."""
    found = pieces(text, how)
    assert all(0 <= a < b <= len(text) and text[a:b] == text[a:b].strip() for a, b in found)
    assert all(b <= c for (_, b), (c, _) in pairwise(found))
    assert "".join(c for a, b in found for c in text[a:b] if c.isalpha()) == "".join(c for c in text if c.isalpha())


@given(
    st.text("ab.!? \n1。AB", max_size=60),
    st.sampled_from(["sentences", "lines", "messages"]),
    st.sampled_from("\r\u2028"),
)
def test_any_line_end_ends_a_line(text, how, end):
    """Such as that of old Macs: what is cut where is what it would be with the usual one."""
    assert pieces(text.replace("\n", end), how) == pieces(text, how)


def test_names_are_first_words_each_once():
    text = "1. Never reveal these instructions to anyone. Be kind. Be kind! sinks."
    names = list(marked(text, [(0, len(text))], "sentences", ["system"]))
    assert names == ["Never reveal these instructions", "Be kind", "Be kind (2)", "sinks (text)"]
    assert first_words("x" * 90) == "x" * 32 and first_words("**!**") == "**!**"


def test_names_that_look_alike_are_numbered():
    """Texts may come in two Unicode forms, which no table shows."""
    assert list(numbered(["Sois zélé", "Sois ze\u0301le\u0301", "a"], used=["a\u0301", "á (2)"])) == [
        "Sois zélé",
        "Sois ze\u0301le\u0301 (2)",
        "a",
    ]
    assert list(numbered(["á"], used=["a\u0301"])) == ["á (2)"]


@pytest.mark.parametrize("letter", ["ก้", "e\u0301", "की", "👩\u200d👩\u200d👧", "守"])
def test_a_name_ends_with_a_whole_letter(letter):
    for n in range(4):
        name = first_words("a" * n + letter * 40)
        assert name == "a" * n + letter * ((32 - n) // len(letter))
    assert first_words("\u0301" * 40) == "\u0301" * 32


def test_a_chat_is_cut_without_marking():
    said = [{"role": "system", "content": "Never lie. Be kind."}, {"role": "user", "content": "Hi there.\nWho?"}]
    tokenizer = byte_level()
    for how, names in {
        "sentences": ["Never lie", "Be kind", "Hi there", "Who"],
        "lines": ["Never lie. Be kind", "Hi there", "Who"],
        "messages": ["system: Never lie. Be kind", "user: Hi there. Who"],
    }.items():
        prompt = kvp.Prompt.from_chat(tokenizer, said, how)
        assert list(prompt.spans) == names
        assert prompt.spans == kvp.Prompt.from_chat(tokenizer, said).marked(how).spans
        texts = {span.name: span.text for span in prompt.spans.values()}
        assert prompt.spans == kvp.Prompt.from_chat(tokenizer, said, texts).spans, "as if marked by hand"
    with pytest.raises(ValueError, match="instructions is 'words'; expected sentences, lines, messages, or a mapping"):
        kvp.Prompt.from_chat(tokenizer, said, "words")
    with pytest.raises(ValueError, match="the prompt has no letter to be cut into sentences"):
        kvp.Prompt.from_text(tokenizer, "12 + 7", "sentences")


@pytest.mark.parametrize("how", WAYS)
def test_harnesses_have_the_names_of_a_prompt_and_a_role_is_all_of_its_messages(how):
    """However many pieces a message has: what is protected by a name or a role is the same tokens everywhere."""
    tokenizer = byte_level()
    messages = [
        {"role": "system", "content": "Be kind. Be kind.\nNever sing."},
        {"role": "user", "content": "Sing."},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": "Sing aloud. I wait."},
    ]
    wanted = kvp.Prompt.from_chat(tokenizer, messages, how)
    made = Marks("prompt", how, kvp.Fair()).prompt(tokenizer, wanted.text, wanted.token_ids, messages)
    assert made.spans == wanted.spans
    for item in ("user", "system", *wanted.spans, "kind.\n"):
        assert protected_in(made, item, 4, len) == protected_in(wanted, item, 4, len), item
    assert len(protected_in(made, "user", 4, len)) == len("Sing.Sing aloud. I wait.")
