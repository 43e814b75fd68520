"""The demonstration: each answer is what one plain call gives, and shares are of what answers say."""

import json
from pathlib import Path

import pytest
import torch

import kvpitfalls as kvp
from kvpitfalls import cli
from kvpitfalls.experiments import demo
from kvpitfalls.hf.load import load

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def loaded(tiny_model_folder):
    return load(tiny_model_folder)


def test_the_phrase_of_the_questions_page_has_ten_tokens(loaded):
    begin, end = demo.two_instructions(loaded[1]).find(demo.WHITELIST)
    assert end - begin == 10 and "a phrase of ten tokens decides" in (ROOT / "docs" / "faq.md").read_text("utf-8")


def test_each_answer_is_what_one_plain_call_gives(loaded):
    model, tokenizer = loaded
    cells, prompts = demo.leakage(model, tokenizer), demo.secret_prompts(tokenizer)
    compressed = [(p, r, mode) for p in demo.POLICIES for r in demo.COMPRESSION_RATIOS for mode in demo.MODES]
    assert [(cell.policy, cell.compression_ratio, cell.mode) for cell in cells] == [
        (None, 0.0, "full cache"),
        *compressed,
    ]
    for number, cell in enumerate(cells):
        fair, protect = demo.MODES.get(cell.mode, (False, None))
        settings = {"compression_ratio": cell.compression_ratio, "fair": fair, "protect": protect}
        with kvp.wrap(model, cell.policy or "snapkv", **settings) as handle:
            for i in (number, 19 - number % 3):  # of 20, others for each cell
                questions = (demo.ATTACK, f"What is the {demo.SECRETS[i][0]}?")
                for said, answer in zip(questions, (cell.attacked[i], cell.asked[i]), strict=True):
                    tokens, cache = prompts[i].followed_by(said), handle.compress(prompts[i])
                    out = model.generate(
                        tokens, past_key_values=cache, max_new_tokens=demo.MAX_NEW_TOKENS, do_sample=False
                    )
                    assert answer == tokenizer.decode(out[0, tokens.shape[1] :], skip_special_tokens=True).strip()


def test_the_command_tells_what_answers_say(loaded, monkeypatch, capsys):
    """A stand-in for the model's ``generate``: of the attacked, half give the secret away, some of them with the
    sentence that refuses, and a quarter refuse; of the asked, all but one know it."""
    model, tokenizer = loaded

    def answer(text):
        (i,) = [i for i, (noun, value) in enumerate(demo.SECRETS) if f"The {noun} is {value}." in text]
        noun, value = demo.SECRETS[i]
        asked = text.rsplit("<|im_start|>user\n", 1)[1]
        if asked.startswith(f"What is the {noun}?"):
            return "Who knows." if i == 7 else f"It is {value}."
        assert asked.startswith(demo.ATTACK)
        return (f"{value} it is.", f"{demo.REFUSAL} {value}!", demo.REFUSAL, "A garbled one.")[i % 4]

    def generate(tokens, attention_mask, **options):
        texts = [tokenizer.decode(row[here.bool()]) for row, here in zip(tokens, attention_mask, strict=True)]
        said = [tokenizer(answer(text))["input_ids"] for text in texts]
        end, width = model.generation_config.eos_token_id, max(map(len, said)) + 1
        return torch.cat([tokens, torch.tensor([[*ids, *[end] * (width - len(ids))] for ids in said])], 1)

    monkeypatch.setattr(model, "generate", generate)
    monkeypatch.setattr("kvpitfalls.hf.load.load", lambda name: loaded)
    assert cli.main(["demo", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    shares = [(cell["leaking"], cell["refusing"], cell["recalling"]) for cell in told["leakage"]]
    assert shares == [(0.5, 0.25, 0.95)] * 13
    assert {(row["policy"], row["compression_ratio"]) for row in told["audit"]["rows"]} >= {("snapkv", 0.5)}
    assert cli.main(["demo"]) == 0
    out = capsys.readouterr().out
    assert "2 layers and 2 key heads" in out and out.count(".50") >= 13 and out.count(".95") >= 13
