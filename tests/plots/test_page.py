"""The page: self-contained, escaped, complete."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from cellpatch_fast import InputError
from cellpatch_fast.plots.page import Section, write_page

VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; every tag that is opened is closed, in order."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def figure() -> Figure:
    made = Figure(figsize=(2, 1))
    made.add_subplot().set_title("drawn")
    return made


def images(page: Page) -> list[tuple[str, bytes]]:
    """Media type and content of every image."""
    sources = [str(attributes["src"]) for tag, attributes in page.tags if tag == "img"]
    found = [re.fullmatch("data:(.*);base64,(.*)", source) for source in sources]
    return [(match[1], base64.b64decode(match[2])) for match in found if match]


def test_page_holds_everything_and_fetches_nothing(tmp_path: Path) -> None:
    figure().savefig(tmp_path / "a.png")
    figure().savefig(tmp_path / "b.svg")
    shown: dict[str, Figure | str | Path] = {
        "made": figure(),
        "png": tmp_path / "a.png",
        "svg": str(tmp_path / "b.svg"),
    }
    sections = [Section("Figures", figures=shown), Section("Words", "One.\nTwo.\n\nThree.")]
    write_page(tmp_path / "page.html", "Result", sections)
    source = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(source)
    assert [kind for kind, _ in images(page)] == ["image/svg+xml", "image/png", "image/svg+xml"]
    assert b">drawn</text>" in images(page)[0][1]
    assert images(page)[1][1] == (tmp_path / "a.png").read_bytes()
    assert [tag for tag, _ in page.tags if tag in ("script", "link", "iframe", "a")] == []
    assert not re.search(r"url\(|@import|https?://", source)
    assert source.count("<p>") == 2
    assert "prefers-color-scheme: dark" in source
    assert "@media print" in source


def test_text_from_outside_is_never_markup(tmp_path: Path) -> None:
    hostile = "<script>alert('1')</script> & \"Zürich\""
    table = pd.DataFrame({hostile: [hostile]}, index=pd.Index([hostile], name=hostile))
    section = Section(hostile, hostile, {hostile: figure()}, {hostile: table})
    write_page(tmp_path / "page.html", hostile, [section])
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "script" not in [tag for tag, _ in page.tags]
    assert page.text.count(hostile) == 10  # 2 titles, heading, text, 2 captions, 4 in the table
    (alt,) = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert alt == hostile


def test_tables_are_complete(tmp_path: Path) -> None:
    names = pd.Index(["long " * 40, "b", *map(str, range(150))], name="class")
    scores = pd.DataFrame({"f1": 0.123456, "cells": 12345}, index=names)
    scores.loc["b", "f1"] = np.nan
    mixed = pd.DataFrame({"value": ["word " * 40, 3, None, 0.5]})
    tables = {"scores": scores, "settings": mixed}
    write_page(tmp_path / "page.html", "Tables", [Section("All", tables=tables)])
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    text = [part.strip() for part in page.text]
    assert {("long " * 40).strip(), ("word " * 40).strip(), "149", "class"} <= set(text)
    assert text.count("0.123") == 151
    assert text.count("12345") == 152
    assert text.count("–") == 2
    assert "0.500" in text
    kinds = [attributes["class"] for tag, attributes in page.tags if tag == "table"]
    assert kinds == ["dataframe numbers", "dataframe texts"]


def test_a_page_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    write_page(path, "old", [])
    old = path.read_bytes()
    with pytest.raises(InputError, match=r"a\.pdf is neither \.svg nor \.png"):
        write_page(path, "new", [Section("x", figures={"a": tmp_path / "a.pdf"})])
    with pytest.raises(FileNotFoundError, match=r"missing\.png"):
        write_page(path, "new", [Section("x", figures={"a": tmp_path / "missing.png"})])
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]
