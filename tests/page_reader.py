"""A page as tests look at it."""

from html.parser import HTMLParser


class Reader(HTMLParser):
    """What a page consists of: each `data` value with its text, scripts, ids, addresses, rows as lists of cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.values: list[float] = []
        self.rows: list[list[str]] = []
        self.inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        self.ids += [str(given["id"])] if given.get("id") else []
        self.links += [str(given[key]) for key in ("href", "src") if given.get(key)]
        if tag == "data":
            self.values.append(float(str(given["value"])))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.inside.pop()

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] = " ".join(f"{self.rows[-1][-1]} {data}".split())
