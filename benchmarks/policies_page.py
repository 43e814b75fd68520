"""docs/policies.md, made of the policies' docstrings: python benchmarks/policies_page.py > docs/policies.md."""

import re

from kvpitfalls.policies import get_policy, policy_names

HEAD = """# Policies

Made of the docstrings by `benchmarks/policies_page.py`, which `tests/test_docs.py` runs. What each scores by, whole: [](api_policies.md).

| name | what it keeps | reads | while a budget is held | defined for | fair | arXiv |
|---|---|---|---|---|---|---|"""


def sentence(pattern: str, text: str) -> str | None:
    """The first match, up to the end of its sentence."""
    found = re.search(pattern + r" (.*?[\w`)])(?=[.:] |$)", text)
    return found and found[1]


def row(name: str) -> str:
    """One line of the table."""
    policy = get_policy(name)
    text = re.sub(r":[a-z]+:(?=`)", "", " ".join(policy.__doc__.split()))  # roles of Sphinx, which Markdown has not
    reads = [
        "keys",
        *(what for what in ("queries", "values", "rotary", "output", "again") if getattr(policy, f"needs_{what}")),
    ]
    columns = [
        f"`{name}`",
        policy.__doc__.splitlines()[0].removesuffix("."),
        ", ".join(reads),
        "yes" if policy.holds else "refused",
        sentence("Defined for", text) or "any prompt and budget",
        sentence("Fair:", text),
        ", ".join(dict.fromkeys(re.findall(r"arXiv (\d+\.\d+)", text))),
    ]
    if missing := [i for i, column in enumerate(columns) if not column]:
        raise ValueError(
            f"the docstring of {name!r} has nothing for column {missing[0]}; expected 'Fair: ...' and 'arXiv N' in it"
        )
    return f"| {' | '.join(columns)} |".replace("``", "`")


if __name__ == "__main__":
    print("\n".join([HEAD, *map(row, policy_names())]))
