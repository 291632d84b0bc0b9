"""README and docs are right: their examples run and print what the pages show, their links lead."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import missing_board_tools
from docs.examples import (
    PAGES,
    REPO,
    RESULTS,
    blocks,
    in_folder,
    masked,
    needs_qemu,
    run_page,
    with_results,
)

DOCUMENTS = (
    *(REPO / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted(REPO.glob("docs/**/*.md")),
)
LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)")


def _runs() -> list[object]:
    """Each page once; where the emulated boards are missing, their pages also without them."""
    params: list[object] = []
    for page in PAGES:
        name = str(page.relative_to(REPO))
        qemu = needs_qemu(page)
        if qemu:
            params.append(pytest.param(page, True, id=f"{name}-qemu", marks=pytest.mark.qemu))
        if not qemu or missing_board_tools():
            params.append(pytest.param(page, False, id=name))
    return params


@pytest.mark.slow
@pytest.mark.parametrize(("page", "qemu"), _runs())
def test_the_examples_of_a_page_run_and_print_what_it_shows(
    page: Path, qemu: bool, tmp_path: Path
) -> None:
    with in_folder(tmp_path):
        wrong = run_page(page, qemu, lambda block, text: None)
    assert not wrong, "\n".join(map(str, wrong)) + "\n(python tests/docs/examples.py --update)"


def test_every_block_names_its_language() -> None:
    assert [b.where for page in PAGES for b in blocks(page) if not b.language] == []


def test_every_verb_has_a_page_that_the_index_links() -> None:
    from modicum.cli import app

    index = (REPO / "docs" / "index.md").read_text()
    verbs = [c.name or c.callback.__name__ for c in app.registered_commands if c.callback]
    assert len(verbs) > 5
    for verb in verbs:
        assert (REPO / "docs" / f"{verb}.md").is_file(), f"docs/{verb}.md is missing"
        assert f"({verb}.md)" in index, f"docs/index.md does not link {verb}.md"


def test_every_page_is_linked_from_the_index() -> None:
    index = (REPO / "docs" / "index.md").read_text()
    linked = {target.partition("#")[0] for target in LINK.findall(index)}
    pages = {str(p.relative_to(REPO / "docs")) for p in REPO.glob("docs/**/*.md")}
    assert pages - linked - {"index.md"} == set()


def test_every_exit_code_has_a_section() -> None:
    from modicum import errors

    page = (REPO / "docs" / "errors.md").read_text()
    for name in errors.__all__:
        if name != "ModicumError":
            assert f"`{name}`" in page, name
            assert f"\n## {getattr(errors, name).exit_code}:" in page, name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(REPO)))
def test_relative_links_resolve(document: Path) -> None:
    for target in LINK.findall(document.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        page = (document.parent / path).resolve() if path else document
        assert page.exists(), f"{target} leads nowhere"
        if anchor:
            assert anchor in _anchors(page), f"{target} names no heading"


@pytest.mark.parametrize("name", ["README.md", "docs/benchmarks.md"])
def test_the_figures_of_the_benchmarks_are_those_of_the_results(name: str) -> None:
    if not list(RESULTS.glob("*.json")):
        pytest.skip("no results in benchmarks/results")
    text = (REPO / name).read_text()
    assert with_results(text) == text, f"python tests/docs/examples.py --update {name}"


def test_masking_leaves_the_words() -> None:
    assert masked("RAM  112,660 of 113,056; 3.08 M, 1.2e-05") == "RAM # of #; # M, #"


def _anchors(page: Path) -> set[str]:
    """The anchors that a rendered page has for its headings."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", title.lower()) for title in titles)
    return {title.replace(" ", "-") for title in plain}
