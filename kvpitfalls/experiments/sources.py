"""What a sweep's records depend on: models, packages, this machine; and how its models are loaded."""

import hashlib
import importlib.metadata
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from .. import __version__, _core
from ..files import in_home
from ..hf.load import DEFAULT_MODEL, describe, load, revision
from .config import SweepConfig
from .corpus import Corpus

SCORING = ("rouge-score", "lm-eval", "nltk", "langdetect")  # packages that an answer's scores depend on
_PACKAGES = ("torch", "transformers", "numpy", *SCORING)
_SAMPLE = 256  # bytes
SCORES = 7  # raised when records get other scores, so that a sweep is not resumed with them
DRAWN_SINCE = 5  # the version since which the random control draws what it draws


def load_model(config: SweepConfig, name: str):
    """The model and tokenizer of a name in a config."""
    options = {"dtype": config.dtype, "device": config.device, "attn_implementation": config.attn_implementation}
    return load(None if name == "default" else name, **options)


def identity(config: SweepConfig, corpus: Corpus) -> dict:
    """All that records depend on: a sweep is only resumed by the same."""
    device = torch.cuda.get_device_name(torch.device(config.device)) if config.device.startswith("cuda") else "cpu"
    return {
        **{f"config.{name}": value for name, value in config.to_dict().items()},
        "corpus_sha256": corpus.sha256,
        "model_sources": [_source(name) for name in config.models],
        "kvpitfalls": __version__,
        "scores": SCORES,
        **versions(_PACKAGES),
        "python": sys.version.split()[0],
        "device": device,
        "core_isa": _core.isa(),
        "threads": torch.get_num_threads(),
    }


def _source(name: str) -> str:
    """Where a model comes from, and which it is: the hub's revision, or a fingerprint of local files."""
    known = None if name in ("default", DEFAULT_MODEL) else name
    path = in_home(name)
    which = _fingerprint(path) if known is not None and path.exists() else revision(known)
    return " at ".join(part for part in (describe(known), which) if part)


def _fingerprint(path: Path) -> str:
    """Of a model's files: names, sizes, and samples of their bytes; hashing all weights would take minutes for large
    models.

    256 bytes are read in every MiB, or in every 1024th of a smaller file, and small files are read whole: weights that
    were trained on in place are noticed even if only one matrix was.
    """
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file()):
        size = file.stat().st_size
        digest.update(repr((file.name, size)).encode())
        stride = max(_SAMPLE, min(2**20, size // 1024))
        with file.open("rb") as content:
            for at in range(0, size, stride):
                content.seek(at)
                digest.update(content.read(_SAMPLE))
    return digest.hexdigest()[:16]


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Package -> its version here; None if it is not installed."""
    return {package: _version(package) for package in packages}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
