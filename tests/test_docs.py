"""The site's API pages hold every public name once. (`make docs` builds the site, and fails at every warning.)"""

import collections
import pathlib
import re

import pytest

import optax_mtl as mtl

DOCS = pathlib.Path(mtl.__file__).parent.parent / "docs"
API = sorted((DOCS / "api").glob("*.md"))
PAGES = sorted(DOCS.glob("*.md"))


def described(page):
    return re.findall(r"^\.\. auto(?:function|class):: (\w+)$", page.read_text(), flags=re.MULTILINE)


def test_every_public_name_is_on_exactly_one_page():
    names = collections.Counter(name for page in API for name in described(page))
    assert set(mtl.__all__) - set(names) == set(), "add these to a page in docs/api"
    assert set(names) - set(mtl.__all__) == set(), "these are not public"
    assert [name for name, times in names.items() if times > 1] == []


@pytest.mark.parametrize("page", API, ids=lambda page: page.stem)
def test_the_table_at_the_head_of_a_page_has_what_the_page_has(page):
    table = re.search(r"\.\. autosummary::\n   :nosignatures:\n\n((?:   \w+\n)+)", page.read_text())
    assert (table[1].split() if table else []) == described(page)


def test_every_page_is_in_a_table_of_contents():
    text = "".join(page.read_text() for page in [*PAGES, *API])
    entries = [
        line for tree in re.findall(r"```{toctree}\n(.*?)```", text, flags=re.DOTALL) for line in tree.split("\n")
    ]
    for page in [*PAGES, *API]:
        if page != DOCS / "index.md":
            inside = page.parent == DOCS / "api" and page.stem != "index"
            assert (page.stem if inside else page.relative_to(DOCS).with_suffix("").as_posix()) in entries, page
