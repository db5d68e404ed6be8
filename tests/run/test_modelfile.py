"""The chat template in Ollama's words: rendered by a reader of that much of Go's templates, against jinja's own."""

import re
from typing import Any

import jinja2
import pytest

from lit_rec.run.modelfile import chat_parts, go_template, modelfile

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As SmolLM2's: somebody without a system message gets one.
SMOL = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system\nHi<|im_end|>\n' }}"
    "{% endif %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{% if loop.first %}{{ '<|begin|>' }}{% endif %}{{ '<|header|>' + m['role'] + '<|end|>\n\n'"
    " + m['content'] | trim + '<|eot|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|header|>assistant<|end|>\n\n' }}{% endif %}"
)
DATED = LLAMA3.replace("m['content'] | trim", "('Today is Monday. ' if m['role'] == 'system' else '') + m['content']")
INST = (
    "{{ '<s>' }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] + '</s>' }}"
    "{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
TALK = [("system", "You know films."), ("user", "Which?"), ("assistant", "Alien."), ("user", "And?")]


def renderer(template: str) -> Any:
    def stop(text: str) -> None:
        raise jinja2.TemplateError(text)

    page = jinja2.Environment(keep_trailing_newline=True).from_string(template)
    return lambda messages, asked: page.render(messages=messages, add_generation_prompt=asked, raise_exception=stop)


def go(template: str, talk: list[tuple[str, str]]) -> str:
    """Go's `range`, `.Role` and `.Content`, and nothing else."""
    found = re.fullmatch(r"\{\{ range \.Messages \}\}(.*?)\{\{ end \}\}(.*)", template, re.DOTALL)
    assert found
    assert "{{" not in found[2]
    return "".join(found[1].replace("{{ .Role }}", r).replace("{{ .Content }}", c) for r, c in talk) + found[2]


@pytest.mark.parametrize(("template", "start"), [(CHATML, ""), (SMOL, ""), (LLAMA3, "<|begin|>")])
@pytest.mark.parametrize("turns", [2, 4])
def test_same_prompt_as_the_tokenizers(template: str, start: str, turns: int) -> None:
    render = renderer(template)
    parts = chat_parts(render, start)
    assert parts is not None
    messages = [{"role": role, "content": content} for role, content in TALK[:turns]]
    assert start + go(go_template(parts), TALK[:turns]) == render(messages, True)


@pytest.mark.parametrize(
    "template", [DATED, INST, NO_SYSTEM, "nothing"], ids=["dated", "inst", "no system", "constant"]
)
def test_what_cannot_be_said_is_left_out(template: str) -> None:
    parts = chat_parts(renderer(template), "<|begin|>")
    assert parts is None
    text = modelfile(parts, system="Be brief.", parameters={"temperature": 0.5}, stops=["</s>"])
    assert not re.search("^TEMPLATE", text, re.MULTILINE)
    assert "# The chat template" in text
    assert 'PARAMETER stop "</s>"' in text


def test_a_start_that_is_no_start_token_is_not_lost() -> None:
    assert chat_parts(renderer(LLAMA3), "<s>") is None


def test_no_common_system_message() -> None:
    text = modelfile(("a", "b", "c"), system=None, parameters={}, stops=[])
    assert not re.search("^SYSTEM", text, re.MULTILINE)
    assert 'TEMPLATE """{{ range .Messages }}a{{ .Role }}b{{ .Content }}c{{ end }}aassistantb"""' in text
