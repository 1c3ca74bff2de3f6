"""What the pages show is what was measured, and their links lead somewhere."""

import re

import pytest

from experiments.numbers import NUMBERS
from experiments.readme import PAGES, README, filled_in

each_page = pytest.mark.parametrize(
    "path", PAGES, ids=[f"{path.parent.name}/{path.name}" for path in PAGES]
)


@each_page
def test_every_table_and_number_is_written_from_results(path):
    text = path.read_text()
    assert filled_in(text) == text
    # At the beginning of a line, a comment would end the paragraph.
    assert not re.findall(r"^<!-- number.*", text, flags=re.MULTILINE)


def test_every_number_is_used():
    text = "".join(path.read_text() for path in PAGES)
    assert set(re.findall(r"<!-- number: (\w+) -->", text)) == set(NUMBERS)


def test_what_has_not_been_measured_is_not_made_up():
    marker = "<!-- number: unknown -->1×<!-- end -->"
    with pytest.raises(KeyError, match="unknown"):
        filled_in(marker)


@each_page
def test_links_lead_somewhere(path):
    prose = re.sub(r"```.*?```|`[^`]*`", "", path.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", prose):
        name, _, section = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        if section:
            heads = re.findall(r"^#+ (.*)$", target.read_text(), flags=re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", head.lower()) for head in heads]
            assert section in [slug.replace(" ", "-") for slug in slugs], link


@each_page
def test_pictures_have_alternative_texts(path):
    for text in re.findall(r"!\[(.*?)\]\(", path.read_text(), flags=re.DOTALL):
        assert len(text.split()) >= 5, text


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= 150
