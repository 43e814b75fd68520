"""The token heat map: what it shows is what was audited, hostile prompts stay text, and its sliders work offline in a
browser."""

import base64
import hashlib
import html.parser
import json
import re
import zlib

import numpy as np
import pytest
from browser import SCHEMES, needs_chromium, run_beside, serious_findings

import kvpitfalls as kvp
from kvpitfalls.display.heatmap import HeatMap
from kvpitfalls.display.markup import SPAN_COLORS, block, note, percent, table, token_strip, visible
from kvpitfalls.experiments.demo import two_instructions

HOSTILE = [
    "<script>document.title='owned'</script>",
    "</script><script>document.title='owned'</script>",
    '"><img src=x onerror="document.title=\'owned\'">',
    "' style='display:none",
    "\u2028\u2029\x00\x1b[31m",
    "\u202eright to left\u202c",
    "</bdi></div></main></body>",
    "]]>--><!--",
    "\ud800 lone",
    "\U000e0041 tag",
    "&lt;b&gt; &amp;",
    "\n",
    " שלום",
]


def test_no_letter_is_invisible():
    """A text of fillers and selectors can say something to the model and nothing to who looks at its page."""
    hidden = ["\u034f", "\u115f", "\u2800", "\u3164", "\uffa0", "\U000e0100", "\U000e01ef"]
    assert visible("a" + "b".join(hidden)) == "a" + "b".join(f"⟨U+{ord(c):04X}⟩" for c in hidden)
    for shown in ("❤\ufe0f", "क\u094d\u200dष", "e\u0301", "가", "守 秘"):
        assert visible(shown) == shown


def hostile_map(**changes):
    n = len(HOSTILE)
    counts = np.random.default_rng(0).integers(0, 4, (3, 2, n))
    spans = {"</b><script>document.title='owned'</script>": (1, 3), 'a "name"': (4, 6)}
    given = {"title": "</title><script>document.title='owned'</script>", "tokens": HOSTILE, "spans": spans}
    given |= {
        "counts": {"one": counts, "</option><script>x": 3 - counts},
        "compression_ratios": [0.0, 0.25, 0.5],
        "n_kept": [13, 9, 6],
    }
    return HeatMap(**{**given, "layers": [3, 7], "heads": [3, 3], **changes})


