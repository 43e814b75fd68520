"""The heat map's page for a prompt of 4,000 tokens: how large it is, and how long Python and a browser take.

Needs a Chromium. The counts are random, the hardest case: 30 layers of 3 heads, as in SmolLM2-135M, 10 settings, 9
ratios.
"""

import queue
import shutil
import subprocess
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

from kvpitfalls.display.heatmap import HeatMap

N_TOKEN, N_LAYER, N_HEAD, N_SETTING, N_RATIO = 4000, 30, 3, 10, 9
# The page says when it is ready; a moved slider is timed until the next frame could be painted.
_TIMER = """
const now = () => new Promise((done) => requestAnimationFrame(() => setTimeout(() => done(performance.now()), 0)));
const frame = document.createElement("iframe"), start = performance.now();
frame.style = "width: 1400px; height: 900px";
frame.onload = async () => {
  const doc = frame.contentDocument;
  while (!doc.querySelector("[data-ready]")) await new Promise((done) => setTimeout(done, 1));
  doc.body.offsetHeight;
  const ready = await now(), ratio = doc.getElementById("ratio");
  ratio.value = 7;
  const moved = performance.now();
  ratio.dispatchEvent(new Event("input"));
  await new Promise((done) => setTimeout(done, 0));
  doc.body.offsetHeight;
  fetch(`/done ${(ready - start).toFixed(0)} ${((await now()) - moved).toFixed(0)}`.replaceAll(" ", "/"));
};
frame.src = "/page";
document.body.append(frame);
"""


def main() -> None:
    rng = np.random.default_rng(0)
    lost_at = [rng.integers(0, N_RATIO + 1, (N_HEAD, N_LAYER, N_TOKEN)) for _ in range(N_SETTING)]
    counts = {f"setting {i}": np.stack([(at > r).sum(0) for r in range(N_RATIO)]) for i, at in enumerate(lost_at)}
    ratios = [(r + 1) / 10 for r in range(N_RATIO)]
    spans = {"first half": (0, N_TOKEN // 2), "second half": (N_TOKEN // 2, N_TOKEN)}
    shown = HeatMap(
        "4,000 tokens", [" word"] * N_TOKEN, spans, counts, ratios, [1] * N_RATIO, range(N_LAYER), [N_HEAD] * N_LAYER
    )
    start = time.perf_counter()
    text = shown.html
    print(f"page: {len(text.encode()) / 1e6:.2f} MB, made in {time.perf_counter() - start:.2f} s")
    chromium = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )
    if chromium is None:
        raise SystemExit("there is no Chromium here; expected one for the browser's times")
    for _ in range(3):
        ready, moved = _in_browser(chromium, text)
        print(
            f"browser: {ready} ms from opening the page to its first frame with all tokens shaded, {moved} ms for a "
            "move of the slider"
        )


def _in_browser(chromium: str, text: str) -> list[str]:
    outer = f"<!doctype html><meta charset='utf-8'><body><script>{_TIMER}</script>"
    done: queue.Queue[list[str]] = queue.Queue()

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path.startswith("/done/"):
                done.put(self.path.split("/")[2:])
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write({"/": outer, "/page": text}.get(self.path, "").encode())

        def log_message(self, *args):
            pass

    with (
        ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server,
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        flags = (
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-port=0",
            f"--user-data-dir={profile}",
        )
        address = f"http://127.0.0.1:{server.server_port}/"
        with subprocess.Popen(
            [chromium, *flags, address], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as browser:
            try:
                return done.get(timeout=60)
            finally:
                browser.terminate()
                server.shutdown()


if __name__ == "__main__":
    main()
