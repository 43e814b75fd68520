"""The way of a span through the package's files, from ``Prompt.from_text`` to the core's press of the first layer, and
of one more layer: how many calls, files and changes of file, and with ``--trace`` which.

python benchmarks/walk_of_a_span.py --policy snapkv --trace

Counted are calls of Python functions whose file is the package's, without comprehensions, generators and the methods
that dataclasses make.
"""

import argparse
import sys
from itertools import groupby, pairwise
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import kvpitfalls as kvp

ROOT = Path(kvp.__file__).parent
LAST = ("press", "select")  # of the core: with the first of them a layer's positions are known


def walk(policy: str) -> list[tuple[str, str]]:
    """(file, function) of each call from a prompt's text to its compressed cache."""
    words = [f"w{i}" for i in range(3, 33)]
    vocabulary = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="w0")
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **size)).eval()
    calls: list[tuple[str, str]] = []

    def note(frame, event, argument):
        path, name = Path(frame.f_code.co_filename), frame.f_code.co_name
        if not path.is_relative_to(ROOT):
            return
        if event == "call" and not name.startswith("<"):
            calls.append((str(path.relative_to(ROOT)), name))
        if event == "c_call" and argument.__name__ in LAST and argument.__module__ == "kvpitfalls._core":
            calls.append(("_core", argument.__name__))

    with kvp.wrap(model, policy, compression_ratio=0.5, fair=True) as handle:
        sys.setprofile(note)
        try:
            spans = {"a": " ".join(words[2:14]), "b": " ".join(words[14:28])}
            handle.compress(kvp.Prompt.from_text(tokenizer, " ".join(words), spans))
        finally:
            sys.setprofile(None)
    return calls


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--policy", default="snapkv")
    parser.add_argument("--trace", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    calls = walk(arguments.policy)
    first, second = [i + 1 for i, (file, _) in enumerate(calls) if file == "_core"][:2]
    for name, part in (("to the first layer's press", calls[:first]), ("one more layer", calls[first:second])):
        files = [file for file, _ in part]
        changes = sum(a != b for a, b in pairwise(files))
        print(f"{name}: {len(part)} calls, {len(set(files))} files, {changes} changes of file")
        for file, of_file in groupby(part, lambda call: call[0]) if arguments.trace else ():
            print(f"  {file}: {', '.join(dict.fromkeys(function for _, function in of_file))}")


if __name__ == "__main__":
    main()