class Page(html.parser.HTMLParser):
    """Tags, what would be loaded, and the text of each token."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.loads, self.tokens, self.handlers, self.title, self.inside = [], [], [], [], "", None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.inside = tag
        self.loads += [value for name, value in attrs if name in ("src", "href", "data", "srcset", "action")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        if tag == "bdi":
            self.tokens.append("")

    def handle_data(self, data):
        if self.inside == "bdi":
            self.tokens[-1] += data
        if self.inside == "title":
            self.title += data

    def handle_endtag(self, tag):
        self.inside = None


def test_hostile_prompts_stay_text():
    shown = hostile_map()
    page = Page(shown.html)
    assert page.tokens == [visible(token) for token in HOSTILE]
    assert (
        page.tags.count("script") == 2
        and page.loads == ["#span-0", "#span-1"]
        and page.handlers == []
        and "img" not in page.tags
    )
    assert page.title == "</title><script>document.title='owned'</script>"
    text = shown.html.encode("utf-8").decode("utf-8")  # a lone surrogate could not be written
    assert text.count(own := "\u201c\u2068${text}\u2069\u201d") == 1, "how the script shows a token"
    assert not re.search("[\u2028\u2029\u202a-\u202e\u2066-\u2069\x00\x1b]", text.replace(own, ""))
    outside = Page(shown._repr_html_())
    assert outside.tags == ["style", "iframe", "p"] and outside.handlers == []


def test_only_the_one_script_may_run_and_nothing_may_be_loaded():
    text = hostile_map().html
    policy = re.search(r'Content-Security-Policy\' content="([^"]*)"', text)[1]
    assert policy.startswith("default-src 'none'; ") and "script-src 'sha256-" in policy
    script = re.findall(r"<script>(.*?)</script>", text, flags=re.S)[-1]
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy
    assert text.index("Content-Security-Policy") < text.index("<style>")


def unpacked(text, n_ratio, n_layer, n_token):
    lines = re.search(r"id='counts'>\n(.*?)\n</script>", text, flags=re.S)[1].split("\n")
    steps = [
        np.frombuffer(zlib.decompress(base64.b64decode(line)), np.uint8).reshape(n_ratio, n_layer, n_token)
        for line in lines
    ]
    return [np.array([step[: r + 1].sum(0, dtype=np.int64) % 256 for r in range(n_ratio)]) for step in steps]


def test_the_page_holds_the_counts():
    shown = hostile_map()
    for found, given in zip(unpacked(shown.html, 3, 2, len(HOSTILE)), shown.counts.values(), strict=True):
        assert np.array_equal(found, given)


def test_an_audits_map_is_what_compress_keeps(smollm2, tmp_path):
    model, tokenizer = smollm2
    prompt = two_instructions(tokenizer)
    audited = kvp.audit(model, prompt, policies=["snapkv", "knorm"], compression_ratios=[0.5, 0.3], fair=[False, 0.5])
    audited.to_html(tmp_path / "map.html")
    found = unpacked((tmp_path / "map.html").read_text("utf-8"), 2, 30, len(prompt))
    assert Page((tmp_path / "map.html").read_text("utf-8")).tokens == [visible(token) for token in prompt.tokens]
    for start, r in ((0, 0), (0.39, 0), (0.41, 1), (0.99, 1)):  # it opens at the nearest ratio
        page = audited.heatmap(start=start).html
        assert f"value='{r}' autocomplete='off'\naria-valuetext='{(30, 50)[r]} % removed" in page
        kept = [row["kept"] for row in audited.rows if row["compression_ratio"] == (0.3, 0.5)[r]][: len(prompt.spans)]
        assert re.findall("class='kvp-share'>([^<]*)<", page)[: len(kept)] == [percent(share) for share in kept]
    settings = [("snapkv", False), ("snapkv", 0.5), ("knorm", False), ("knorm", 0.5)]
    assert list(audited.heatmap().counts) == ["snapkv, biased", "snapkv, fair 0.5", "knorm, biased", "knorm, fair 0.5"]
    for (policy, fair), counts in zip(settings, found, strict=True):
        for r, ratio in enumerate([0.3, 0.5]):
            with kvp.wrap(model, policy, compression_ratio=ratio, fair=fair) as handle:
                cache = handle.compress(prompt)
            for layer in range(30):
                assert np.array_equal(
                    counts[r, layer], np.bincount(cache.positions(layer)[0].ravel(), minlength=len(prompt))
                )


def test_four_thousand_tokens_are_under_five_megabytes():
    """The hardest case: what is kept of each token is independent of everything else; 30 layers, 10 settings, 9
    ratios."""
    rng, n = np.random.default_rng(0), 4000
    fate = [rng.integers(0, 10, (3, 30, n)) for _ in range(10)]  # per head: the first ratio at which the token is lost
    counts = {
        f"setting {i}": np.stack([(of_setting > r).sum(0) for r in range(9)]) for i, of_setting in enumerate(fate)
    }
    ratios = [r / 10 for r in range(1, 10)]
    shown = HeatMap("long", [" word"] * n, {"all": (0, n)}, counts, ratios, [1] * 9, range(30), [3] * 30)
    assert len(shown.html.encode()) < 5_000_000


def test_what_does_not_fit_is_one_sentence():
    for changes, message in [
        ({"counts": {}}, "there are 0 settings"),
        ({"counts": {"one": np.zeros((1, 2, 3))}}, r"counts\['one'\] has shape \(1, 2, 3\); expected \(3, 2, 13\)"),
        ({"counts": {"one": np.full((3, 2, 13), 256)}}, r"counts\['one'\] has 256 to 256; expected 0 to as many as"),
        ({"counts": {"one": np.full((3, 2, 13), -1)}}, r"counts\['one'\] has -1 to -1; expected 0 to as many as"),
        ({"heads": [3, 256]}, r"heads is \[3, 256\]; expected 1 to 255 for each of 2 layers"),
    ]:
        with pytest.raises(ValueError, match=message):
            hostile_map(**changes)


def test_tokens_of_a_strip_nest_in_their_instructions():
    text = token_strip(["a", "b", "c"], {"one": (0, 1), "two": (1, 3)}, is_template=[True, False, False])
    assert re.sub(r" style='[^']*'| class='[^']*'| dir='[^']*'", "", text) == (
        "<div><span data-edges='0,1'><b>one</b> <bdi>a</bdi></span><span data-edges='1,3'><b>two</b> "
        "<bdi>b</bdi><bdi>c</bdi></span></div>"
    )


@needs_chromium
def test_the_sliders_in_a_browser(tmp_path):
    """Every setting, ratio and layer: what the page shows after the slider moved is what NumPy computes."""
    shown = hostile_map()
    shown.save(tmp_path / "map.html")
    script = """
      const main = doc.getElementById("heatmap"), get = (id) => doc.getElementById(id), out = [];
      await wait(() => main.dataset.ready);
      for (let s = 0; s < 2; s++) for (let r = 0; r < 3; r++) for (let l = 0; l < 3; l++) {
        for (const [id, value] of [["ratio", r], ["layer", l]]) {
          get(id).value = value;
          get(id).dispatchEvent(new doc.defaultView.Event("input"));
        }
        get("setting").selectedIndex = s;
        get("setting").dispatchEvent(new doc.defaultView.Event("input"));
        await new Promise((done) => setTimeout(done, 30));
        if (get("ratio").getAttribute("aria-valuetext") !== get("ratio-text").textContent) throw "a slider says something else";
        out.push([get("ratio-text").textContent, get("layer-text").textContent,
          [...doc.querySelectorAll("bdi")].map((b) => +b.style.getPropertyValue("--k")),
          [...doc.querySelectorAll("#instructions .kvp-share")].map((o) => o.textContent)]);
      }
      const token = doc.querySelectorAll("bdi")[5];
      token.dispatchEvent(new doc.defaultView.PointerEvent("pointerover", {bubbles: true}));
      const color = doc.defaultView.getComputedStyle(token).backgroundColor;
      return [out, doc.title, document.title, get("token").value, color, [...doc.querySelectorAll("bdi")].map((b) => b.textContent)];
    """
    states, title, outer_title, said, color, texts = json.loads(run_beside(tmp_path / "map.html", script, tmp_path))
    assert title == shown.title and outer_title == "" and texts == [visible(token) for token in HOSTILE]
    expected = []
    for counts in shown.counts.values():
        for r, (removed, n_kept) in enumerate([("0", 13), ("25", 9), ("50", 6)]):
            for l, chosen in enumerate([[0, 1], [0], [1]]):
                shares = counts[r, chosen].mean(0) / 3
                spans = [f"{100 * shares[begin:end].mean():.0f} %" for begin, end in shown.spans.values()]
                layer = ["mean of all 2", "layer 3", "layer 7"][l]
                expected.append([f"{removed} % removed, {n_kept} of 13 tokens kept", layer, shares, spans])
    assert len(states) == len(expected) == 18
    for found, wanted in zip(states, expected, strict=True):
        assert found[:2] == wanted[:2] and found[2] == pytest.approx(list(wanted[2]), abs=6e-4)
        assert [int(text[:-2]) for text in found[3]] == pytest.approx(
            [int(text[:-2]) for text in wanted[3]], abs=1
        )  # halves round either way
    assert (
        said
        == f"token 5 “\u2068{visible(HOSTILE[5]).strip()}\u2069”: {100 * shown.counts['</option><script>x'][2, 1, 5] / 3:.0f} % kept"
    )
    assert color.startswith("rgba(68, 119, 170, ")


@needs_chromium
@pytest.mark.parametrize("heads", [[1] * 5, [3] * 5, [8] * 5, [2, 8, 1, 3, 2]], ids=str)
def test_the_script_says_what_the_page_said_before_it(tmp_path, heads):
    """Halves of a percent among it: 12.5 % was 12 % until the script ran, and 13 % then."""
    rng, n = np.random.default_rng(heads), 200
    counts = rng.integers(0, np.array(heads)[:, None] + 1, (2, 5, n))
    counts[0, :, : heads[-1] + 1] = np.minimum(np.arange(heads[-1] + 1), np.array(heads)[:, None])
    widths = [1] * 40 + [2] * 20 + [8] * 10 + [40]
    spans = {f"{i}": (end - w, end) for i, (w, end) in enumerate(zip(widths, np.cumsum(widths).tolist(), strict=True))}
    shown = HeatMap("", ["x"] * n, spans, {"one": counts}, [0.125, 0.5], [175, 100], range(5), heads, start=0.125)
    shown.save(tmp_path / "map.html")
    script = """
      const texts = () => [...doc.querySelectorAll(".kvp-share, #ratio-text, #layer-text")].map((x) => x.textContent);
      await wait(() => doc.getElementById("heatmap").dataset.ready);
      return texts();
    """
    said = re.findall(r"(?:class='kvp-share'|id='(?:ratio|layer)-text' aria-hidden='true')>([^<]*)<", shown.html)
    assert "12.5 % removed, 175 of 200 tokens kept" in said and len(said) == 2 + 2 * len(spans)
    assert json.loads(run_beside(tmp_path / "map.html", script, tmp_path)) == said


@needs_chromium
def test_two_settings_side_by_side_links_and_the_keyboard(tmp_path):
    shown = hostile_map(spans={"later": (4, 6), "sooner": (1, 3)})
    shown.save(tmp_path / "map.html")
    script = """
      const main = doc.getElementById("heatmap"), get = (id) => doc.getElementById(id), window = doc.defaultView;
      await wait(() => main.dataset.ready);
      const press = (key) => main.querySelector(".kvp-tokens").dispatchEvent(new window.KeyboardEvent("keydown", {key, bubbles: true}));
      const choose = async (index) => {
        get("beside").selectedIndex = index;
        get("beside").dispatchEvent(new window.Event("input"));
        await new Promise((done) => setTimeout(done, 50));
      };
      await choose(2);
      const strips = [...main.querySelectorAll(".kvp-tokens")], out = [get("dead")];
      const shades = (strip) => [...strip.querySelectorAll("bdi")].map((b) => +b.style.getPropertyValue("--k"));
      out.push(strips.map((strip) => [strip.dataset.setting, shades(strip)]));
      out.push([...doc.querySelectorAll("#instructions li")].map((li) => li.textContent));
      out.push([...doc.querySelectorAll("#instructions a")].map((a) => doc.querySelector(a.getAttribute("href")).dataset.edges));
      const ids = [...doc.querySelectorAll("[id]")].map((element) => element.id);
      out.push(ids.length - new Set(ids).size);
      for (const key of ["End", "ArrowRight", "ArrowLeft"]) press(key);
      out.push(get("token").value, [...main.querySelectorAll(".kvp-at")].length);
      await choose(0);
      out.push(main.querySelectorAll(".kvp-tokens").length, doc.querySelector("#instructions li").textContent);
      return out;
    """
    dead, strips, said, edges, n_twice, token, n_at, n_left, alone = json.loads(
        run_beside(tmp_path / "map.html", script, tmp_path)
    )
    shares = [counts[2].mean(0) / 3 for counts in shown.counts.values()]
    assert dead is None and n_twice == 0 and n_at == 1 and n_left == 1
    assert [name for name, _ in strips] == list(shown.counts)
    for (_, found), wanted in zip(strips, shares, strict=True):
        assert found == pytest.approx(list(wanted), abs=6e-4)
    assert edges == ["4,6", "1,3"]
    for text, (name, (begin, end)) in zip(said, shown.spans.items(), strict=True):
        numbers = re.fullmatch(rf"{name} (\d+) % \| (\d+) %", text)
        assert [int(number) for number in numbers.groups()] == pytest.approx(
            [100 * of[begin:end].mean() for of in shares], abs=1
        )
    assert alone == said[0].split(" | ")[0]
    both = " | ".join(f"{100 * of[11]:.0f} %" for of in shares)
    assert token == f"token 11 “\u2068{visible(HOSTILE[11]).strip()}\u2069”: {both} kept"


def test_where_the_script_does_not_run_the_page_says_so():
    assert "<p id='dead'>The script of this page does not run here" in hostile_map().html
    assert hostile_map(spans={}).html.count("tabindex='0'") == 1


@pytest.mark.parametrize("color", SPAN_COLORS)
def test_names_can_be_read_on_their_colors(color):
    """WCAG 2.2: 4.5 to 1 for white text, 3 to 1 for outlines on a dark page."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    assert 1.05 / (luminance + 0.05) >= 4.5 and (luminance + 0.05) / 0.05 >= 3


