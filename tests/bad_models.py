"""The table of bad inputs of prompts, models, caches and texts; see bad_inputs.py."""

import torch
from bad_inputs import LOWER, SAID
from tiny_models import build, ids

import kvpitfalls as kvp
from kvpitfalls import DeviceError
from kvpitfalls.audits.following import accuracies, check
from kvpitfalls.audits.leakage import begun_and_rest, floor, leakage, rouge_recall
from kvpitfalls.audits.refusal import refuses
from kvpitfalls.hf.load import load

PROMPTS = [
    (
        lambda e: kvp.Prompt.from_chat(e.tok, 3),
        TypeError,
        "messages is a int; expected a list of messages, each with a role and a content",
    ),
    (
        lambda e: kvp.Prompt.from_chat(e.tok, torch.tensor(3)),
        TypeError,
        "messages is a Tensor; expected a list of messages, each with a role and a content",
    ),
    (
        lambda e: kvp.Prompt.from_chat(e.tok, "text"),
        TypeError,
        "messages is a str; expected a list of messages, each with a role and a co",
    ),
    (
        lambda e: kvp.Prompt.from_chat(e.tok, {"role": "user", "content": "a"}),
        TypeError,
        "messages is a dict; expected a list of messages",
    ),
    (
        lambda e: kvp.Prompt.from_chat(e.tok, [3]),
        ValueError,
        "message 0 is 3; expected a role and a content that is a str",
    ),
    (
        lambda e: kvp.Prompt.from_chat(e.tok, [{"role": "user"}]),
        ValueError,
        "message 0 is {'role': 'user'}; expected a role and a content",
    ),
    (
        lambda e: kvp.Prompt.from_chat(e.tok, [{"content": "a"}]),
        ValueError,
        "message 0 is {'content': 'a'}; expected a role and a content",
    ),
    (
        lambda e: kvp.Prompt.from_chat(e.tok, [{"role": "user", "content": None}]),
        ValueError,
        "message 0 is {'role': 'user', 'content': No",
    ),
    (
        lambda e: kvp.Prompt.from_chat(e.tok, SAID, ["abc"]),
        TypeError,
        "instructions is a list; expected a mapping of names to texts",
    ),
    (
        lambda e: kvp.Prompt.from_chat(e.tok, SAID, {"a": (True, 3)}),
        ValueError,
        "instruction 'a' is (True, 3); expected a text, or (start",
    ),
    (
        lambda e: kvp.Prompt.from_chat(e.tok, SAID, {"a": (1.0, 3.0)}),
        ValueError,
        "instruction 'a' is (1.0, 3.0); expected a text, or (sta",
    ),
    (
        lambda e: kvp.Prompt.from_chat(e.tok, SAID, {"a": None}),
        ValueError,
        "instruction 'a' is None; expected a text, or (start, end) in ",
    ),
    (
        lambda e: kvp.Prompt.from_chat(e.tok, SAID, {3: "abc"}),
        ValueError,
        "an instruction is called 3; expected a name, a str that is not",
    ),
    (
        lambda e: kvp.Prompt.from_chat(None, SAID),
        TypeError,
        "the tokenizer is a NoneType without character offsets; expected a fast token",
    ),
    (lambda e: kvp.Prompt.from_text(e.tok, None), TypeError, "text is a NoneType; expected a str"),
    (lambda e: kvp.Prompt.from_text(e.tok, b"abc"), TypeError, "text is a bytes; expected a str"),
    (lambda e: e.text.find(3), TypeError, "text is a int; expected a str"),
    (
        lambda e: e.text.find("zz"),
        ValueError,
        "the text is not in the prompt; expected it once: 'zz'",
    ),
    (lambda e: e.text.followed_by(3), TypeError, "user is a int; expected a str, since the prompt is plain text"),
    (
        lambda e: e.chat.followed_by(3),
        TypeError,
        "messages is a int; expected a list of messages, each with a role and a content",
    ),
    (lambda e: e.chat.followed_by([]), ValueError, "messages is empty; expected at least one message"),
    (
        lambda e: e.text.followed_by(""),
        ValueError,
        "the context is not a prefix of the full ids: at token 3 the prompt has its end and th",
    ),
]

