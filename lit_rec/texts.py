"""Texts from elsewhere."""


def whole_text(text: str) -> str:
    r"""A text that can be written: JSON may hold halves of surrogate pairs, which no encoding has.

    >>> whole_text("\ud83c\udfac \ud800") == "\U0001f3ac \ufffd"
    True
    """
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def printable(text: str) -> str:
    r"""A text without what a terminal would obey.

    >>> printable("Alien \x1b[2J")
    'Alien  [2J'
    """
    return "".join(c if c.isprintable() else " " for c in text)
