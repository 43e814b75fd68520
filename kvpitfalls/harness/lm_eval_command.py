"""``kvpitfalls lm-eval``: lm-eval's own command line on the model type ``kvpitfalls``. Importing this registers the
type."""

import contextlib
import importlib.util
import json
import sys
from pathlib import Path

from ..audits.following import prepare_checkers

TASKS = Path(__file__).parent / "tasks"


def need_lm_eval() -> None:
    """Raise ImportError, in one sentence, if lm-eval is missing."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ImportError("the package lm-eval is missing; expected pip install 'kvpitfalls[eval]'")


def register() -> None:
    """Make ``model="kvpitfalls"`` known to lm-eval in this process; its own commands find no model types outside
    lm-eval.

    Examples
    --------
    >>> register()
    >>> from lm_eval.api.registry import get_model
    >>> get_model("kvpitfalls").__name__
    'CompressedHFLM'
    """
    need_lm_eval()
    import lm_eval.models  # noqa: F401  (lm-eval registers its own only if there are none yet)
    from lm_eval.api.registry import model_registry

    if "kvpitfalls" not in model_registry:
        model_registry.register("kvpitfalls", target="kvpitfalls.harness.lm_eval_model:CompressedHFLM")


def run(model_args: dict, arguments: list[str]) -> int:
    """Run ``lm-eval run`` on the model type ``kvpitfalls``.

    Parameters
    ----------
    model_args : dict
        As :class:`kvpitfalls.harness.lm_eval_model.CompressedHFLM` takes them; those of ``arguments`` are added.
    arguments : list of str
        lm-eval's own, without ``--model``.

    Returns
    -------
    int
        0; lm-eval's own errors are raised.
    """
    if clash := [a for a in arguments if a in ("--model", "-M") or a.startswith("--model=")]:
        raise ValueError(
            f"lm-eval's {clash[0]} is given; expected the model as --model before the --, or as --model_args "
            "pretrained=..."
        )
    register()
    prepare_checkers()
    from lm_eval.__main__ import cli_evaluate

    own = ["--model", "kvpitfalls", "--model_args", json.dumps(model_args)]
    if not any(a == "--include_path" or a.startswith("--include_path=") for a in arguments):
        own += ["--include_path", str(TASKS)]
    with command_line(["lm-eval", "run", *own, *arguments]):
        cli_evaluate()
    return 0


@contextlib.contextmanager
def command_line(words: list[str]):
    """lm-eval reads the command line of the process."""
    before = sys.argv
    try:
        sys.argv = words
        yield
    finally:
        sys.argv = before


if importlib.util.find_spec("lm_eval") is not None:
    register()
