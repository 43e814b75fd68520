"""The prompt as one HTML page: every token shaded by the share of layers and heads that keep it, with sliders for ratio
and layer.

The page is self-contained and works from a file, without any network: its own policy (CSP) forbids it to load anything,
and to run any script but the one below. That script reads numbers only; the prompt is in the page as escaped text.
"""

import base64
import hashlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape as escape_markup
from textwrap import indent

import numpy as np

from ..files import whole
from .markup import PERCENT_SCRIPT, STYLE, escape, isolated, percent, span_color, token_strip

_PAGE_STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 1100px; padding: 0 12px 12px;
  background: Canvas; color: CanvasText }
h1 { font-size: 1.15em; margin: .6em 0 .3em; overflow-wrap: anywhere }
.controls { position: sticky; top: 0; background: Canvas; border-bottom: 1px solid GrayText; padding: .4em 0; display: grid;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 290px), 1fr)); gap: .3em 1.4em }
.controls label { display: grid; grid-template-columns: 4.2em 1fr; align-items: center; align-content: start; gap: .4em }
.controls label > span { grid-column: 2; font-variant-numeric: tabular-nums }
.controls input, .controls select { width: 100%; margin: 0; min-width: 0; font: inherit }
#token { min-height: 1.5em; overflow-wrap: anywhere; font-variant-numeric: tabular-nums }
.legend { display: flex; align-items: center; gap: .5em; font-size: 13px }
.legend i { width: 8em; height: 1em; border: 1px solid GrayText; print-color-adjust: exact; -webkit-print-color-adjust: exact;
  background: linear-gradient(90deg, rgb(68 119 170 / 0), rgb(68 119 170 / .65)) }
#dead { border: 1px solid GrayText; padding: .3em .6em }
#instructions { margin: .6em 0; padding: 0; list-style: none; max-height: 11em; overflow: auto; display: flex; flex-wrap: wrap;
  gap: .2em 1.2em; font-size: 14px; font-variant-numeric: tabular-nums; overflow-wrap: anywhere }
