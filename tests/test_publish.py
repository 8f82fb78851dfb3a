"""What is published: whole and checked folders, without this machine's places, under a card that says what the records say."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from markdown_it import MarkdownIt

from tests.records import compare, evaluate, push
from tests.uptraining import QUIET, Workshop, make_workshop
from upfit import provenance
from upfit.convert.conversion import Settings, convert
from upfit.convert.recipe import find_recipes
from upfit.errors import UpfitError
from upfit.evaluate.options import Options as EvaluateOptions
from upfit.publish import front
from upfit.publish.card import BEGIN, END
from upfit.publish.licence import doubts
from upfit.publish.options import Options
from upfit.publish.portable import portable
from upfit.publish.push import pack, settle

README = "---\nlicense: apache-2.0\ntags: [poems]\nbase_model: some/other\nmodel-index: []\n---\n# The source\n\nIt | rhymes.\n"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A teacher with a card, converted (2 heads), measured, uptrained, measured again."""
    made = make_workshop(tmp_path_factory.mktemp("shop"))
    (made.teacher / "README.md").write_text(README, encoding="utf-8")
    recipe, root = find_recipes()["gqa"], made.teacher.parent
    convert(recipe, str(made.teacher), root / "small", recipe.options(kv_heads=2, method="mean"), Settings(), QUIET)
    text = root / "text.txt"
    text.write_text("so many words and more of them. " * 40, encoding="utf-8")
    options = EvaluateOptions(against=str(made.teacher), data=[str(text)], length=32, windows=4, record=True, dtype="float32")
    evaluate(str(root / "small"), options, QUIET)
    from tests.uptraining import config
    from upfit.uptrain.train import uptrain

    uptrain(str(root / "small"), str(made.data), root / "better", config(tokens="512", stages="distill"), False, False, QUIET)
    evaluate(str(root / "better"), options, QUIET)
    return made


@pytest.fixture
def folder(shop: Workshop, tmp_path: Path) -> Path:
    return copied(shop.teacher.parent / "better", tmp_path / "better")


def copied(source: Path, target: Path) -> Path:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def card(folder: Path, **settings: Any) -> str:
    made = pack(folder, "alice/poet", Options(**settings)).files["README.md"]
    assert isinstance(made, bytes)
    return made.decode()


@pytest.mark.slow
def test_no_place_of_this_machine_is_published(folder: Path) -> None:
    parcel = pack(folder, "alice/poet", Options())
    places = {str(path) for step in provenance.read(folder) for path in [step["source"].get("path")] if path}
    assert places
    for name, part in parcel.files.items():
        text = (part if isinstance(part, bytes) else part.read_bytes()).decode(errors="replace")
        assert str(folder.parent) not in text and not any(place in text for place in places), name
    record = parcel.files["recipe.json"]
    assert isinstance(record, bytes)
    told = json.loads(record)
    assert [step["verb"] for step in told["steps"]] == [step["verb"] for step in provenance.read(folder)]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"name": "a/b", "revision": None, "path": "/home/me/models--a--b/snapshots/abc"},
         {"name": "a/b", "revision": None, "commit": "abc"}),
        ({"name": "/home/me/model", "path": "/home/me/model", "revision": None}, {"name": "model", "revision": None}),
        ({"command": "upfit convert gqa /home/me/a '/home/m e/b' --calibration ~/c"},
         {"command": "upfit convert gqa a b --calibration c"}),
        (["/a/b.txt", "C:\\me\\b.txt", "a/b", "3 / 4", "see https://x.y/z", "from ['/srv/w/t'] on", 1.5],
         ["b.txt", "b.txt", "a/b", "3 / 4", "see https://x.y/z", "from ['t'] on", 1.5]),
    ],
)  # fmt: skip
def test_paths_become_names(given: Any, wanted: Any) -> None:
    assert portable(given) == wanted
    assert portable(portable(given)) == portable(given), "a published history can be published again"


