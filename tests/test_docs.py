"""What is written down must be true: docstring examples run, and the README's table is what the code says."""

import doctest
import re
from importlib import import_module
from pathlib import Path

import pytest

from kvpitfalls.policies import get_policy

ROOT = Path(__file__).parent.parent
BUILT_IN = ["h2o", "knorm", "snapkv", "streaming_llm", "tova"]
MODULES = ["budget", "fairness", "ops", "policies.base", "prompt", "selection", "hf.wrap", "hf.load", "audits.retention", "audits.leakage"]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    from kvpitfalls.policies.base import _registry

    before = dict(_registry)
    try:
        assert doctest.testmod(import_module(f"kvpitfalls.{name}")).failed == 0
    finally:
        _registry.clear()
        _registry.update(before)


def test_readme_lists_the_policies():
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \| (.*) \|$", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.M)
    assert rows == [(name, repr(get_policy(name)), get_policy(name).__doc__.splitlines()[0]) for name in BUILT_IN]


def test_public_names_are_documented():
    import kvpitfalls

    for name in kvpitfalls.__all__:
        if name != "__version__":
            assert (getattr(kvpitfalls, name).__doc__ or "").strip(), f"{name} has no docstring"


def test_relative_links_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("csrc/*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