#instructions a { color: inherit; border-left: 4px solid var(--c); padding-left: .4em }
#strips { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr)); gap: 0 1.6em }
.kvp-tokens[data-setting]::before { content: attr(data-setting); display: block; font-weight: bold }
.kvp-span { scroll-margin-top: 7em }
.kvp-at { outline: 2px solid CanvasText }
.kvp-share { font-style: normal; margin-left: .4em; white-space: nowrap }
@media (forced-colors: active) { .kvp-tokens bdi, .kvp-span, .kvp-span > b, .legend i, #instructions a { forced-color-adjust: none } }
@media print { .controls { position: static } #instructions { max-height: none } input, #token { display: none } }
"""
# counts: [ratio][layer][token], the heads that keep a token, as differences from one ratio to the next (modulo 256),
# deflated
_SCRIPT = """
"use strict";
(async () => {
  const get = (id) => document.getElementById(id), main = get("heatmap");
  get("dead").remove();
  const numbers = (text) => text.split(",").map(Number);
  const [removed, kept, layers, heads] = ["removed", "kept", "layers", "heads"].map((name) => numbers(main.dataset[name]));
  const strips = [main.querySelector(".kvp-tokens")], n = strips[0].querySelectorAll("bdi").length;
  const packed = get("counts").textContent.trim().split("\\n"), unpacked = new Map();
"""
_SCRIPT += indent(PERCENT_SCRIPT, "  ")
_SCRIPT += """\
  const names = [...get("setting").options].map((option) => option.text);
  const spans = [...strips[0].querySelectorAll(".kvp-span")], links = [...document.querySelectorAll("#instructions a")];
  const places = links.map((link) => spans.findIndex((span) => "#" + span.id === link.getAttribute("href")));
  let shares = [], at = null;

  async function counts(setting) {
    if (!unpacked.has(setting)) {
      const bytes = Uint8Array.from(atob(packed[setting]), (c) => c.charCodeAt(0));
      const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
      const data = new Uint8Array(await new Response(stream).arrayBuffer()), plane = layers.length * n;
      for (let i = plane; i < data.length; i++) data[i] += data[i - plane];
      unpacked.set(setting, data);
    }
    return unpacked.get(setting);
  }

  const settings = () => [get("setting").selectedIndex, get("beside").selectedIndex - 1].filter((i) => i >= 0);

  async function draw() {
    await Promise.all(settings().map(counts));
    const shown = settings(), r = +get("ratio").value, layer = +get("layer").value - 1;
    if (!shown.every((setting) => unpacked.has(setting))) return;  // chosen meanwhile: its own event draws it
    const chosen = layer < 0 ? [...layers.keys()] : [layer], n_head = chosen.reduce((sum, l) => sum + heads[l], 0);
    shares = shown.map((setting) => {
      const data = unpacked.get(setting), of = new Float64Array(n);
      for (const l of chosen)
        for (let t = 0, from = (r * layers.length + l) * n; t < n; t++) of[t] += data[from + t];
      return of.map((sum) => sum / n_head);
    });
    place(shown);
    shares.forEach((of, i) => shade(strips[i], of));
    links.forEach((link, i) => {
      const said = strips.map((strip) => strip.querySelectorAll(".kvp-share")[places[i]].textContent);
      link.nextElementSibling.textContent = said.join(" | ");
    });
    say("ratio", `${removed[r]} % removed, ${kept[r]} of ${n} tokens kept`);
    say("layer", layer < 0 ? `mean of all ${layers.length}` : `layer ${layers[layer]}`);
    tell();
  }

  function place(shown) {
    while (strips.length > shown.length) strips.pop().remove();
    if (strips.length < shown.length) {
      strips.push(get("strips").appendChild(strips[0].cloneNode(true)));
      strips[1].querySelectorAll("[id]").forEach((element) => element.removeAttribute("id"));
    }
    strips.forEach((strip, i) => {
      if (shown.length > 1) strip.dataset.setting = names[shown[i]];
      else delete strip.dataset.setting;
    });
  }

  function shade(strip, of) {
    strip.querySelectorAll("bdi").forEach((token, t) => token.style.setProperty("--k", of[t].toFixed(3)));
    for (const span of strip.querySelectorAll(".kvp-span")) {
      const [begin, end] = numbers(span.dataset.edges);
      span.querySelector(".kvp-share").textContent = percent(of.slice(begin, end).reduce((a, b) => a + b, 0) / (end - begin));
    }
  }

  function say(id, text) {
    get(id + "-text").textContent = text;
    get(id).setAttribute("aria-valuetext", text);
  }

  function tell() {
    if (at === null) return;
    const text = strips[0].querySelectorAll("bdi")[at].textContent.trim();
    get("token").value = `token ${at} \u201c\u2068${text}\u2069\u201d: ${shares.map((of) => percent(of[at])).join(" | ")} kept`;
  }

  function move(token) {
    for (const strip of strips) strip.querySelectorAll(".kvp-at").forEach((old) => old.classList.remove("kvp-at"));
    at = token;
    tell();
  }

  get("strips").addEventListener("pointerover", (event) => {
    const token = event.target.closest("bdi");
    if (token) move([...token.closest(".kvp-tokens").querySelectorAll("bdi")].indexOf(token));
  });
  get("strips").addEventListener("keydown", (event) => {
    const to = {ArrowRight: (at ?? -1) + 1, ArrowLeft: (at ?? 1) - 1, Home: 0, End: n - 1}[event.key];
    if (to === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    move(Math.min(Math.max(to, 0), n - 1));
    const token = event.target.closest(".kvp-tokens").querySelectorAll("bdi")[at];
    token.classList.add("kvp-at");
    token.scrollIntoView({block: "nearest"});
  });
  for (const id of ["setting", "beside", "ratio", "layer"]) get(id).addEventListener("input", draw);
  await draw();
  main.dataset.ready = "yes";
  const pixel = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const paper = (element) => {  // what it stands on is dark; painted, since a color has many notations
    for (let at = element; at; at = at.parentElement) {
      pixel.clearRect(0, 0, 1, 1);
      pixel.fillStyle = getComputedStyle(at).backgroundColor;
      pixel.fillRect(0, 0, 1, 1);
      const [r, g, b, alpha] = pixel.getImageData(0, 0, 1, 1).data;
      if (alpha > 127) return .3 * r + .6 * g + .1 * b < 128;
    }
    const scheme = getComputedStyle(element.ownerDocument.documentElement).colorScheme;
    return scheme.includes("dark") && (!scheme.includes("light") || matchMedia("(prefers-color-scheme: dark)").matches);
  };
  const height = () => document.documentElement.offsetHeight + 4 + "px";
  const fit = () => {  // in a notebook, whatever the system likes: as high as it is, and as dark as the page around it
    const frame = window.frameElement;
    if (!frame) return;
    document.documentElement.style.colorScheme = paper(frame) ? "dark" : "light";
    frame.style.width = "480px";  // as narrow as a notebook on paper may make it
    frame.style.setProperty("--printed", height());
    frame.style.width = "100%";
    frame.style.height = height();
  };
  fit();
  window.addEventListener("resize", fit);
})();
"""

_HINT = (
    "The heat map is a page of its own, which is shown neither in a notebook that nobody trusts nor by a viewer that "
    "removes it: trust the "
    'notebook and run the cell, or write the page to a file by save("map.html").'
)


@dataclass(frozen=True, eq=False)  # arrays are not compared by ==
class HeatMap:
    """A prompt, its instructions, and what each setting keeps of each token. Shows itself in a notebook.

    Parameters
    ----------
    title : str
    tokens : list of str
    spans : dict of str to (int, int)
        The instructions, in tokens.
    counts : dict of str to ndarray of int, shape (R, L, T)
        Name of a setting -> by ratio and layer, how many heads keep each token.
    compression_ratios : list of float
        R shares removed, ascending.
    n_kept : list of int
        R numbers of kept tokens, per layer and head.
    layers : list of int
        L indices.
    heads : list of int
        L numbers of heads, at most 255 each.
    start : float
        The ratio the page opens at; the nearest one there is.

    Examples
    --------
    >>> counts = np.array([[[1, 1, 1]], [[1, 0, 0]]])
    >>> shown = HeatMap("two ratios", ["Never", " say", "<no>"], {"rule": (0, 2)}, {"snapkv": counts}, [0.0, 0.5], [3, 1], [0], [1])
    >>> "&lt;no&gt;" in shown.html, shown
    (True, <HeatMap: 3 tokens, 1 settings, 2 ratios, 1 layers>)
    """

    title: str
    tokens: Sequence[str] = field(repr=False)
    spans: Mapping[str, tuple[int, int]]
    counts: Mapping[str, np.ndarray] = field(repr=False)
    compression_ratios: Sequence[float]
    n_kept: Sequence[int]
    layers: Sequence[int]
    heads: Sequence[int]
    start: float = 0.5

    def __post_init__(self):
        shape = (len(self.compression_ratios), len(self.layers), len(self.tokens))
        if not self.counts or 0 in shape:
            raise ValueError(f"there are {len(self.counts)} settings of shape {shape}; expected at least one of each")
        for name, counts in self.counts.items():
            if counts.shape != shape:
                raise ValueError(f"counts[{name!r}] has shape {counts.shape}; expected {shape}: ratios, layers, tokens")
        if not all(0 < n <= 255 for n in self.heads) or len(self.heads) != len(self.layers):
            raise ValueError(f"heads is {list(self.heads)}; expected 1 to 255 for each of {len(self.layers)} layers")
        for name, counts in self.counts.items():
            if ((counts < 0) | (counts > np.asarray(self.heads)[:, None])).any():
                raise ValueError(
                    f"counts[{name!r}] has {counts.min()} to {counts.max()}; expected 0 to as many as a layer has heads"
                )

    def __repr__(self) -> str:
        sizes = f"{len(self.counts)} settings, {len(self.compression_ratios)} ratios, {len(self.layers)} layers"
        return f"<HeatMap: {len(self.tokens)} tokens, {sizes}>"

    @property
    def html(self) -> str:
        """The page."""
        digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
        policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
        head = (
            f"<meta charset='utf-8'><meta http-equiv='Content-Security-Policy' content=\"{policy}\">"
            "<meta name='viewport' content='width=device-width, initial-scale=1'>"
            f"<title>{escape(self.title)}</title><style>{STYLE}{_PAGE_STYLE}</style>"
        )
        data = "\n".join(_packed(counts) for counts in self.counts.values())
        return (
            f"<!doctype html><html lang='en'><head>{head}</head><body><h1>{escape(self.title)}</h1>{self._main()}"
            f"<script type='text/plain' id='counts'>\n{data}\n</script><script>{_SCRIPT}</script></body></html>"
        )

    def _main(self) -> str:
        r = int(np.abs(np.asarray(self.compression_ratios) - self.start).argmin())
        first = next(iter(self.counts.values()))[r]
        shares = first.sum(0, dtype=np.int64) / sum(self.heads)
        # summed one by one, as the script does: NumPy's means differ in the last bit, by which a half would round
        means = {name: np.cumsum(shares[begin:end])[-1] / (end - begin) for name, (begin, end) in self.spans.items()}
        notes = {name: percent(mean) for name, mean in means.items()}
        strip = token_strip(self.tokens, self.spans, shares, notes=notes, linked=True)
        lists = {"removed": self._removed(), "kept": self.n_kept, "layers": self.layers, "heads": self.heads}
        data = " ".join(f"data-{name}='{','.join(map(str, values))}'" for name, values in lists.items())
        links = "".join(
            f"<li><a href='#span-{i}' style='--c: {span_color(i)}'>{isolated(name)}</a> <i "
            f"class='kvp-share'>{said}</i></li>"
            for i, (name, said) in enumerate(notes.items())
        )
        index = f"<ul id='instructions' aria-label='instructions and their kept shares'>{links}</ul>" if links else ""
        return f"<main id='heatmap' {data}>{self._controls(r)}{index}<div id='strips'>{strip}</div></main>"

    def _removed(self) -> list[str]:
        """The ratios, in percent."""
        return [f"{round(100 * ratio, 2):g}" for ratio in self.compression_ratios]

    def _controls(self, r: int) -> str:
        options = "".join(f"<option>{escape(name)}</option>" for name in self.counts)
        removed = f"{self._removed()[r]} % removed, {self.n_kept[r]} of {len(self.tokens)} tokens kept"
        every = f"mean of all {len(self.layers)}"
        return f"""<div class='controls'>
<label>policy <select id='setting' autocomplete='off'>{options}</select></label>
<label>beside <select id='beside' autocomplete='off'><option>nothing</option>{options}</select></label>
<label>ratio <input id='ratio' type='range' min='0' max='{len(self.compression_ratios) - 1}' value='{r}' autocomplete='off'
aria-valuetext='{removed}'><span id='ratio-text' aria-hidden='true'>{removed}</span></label>
<label>layer <input id='layer' type='range' min='0' max='{len(self.layers)}' value='0' autocomplete='off'
aria-valuetext='{every}'><span id='layer-text' aria-hidden='true'>{every}</span></label>
<div class='legend'>lost <i></i> kept</div>
<output id='token'>Point at a token for its share, or go to one with the arrow keys.</output>
</div><p id='dead'>The script of this page does not run here (scripts are off, or the viewer forbids them), so the controls do nothing:
it shows the first policy, the mean of all layers, and one ratio.</p>"""

    def save(self, path) -> None:
        """Write the page to a file."""
        with whole(path) as temporary:
            temporary.write_text(self.html, encoding="utf-8")

    def _repr_html_(self) -> str:
        height = 220 + 32 * (sum(map(len, self.tokens)) // 90 + len(self.spans) + 1)  # until the page measures itself
        source = escape_markup(self.html, quote=True)
        style = f"width: 100%; height: {height}px; border: 0"
        frame = f'<iframe class="kvp-map" srcdoc="{source}" style="{style}" title="token heat map"></iframe>'
        style = "iframe + .kvp-hint { display: none } @media print { .kvp-map { height: var(--printed) !important } }"
        return f"<style>{style}</style>{frame}<p class='kvp-hint'>{escape(_HINT)}</p>"


def _packed(counts: np.ndarray) -> str:
    """Base64 of the deflated counts: as differences between ratios, since what falls at one ratio seldom comes back at
    the next."""
    steps = np.diff(counts.astype(np.uint8), axis=0, prepend=np.uint8(0))
    # runs and digit frequencies are all there is to save; ten times as fast as the default
    deflate = zlib.compressobj(strategy=zlib.Z_RLE)
    return base64.b64encode(deflate.compress(steps.tobytes()) + deflate.flush()).decode()
