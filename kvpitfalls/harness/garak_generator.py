"""A garak generator that answers from a compressed cache, so that its probes see what compression does. Imports
garak."""

from garak import _config  # pyright: ignore[reportMissingImports] # an environment of its own has it
from garak.attempt import Message  # pyright: ignore[reportMissingImports] # an environment of its own has it
from garak.generators.base import Generator  # pyright: ignore[reportMissingImports] # an environment of its own has it

from ..hf.load import load
from .chat import CompressedChat

_SETTINGS = {
    "policy": "snapkv",
    "compression_ratio": None,
    "budget": None,
    "fair": False,
    "protect": None,
    "compress": "system",
    "instructions": "sentences",
}


class Compressed(Generator):
    """A Hugging Face model with a compressed KV cache; garak's target_type kvpitfalls."""

    DEFAULT_PARAMS = Generator.DEFAULT_PARAMS | _SETTINGS | {"device": "cpu", "dtype": "float32"}
    generator_family_name = "kvpitfalls"
    parallel_capable = False
    __module__ = "garak.generators.kvpitfalls"  # where garak looks for the classes of its plugins

    def __init__(self, name="default", config_root=_config):
        super().__init__(name, config_root)
        if self.temperature or self.top_k:
            raise ValueError(
                f"temperature is {self.temperature} and top_k {self.top_k}; expected neither: answers are greedy"
            )
        model, tokenizer = load(
            None if self.name in ("", "default") else self.name, dtype=self.dtype, device=self.device
        )
        self.chat = CompressedChat(model, tokenizer, **{name: getattr(self, name) for name in _SETTINGS})

    def _call_model(self, prompt, generations_this_call=1):
        said = self.chat.answer(self._conversation_to_list(prompt), self.max_tokens)
        # garak's report has no place of its own for a generator's settings
        about = {name: getattr(self, name) for name in _SETTINGS}
        return [Message(said.text, notes={"kvpitfalls": {**about, "n_tokens": said.n_tokens, "n_kept": said.n_kept}})]


DEFAULT_CLASS = "Compressed"
