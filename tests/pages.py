"""What tests ask of an HTML page, and what nobody should be able to put into one."""

from html.parser import HTMLParser

EVIL = (
    '</pre></div><script>alert("x")</script><img src=x onerror=alert(1)> & $x_1$ "quoted"',
    "{{ 7 * 7 }} {% raw %}",
    "\x00\x1b[31m\u202e]]>",
)
VOID = {"meta", "link", "img", "br", "hr", "input", "use", "path", "rect"}


class Page(HTMLParser):
    """Collects what a test asks of a page: elements, attributes, whether all is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
