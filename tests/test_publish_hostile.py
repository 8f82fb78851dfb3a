"""A card is made of records that somebody else may have written: whatever they hold is shown, and nothing of it works."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from benchmarks.fuzz_convert import damaged
from tests.folders import save_tiny
from tests.records import compare, evaluate, report
from tests.test_publish import card, copied
from tests.uptraining import QUIET
from upfit import provenance
from upfit.checkpoint.source import teacher_source
from upfit.convert.conversion import Settings, convert
from upfit.convert.recipe import find_recipes
from upfit.errors import UpfitError
from upfit.evaluate.options import Options as EvaluateOptions
from upfit.publish import front
from upfit.publish.card import BEGIN, END
from upfit.publish.markdown import code, harmless, model_link, plain

ATTACKS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[press](javascript:alert(1))",
    "![x](javascript:alert(1))",
    "<javascript:alert(1)>",
    "[x]: javascript:alert(1)",
    f"{END}\n<b>out</b>\n{BEGIN}",
    "---\nlicense: mit\n---",
    "a | b | c\n| d |",
    "`` ` ``<i>x</i>`",
    "\n\n# A heading\n\n* a list\n\n> said\n\n```html\n<b>",
    "&lt;script&gt; &amp; *bold* _slanted_ ~~gone~~",
    "{{ 1/0 }}{% raw %}",
    "\\`<i>x</i>\\`",
    "1. first",
]
KEPT = {"h1", "h2", "p", "table", "thead", "tbody", "tr", "th", "td", "strong", "ol", "ul", "li", "pre", "code", "a", "br"}


def page_of(text: str) -> str:
    return str(MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(front.split(text)[1]))


def elements(page: str) -> list[tuple[str, dict[str, Any]]]:
    from html.parser import HTMLParser

    found: list[tuple[str, dict[str, Any]]] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            found.append((tag, dict(attrs)))

    Reader().feed(page)
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("made")
    save_tiny(place / "source")
    recipe = find_recipes()["gqa"]
    options = recipe.options(kv_heads=2, method="mean")
    convert(recipe, str(place / "source"), place / "small", options, Settings(), QUIET)
    (place / "text.txt").write_text("so many words and more of them. " * 40, encoding="utf-8")
    measured = EvaluateOptions(data=[str(place / "text.txt")], length=32, windows=4, record=True, dtype="float32")
    evaluate(str(place / "small"), measured, QUIET)
    return place / "small"


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return copied(made, tmp_path / "small")


def attacked(value: Any, attack: str) -> Any:
    """The records with `attack` in every text that is not looked up."""
    if isinstance(value, dict):
        kept = ("verb", "path", "sha256", "revision", "fingerprint")
        return {key: part if key in kept else attacked(part, attack) for key, part in value.items()}
    if isinstance(value, list):
        return [attacked(part, attack) for part in value]
    return attack + value if isinstance(value, str) else value


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_in_a_recipe_works_in_the_card(folder: Path, attack: str) -> None:
    honest = card(folder)
    provenance.write(folder, attacked(provenance.read(folder), attack))
    text = card(folder, license="mit")
    page = page_of(text)
    tags = elements(page)
    assert {tag for tag, _ in tags} <= KEPT
    for name, attributes in tags:
        assert not [key for key in attributes if key.startswith("on")]
        assert not str(attributes.get("href", "https:")).strip().lower().startswith(("javascript", "data", "vbscript"))
        assert name != "a" or attributes["href"].startswith("https://huggingface.co/")
    assert [tag for tag, _ in tags].count("h2") == [tag for tag, _ in elements(page_of(honest))].count("h2")
    assert 0 < [tag for tag, _ in tags].count("td") == [tag for tag, _ in elements(page_of(honest))].count("td")
    assert text.count(BEGIN) == text.count(END) == 1 and text.rstrip().endswith(END)
    assert front.split(text)[0]["license"] == "mit" and "<script" not in text and "<img" not in text


def test_what_is_shown_is_what_was_written(folder: Path) -> None:
    """Escapes are seen by nobody: a reader sees the name as it is."""
    from html.parser import HTMLParser

    class Words(HTMLParser):
        said = ""

        def handle_data(self, data: str) -> None:
            self.said += data

    for attack in ATTACKS:
        for made in (plain(attack), code(attack)):
            reader = Words()
            reader.feed(MarkdownIt("commonmark", {"html": True}).enable("table").render(f"x {made} y"))
            assert reader.said.strip() == f"x {' '.join(attack.split())} y", (attack, made)


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_readme_of_the_source_runs_nothing(folder: Path, attack: str) -> None:
    steps = provenance.read(folder)
    (folder / "README.md").write_text(f"# A card\n\n<div align=center>{attack}</div>\n\n{attack}\n", encoding="utf-8")
    import hashlib

    steps[0]["readme_sha256"] = hashlib.sha256((folder / "README.md").read_bytes()).hexdigest()
    provenance.write(folder, steps)
    text = card(folder, license="mit")
    tags = elements(page_of(text))
    assert not {tag for tag, _ in tags} & {"script", "iframe", "object", "style"}
    for _, attributes in tags:
        assert not [key for key in attributes if key.startswith("on")]
        for key in ("href", "src"):
            assert not str(attributes.get(key)).lower().startswith(("javascript", "data:text"))
    assert text.count(BEGIN) == text.count(END) == 1


def test_code_in_a_readme_stays_as_it_is() -> None:
    for text in (
        "```html\n<script>go()</script>\n```\n",
        "Use `<script>` here.",
        "<p align='center'>Fine</p>",
        "a [b](https://c.d)",
    ):
        assert harmless(text) == text
    assert "<script" not in harmless("a <script>x</script> `b`") and "javascript:" not in harmless("[a](java\nscript:x)")


def test_an_id_that_is_none_is_no_link() -> None:
    assert model_link("org/model.v1") == "[org/model.v1](https://huggingface.co/org/model.v1)"
    assert "](" not in model_link("a/b](javascript:x)") and "](" not in model_link("../x")


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_in_a_recipe_works_in_the_report(folder: Path, tmp_path: Path, attack: str) -> None:
    provenance.write(folder, attacked(provenance.read(folder), attack))
    (folder / "metrics.jsonl").write_text(json.dumps({"tokens": 1, "ce": 1.0, "stage": attack}) + "\n")
    report(str(folder), tmp_path / "page.html", [], None, False)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    tags = elements(page)
    assert not {tag for tag, _ in tags} & {"script", "iframe", "object", "a", "b", "i"}
    assert all(attributes["src"].startswith("data:image/svg+xml;base64,") for tag, attributes in tags if tag == "img")
    assert not [key for _, attributes in tags for key in attributes if key.startswith("on")]


@pytest.mark.parametrize("seed", range(30))
def test_a_recipe_of_any_shape_is_told_of_or_refused(folder: Path, tmp_path: Path, seed: int) -> None:
    path = folder / provenance.FILE
    path.write_bytes(damaged(path.read_bytes(), provenance.FILE, random.Random(seed)))

    def told() -> None:
        card(folder, license="mit")

    def reported() -> None:
        report(str(folder), tmp_path / "page.html", [], None, False)

    for verb in (told, reported, lambda: compare([str(folder)]), lambda: teacher_source(folder)):
        try:
            verb()
        except UpfitError as error:
            assert "\n" not in str(error) and (provenance.FILE in str(error) or "source" in str(error))