@pytest.mark.slow
def test_the_card_says_what_the_records_say(folder: Path) -> None:
    text = card(folder)
    steps = provenance.read(folder)
    for step in steps:
        if step["verb"] == "evaluate":
            assert f"{step['measurements']['model']['loss']['nats_per_token']['mean']:.4f}" in text
    uptrained = steps[2]["measurements"]["holdout"]
    assert f"{uptrained['before']['ce']:.3f} → {uptrained['after']['ce']:.3f}" in text
    assert "arXiv 2305.13245" in text and 'from_pretrained("alice/poet")' in text and "trust_remote_code" not in text


def test_the_card_is_what_the_hub_reads(folder: Path) -> None:
    read = ModelCard(card(folder, base_model="bob/poet", license="mit")).data.to_dict()
    assert read["base_model"] == "bob/poet" and read["base_model_relation"] == "finetune"
    assert read["license"] == "apache-2.0", "what the README says of its licence stays"
    assert read["tags"] == ["poems", "upfit", "gqa", "arxiv:2305.13245"] and read["library_name"] == "transformers"
    results = {result.metric_type: result.metric_value for result in model_index_to_eval_results(read["model-index"])[1]}
    loss = provenance.read(folder)[-1]["measurements"]["model"]["loss"]
    assert results["loss"] == round(loss["nats_per_token"]["mean"], 4)
    assert results["perplexity"] == round(loss["perplexity"]["mean"], 4)


def test_the_card_renders(folder: Path) -> None:
    page = MarkdownIt("commonmark").enable("table").render(front.split(card(folder))[1])
    tables = re.findall(r"<table>.*?</table>", page, re.DOTALL)
    for table in tables:
        widths = {len(re.findall(r"<t[hd]", row)) for row in re.findall(r"<tr>.*?</tr>", table, re.DOTALL)}
        assert len(widths) == 1, "every row has the cells of its head"
    assert len(tables) == 2 and page.count("<h2>") == 6 and "{{" not in page and "|---" not in page


def test_what_the_source_says_of_itself_is_not_said_of_the_result(folder: Path) -> None:
    told, body = front.split(card(folder))
    assert "base_model" not in told, "where the source came from is not where the result came from"
    assert "## The card of the model that it was made from" in body and body.rstrip().endswith("It | rhymes.")


def test_words_of_the_user_are_kept(folder: Path) -> None:
    mine = f"---\nlicense: mit\nmine: 1\n---\nBefore.\n{BEGIN}\nof yore\n{END}\nAfter.\n"
    (folder / "README.md").write_text(mine, encoding="utf-8")
    told, body = front.split(card(folder))
    assert told["mine"] == 1 and told["license"] == "mit" and "of yore" not in body
    assert body.startswith("Before.\n") and body.endswith("\nAfter.\n") and "# poet" in body
    (folder / "README.md").write_text("Words alone.\n", encoding="utf-8")
    assert front.split(card(folder))[1].endswith("\n\nWords alone.\n")
    (folder / "README.md").write_text("---\n[broken\n---\n", encoding="utf-8")
    with pytest.raises(UpfitError, match="not YAML"):
        card(folder)


def test_weights_that_were_not_measured_are_not_praised(folder: Path) -> None:
    provenance.write(folder, provenance.read(folder)[:3])
    text = card(folder)
    assert "model-index" not in text and "these very weights were not measured" in text
    provenance.write(folder, provenance.read(folder)[:1])
    assert "Nothing yet: no evaluation is recorded" in card(folder)


def test_unfinished_folders_and_foreign_ones_do_not_go(folder: Path, shop: Workshop) -> None:
    with pytest.raises(UpfitError, match="nothing to make a model card of"):
        pack(shop.teacher, "alice/poet", Options())
    partial = copied(folder, folder.with_name("better.upfit-work"))
    with pytest.raises(UpfitError, match="unfinished run"):
        pack(partial, "alice/poet", Options())
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(UpfitError):
        pack(folder, "alice/poet", Options())