@needs_chromium
@pytest.mark.parametrize(
    ("background", "scheme"),
    [
        ("none", "light"),
        ("#111", "dark"),
        ("rgb(255 255 255 / .1)", "light"),
        ("color(srgb .95 .95 .95)", "light"),
        ("color(display-p3 .1 .1 .1)", "dark"),
        ("oklch(.96 .01 250)", "light"),
        ("oklch(.2 .02 250)", "dark"),
        ("lab(10 0 0 / .3)", "light"),
        ("color-mix(in oklab, white, black 90%)", "dark"),
    ],
)
def test_the_notebooks_frame_in_a_browser(tmp_path, background, scheme):
    """As a notebook shows it: in a frame that the page itself makes as high as it is, and as dark as what it stands
    on."""
    cell = f"<!doctype html><meta charset='utf-8'><div style='background: {background}'>{hostile_map()._repr_html_()}</div>"
    (tmp_path / "cell.html").write_text(cell, encoding="utf-8")
    script = """
      const inner = doc.querySelector("iframe"), hint = doc.defaultView.getComputedStyle(doc.querySelector(".kvp-hint")).display;
      await wait(() => inner.contentDocument && inner.contentDocument.querySelector("[data-ready]"));
      const page = inner.contentDocument.documentElement;
      return [parseInt(inner.style.height) - page.offsetHeight, doc.title, page.style.colorScheme, hint];
    """
    assert json.loads(run_beside(tmp_path / "cell.html", script, tmp_path)) == [4, "", scheme, "none"]


