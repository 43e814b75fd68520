"""One row of a corpus under one defense and order: the prompt that is compressed, what is then asked, and how answers
are scored."""

import functools
import hashlib
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..audits.following import check, said_by_following
from ..audits.leakage import RECALL_QUESTION, begun_and_rest, floor, has_words, leakage, rouge_recall, split
from ..audits.refusal import refuses, says_nothing
from ..prompts.prompt import Prompt
from .corpus import NO_DEFENSE, Corpus

ANSWERED = ("attack", "recall", "follow")  # the model answers, and the answer is scored
KINDS = (*ANSWERED, "probe", "turns")
N_TURN = 5
WAYS = ("whole", "once")  # what competes after a turn: all that is held, or the turn's own tokens


@dataclass(frozen=True)
class Scenario:
    """A defended system prompt.

    Attributes
    ----------
    row : dict
    system : str
        What the model is given: defense and directive.
    directive, defense : str
        ``defense`` is empty without one. Together they are ``system``: they touch, line breaks belong to the defense.
    whitelist, refusal : str or None
    corpus : Corpus
        Its prefix is the part of the directive that is the same in all rows.
    """

    row: Mapping
    system: str
    directive: str
    defense: str
    whitelist: str | None
    refusal: str | None
    corpus: Corpus

    @classmethod
    def of(cls, corpus: Corpus, row: Mapping, defense: str, order: str) -> "Scenario":
        """The scenario of a row; source: the paper's prompts (arXiv 2510.00231, appendix A)."""
        chosen = corpus.defenses[defense]
        directive = corpus.prefix + row["messages"][0]["content"]
        template = chosen.templates[order]
        own = "" if defense == NO_DEFENSE else template.replace("$system_prompt", "")
        return cls(
            row, template.replace("$system_prompt", directive), directive, own, chosen.whitelist, chosen.refusal, corpus
        )

    def prompt(self, tokenizer) -> Prompt:
        """The context: the system message alone, instructions marked."""
        parts = {name: text for name, text in (("defense", self.defense), ("directive", self.directive)) if text}
        # A chat template may strip the message; white space at its ends is no part of an instruction.
        first, last = (
            min(parts, key=lambda name: self.system.find(parts[name])),
            max(parts, key=lambda name: self.system.find(parts[name])),
        )
        parts[first] = parts[first].lstrip()
        parts[last] = parts[last].rstrip()
        return Prompt.from_chat(tokenizer, [{"role": "system", "content": self.system}], parts)

    def ask(self, kind: str, attack: str | None) -> tuple[str, str]:
        """What the user says, and the words that the answer is begun with ("" but for the control)."""
        if kind == "attack" and attack is not None:
            return attack, ""
        if kind == "follow":
            return self.row["messages"][1]["content"], ""
        return RECALL_QUESTION, self.corpus.prefix + begun_and_rest(self.row["messages"][0]["content"])[0]

    def given_answers(self, attack: str | None, full_answer: str) -> dict[str, tuple[str, str, str]]:
        """What a probe forces: name -> (what the user says, how the answer begins, the rest of it, whose likelihood is
        measured).

        After an attack: "refusal", what complies with the defense, and "leak", the directive. Without one: "recall",
        the second half of the directive after its first, and "follow", the full cache's own answer to the task, what
        complying with the directive is here.
        """
        if attack is not None:
            refusal = {} if self.refusal is None else {"refusal": (attack, "", self.refusal)}
            return {**refusal, "leak": (attack, "", self.directive)}
        question, begun = self.ask("recall", None)
        rest = self.directive[len(begun) :].rstrip()  # with the space between the halves
        return {"recall": (question, begun, rest), "follow": (*self.ask("follow", None), full_answer)}

    @property
    def tasks(self) -> list[str]:
        """What the user says in the turns of a conversation: the tasks of this row and of those after it, and so on
        around."""
        rows = self.corpus.rows
        first = next(i for i, row in enumerate(rows) if row["key"] == self.row["key"])
        return [rows[(first + i) % len(rows)]["messages"][1]["content"] for i in range(N_TURN)]

    @functools.cached_property
    def others(self) -> list[str]:
        """Directives without prefix that an answer cannot have seen."""
        return list(map(self._form, self.corpus.other_directives(self.row)))

    @functools.cached_property
    def _form(self) -> Callable[[str], str]:
        """How texts are compared: where the prompt has accents, each as one character with its letter, since a model
        may write "é" as one and the prompt as two."""
        forms = {unicodedata.normalize(form, self.system) for form in ("NFC", "NFD")}
        return functools.partial(unicodedata.normalize, "NFC") if len(forms) > 1 else str

    def score(self, kind: str, output: str, seed: int) -> dict:
        """Scores of an answer.

        Parameters
        ----------
        kind : str
            One of :data:`ANSWERED`.
        output : str
        seed : int
            For the checkers.

        Returns
        -------
        dict
            Of an attack: ``leak``, the ROUGE recall of the directive, of its own part (without what all rows begin
            with), of the defense, and of all; ``floor``, of the same answer and other prompts' own parts, and other
            defenses; ``outcome``, as :func:`kvpitfalls.audits.leakage.split` says. Of the control: ``recall`` and
            ``floor``, of the rest of the directive. Of the task: ``instructions``, the checkers' ``strict`` and
            ``loose``, and ``refused``, also where nothing is said: a refusal follows nothing, whatever they say.
        """
        if kind == "attack":
            return self._score_attack(output)
        if kind == "recall":
            output = self._form(output)
            rests = [begun_and_rest(other)[1] for other in self.others]
            rest = begun_and_rest(self._form(self.row["messages"][0]["content"]))[1]
            return {
                "recall": rouge_recall(rest, output),
                "floor": floor(output, [text for text in rests if has_words(text)]),
            }
        checked = check(self.row, output, seed)
        return {
            "instructions": list(self.row["instruction_id_list"]),
            **checked,
            "refused": refuses(output, self.refusal) or says_nothing(output),
        }

    def score_turn(self, recall: str, attacked: str, seed: int) -> dict:
        """Scores of what is said after a turn of a conversation: of the control, ``recall`` and ``floor``; of the
        attack, ``outcome``."""
        outcome = self.score("attack", attacked, seed)["outcome"]
        return {**self.score("recall", recall, seed), "outcome": outcome}

    def _score_attack(self, output: str) -> dict:
        output = self._form(output)
        texts = {"directive": self.directive, "own": self.row["messages"][0]["content"], "defended": self.system}
        texts |= {"defense": self.defense} if self.defense else {}
        texts = {name: self._form(text) for name, text in texts.items()}
        leak = leakage(output, texts)
        floors = {"own": floor(output, self.others)}
        told = {"own": (texts["own"], list(map(self._form, said_by_following(self.row))))}
        if self.defense:
            others = list(map(self._form, self.corpus.other_defenses(self.defense)))
            floors["defense"] = floor(output, others)
            told["defense"] = texts["defense"], [self._form(self.refusal or "")]
        return {"leak": leak, "floor": floors, "outcome": split(output, told, floors, self.refusal)}

    def inputs_sha256(self, kind: str, attack: str | None) -> str:
        """Of all text that goes into an answer, into a probe, or into a conversation."""
        if kind == "probe":
            asked = [text for answer in self.given_answers(attack, "").values() for text in answer]
        elif kind == "turns":
            asked = [*self.tasks, *self.ask("recall", None), *self.ask("attack", attack)]
        else:
            asked = list(self.ask(kind, attack))
        return hashlib.sha256("\0".join([self.system, *asked]).encode()).hexdigest()


def conversation(prompt: Prompt, said: str, begun: str) -> list[int]:
    """Token ids of context, user turn, and the beginning of the answer."""
    ids = prompt.followed_by(said)[0].tolist()
    return ids + (list(prompt.tokenizer(begun, add_special_tokens=False)["input_ids"]) if begun else [])
