"""Runs tests on the newest release of transformers that the package index has today, laid over this environment.

Where that is the release that is here, `make test` runs on it, and nothing is left to do. A failure on a release that
tests/matrix.txt knows is a failure. On a newer one it is told, and is a failure with --strict only: nobody who changes
something else has to mend it first.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from packaging.version import Version

ROOT = Path(__file__).parent.parent
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]


def known() -> str:
    """The newest release of tests/matrix.txt."""
    return max(re.findall(r"^transformers==(\S+)", (ROOT / "tests/matrix.txt").read_text(), re.M), key=Version)


def asked() -> dict[str, str]:
    """What would be installed for the newest release: versions by package, with what it needs newer than is here."""
    report = subprocess.run(
        [*PIP, "--dry-run", "--upgrade", "--report", "-", "transformers"], check=True, stdout=subprocess.PIPE
    ).stdout
    return {item["metadata"]["name"]: item["metadata"]["version"] for item in json.loads(report)["install"]}


def run(packages: dict[str, str], arguments: list[str]) -> int:
    """Exit status of the tests with these packages."""
    folder = ROOT / "build/matrix" / packages["transformers"]
    wanted = [f"{name}=={version}" for name, version in packages.items()]
    subprocess.run([*PIP, "--no-deps", "--upgrade", "--target", str(folder), *wanted], check=True)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(folder)}).returncode


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--strict", action="store_true", help="a failure on a release that is newer than tests/matrix.txt fails, too"
    )
    parser.add_argument("arguments", nargs="+", metavar="ARGUMENT", help="of pytest")
    args = parser.parse_args()
    packages = asked()
    newest = packages.get("transformers")
    if newest is None and Version(version("transformers")) >= Version(known()):
        print(f"transformers {version('transformers')} is the newest release: make test runs on it", flush=True)
        return 0
    if newest is None or Version(newest) <= Version(known()):
        print(f"the newest release is known: {known()}", flush=True)
        return subprocess.run(["make", f"test-transformers-{known()}"], cwd=ROOT).returncode
    status = run(packages, args.arguments)
    rule = "!" * 100
    outcome = "the tests pass on it: tests/matrix.txt can name it" if status == 0 else "TESTS FAIL ON IT, see above"
    print(f"{rule}\ntransformers {newest} is newer than {known()}, the newest in tests/matrix.txt; {outcome}\n{rule}")
    return status if args.strict else 0


if __name__ == "__main__":
    sys.exit(main())