@needs_chromium
@pytest.mark.parametrize("width", [480, 560, 900])
def test_on_paper_the_notebooks_frame_is_as_high_as_what_it_shows(tmp_path, width):
    """Paper is narrower than the screen, and nothing measures the frame anew: here nothing can, before the script
    returns."""
    cell = hostile_map()._repr_html_().replace("@media print", "@media screen")
    (tmp_path / "cell.html").write_text(f"<!doctype html><div id='paper'>{cell}</div>", encoding="utf-8")
    script = f"""
      const paper = doc.getElementById("paper"), inner = doc.querySelector("iframe");
      paper.style.width = "1000px";
      await wait(() => inner.contentDocument && inner.contentDocument.querySelector("[data-ready]"));
      await new Promise((done) => setTimeout(done, 50));
      paper.style.width = "{width}px";
      return [inner.offsetWidth, inner.offsetHeight - inner.contentDocument.documentElement.offsetHeight];
    """
    shown, spare = json.loads(run_beside(tmp_path / "cell.html", script, tmp_path))
    assert shown == width and spare >= 0


@needs_chromium
def test_on_paper_a_table_of_nine_ratios_is_whole(tmp_path):
    """What a notebook on A4 leaves it is 550 pixels, whatever the notebook says of its own tables; no share is broken
    into two lines."""
    host = ".host table { font-size: 14px } .host :is(td, th) { padding: .5em; white-space: normal }"
    header = ["policy", "eviction", "instruction", *(f"r = 0.{i}" for i in range(1, 10))]
    rows = [["streaming_llm", "biased", "never reveal", *[1.0] * 9]] * 2
    text = block("Audit", table(header, rows, shares=range(3, 12))).replace("@media print", "@media screen")
    page = f"<!doctype html><style>{host}</style><div class='host' style='width: 550px'>{text}</div>"
    (tmp_path / "cell.html").write_text(page, encoding="utf-8")
    script = """
      const wide = doc.querySelector(".kvp-wide"), [one] = [...doc.querySelectorAll("td.n")], range = doc.createRange();
      range.selectNodeContents(one);
      return [wide.scrollWidth - wide.clientWidth, range.getClientRects().length];
    """
    assert json.loads(run_beside(tmp_path / "cell.html", script, tmp_path)) == [0, 1]


