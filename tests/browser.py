"""Headless Chromium, for pages that have to work in a browser."""

import contextlib
import functools
import html
import http.server
import importlib.util
import json
import re
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

# No host resolves but this machine itself: what a page wants from the network fails.
_RULES = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
SCHEMES = ("dark", "light")  # in Chromium's order
_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", _RULES, "--virtual-time-budget=8000")


@functools.cache
def chromium() -> str | None:
    """Its path, if there is one."""
    return next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )


needs_chromium = pytest.mark.skipif(chromium() is None, reason="no Chromium on this machine")


@contextlib.contextmanager
def served(folder: Path, answer):
    """The address under which a folder's files are, and ``/answer``: what ``answer`` makes of the JSON that is posted
    there."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_POST(self):
            said = json.dumps(answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def end_headers(self):
            self.send_header("Access-Control-Allow-Origin", "*")  # a sandboxed frame is of no origin
            super().end_headers()

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def serious_findings(
    page: Path, folder: Path, script: str = "", address: str | None = None, *, scheme: str
) -> list[str]:
    """What axe-core finds serious or critical on a page, after a script of :func:`run_beside` has run; for a reader
    whose system is "light" or "dark".

    It looks at a copy without the page's policy, which would not let it in.
    """
    package = importlib.util.find_spec("axe_playwright_python").submodule_search_locations[
        0
    ]  # only its axe.min.js is used
    text = re.sub(r"<meta http-equiv='Content-Security-Policy'[^>]*>", "", page.read_text("utf-8"))
    axe = Path(package, "axe.min.js").read_text("utf-8").replace("</script", "<\\/script")
    copy = folder / "with_axe.html"
    copy.write_text(text + f"<script>{axe}</script>", "utf-8")
    check = """
      const {passes, violations} = await doc.defaultView.axe.run(doc);
      const worst = violations.filter(({impact}) => impact === "serious" || impact === "critical");
      const isDark = doc.defaultView.matchMedia("(prefers-color-scheme: dark)").matches;
      return [passes.length, isDark, worst.map(({id, nodes}) => id + ": " + nodes.map((node) => node.html.slice(0, 300)).join(" "))];
    """
    preferred = f"--blink-settings=preferredColorScheme={SCHEMES.index(scheme)}"
    n_passed, is_dark, found = json.loads(run_beside(copy, script + check, folder, address, preferred))
    assert n_passed > 10 and is_dark == (scheme == "dark"), "axe did not look"
    return found


def picture(page: Path, folder: Path, width: int, *, scheme: str) -> np.ndarray:
    """What a reader whose system is "light" or "dark" sees of a page: (600, width, 3), 0 to 1."""
    flags = (f"--blink-settings=preferredColorScheme={SCHEMES.index(scheme)}", f"--window-size={width},600")
    shot = [f"--screenshot={folder / 'picture.png'}", f"--user-data-dir={folder / 'profile'}", page.as_uri()]
    subprocess.run([chromium(), *_FLAGS, *flags, *shot], capture_output=True, timeout=120, check=True)
    return imread(folder / "picture.png")[..., :3]


def run_beside(page: Path, script: str, folder: Path, address: str | None = None, *flags: str) -> str:
    """Open a page in a frame of another one, run a script there, and give what it returned as text.

    The script is the body of an async function of ``doc``, the page's document. The page itself stays as it is: its own
    policy would not let a script be added to it. ``address``: where :func:`served` serves the folder, if the page needs
    that. ``flags``: more of Chromium's.
    """
    outer, source = folder / "outer.html", page.name if address else page.as_uri()
    outer.write_text(
        f"""<!doctype html><meta charset="utf-8"><iframe id="page" src="{source}" style="width:800px;height:600px"></iframe>
<pre id="result">nothing came back</pre><script>
const result = document.getElementById("result"), frame = document.getElementById("page");
const wait = async (holds) => {{ while (!holds()) await new Promise((done) => setTimeout(done, 20)); }};
frame.onload = async () => {{
  const doc = frame.contentDocument;
  try {{ result.textContent = JSON.stringify(await (async () => {{ {script} }})()); }}
  catch (error) {{ result.textContent = "error: " + error; }}
}};
</script>""",
        encoding="utf-8",
    )
    return _dumped(outer, folder, address, *flags)


def run_sandboxed(page: Path, script: str, folder: Path, address: str) -> str:
    """As :func:`run_beside`, in a frame that may run scripts and nothing else: of no origin, so that the script is put
    into a copy of the page, and what it returned comes as a message."""
    outer, inner = folder / "outer.html", folder / "sandboxed.html"
    inner.write_text(
        page.read_text("utf-8")
        + f"""<script>
const wait = async (holds) => {{ while (!holds()) await new Promise((done) => setTimeout(done, 20)); }};
(async () => {{
  const doc = document, say = (text) => parent.postMessage(text, "*");
  try {{ say(JSON.stringify(await (async () => {{ {script} }})())); }} catch (error) {{ say("error: " + error); }}
}})();
</script>""",
        encoding="utf-8",
    )
    outer.write_text(
        f"""<!doctype html><meta charset="utf-8"><pre id="result">nothing came back</pre>
<script>onmessage = ({{data}}) => {{ document.getElementById("result").textContent = data; }};</script>
<iframe sandbox="allow-scripts" src="{inner.name}" style="width:800px;height:600px"></iframe>""",
        encoding="utf-8",
    )
    # In a process of its own the frame would not be waited for.
    return _dumped(outer, folder, address, "--disable-features=IsolateSandboxedIframes")


def _dumped(outer: Path, folder: Path, address: str | None, *flags: str) -> str:
    """What stands in a page's ``result`` in the end."""
    command = [
        chromium(),
        *_FLAGS,
        *flags,
        "--allow-file-access-from-files",
        f"--user-data-dir={folder / 'profile'}",
        "--dump-dom",
    ]
    command.append(f"{address}/{outer.name}" if address else outer.as_uri())
    out = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    return html.unescape(re.search(r'<pre id="result">(.*?)</pre>', out, flags=re.S)[1])
