"""What is shown of addresses: never who asks, nor with which word."""

from pathlib import Path

import pytest

from upfit.addresses import id_and_revision, public, redacted


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("org/model", ("org/model", None)),
        ("org/model@v1/a@b", ("org/model", "v1/a@b")),
        ("gpt2@", ("gpt2", None)),
        ("", ("", None)),
    ],
)
def test_a_hub_name_is_an_id_and_perhaps_a_revision(name: str, parts: tuple[str, str | None]) -> None:
    assert id_and_revision(name) == parts


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://user:secret@host.org:8000/v1", "https://host.org:8000/v1"),
        ("http://user@host/v1", "http://host/v1"),
        ("http://:secret@host/v1", "http://host/v1"),
        ("https://user:pa/ss@w?r#d@host/v1", "https://host/v1"),
        ("https://host/v1?api_key=secret&x=1#top", "https://host/v1"),
        ("http://localhost:8000/v1", "http://localhost:8000/v1"),
        ("https://huggingface.co/org/model", "https://huggingface.co/org/model"),
        ("no address", "no address"),
        ("socks5h://u:p@[::1]:80", "socks5h://[::1]:80"),
    ],
)
def test_an_address_is_shown_without_who_asks(address: str, shown: str) -> None:
    assert public(address) == shown == public(shown)
    assert redacted(f"({address}) does not answer") == f"({shown}) does not answer" or address.endswith(("top", "]:80"))


def test_tokens_and_keys_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "correct horse battery")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false but long enough")
    text = "no: hf_abcDEF123456, sk-proj-12345678, Authorization: Bearer abc.def, correct horse battery; false but long enough"
    shown = redacted(text)
    for secret in ("hf_abc", "sk-proj", "abc.def", "correct horse"):
        assert secret not in shown
    assert shown.endswith("false but long enough") and "\n" not in shown
    assert redacted("quantised (by its hf_quant_config.json)") == "quantised (by its hf_quant_config.json)", "no token"


def test_recipes_keep_no_password() -> None:
    from upfit import provenance

    options = {"base_url": "https://me:opensesame@host/v1?key=opensesame", "texts": ["a"], "seed": 1, "shards": None}
    assert provenance.step("synth", {}, options)["options"] == {**options, "base_url": "https://host/v1"}


def test_a_server_that_stays_away_is_told_without_its_password(tmp_path: Path) -> None:
    pytest.importorskip("openai")
    from upfit.errors import UpfitError
    from upfit.longcontext.ask import backends
    from upfit.longcontext.ask.model import Request
    from upfit.longcontext.options import Options
    from upfit.output import Output

    options = Options(tokenizer="x", ask="openai", model="m", base_url="http://me:opensesame@127.0.0.1:9/v1?key=opensesame")
    answers = backends.Answers(tmp_path / "answers.jsonl")
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(backends, "RETRIES", 0)
    with monkeypatch.context(), Output(quiet=True).progress("x", 1) as meter, pytest.raises(UpfitError) as caught:
        backends.ask_server([Request(0, "?", (0,))], answers, options, meter)
    monkeypatch.undo()
    assert "opensesame" not in str(caught.value) and "http://127.0.0.1:9/v1 does not answer" in str(caught.value)