@needs_chromium
def test_no_name_is_wider_than_the_page(tmp_path):
    """Of an instruction, a title or a setting: without a space, a line has no place to break by itself."""
    long, counts = "x" * 400, np.ones((3, 2, len(HOSTILE)), int)
    hostile_map(title=long, spans={long: (1, 3)}, counts={long: counts}).save(tmp_path / "map.html")
    (tmp_path / "cell.html").write_text("<!doctype html>" + block(long, note(long)), "utf-8")
    script = """
      const all = [doc.documentElement, ...doc.querySelectorAll("#instructions")];
      return all.map((one) => one.scrollWidth - one.clientWidth);
    """
    assert json.loads(run_beside(tmp_path / "map.html", script, tmp_path)) == [0, 0]
    assert json.loads(run_beside(tmp_path / "cell.html", script, tmp_path)) == [0]


@needs_chromium
def test_a_name_that_runs_from_right_to_left_does_not_turn_its_number_around(tmp_path):
    """In the strip and in the list a share stands right of its name, whatever its script, and reads as a number."""
    n = len(HOSTILE)
    names = {"never": (0, 2), "שמור סוד": (2, 4), "لا تكشف 3": (4, 6), "守秘": (6, 8)}
    hostile_map(spans=names, counts={"one": np.ones((3, 2, n), int)}).save(tmp_path / "map.html")
    script = """
      await wait(() => doc.getElementById("heatmap").dataset.ready);
      const rect = (node, begin, end) => {
        const range = doc.createRange();
        range.setStart(node, begin);
        range.setEnd(node, end);
        return range.getBoundingClientRect();
      };
      const places = (name, share) => {
        const [first, last] = [rect(share, 0, 1), rect(share, share.length - 1, share.length)];
        return rect(name, 0, name.length).right <= first.left + .5 && first.right <= last.left;
      };
      const strip = [...doc.querySelectorAll(".kvp-span > b")].map((one) => places(one.firstChild, one.lastChild.firstChild));
      const list = [...doc.querySelectorAll("#instructions li")].map((one) =>
        places(one.querySelector("a").firstChild, one.querySelector(".kvp-share").firstChild));
      return [strip, list];
    """
    assert json.loads(run_beside(tmp_path / "map.html", script, tmp_path)) == [[True] * 4] * 2


