"""Headless Chromium, for pages that have to work in a browser."""

import functools
import html
import re
import shutil
import subprocess

import pytest

# No host resolves: what a page wants from the network fails.
_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=8000")


@functools.cache
def chromium() -> str | None:
    """Its path, if there is one."""
    return next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)


needs_chromium = pytest.mark.skipif(chromium() is None, reason="no Chromium on this machine")


def run_beside(page, script: str, folder) -> str:
    """Open a page in a frame of another one, run a script there, and give what it returned as text.

    The script is the body of an async function of ``doc``, the page's document. The page itself stays as it is: its own policy would not
    let a script be added to it.
    """
    outer = folder / "outer.html"
    outer.write_text(
        f"""<!doctype html><meta charset="utf-8"><iframe id="page" src="{page.as_uri()}" style="width:800px;height:600px"></iframe>
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
    command = [chromium(), *_FLAGS, "--allow-file-access-from-files", f"--user-data-dir={folder / 'profile'}", "--dump-dom", outer.as_uri()]
    out = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    return html.unescape(re.search(r'<pre id="result">(.*?)</pre>', out, flags=re.S)[1])