def test_an_unverified_folder_is_asked_about(folder: Path) -> None:
    steps = provenance.read(folder)[:1]
    steps[0]["measurements"].pop("verify", None)
    provenance.write(folder, steps)
    found = pack(folder, "alice/poet", Options()).doubts
    assert len(found) == 1 and "--no-verify" in found[0]


def test_what_is_not_the_models_stays_here(folder: Path) -> None:
    (folder / "secrets.txt").write_text("hush", encoding="utf-8")
    (folder / "evil.py").write_text("1/0", encoding="utf-8")
    parcel = pack(folder, "alice/poet", Options())
    assert parcel.left_out == ["evil.py", "secrets.txt", "uptrain.toml"] and not set(parcel.left_out) & set(parcel.files)
    (folder / "tokenizer.model").symlink_to("/etc/passwd")
    with pytest.raises(UpfitError, match="outside the model folder"):
        pack(folder, "alice/poet", Options())


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"license": "apache-2.0"}, ""),
        ({}, "names no licence"),
        ({"license": "cc-by-nc-nd-4.0"}, "forbids publishing"),
        ({"license": "other", "license_name": "llama3.2"}, "Built with Llama"),
        ({"license": "llama3.1"}, "Built with Llama"),
        ({"license": "gemma"}, "terms of use"),
        ({"license": "cc-by-nc-4.0"}, "no commercial use"),
    ],
)
def test_licences_are_read(told: dict[str, Any], said: str) -> None:
    found = doubts(told, False)
    assert said in found[0] if said else not found


def test_a_doubt_is_asked_about_or_ends_the_push() -> None:
    asked: list[str] = []

    def yes(question: str) -> bool:
        asked.append(question)
        return True

    settle(["this", "that"], Options(), yes)
    assert [question.split(".")[0] for question in asked] == ["this", "that"]
    settle(["this"], Options(yes=True), None)
    for ask in (None, lambda question: False):
        with pytest.raises(UpfitError, match="not published: this"):
            settle(["this"], Options(), ask)


def test_a_dry_run_asks_the_hub_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upfit.publish.hub.connect", lambda: 1 / 0)
    [answer] = push(str(folder), "alice/poet", Options(dry_run=True), None, QUIET)
    assert answer["files"]["model.safetensors"] == (folder / "model.safetensors").stat().st_size
    assert answer["bytes"] == sum(answer["files"].values()) and answer["doubts"] == []


def test_the_home_folder_is_known(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    options = Options(dry_run=True, card=Path("~/card.md"))
    [answer] = push(f"~/{folder.name}", "alice/poet", options, None, QUIET)
    assert answer["files"] and (folder.parent / "card.md").exists()
    with pytest.raises(UpfitError, match="exists; give another name"):
        push(f"~/{folder.name}", "alice/poet", options, None, QUIET)


def test_every_model_of_a_folder_gets_a_name(shop: Workshop, tmp_path: Path) -> None:
    for name in ("one", "two"):
        copied(shop.teacher.parent / "better", tmp_path / name)
    for repo, names in (("alice", ["alice/one", "alice/two"]), ("alice/poet", ["alice/poet-one", "alice/poet-two"])):
        answers = push(str(tmp_path), repo, Options(dry_run=True, all=True), None, QUIET)
        assert [answer["repo"] for answer in answers] == names
    with pytest.raises(UpfitError, match="give USER/NAME"):
        push(str(tmp_path / "one"), "alice", Options(dry_run=True), None, QUIET)


def test_compared_models_share_a_table_only_when_they_were_measured_on_the_same_text(shop: Workshop) -> None:
    root = shop.teacher.parent
    told = compare([str(root / "small"), str(root / "better"), str(shop.teacher)])
    assert [[row[0] for row in group["rows"]] for group in told] == [["small", "better"], [shop.teacher.name]]
    trained = provenance.read(root / "better")[2]["measurements"]["tokens"]
    assert told[0]["rows"][1][4] == str(trained) and told[1]["rows"][0][5] == ""
