"""lm-eval's task ``ifeval`` on a local file of rows, item by item: its own ``hf`` model against ours at ratio 0, and
``kvpitfalls ifeval``
against ours above. Everything goes through the two command lines. Prints a table; exits with 1 if anything differs.

    python benchmarks/lm_eval_equality.py --output build/lm-eval                 # 30 rows of the package's own
    python benchmarks/lm_eval_equality.py --output build/lm-eval --data DIR      # the paper's first 30, from DIR/sys_ifeval.jsonl
"""

import argparse
import json
import shutil
import sys
from importlib.resources import files
from pathlib import Path

import lm_eval
from lm_eval.__main__ import cli_evaluate

from kvpitfalls import cli
from kvpitfalls.audits.following import prepare_checkers
from kvpitfalls.harness.lm_eval_command import command_line
from kvpitfalls.hf.load import transformers_name

RATIOS = ("0.5", "0.9")
# IFEval asks here for the frequency of "#" or "!", which lm-eval's checker takes for no letter: it draws one, and no
# two runs score alike.
DRAWN = (1122, 1129)
TASK = """\
include: {ifeval}
dataset_path: json
dataset_kwargs: {{data_files: {{train: {rows}}}}}
description: "{{{{messages[0].content}}}}"
doc_to_text: "{{{{messages[1].content}}}}"
"""


def main() -> int:
    args = _arguments()
    folder = Path(args.output).resolve()
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "tasks").mkdir(parents=True)
    own = files("kvpitfalls.experiments") / "data" / "prompts.jsonl"
    lines = (
        (Path(args.data, "sys_ifeval.jsonl") if args.data else own)
        .read_text(encoding="utf-8")
        .splitlines()[: args.rows]
    )
    (folder / "rows.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    ifeval = Path(lm_eval.__file__).parent / "tasks" / "ifeval" / "ifeval.yaml"
    (folder / "tasks" / "ifeval.yaml").write_text(TASK.format(ifeval=ifeval, rows=folder / "rows.jsonl"))

    # offline lm-eval's checkers have no sentence tables, and they draw at random in detecting languages
    prepare_checkers()
    hf = ["lm-eval", "run", "--model", "hf", "--model_args", f"pretrained={transformers_name()}"]
    ours = ["lm-eval", "--policy", args.policy, "--compress", "system"]
    found = {"hf": _samples(args, folder, "hf", hf, own_command)}
    for ratio in ("0", *RATIOS):
        found[ratio] = _samples(args, folder, ratio, [*ours, "--compression-ratio", ratio, "--"], cli.main)
    swept = _swept(args, folder)
    wrong = 0
    print(f"{len(lines)} rows, {args.policy}, at most {args.max_tokens} tokens, batches of {args.batch_size}\n")
    print("ratio  compared with      answers equal  scores equal  answers as hf's  prompt strict  prompt loose")
    for ratio in ("0", *RATIOS):
        other, name = (found["hf"], "lm-eval's hf") if ratio == "0" else (swept[float(ratio)], "kvpitfalls ifeval")
        mine, n = found[ratio], len(found[ratio])
        texts = sum(_same_text(mine[key]["text"], other[key]["text"], exactly=ratio == "0") for key in mine)
        scored = [key for key in mine if key not in DRAWN]
        scores = sum(
            mine[key]["strict"] == other[key]["strict"] and mine[key]["loose"] == other[key]["loose"] for key in scored
        )
        unchanged = sum(mine[key]["text"] == found["hf"][key]["text"] for key in mine)
        means = [sum(all(item[rule]) for item in mine.values()) / n for rule in ("strict", "loose")]
        counts = f"{texts:6} of {n:<4}  {scores:5} of {len(scored):<4}  {unchanged:8} of {n:<4}"
        print(f"{ratio:5}  {name:17}  {counts}  {means[0]:13.3f}  {means[1]:12.3f}")
        wrong += n - texts + len(scored) - scores
        wrong += ratio != "0" and unchanged == n  # compressed, and nothing changed
    if drawn := sorted(set(found["hf"]) & set(DRAWN)):
        print(f"\nScores of row {', '.join(map(str, drawn))} are not compared: lm-eval's checker draws a letter there.")
    return 1 if wrong else 0


def _arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True)
    parser.add_argument("--data")
    parser.add_argument("--rows", type=int, default=30)
    parser.add_argument("--policy", default="snapkv")
    parser.add_argument("--max-tokens", type=int, default=1280)
    parser.add_argument("--batch-size", type=int, default=30)
    return parser.parse_args()


def _same_text(one: str, two: str, exactly: bool) -> bool:
    return one == two if exactly else one.strip() == two.strip()  # kvpitfalls ifeval strips its answers


def own_command(words: list[str]) -> int:
    """lm-eval's own command line."""
    with command_line(words):
        cli_evaluate()
    return 0


def _samples(args, folder: Path, name: str, command: list[str], run) -> dict:
    """Run lm-eval; its samples by key."""
    options = [
        "--tasks",
        "ifeval",
        "--apply_chat_template",
        "--include_path",
        str(folder / "tasks"),
        "--device",
        "cpu",
        "--log_samples",
    ]
    options += [
        "--batch_size",
        str(args.batch_size),
        "--gen_kwargs",
        f"max_gen_toks={args.max_tokens}",
        "--output_path",
        str(folder / name),
    ]
    if code := run([*command, *options]):
        raise SystemExit(code)
    (path,) = (folder / name).glob("**/samples_ifeval_*.jsonl")
    samples = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {
        s["doc"]["key"]: {
            "text": s["resps"][0][0],
            "strict": s["inst_level_strict_acc"],
            "loose": s["inst_level_loose_acc"],
        }
        for s in samples
    }


def _swept(args, folder: Path) -> dict:
    """Run ``kvpitfalls ifeval``; its records by ratio and key."""
    command = ["ifeval", "--dataset", str(folder / "rows.jsonl"), "--policy", args.policy]
    command += [word for ratio in RATIOS for word in ("--ratio", ratio)]
    command += [
        "--max-new-tokens",
        str(args.max_tokens),
        "--batch-size",
        str(args.batch_size),
        "--output",
        str(folder / "sweep"),
    ]
    if code := cli.main(command):
        raise SystemExit(code)
    out: dict = {}
    for line in (folder / "sweep" / "records.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        scores = record["scores"] or {}
        out.setdefault(record["compression_ratio"], {})[record["key"]] = {
            "text": record["output"],
            "strict": scores.get("strict"),
            "loose": scores.get("loose"),
        }
    return out


if __name__ == "__main__":
    sys.exit(main())
