"""Create the golden files of this folder with Hugging Face's tokenizers and transformers.

    python make_bpe.py smollm2-135m-instruct=PATH.gguf qwen2.5-coder-0.5b-instruct=PATH.gguf

It needs transformers and gguf (`pip install -e '.[parity]'`).

When transformers 5.23 reads a GGUF file, it loses two settings of the models' tokenizer.json files:
the individual digits of SmolLM2, and the NFC normalization of Qwen2 (in its class Qwen2Tokenizer).
This script restores them.
"""

import json
import random
import sys
from pathlib import Path

import tokenizers
import transformers
from tokenizers import normalizers, pre_tokenizers

HERE = Path(__file__).parent

TEXTS = [
    "",
    "Hello, world!",
    "What is the capital of France?",
    "The quick brown fox jumps over the lazy dog. It's what they'd've wanted; isn't it? I'LL GO.",
    "hamburger hamburgers Hamburger HAMBURGER",
    " leading space, trailing space ",
    "\n\n\nlines\n\n   indented\n\t\ttabs\r\nreturn\r\n\r\n",
    "  two   three    four     five      six",
    "                                                                                        ",
    "a \n b \n\n c\u00a0d\u2003e\u3000f\u2028g",
    "0 1 12 123 1234 12345 123456 1234567890 3.14159 1,000,000 -42 0x1F 1e-10 2nd 50% $9.99",
    "x1 x12 x123  1  12  \n3 \t4 ½ ² ٣٤ Ⅷ 一二三 １２３",
    "def f(x):\n    return [i ** 2 for i in range(x) if i % 2 == 0]  # comment\n\n\n"
    "class A(B): pass\n",
    "for (int i = 0; i < n; ++i) {\n\tsum += a[i]->b.c;\n}\n// done;;;\n",
    '{"key": [1, 2.5, null, true], "nested": {"a\\n": "\\u00e9"}}',
    "<html><body class='x'>&amp;</body></html> https://example.com/a?b=c&d=e#f",
    "naïve café résumé Ångström Zürich São Paulo",
    "nai\u0308ve cafe\u0301 A\u030angstro\u0308m \u1100\u1161\u11a8 \ufb01 \u2126 \u212b",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "天地玄黄，宇宙洪荒。日月盈昃，辰宿列张。",
    "いろはにほへと ちりぬるを、カタカナも漢字も。",
    "다람쥐 헌 쳇바퀴에 타고파.",
    "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतंत्रता प्राप्त है।",
    "كل الناس يولدون أحراراً متساوين في الكرامة والحقوق.",
    "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם.",
    "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกัน",
    "👋🌍 👩‍👩‍👧‍👦 🏳️‍🌈 🏴󠁧󠁢󠁥󠁮󠁧󠁿 👍🏽 ❤️‍🔥 🇫🇷🇩🇪",
    "a\u200bb\u200dc\ufeffd\u00ade\u202ef",
    "\x00\x01\x02\x03\x05\x07\x08\x0b\x0c\x0e\x1b[31m\x1f\x7f\x80\x85\x9f",
    "lost in SmolLM2: \x04 \x06x\x13\x14\x16 \x1d a\x04b \U00040000 \U00050000z",
    "\uffff\ufffe\ufdd0\ufffd\U0010ffff\U000f0000\ue000",
    "it's IT'S it’s 's 'S 't 'll 'LL 've'RE're 'm'd 'D'x '' ''s ſ's 'ſ",
    "!!!...???---===***///\\\\\\|||~~~^^^&&&%%%$$$###@@@",
    "....\n\n;;;\n}\n\n\n{ \n (word) [word] _word_ word_word camelCaseWord snake_case",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "a<|endoftext|><|endoftext|> <|im_end|>b <|im_end <|im_end|",
    "<tool_call>\n{}\n</tool_call><repo_name><file_sep><|fim_prefix|>x<|fim_suffix|>y<|fim_middle|>",
    "e<|im_end|>\u0338 cafe<|im_end|>\u0301",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" * 4,
    "ab" * 200 + " " + "abc" * 100 + "…" * 80,
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft",
]

CHAT = {
    "one turn": [{"role": "user", "content": "What is the capital of France?"}],
    "system": [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "  Capital of France?  "},
        {"role": "assistant", "content": "Paris"},
        {"role": "user", "content": "Of Japan? 東京 🗼\n\n1234"},
    ],
    "ends with the assistant": [
        {"role": "user", "content": "Say a."},
        {"role": "assistant", "content": " a \n"},
        {"role": "user", "content": "Say b."},
        {"role": "assistant", "content": "b"},
    ],
    "empty content": [{"role": "user", "content": ""}],
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather <now> & here, in °C",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
]
TOOL_CHAT = [
    {"role": "user", "content": "Weather in Paris and Rome?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "type": "function",
                "function": {"name": "get_weather", "arguments": {"city": city, "n": [1, 2.5]}},
            }
            for city in ("Paris", "Rome")
        ],
    },
    {"role": "tool", "content": "21"},
    {"role": "tool", "content": "25"},
    {"role": "assistant", "content": "21 and 25 degrees."},
]

