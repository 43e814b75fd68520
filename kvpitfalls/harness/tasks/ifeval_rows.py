"""What the lm-eval task ``kvpitfalls_ifeval`` is made of; lm-eval imports this file by its path."""

from datasets import Dataset
from lm_eval.tasks.ifeval.utils import agg_inst_level_acc  # noqa: F401  (the task's yaml names it)

from kvpitfalls.audits.following import check
from kvpitfalls.experiments.corpus import load_corpus


def rows(dataset="own", data=None, **_) -> dict:
    """The split ``test``; lm-eval hands in its model_args and its metadata as well."""
    corpus = load_corpus(dataset, data)
    for row in corpus.rows:
        if not row["instruction_id_list"]:
            raise ValueError(
                f"row {row['key']!r} of {corpus.name} has no instruction_id_list; expected checkable instructions"
            )
    return {"test": Dataset.from_list([_doc(corpus.prefix, row) for row in corpus.rows])}


def _doc(prefix: str, row) -> dict:
    system, user = (message["content"] for message in row["messages"])
    return {
        "key": row["key"],
        "prompt": row["prompt"],
        "system": prefix + system,
        "user": user,
        "instruction_id_list": row["instruction_id_list"],
        "kwargs": row["kwargs"],
    }


def results(doc, responses) -> dict:
    """lm-eval's own checks of an answer, made deterministic."""
    followed = check(doc, responses[0])
    return {
        f"{level}_level_{rule}_acc": all(followed[rule]) if level == "prompt" else followed[rule]
        for level in ("prompt", "inst")
        for rule in ("strict", "loose")
    }
