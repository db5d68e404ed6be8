"""An Ollama Modelfile for a merged model: its chat template in Ollama's words, how it is sampled, its system prompt."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Render = Callable[[list[dict[str, str]], bool], str]
SYSTEM, USER, ANSWER = "one system", "two user", "three answer"  # told apart from each other and from any template
PROBES = (("system", "user"), ("system", "user", "assistant", "user"), ("system", "user", "assistant"))
TEXTS = {"system": SYSTEM, "user": USER, "assistant": ANSWER}


def chat_parts(render: Render, start_token: str = "") -> tuple[str, str, str] | None:
    """What stands before, between and behind role and text of every message of a ChatML-like template.

    Args:
        render: Chat messages, and whether an answer is to follow, to text.
        start_token: What may stand in front of everything; it is left out, as Ollama adds it itself.

    Returns:
        (before the role, between role and text, behind the text), or None where the template is no such one.
    """
    system, user = ({"role": role, "content": TEXTS[role]} for role in ("system", "user"))
    try:
        text = render([system, user], False)
    except Exception:  # a template may refuse a conversation, in words of its own
        return None
    head, found, rest = text.partition(SYSTEM)
    close_open, also, tail = rest.partition(USER)
    if not (found and also and "system" in head and "user" in close_open):
        return None
    front, _, middle = head.rpartition("system")
    before_user, _, between = close_open.rpartition("user")
    if middle != between:
        return None
    close = tail
    opening = before_user.removeprefix(close)
    start = front.removesuffix(opening)
    if not close or not before_user.startswith(close) or start not in ("", start_token):
        return None
    for roles in PROBES:
        messages = [{"role": role, "content": TEXTS[role]} for role in roles]
        asked = roles[-1] == "user"
        told = "".join(f"{opening}{role}{middle}{TEXTS[role]}{close}" for role in roles)
        told += f"{opening}assistant{middle}" if asked else ""
        try:
            if render(messages, asked) != start + told:
                return None
        except Exception:
            return None
    return opening, middle, close


def go_template(parts: tuple[str, str, str]) -> str:
    """The same template in Go's template language, as Ollama reads it."""
    opening, middle, close = parts
    return (
        f"{{{{ range .Messages }}}}{opening}{{{{ .Role }}}}{middle}{{{{ .Content }}}}{close}{{{{ end }}}}"
        f"{opening}assistant{middle}"
    )


def modelfile(
    parts: tuple[str, str, str] | None, *, system: str | None, parameters: Mapping[str, Any], stops: Sequence[str]
) -> str:
    """The text of a Modelfile.

    Args:
        parts: Of the chat template, from `chat_parts`.
        system: The system message of every prompt; None where prompts have none in common.
        parameters: Ollama's sampling parameters.
        stops: Texts that end an answer.
    """
    lines = ["FROM ."]
    if parts is None or any('"""' in part or "{{" in part for part in parts):
        lines.append(
            "# The chat template (chat_template.jinja) cannot be said in Ollama's words: no TEMPLATE. Ollama then"
        )
        lines.append("# guesses one; compare its prompts with the tokenizer's before you trust its answers.")
    else:
        lines.append(f'TEMPLATE """{go_template(parts)}"""')
    lines += [f"PARAMETER {name} {value}" for name, value in parameters.items()]
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    if system is None or '"""' in system:
        lines.append("# The prompts have no system message in common that could be said here: no SYSTEM.")
    else:
        lines.append(f'SYSTEM """{system}"""')
    return "\n".join(lines) + "\n"
