"""Small byte-level tokenizers with a chat template."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Pairs that the tokenizer joins, in bytes as byte-level BPE writes them (Ċ is a line break, Ġ a space).
MERGES = [("n", "o"), ("a", "y"), ("S", "p"), (".", "Ċ"), (".Ċ", "Ċ"), ("Ġ", "S"), ("e", "r")]


def byte_level(merges=MERGES, template=CHATML):
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|im_end|>", eos_token="<|im_end|>")
    fast.chat_template = template
    return fast


# After the templates of Llama 3.1, Qwen 3, Mistral, Gemma and SmolVLM, which differ in what they do with dates, tools,
# systems and parts.
TEMPLATES = {
    "chatml": CHATML,
    "llama": (
        "<|im_start|>system\n\n{% if tools %}Environment: ipython\n{% for tool in tools %}{{ tool | tojson }}\n{% "
        "endfor %}{% endif %}Today Date: {{ strftime_now('%d %b %Y "
        "%H:%M:%S.%f') }}\n\n"
        "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% set messages = messages[1:] %}{% "
        "endif %}<|im_end|>"
        "{% for m in messages %}{% if m.tool_calls %}<|im_start|>assistant\n\n{% for c in m.tool_calls %}"
        '{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}{% endfor %}<|im_end|>'
        "{% else %}<|im_start|>{{ m.role }}\n\n{{ m.content | trim }}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
    ),
    "qwen": (
        "{% if tools %}<|im_start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% "
        "endif %}# Tools\n"
        "{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}{% for m in messages %}"
        "{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n"
        "{% elif not (loop.first and tools and m.role == 'system') %}<|im_start|>{{ m.role }}\n{% if m.content %}{{ "
        "m.content }}{% endif %}"
        "{% for c in m.tool_calls or [] %}\n<tool_call>\n{{ c.function | tojson }}\n</tool_call>{% endfor "
        "%}<|im_end|>\n{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
    ),
    "mistral": (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {% if loop.index0 == 1 and messages[0].role == "
        "'system' %}"
        "{{ messages[0].content + '\n\n' }}{% endif %}{{ m.content }}[/INST]{% elif m.role != 'system' %} {{ "
        "m.content or '' }}"
        "{% if m.tool_calls %}[TOOL_CALLS]{{ m.tool_calls | tojson }}{% endif %}<|im_end|>{% endif %}{% endfor %}"
    ),
    "parts": (
        "{% for m in messages %}<|im_start|>{{ m.role | capitalize }}: {% if m.content is string %}{{ m.content }}{% "
        "else %}"
        "{% for part in m.content or [] %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
        "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>Assistant:{% endif %}"
    ),
}