# Templates for the tests, each with one feature of the template language.
TEMPLATES = {
    "white space": "{% for m in messages %}\n  {% if m.role == 'user' %}\nU: {{ m.content }}\n"
    "  {% else %}\nA: {{ m['content'] | trim }}{{ eos_token }}\n  {% endif %}\n{% endfor %}\n"
    "{% if add_generation_prompt %}A: {% endif %}",
    "loop controls": "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{% continue %}{% endif %}[{{ loop.index0 }}|{{ loop.last }}]{{ m.content.strip() }}"
    "{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}",
    "namespace and macro": "{% set ns = namespace(n=0, text='') %}{% macro show(m) %}"
    "<{{ m.role | upper }}>{{ m.content }}{% endmacro %}{% for m in messages %}"
    "{% set ns.n = ns.n + 1 %}{% set ns.text = ns.text ~ show(m) %}{% endfor %}"
    "{{ ns.n }}:{{ ns.text }}",
    "tojson": "{{ messages | tojson }}\n{{ messages[0] | tojson(indent=2) }}"
    "{{ messages | map(attribute='role') | join(',') }}{{ messages | length }}",
    "slices and tests": "{% set rest = messages[1:] %}"
    "{% if tools is not none and tools is defined %}{{ tools }}{% endif %}"
    "{% for m in rest if m.content is string %}{{ m.content[:3] }}{{ m.name | default('-') }}"
    "{% endfor %}{{ rest | selectattr('role', 'equalto', 'user') | list | length }}"
    "{{ 'x' in messages[0].content }}{{ range(3) | list }}{{ 7 % 3 }}",
    "generation": "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}</s>{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}",
}


def random_texts(n: int) -> list[str]:
    """Return random texts of whitespace, digits, apostrophes, marks and joined emoji."""
    rng = random.Random(0)
    bits = [*" \n\t\r'.,!1298aeIsStTlLvVreRmMdDxyz_-/(", "\u00a0", "é", "e\u0301", "ß", "ж", "中"]
    bits += ["क्षि", "🙂", "👩‍💻", "½", "٣", "  ", "\n\n", "'s", "'LL", "the", " and", "ing", "123"]
    return ["".join(rng.choices(bits, k=rng.randint(1, 40))) for _ in range(n)]


def load(model: str, path: Path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    backend = tokenizer.backend_tokenizer
    if model.startswith("smollm2"):
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    elif model.startswith("qwen2"):
        backend.normalizer = normalizers.NFC()
    else:
        raise SystemExit(f"{model}: add the settings of its tokenizer.json to load()")
    return tokenizer


def write(name: str, content: dict) -> None:
    versions = {"transformers": transformers.__version__, "tokenizers": tokenizers.__version__}
    text = json.dumps({"made with": versions, **content}, ensure_ascii=True, indent=1)
    (HERE / name).write_text(text + "\n")


def main(arguments: list[str]) -> None:
    for argument in arguments:
        model, _, path = argument.partition("=")
        tokenizer = load(model, Path(path))
        chats = []
        for name, messages in {**CHAT, "tools": TOOL_CHAT}.items():
            for prompt in (True, False):
                options = {"add_generation_prompt": prompt}
                options["tools"] = TOOLS if name == "tools" else None
                if name == "tools" and "tools" not in tokenizer.chat_template:
                    continue
                text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
                ids = tokenizer.encode(text, add_special_tokens=False)
                chats.append({"messages": messages, **options, "text": text, "ids": ids})
        texts = TEXTS + random_texts(150)
        cases = [
            {"text": text, "ids": tokenizer.encode(text, add_special_tokens=False)}
            for text in texts
        ]
        write(f"{model}.json", {"texts": cases, "chats": chats})

    rendered = []
    for name, template in TEMPLATES.items():
        for messages in CHAT.values():
            for prompt in (True, False):
                text, spans = transformers.utils.chat_template_utils.render_jinja_template(
                    [messages],
                    chat_template=template,
                    add_generation_prompt=prompt,
                    return_assistant_tokens_mask="generation %}" in template,
                    bos_token="<s>",
                    eos_token="</s>",
                )
                rendered.append(
                    {
                        "template": name,
                        "messages": messages,
                        "add_generation_prompt": prompt,
                        "text": text[0],
                        "spans": spans[0] if spans else None,
                    }
                )
    write("templates.json", {"templates": TEMPLATES, "rendered": rendered})


if __name__ == "__main__":
    main(sys.argv[1:])