MODELS = [
    (lambda e: kvp.wrap(None, "knorm", budget=3), TypeError, "model is a NoneType; expected a transformers model"),
    (lambda e: kvp.wrap("gpt2", "knorm", budget=3), TypeError, "model is a str; expected a transformers model"),
    (
        lambda e: kvp.wrap(build("llama"), None, budget=3),
        TypeError,
        "policy is a NoneType; expected a Policy or one of adakv, chunkkv, ",
    ),
    (
        lambda e: kvp.wrap(build("llama"), "knorm", budget=3, when=None),
        ValueError,
        "when is None; expected 'prefill', 'decode' or 'always",
    ),
    (
        lambda e: kvp.wrap(build("llama"), "knorm", budget=3, when="decode", fair=0.5),
        ValueError,
        "fair is 0.5; when='decode' expects Fals",
    ),
    (
        lambda e: kvp.wrap(build("llama"), "knorm", budget=3, protect=object()).compress(ids()),
        ValueError,
        "protect holds <object object a",
    ),
    (
        lambda e: kvp.wrap(build("llama"), "knorm", budget=3, protect=object()).compress(e.prompt),
        ValueError,
        "protect holds <object objec",
    ),
    (
        lambda e: kvp.wrap(build("llama"), "knorm", budget=3, protect=True).compress(e.prompt),
        ValueError,
        "protect holds True; expected 's",
    ),
    (
        lambda e: e.handle.compress(e.prompt, prefill_chunk_size=0),
        ValueError,
        "prefill_chunk_size is 0; expected a whole number, at least 1",
    ),
    (
        lambda e: e.handle.compress(e.prompt, prefill_chunk_size=[0, len(e.prompt)]),
        ValueError,
        "prefill_chunk_size holds 0; expected whole numbers, at least 1",
    ),
    (
        lambda e: e.handle.compress(e.prompt, prefill_chunk_size=[len(e.prompt), 1]),
        ValueError,
        "prefill_chunk_size holds 2 chunks of ",
    ),
    (
        lambda e: e.handle.compress(None),
        TypeError,
        "prompt is a NoneType that is no tensor; expected a Prompt, a list of them, or token i",
    ),
    (
        lambda e: e.handle.compress(e.prompt, span={}),
        TypeError,
        "compress was given a prompt and span; expected a prompt, or all that a",
    ),
    (
        lambda e: e.handle.compress(attention_masks=3),
        TypeError,
        "compress was given no prompt; expected a prompt, or all that a token",
    ),
    (
        lambda e: e.handle.compress("text"),
        TypeError,
        "prompt is a str that is no tensor; expected a Prompt, a list of them, or token ids ",
    ),
    (
        lambda e: e.handle.compress([]),
        ValueError,
        "prompt has shape (1, 0) and dtype torch.float32; expected a Prompt, or token ids (T,) ",
    ),
    (
        lambda e: e.handle.compress([e.prompt, 3]),
        TypeError,
        "prompt is a list that is no tensor; expected a Prompt, a list of them, or to",
    ),
    (
        lambda e: e.handle.compress(ids().float()),
        ValueError,
        "prompt has shape (2, 30) and dtype torch.float32; expected a Prompt, or tok",
    ),
    (
        lambda e: e.handle.compress(ids()[None]),
        ValueError,
        "prompt has shape (1, 2, 30) and dtype torch.int64; expected a Prompt, or toke",
    ),
    (
        lambda e: e.handle.compress(torch.tensor([[True, False, True]])),
        ValueError,
        "prompt has shape (1, 3) and dtype torch.bool; expecte",
    ),
    (lambda e: e.handle.compress(ids() + 1000), ValueError, "prompt holds token 1127; expected ids in [0, 128)"),
    (lambda e: e.handle.compress(ids() - 1000), ValueError, "prompt holds token -996; expected ids in [0, 128)"),
    (
        lambda e: e.handle.compress(ids(), spans={"a": (0, 99)}),
        ValueError,
        "span 'a' is [0, 99); expected a range inside [0, 30)",
    ),
    (
        lambda e: e.handle.compress(ids(), spans={"a": (5, 5), "b": (5, 9)}),
        ValueError,
        "span 'a' is [5, 5); expected at least one token",
    ),
    (
        lambda e: e.handle.compress(ids(), attention_mask=torch.full((2, 30), 0.5)),
        ValueError,
        "attention_mask holds 0.5; expected 1 for a real token and 0 for padding",
    ),
    (
        lambda e: e.handle.compress(ids(), attention_mask=torch.tensor([[-1e9] * 4 + [0.0] * 26] * 2)),
        ValueError,
        "attention_mask holds -1e+09; expected 1 for a real token and 0 for padding",
    ),
    (
        lambda e: e.handle.compress(ids(), spans=3),
        TypeError,
        "spans is 3; expected (start, end) pairs, by name or in a list",
    ),
    (
        lambda e: e.handle.compress(ids(), attention_mask="x"),
        TypeError,
        "attention_mask is a str that is no tensor; expected a tensor (B,",
    ),
    (
        lambda e: e.handle.compress(ids(), attention_mask=torch.ones(30)),
        ValueError,
        "attention_mask has shape (30,); expected (2, 30), on",
    ),
    (
        lambda e: e.handle.compress(e.prompt, attention_mask=torch.ones(1, 30)),
        ValueError,
        "attention_mask or spans were given with a Prom",
    ),
    (
        lambda e: e.handle.compress(e.prompt, spans={}),
        ValueError,
        "attention_mask or spans were given with a Prompt; expected them only w",
    ),
    (
        lambda e: e.handle.compress(ids().to("meta")),
        ValueError,
        "prompt is on the device 'meta', without values; expected a Prompt, a lis",
    ),
    (lambda e: e.handle.verify(n_token=3), ValueError, "n_token is 3; expected a whole number, at least 4"),
    (lambda e: e.handle.verify(n_token="x"), ValueError, "n_token is 'x'; expected a whole number, at least 4"),
    (lambda e: e.handle.verify(tolerance="x"), ValueError, "tolerance is 'x'; expected a number, at least 0"),
    (lambda e: e.cache.positions(99), ValueError, "layer is 99; expected a number in [0, 3)"),
    (lambda e: e.cache.positions("x"), ValueError, "layer is 'x'; expected a number in [0, 3)"),
    (lambda e: e.cache.positions(-7), ValueError, "layer is -7; expected a number in [0, 3)"),
    (lambda e: e.cache.kept("z"), ValueError, "span is 'z'; expected one of a, b"),
    (
        lambda e: e.cache.kept(3),
        ValueError,
        "span is 3; expected a name, or (start, end) in tokens, which is not empty",
    ),
    (
        lambda e: e.cache.kept((3, 3)),
        ValueError,
        "span is (3, 3); expected a name, or (start, end) in tokens, which is not empty",
    ),
    (
        lambda e: e.cache.kept((5, 2)),
        ValueError,
        "span is (5, 2); expected a name, or (start, end) in tokens, which is not empty",
    ),
    (
        lambda e: e.cache.kept((False, True)),
        ValueError,
        "span is (False, True); expected a name, or (start, end) in tokens, which is not empty",
    ),
    (lambda e: e.cache.kept((20, 999)), ValueError, r"span is (20, 999); expected one within the "),
    (lambda e: e.cache.kept("a", row=5), ValueError, "row is 5; expected one of the 1 of the batch"),
    (lambda e: e.cache.kept("a", row="x"), ValueError, "row is 'x'; expected one of the 1 of the batch"),
    (lambda e: e.cache.save(None), TypeError, "path is None; expected the path of a file"),
    (lambda e: e.cache.save(3), TypeError, "path is 3; expected the path of a file"),
    (lambda e: kvp.load_cache(None, e.model), TypeError, "path is None; expected the path of a file"),
    (lambda e: kvp.load_cache("x", None), TypeError, "model is a NoneType; expected a transformers model"),
    (lambda e: kvp.audit(None, e.prompt), TypeError, "model is a NoneType; expected a transformers model"),
    (
        lambda e: kvp.audit(e.model, "text"),
        TypeError,
        "prompt is a str; expected a kvpitfalls.Prompt, which knows where its instructions ",
    ),
    (
        lambda e: kvp.audit(e.model, ids()),
        TypeError,
        "prompt is a Tensor; expected a kvpitfalls.Prompt, which knows where its instruction",
    ),
    (lambda e: kvp.audit(e.model, e.prompt, policies="knorm"), TypeError, "policies is 'knorm'; expected a list"),
    (lambda e: kvp.audit(e.model, e.prompt, policies=3), TypeError, "policies is 3; expected a list"),
    (
        lambda e: kvp.audit(e.model, e.prompt, compression_ratios=torch.tensor(0.5)),
        TypeError,
        "compression_ratios is tensor(0.5000); expected a list",
    ),
    (
        lambda e: kvp.audit(e.model, e.prompt, policies=[]),
        ValueError,
        "nothing to audit; expected at least one policy, one fairness and o",
    ),
    (
        lambda e: kvp.audit(e.model, e.prompt, policies=[3]),
        TypeError,
        "policy is a int; expected a Policy or one of adakv, chunkkv, ",
    ),
    (
        lambda e: kvp.audit(e.model, e.prompt, compression_ratios=0.5),
        TypeError,
        "compression_ratios is 0.5; expected a list",
    ),
    (
        lambda e: kvp.audit(e.model, e.prompt, compression_ratios="0.5"),
        TypeError,
        "compression_ratios is '0.5'; expected a list",
    ),
    (
        lambda e: kvp.audit(e.model, e.prompt, compression_ratios=["x"]),
        ValueError,
        "compression_ratio is 'x'; expected the share removed,",
    ),
    (
        lambda e: kvp.audit(e.model, e.prompt, compression_ratios=[1]),
        ValueError,
        "compression_ratio is 1; expected the share removed, a n",
    ),
    (
        lambda e: kvp.audit(e.model, e.prompt, compression_ratios=[True]),
        ValueError,
        "compression_ratio is True; expected the share remove",
    ),
    (
        lambda e: kvp.audit(e.model, e.prompt, compression_ratios=[None]),
        ValueError,
        "exactly one of compression_ratio (the share removed)",
    ),
    (
        lambda e: kvp.audit(e.model, e.prompt, compression_ratios=[float("nan")]),
        ValueError,
        "compression_ratio is nan; expected the share",
    ),
    (
        lambda e: kvp.audit(e.model, e.prompt, fair=None),
        ValueError,
        "fair is None; expected False, True, a number in [0, 1], 'paper', 'flo",
    ),
    (lambda e: kvp.audit(e.model, e.prompt, fair=[2]), ValueError, "strength is 2.0; expected a number from 0 to 1"),
    (
        lambda e: kvp.audit(e.model, e.prompt, fair=[]),
        ValueError,
        "nothing to audit; expected at least one policy, one fairness and one c",
    ),
    (
        lambda e: kvp.audit(e.model, e.prompt, protect="dfnse"),
        ValueError,
        "once: 'dfnse'; or the name of an instruction (a, b)",
    ),
    (
        lambda e: kvp.audit(e.model, e.prompt, protect="zzz"),
        ValueError,
        "the text is not in the prompt; expected it once: 'zzz'; or the name ",
    ),
    (
        lambda e: kvp.audit(e.model, e.prompt, protect=[99]),
        ValueError,
        "protect holds position 99; expected one inside [0, 30)",
    ),
    (lambda e: kvp.audit(e.model, e.prompt, protect=object()), ValueError, "protect holds <object object at "),
    (
        lambda e: kvp.audit(e.model, e.prompt, protect=3.5),
        ValueError,
        "protect holds 3.5; expected 'sinks', 'boundary', span names",
    ),
    (lambda e: e.audit.first_loss("x"), ValueError, "threshold is 'x'; expected a share in (0, 1]"),
    (lambda e: e.audit.first_loss(0), ValueError, "threshold is 0; expected a share in (0, 1]"),
    (
        lambda e: e.audit.kept_mask("knorm", 0.3),
        ValueError,
        "policy, fair and compression_ratio are ('knorm', False, 0.3); expected a com",
    ),
    (
        lambda e: e.audit.kept_mask("knorm", "x"),
        ValueError,
        "compression_ratio is 'x'; expected the share removed, a number in [0, 1)",
    ),
    (
        lambda e: e.audit.kept_mask("zzz", 0.5),
        ValueError,
        "policy is 'zzz', which is not known; expected one of adakv, chunkkv, ",
    ),
    (
        lambda e: e.audit.kept_mask("knorm", 0.5, layer=9),
        ValueError,
        "layer is 9; expected one of the compressed layers: 0, 1",
    ),
    (lambda e: e.audit.heatmap(start="x"), ValueError, "start is 'x'; expected a ratio in [0, 1)"),
    (lambda e: e.audit.heatmap(start=3), ValueError, "start is 3; expected a ratio in [0, 1)"),
    (
        lambda e: e.audit.plot_tokens("knorm", 0.5, layer=9),
        ValueError,
        "layer is 9; expected one of the compressed layers: 0, 1, 2",
    ),
    (lambda e: e.audit.to_json(None), TypeError, "path is a NoneType; expected the path of a file"),
]

