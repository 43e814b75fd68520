"""`make fuzz-python`: random input by atheris, guided by coverage. Only the documented exceptions may come out, of
exactly these types.

    python tests/fuzz_python/fuzz.py TARGET FOLDER [libFuzzer options]

FOLDER takes the inputs that were worth keeping; it is begun with a few good ones. What is found becomes a row of a
test.
"""

import contextlib
import io
import json
import os
import shutil
import struct
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["kvpitfalls"]):
    import numpy as np
    import torch

    sys.path.insert(0, str(Path(__file__).parent.parent))
    from chat_tokenizers import byte_level
    from safetensors import safe_open
    from safetensors.torch import save
    from tiny_models import build, ids

    import kvpitfalls as kvp
    from kvpitfalls import cli
    from kvpitfalls.errors import DeviceError, NotInterceptedError, UnsupportedModelError
    from kvpitfalls.experiments import records
    from kvpitfalls.experiments.config import SweepConfig
    from kvpitfalls.experiments.corpus import load_corpus
    from kvpitfalls.experiments.metrics import check_records
    from kvpitfalls.experiments.summary import summarize
    from kvpitfalls.hf import load as loading
    from kvpitfalls.hf.save import _digest

# By type, not by isinstance: a UnicodeDecodeError or JSONDecodeError is a ValueError that nobody wrote a sentence for.
ALLOWED = (ValueError, TypeError, NotImplementedError, DeviceError, NotInterceptedError, UnsupportedModelError)
FILE = (*ALLOWED, OSError, FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
PIECES = [
    "<|im_end|>",
    "<|im_start|>",
    "<|im_",
    "\n",
    " ",
    "\0",
    "\u202e",
    "e\u0301",
    "\ud800",
    "\ue0000\ue001",
    "\ue002",
    "Never",
    "Speak",
]
FOLDER = Path(tempfile.mkdtemp(prefix="fuzz"))


@contextlib.contextmanager
def only(allowed):
    """Let documented exceptions end an input; any other one is a find."""
    try:
        yield
    except Exception as error:
        if type(error) not in allowed:
            raise


def text(data, n=6):
    """Pieces that matter and any characters between them."""
    out = ""
    for _ in range(data.ConsumeIntInRange(0, n)):
        out += data.PickValueInList(PIECES) if data.ConsumeBool() else data.ConsumeUnicode(data.ConsumeIntInRange(0, 8))
    return out


def anything(data):
    """A value of any type, for arguments that expect another one."""
    return data.PickValueInList(
        [
            None,
            True,
            -1,
            2**63,
            0.5,
            float("nan"),
            b"x",
            [],
            {},
            [1],
            (0, 3),
            "sinks",
            "a",
            text(data),
            np.int64(3),
            [None],
        ]
    )


class Targets:
    """One method per target; each is called with bytes. What it needs is made once, on first use."""

    def __init__(self):
        self.tokenizer, self.model = byte_level(), build("llama", vocab_size=300, num_hidden_layers=2)
        self.plan = [[{"key": 1}, {"key": 2}], [{"key": 3}]]
        self.rng = np.random.default_rng(0)

    def prompt(self, raw: bytes) -> None:
        """Messages and instructions; spans are in order, apart, and hold their text."""
        data = atheris.FuzzedDataProvider(raw)
        messages = [
            {"role": data.PickValueInList(["system", "user", "x\n", 3]), "content": text(data)}
            for _ in range(data.ConsumeIntInRange(0, 3))
        ]
        wanted = {}
        for name in "abc"[: data.ConsumeIntInRange(0, 3)]:
            where = data.ConsumeIntInRange(0, 40)
            content = messages[0]["content"] if messages else ""
            wanted[name] = data.PickValueInList(
                [content[where : where + 9], (where, where + data.ConsumeIntInRange(0, 9)), anything(data)]
            )
        with only(ALLOWED):
            prompt = kvp.Prompt.from_chat(
                self.tokenizer, messages, wanted, data.ConsumeBool(), allow_special_tokens=data.ConsumeBool()
            )
            last = 0
            for name, span in prompt.spans.items():
                assert last <= span.start < span.end <= len(prompt), name
                last = span.end
            prompt.followed_by(text(data))
        with only(ALLOWED):
            kvp.Prompt.from_text(self.tokenizer, text(data), wanted).find(text(data, 2))

    def spans(self, raw: bytes) -> None:
        """Places, protection, budgets and fairness on bare arrays; the result keeps what it says."""
        data = atheris.FuzzedDataProvider(raw)

        def number():
            return data.PickValueInList([data.ConsumeIntInRange(-3, 23), data.ConsumeIntInRange(0, 20), anything(data)])

        spans = {
            data.PickValueInList(["a", "b", "", 3]): (number(), number()) for _ in range(data.ConsumeIntInRange(0, 3))
        }
        given = {
            "spans": data.PickValueInList([spans, list(spans.values()), [spans], anything(data)]),
            "protect": data.PickValueInList([None, "sinks", [number()], ["a", number()], anything(data)]),
            "valid": data.PickValueInList([None, [(number(), number())], anything(data)]),
            "fair": data.PickValueInList([False, True, "paper", data.ConsumeProbability(), anything(data)]),
            "scaling": data.PickValueInList([None, 1.0, anything(data)]),
            "softcap": data.PickValueInList([0.0, 5.0, anything(data)]),
            data.PickValueInList(["budget", "compression_ratio"]): data.PickValueInList(
                [number(), data.ConsumeProbability()]
            ),
        }
        policy = data.PickValueInList(["knorm", "snapkv", "tova", "h2o", "streaming_llm", anything(data)])
        keys, queries = (
            self.rng.standard_normal((1, 2, 20, 4), np.float32),
            self.rng.standard_normal((1, 2, 20, 4), np.float32),
        )
        with only(ALLOWED):
            kept = kvp.keep(policy, keys, queries, **given)
            assert (kept.counts == (kept.positions >= 0).sum(-1)).all() and kept.quotas.sum(
                -1
            ).max() == kept.counts.max()

    def arguments(self, raw: bytes) -> None:
        """Command lines: an exit code of 0 to 3, whatever they are."""
        data = atheris.FuzzedDataProvider(raw)
        words = [
            "audit",
            "report",
            "sweep",
            "info",
            "--system",
            "--instruction",
            "a=Never",
            "Never Speak",
            "--policy",
            "knorm",
            "--ratio",
            "0.5",
            "--fair",
        ]
        words += [
            "yes",
            "--json",
            "--protect",
            "sinks",
            "--min-kept",
            "--allow-special-tokens",
            "--system-file",
            "in.txt",
            "--config",
            "c.toml",
            "--output",
        ]
        argv = [
            data.PickValueInList([data.PickValueInList(words), text(data, 2)])
            for _ in range(data.ConsumeIntInRange(0, 14))
        ]
        if any(word.startswith(("/", "--output=/", "--m", "--pr")) or ".." in word for word in argv):
            return  # no writes elsewhere, no models and presets, which would run
        (FOLDER / "in.txt").write_bytes(data.ConsumeBytes(40))
        (FOLDER / "c.toml").write_bytes(data.ConsumeBytes(80))
        os.chdir(FOLDER)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
            try:
                code = cli.main(argv)
            except SystemExit as error:
                code = error.code
        assert code in (0, 1, 2, 3), code
        assert code == 0 or err.getvalue(), "a failure says why"

    def records(self, raw: bytes) -> None:
        """Files of a sweep, from a kill or a stranger."""
        cut = raw.find(b"\xfe") if b"\xfe" in raw else len(raw)
        (FOLDER / records.RECORDS).write_bytes(raw[:cut])
        (FOLDER / records.META).write_bytes(raw[cut + 1 :])
        for call in (
            lambda: records.read_meta(FOLDER),
            lambda: self.summary(),
            lambda: records.recover(FOLDER, self.plan),
        ):
            with only(FILE):
                call()
        with only(FILE):
            SweepConfig.parse(records.read_meta(FOLDER)["same"])
        (FOLDER / "rows.jsonl").write_bytes(raw[:cut])
        with only(FILE):
            load_corpus(str(FOLDER / "rows.jsonl"))

    def summary(self) -> None:
        """The figures of records that pass for a sweep's."""
        found = records.read_records(FOLDER)
        check_records(found)
        summarize(found)

    def cache(self, raw: bytes) -> None:
        """Saved caches: any bytes, or a description of any kind with a checksum that fits."""
        path = FOLDER / "cache.safetensors"
        if raw[:1] == b"{":
            tensors, metadata = self.saved
            about = raw.decode("utf-8", "replace")
            path.write_bytes(save(tensors, {**metadata, "about": about, "sha256": _digest(about, tensors)}))
        else:
            path.write_bytes(raw)
        with only(FILE):
            kvp.load_cache(path, self.model).report()

    @property
    def saved(self):
        if not hasattr(self, "_saved"):
            self.save_cache(FOLDER / "good.safetensors")
            with safe_open(FOLDER / "good.safetensors", "pt") as file:
                self._saved = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
        return self._saved

    def save_cache(self, path: Path) -> None:
        with kvp.wrap(self.model, "knorm", budget=4) as handle:
            handle.compress(ids(1, 8), spans={"a": (2, 6)}).save(path)

    def gguf(self, raw: bytes) -> None:
        """A file behind the magic, and its name."""
        data = atheris.FuzzedDataProvider(raw)
        name = data.PickValueInList(["m.gguf", "m.gguf", "m.gguf", text(data, 2) + ".gguf"])
        path = FOLDER / "gguf" / name.replace("/", "_")
        shutil.rmtree(FOLDER / "gguf", ignore_errors=True)
        (FOLDER / "gguf").mkdir()
        with contextlib.suppress(OSError, ValueError):  # a name that no file may have
            path.write_bytes(b"GGUF" + data.ConsumeBytes(2**16))
        os.environ["KVPITFALLS_CACHE"] = str(FOLDER / "gguf" / "cache")
        with contextlib.redirect_stderr(io.StringIO()), only((*FILE, ImportError)):
            loading.load(str(path))

    def seeds(self, target: str) -> list[bytes]:
        """Good inputs to begin with."""
        if target == "cache":
            self.save_cache(FOLDER / "seed")
            return [(FOLDER / "seed").read_bytes(), self.saved[1]["about"].encode()]
        if target == "records":
            record = dict.fromkeys(
                ("model", "dataset", "defense", "order", "policy", "mode", "kind", "attack"), "recall"
            )
            scores = {"recall": {"rougeL": 0.5}}
            whole = json.dumps(
                {**record, "compression_ratio": 0.5, "key": 1, "kept": {"a": 1.0}, "error": None, "scores": scores}
            )
            row = json.dumps(
                {"key": 1, "messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]}
            )
            return [
                f"{whole}\n".encode() + b'\xfe{"same": {"models": ["default"], "seed": 1}, "sessions": []}',
                b'{"key": 1}\n{"key": 2}\n',
                row.encode(),
            ]
        if target == "gguf":
            key = b"general.architecture"
            header = (
                struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", len(key)) + key + struct.pack("<IQ", 8, 5) + b"llama"
            )
            return [header, struct.pack("<IQQ", 3, 0, 0)]
        return [bytes(range(i, i + 120)) for i in range(0, 120, 30)]


def main() -> None:
    target, corpus = sys.argv[1], Path(sys.argv[2]).resolve()
    torch.set_num_threads(1)
    targets = Targets()
    loading.load = lambda name, **_: (targets.model, targets.tokenizer)
    if target == "gguf":
        loading.load = REAL_LOAD
    corpus.mkdir(parents=True, exist_ok=True)
    for n, seed in enumerate(targets.seeds(target)):
        (corpus / f"seed{n}").write_bytes(seed)
    atheris.Setup([sys.argv[0], str(corpus), *sys.argv[3:]], getattr(targets, target))
    atheris.Fuzz()


REAL_LOAD = loading.load

if __name__ == "__main__":
    main()
