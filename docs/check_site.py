"""Checks a built site: every link inside it leads somewhere, no page loads anything from a network, and no role of a
docstring stands in one as text.

``python docs/check_site.py build/docs``
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

_LOADING = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "link": "href",
    "object": "data",
    "embed": "src",
}


class Page(HTMLParser):
    """The ids of a page, where it links to, what it loads, and roles that were not understood."""

    def __init__(self, path: Path):
        super().__init__()
        self.ids, self.links, self.loads = {""}, [], []
        text = path.read_text(encoding="utf-8")
        self.roles = re.findall(r":[a-z]+:(?=<code|`)", text)
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        """Called by the parser."""
        of_tag = dict(attrs)
        self.ids |= {of_tag[name] for name in ("id", "name") if of_tag.get(name)}
        if tag == "a" and of_tag.get("href"):
            self.links.append(of_tag["href"])
        if of_tag.get(_LOADING.get(tag, "-")):
            self.loads.append(of_tag[_LOADING[tag]])


def faults(site: Path) -> list[str]:
    """One sentence for each link that leads nowhere, each thing that a network would have to give, and each role."""
    pages = {path: Page(path) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        here = path.relative_to(site)
        found += [f"{here} shows {role} as text" for role in page.roles]
        found += [f"{here} loads {load}" for load in page.loads if urlsplit(load).netloc]
        for link in [*page.links, *(load for load in page.loads if not load.startswith("data:"))]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                found.append(f"{here} links to {link}, which is not there")
            elif target in pages and unquote(parts.fragment) not in pages[target].ids:
                found.append(f"{here} links to {link}, but that page has no such place")
    for style in sorted(site.rglob("*.css")):
        text = style.read_text(encoding="utf-8")
        found += [
            f"{style.relative_to(site)} loads from a network"
            for mark in ("url(http", "url(//", "@import url")
            if mark in text
        ]
    return found


def main() -> int:
    """Print the faults; 1 if there are any."""
    site = Path(sys.argv[1]).resolve()
    n_page = len(list(site.rglob("*.html")))
    found = faults(site) if n_page else [f"{site} has no page"]
    print(
        "\n".join(
            found
            or [f"{n_page} pages: every link inside the site leads somewhere, and nothing is loaded from a network"]
        )
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