def test_what_tells_instructions_apart_needs_no_style_sheet():
    """A notebook that nobody trusts keeps no style sheet and no frame: JupyterLab's sanitizer leaves colours like these
    in elements."""
    strip = token_strip(["a", "b"], {"one": (0, 1)})
    assert (
        f"style='border: 2px solid {SPAN_COLORS[0]}'" in strip
        and f"background-color: {SPAN_COLORS[0]}; color: #ffffff" in strip
    )
    assert "</b> <bdi" in strip, "a name and its text are two words"
    assert re.search("background-color: rgba\\(68, 119, 170, 0.325\\)", table(["a"], [[0.5]], shares=[0]))
    assert re.search("</iframe><p [^>]*>The heat map is", hostile_map()._repr_html_())


@needs_chromium
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_page_has_no_serious_fault_for_who_cannot_see_it(tmp_path, scheme):
    shown = hostile_map()
    shown.save(tmp_path / "map.html")
    script = """
      await wait(() => doc.getElementById("heatmap").dataset.ready);
      doc.getElementById("beside").selectedIndex = 2;
      doc.getElementById("beside").dispatchEvent(new doc.defaultView.Event("input"));
      await new Promise((done) => setTimeout(done, 50));
    """
    assert serious_findings(tmp_path / "map.html", tmp_path, script, scheme=scheme) == []
