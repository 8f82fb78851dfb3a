"""What a source's licence says about publishing a model made from it. A reminder for people, no legal advice."""

from typing import Any

FORBIDDEN = ("cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0")
# How the id of a licence begins, and what its holder asks of those who publish a derived model.
CONDITIONS = (
    ("llama", "asks for 'Built with Llama' to be shown and for names that begin with Llama"),
    ("gemma", "asks for Gemma's terms of use to be passed on"),
    ("cc-by-nc", "allows no commercial use"),
    ("cc-by-sa", "asks for the same licence"),
    ("other", "has terms of its own"),
)


def doubts(settings: dict[str, Any], licence_files: bool) -> list[str]:
    """Questions to be settled before publishing, of the front matter `settings` of a card; empty when there are none.

    `licence_files`: whether the folder carries the licence's text.
    """
    licence = str(settings.get("license") or "").lower()
    if not licence:
        named = "its text is in the folder" if licence_files else "and there is no licence file"
        return [f"the card names no licence ({named}); name it with --license, if the source's allows publishing"]
    if licence in FORBIDDEN:
        return [f"the licence {licence} forbids publishing what is derived from the source"]
    name = str(settings.get("license_name") or licence).lower()
    return [f"the licence {name} {what}; see that it is so" for begins, what in CONDITIONS if name.startswith(begins)]