TEXTS = [
    (
        lambda e: rouge_recall("", "x"),
        ValueError,
        "the reference is ''; expected text with a letter a-z or a digit, since ROUGE sees noth",
    ),
    (lambda e: rouge_recall(3, "x"), TypeError, "reference is a int; expected a str"),
    (lambda e: rouge_recall("a", None), TypeError, "response is a NoneType; expected a str"),
    (
        lambda e: leakage("x", {"a": "!"}),
        ValueError,
        "the reference is '!'; expected text with a letter a-z or a digit, since ROUGE sees ",
    ),
    (lambda e: leakage("x", ["a"]), TypeError, "references is a list; expected a mapping of names to texts"),
    (lambda e: leakage(3, {"a": "b"}), TypeError, "response is a int; expected a str"),
    (lambda e: refuses(3), TypeError, "response is a int; expected a str"),
    (lambda e: refuses("a", 3), TypeError, "sentence is a int; expected a str"),
    (
        lambda e: floor("a", []),
        ValueError,
        "others is []; expected texts that the answer cannot have seen, since a leak",
    ),
    (
        lambda e: floor("a", "b"),
        ValueError,
        "others is 'b'; expected texts that the answer cannot have seen, since a leak",
    ),
    (
        lambda e: begun_and_rest("one"),
        ValueError,
        "the directive is 'one'; expected at least two words, to begin with one and ask for the",
    ),
    (lambda e: begun_and_rest(3), TypeError, "directive is a int; expected a str"),
    (
        lambda e: check({"key": 1}, "x"),
        ValueError,
        "the row has no 'prompt'; expected the fields of IFEval: key, prompt, instruction_id_l",
    ),
    (lambda e: check(3, "x"), TypeError, "row is a int; expected a mapping with the fields of IFEval"),
    (
        lambda e: check({"key": 1, "prompt": "x", "instruction_id_list": ["a:b"], "kwargs": [{}]}, "x"),
        ValueError,
        "row 1 names instructio",
    ),
    (
        lambda e: check(
            {"key": 1, "prompt": "x", "instruction_id_list": ["change_case:english_lowercase"], "kwargs": []}, "x"
        ),
        ValueError,
        "row 1 has 1 ins",
    ),
    (
        lambda e: check(
            {"key": 1, "prompt": "x", "instruction_id_list": ["change_case:english_lowercase"], "kwargs": [{"zz": 1}]},
            "x",
        ),
        ValueError,
        "row 1 has kwarg",
    ),
    (lambda e: check(LOWER, 3), TypeError, "response is a int; expected a str"),
    (lambda e: check(LOWER, "x", seed="a"), TypeError, "seed is 'a'; expected a whole number"),
    (
        lambda e: check({"key": 1, "prompt": "x", "instruction_id_list": 3, "kwargs": [{}]}, "x"),
        TypeError,
        "row 1 has a int as instructio",
    ),
    (lambda e: accuracies([{}], []), ValueError, "results has 0 entries; expected 1, one for each row"),
    (lambda e: load(3), ValueError, "name is 3; expected a hub id, a folder or a GGUF file"),
    (lambda e: load(""), ValueError, "name is ''; expected a hub id, a folder or a GGUF file"),
    (lambda e: load("a\0b"), ValueError, "name is 'a\\x00b'; expected a hub id, a folder or a GGUF file"),
    (lambda e: load("/no/where"), FileNotFoundError, "name is '/no/where', which does not exist; expected a hub id"),
    (lambda e: load("~nobody/m"), FileNotFoundError, "name is '~nobody/m', which does not exist; expected a"),
    (lambda e: load("none.gguf"), FileNotFoundError, "none.gguf does not exist; expected a GGUF file"),
    (lambda e: load(dtype="float31"), ValueError, "dtype is 'float31'; expected float32, float16 or bfloat16"),
    (lambda e: load(dtype="int8"), ValueError, "dtype is 'int8'; expected float32, float16 or bfloat16"),
    (lambda e: load(dtype=None), ValueError, "dtype is None; expected float32, float16 or bfloat16"),
    (lambda e: load(dtype="Tensor"), ValueError, "dtype is 'Tensor'; expected float32, float16 or bfloat16"),
    (lambda e: load(device="gpu"), ValueError, "device is 'gpu'; expected a name such as 'cpu' or 'cuda'"),
    (lambda e: load(device=3.5), ValueError, "device is 3.5; expected a name such as 'cpu' or 'cuda'"),
    (lambda e: load(device="cuda"), DeviceError, "device is 'cuda'; expected 'cpu', since torch sees no GPU"),
]
