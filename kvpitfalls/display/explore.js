// The page's half of explore.py: it shows states and sends requests. HTML comes from Python, escaped; everything else is set as text.
// Before it stands `percent` of markup.py.

// JupyterLab and Notebook take keys such as the arrows from what can be focused but not written in, unless it says this.
const OWN_KEYS = {"data-lm-suppress-shortcuts": "true"};

function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries({...attributes, ...OWN_KEYS})) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

function choice(label, names, chosen, onchange) {
  const options = Object.entries(names).map(([value, text]) => make("option", {value}, text));
  const select = make("select", {onchange: () => onchange(select.value)}, ...options);
  select.value = chosen;
  return make("label", {}, label + " ", select);
}

const byName = (names) => Object.fromEntries(names.map((name) => [name, name]));

function render({model, el}) {
  const options = model.get("options");
  let state = model.get("state"), form = structuredClone(state.form), n = state.n, chosen = null, at = null;

  // What is filled in.
  const text = make("textarea", {rows: 5, dir: "auto", "aria-label": "prompt", onchange: () => moved("text", text.value)});
  const question = make("input", {dir: "auto", onchange: () => (form.question = question.value)});
  const ratio = make("input", {type: "range", min: 0.05, max: 0.95, step: 0.05, oninput: () => say(+ratio.value)});
  const removed = make("span", {"aria-hidden": "true"});
  const compare = make("button", {type: "button", class: "kvp-main", onclick: () => request("compare")}, "Compare");
  const mark = make("button", {type: "button", onclick: markChosen, disabled: ""}, "Mark what is selected");
  const kind = choice("The prompt is", options.kinds, form.kind, (value) => moved("kind", value));
  const ways = {...byName(options.ways), "": "marked by hand"};
  const way = choice("Its instructions are", ways, form.way, (value) => {
    form.way = value;
    request("read");
  });
  const settings = make("div", {class: "kvp-pair"});

  // What is shown.
  const status = make("p", {role: "status"}), error = make("p", {role: "alert", class: "kvp-error"});
  const strips = make("div", {class: "kvp-pair", onkeydown: walk, onpointerover: point});
  const token = make("p", {class: "kvp-quiet", "aria-live": "polite"});
  const listed = make("div", {class: "kvp-wide"}), said = make("div", {class: "kvp-answers"});
  const code = make("pre", {tabindex: 0, "aria-label": "Python code"}), copied = make("span", {role: "status"});
  const copy = make("button", {type: "button", onclick: copyCode}, "Copy");
  const coded = make("details", {}, make("summary", {}, "The Python code of this"), copy, " ", copied, code);

  el.replaceChildren(make("div", {class: "kvp-explore", role: "group", "aria-label": "settings tried on a prompt"},
    make("div", {class: "kvp-row"}, kind, way), text,
    make("label", {class: "kvp-line"}, "Then the user asks ", question), settings,
    make("div", {class: "kvp-row"}, make("label", {class: "kvp-grow"}, "removed ", ratio), removed, compare),
    status, error, strips, token, said, make("div", {class: "kvp-row"}, mark,
      make("span", {class: "kvp-quiet"}, "Select tokens with the mouse, or there with Shift and the arrow keys.")),
    listed, coded));

  function say(value) {
    form.ratio = value;
    removed.textContent = percent(value);
    ratio.setAttribute("aria-valuetext", `${percent(value)} removed`);
  }

  function moved(name, value) {
    form[name] = value;
    for (const one of form.marks) delete one.begin;  // Python looks for it in the new text
    request("read");
  }

  function byHand(marks) {
    form.marks = marks;
    form.way = way.querySelector("select").value = "";
    request("read");
  }

  function request(what) {
    const names = new Set(form.marks.map((one) => one.name));
    for (const setting of form.settings) setting.protect = setting.protect.filter((name) => names.has(name));
    n += 1;
    status.textContent = what === "compare" ? "The model runs\u2026" : "";
    compare.disabled = mark.disabled = true;  // the tokens that are shown may be another text's
    el.firstChild.setAttribute("aria-busy", "true");
    model.send({do: what, n, form: structuredClone(form)});
  }

  function receive() {
    const came = model.get("state");
    if (came.n < n) return;  // of a request that was overtaken
    if (came.n > n) fill(structuredClone(came.form));  // another view of this widget asked
    n = came.n;
    state = came;
    form.marks = structuredClone(came.form.marks);
    draw();
  }

  function fill(filled) {
    form = filled;
    [text.value, question.value, ratio.value] = [form.text, form.question, form.ratio];
    kind.querySelector("select").value = form.kind;
    way.querySelector("select").value = form.way;
    say(form.ratio);
    settings.replaceChildren(...form.settings.map((setting, i) =>
      make("fieldset", {}, make("legend", {}, `setting ${"AB"[i]}`),
        choice("policy", byName(options.policies), setting.policy, (value) => (setting.policy = value)), " ",
        choice("eviction", byName(options.evictions), setting.eviction, (value) => (setting.eviction = value)))));
  }

  function draw() {
    const {prompt, result} = state;
    compare.disabled = false;
    el.firstChild.removeAttribute("aria-busy");
    error.textContent = state.error;
    status.textContent = result ? result.about : "";
    keepFocus(strips, () => drawStrips(prompt, result));
    choose(null);
    keepFocus(listed, () => drawList(result));
    said.replaceChildren(...(result ? result.answers : []).map(([name, answer]) =>
      make("div", {}, make("b", {}, name), make("p", {dir: "auto"}, answer))));
    code.textContent = state.code;
    coded.hidden = !state.code;
  }

  function keepFocus(holder, redraw) {
    const reached = () => [...holder.querySelectorAll("input, button, [tabindex]")];
    const i = reached().indexOf(el.getRootNode().activeElement);
    redraw();
    if (i >= 0) reached().at(Math.min(i, reached().length - 1))?.focus();
  }

  function drawStrips(prompt, result) {
    const htmls = result ? result.strips : prompt ? [prompt.strip] : [];
    strips.replaceChildren(...htmls.map((html, i) => {
      const side = make("div");
      side.innerHTML = html;  // by token_strip, which escapes
      const name = result ? `${"AB"[i]}: ${result.names[i]}` : "tokens of the prompt";
      for (const [attribute, value] of Object.entries({tabindex: 0, role: "group", "aria-label": name, ...OWN_KEYS}))
        side.firstChild.setAttribute(attribute, value);
      if (result) side.prepend(make("b", {}, name));
      return side;
    }));
    token.textContent = "";
    at = null;
  }

  function drawList(result) {
    const shares = (name) => (result ? result.kept.map((kept) => make("td", {class: "n"}, percent(kept[name]))) : []);
    const rows = form.marks.map((one, i) => {
      const rename = (event) => {
        const name = event.target.value;
        for (const setting of form.settings) setting.protect = setting.protect.map((other) => (other === one.name ? name : other));
        one.name = name;  // the same object: it may be renamed or removed again before an answer comes
        byHand(form.marks);
      };
      const remove = () => byHand(form.marks.filter((other) => other !== one));
      return make("tr", {},
        make("td", {style: `border-left: 4px solid ${one.color}`},
          make("input", {value: one.name, "aria-label": `name of instruction ${i + 1}`, onchange: rename})),
        ...shares(one.name),
        ...form.settings.map((setting, s) => make("td", {}, protection(setting, one.name, "AB"[s]))),
        make("td", {}, make("button", {type: "button", "aria-label": `unmark ${one.name}`, onclick: remove}, "\u00d7")));
    });
    const heads = ["instruction", ...(result ? ["kept by A", "kept by B"] : []), "protect in A", "protect in B", "unmark"];
    const head = make("thead", {}, make("tr", {}, ...heads.map((name) => make("th", {scope: "col", class: name.startsWith("kept") ? "n" : ""}, name))));
    listed.replaceChildren(...(rows.length ? [make("table", {class: "kvp-table"}, head, make("tbody", {}, ...rows))] : []));
  }

  function protection(setting, name, letter) {
    const box = make("input", {type: "checkbox", "aria-label": `protect ${name} in setting ${letter}`, onchange: () => {
      setting.protect = setting.protect.filter((other) => other !== name);
      if (box.checked) setting.protect.push(name);
    }});
    box.checked = setting.protect.includes(name);
    return box;
  }

  // Tokens: pointed at, walked through, chosen.
  const tokensOf = (node) => {
    const strip = (node.nodeType === 1 ? node : node.parentElement)?.closest(".kvp-tokens");
    return strip && strips.contains(strip) ? [...strip.querySelectorAll("bdi")] : [];
  };

  function tell(i) {
    const kept = state.result ? `: ${state.result.shares.map((of) => percent(of[i])).join(" | ")} kept` : "";
    token.textContent = `token ${i} \u201c\u2068${strips.querySelectorAll("bdi")[i].textContent.trim()}\u2069\u201d${kept}`;
  }

  function point(event) {
    const one = event.target.closest("bdi");
    if (one) tell(tokensOf(one).indexOf(one));
  }

  function walk(event) {
    if (event.key === "Enter") markChosen();
    const all = tokensOf(event.target), ends = {Home: 0, End: all.length - 1};
    const to = {ArrowRight: (at ?? -1) + 1, ArrowLeft: (at ?? 1) - 1, ...ends}[event.key];
    if (to === undefined || !all.length || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    event.stopPropagation();
    const from = event.shiftKey ? (chosen ? (at === chosen[0] ? chosen[1] - 1 : chosen[0]) : at ?? 0) : null;
    at = Math.min(Math.max(to, 0), all.length - 1);
    choose(from === null ? null : [Math.min(from, at), Math.max(from, at) + 1]);
    all[at].classList.add("kvp-at");
    all[at].scrollIntoView({block: "nearest"});
    tell(at);
  }

  function select() {
    const found = document.getSelection();
    if (!found.rangeCount || found.isCollapsed) return;
    const {startContainer: first, startOffset, endContainer: last, endOffset} = found.getRangeAt(0), all = tokensOf(first);
    if (!all.length || tokensOf(last)[0] !== all[0]) return;
    const touched = all.map((one, i) => i).filter((i) => found.containsNode(all[i], true));
    if (startOffset === first.length && all[touched[0]]?.contains(first)) touched.shift();  // of these not one character
    if (endOffset === 0 && all[touched.at(-1)]?.contains(last)) touched.pop();
    if (!touched.length) return;
    at = touched.at(-1);
    choose([touched[0], at + 1]);
  }

  function choose(range) {
    for (const old of strips.querySelectorAll(".kvp-at, .kvp-chosen")) old.classList.remove("kvp-at", "kvp-chosen");
    chosen = range;
    mark.disabled = !range || state.n < n;
    if (range)
      for (const strip of strips.querySelectorAll(".kvp-tokens"))
        [...strip.querySelectorAll("bdi")].slice(...range).forEach((one) => one.classList.add("kvp-chosen"));
  }

  function markChosen() {
    if (mark.disabled) return;
    const {offsets} = state.prompt, [first, last] = [offsets[chosen[0]], offsets[chosen[1] - 1]];
    const apart = form.marks.filter((one) => one.end <= first[0] || one.begin >= last[1]);
    byHand([...apart, {name: "", begin: first[0], end: last[1]}]);
  }

  async function copyCode() {
    try {
      await navigator.clipboard.writeText(state.code);
      copied.textContent = "copied";
    } catch {  // a frame that may not write there
      document.getSelection().selectAllChildren(code);
      copied.textContent = "selected: press Ctrl+C";
    }
  }

  document.addEventListener("selectionchange", select);
  model.on("change:state", receive);
  fill(form);
  draw();
  return () => {
    document.removeEventListener("selectionchange", select);
    model.off("change:state", receive);
  };
}

export default {render};
