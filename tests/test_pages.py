"""What the pages show is true: their Python runs, their links and test names lead somewhere.

Run this file to renew the table of flags in tfloop/docs/flags.md.
"""

import re
from pathlib import Path

import pytest

import tfloop
from tfloop.cli import flag, help_text
from tfloop.config import FIELDS, GROUPS

ROOT = Path(__file__).parent.parent
FLAGS = ROOT / "tfloop" / "docs" / "flags.md"
PAGES = [
    page
    for pattern in ("*.md", ".github/*.md", "benchmarks/*.md", "tests/*.md", "tfloop/**/*.md")
    for page in sorted(ROOT.glob(pattern))
]
pytestmark = pytest.mark.quick


def named(pages: list[Path]):
    return pytest.mark.parametrize("page", pages, ids=lambda page: str(page.relative_to(ROOT)))


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text_of(page), re.DOTALL)


def without_blocks(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The targets that headings make, as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", without_blocks(text_of(page)), re.MULTILINE)
    names = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {name.replace(" ", "-") for name in names}


def flag_table() -> str:
    lines = ["| flag and default | meaning |", "| --- | --- |"]
    for group, names in GROUPS.items():
        lines.append(f"| **{group}** | |")
        for name in names:
            default = FIELDS[name].default
            state = (" (on)" if default else " (off)") if isinstance(default, bool) else ""
            meaning = help_text(name).replace("|", r"\|")
            lines.append(f"| `{flag(name, default)}`{state} | {meaning} |")
    return "\n".join(lines)


def test_the_table_of_flags_is_the_programs():
    assert flag_table() in text_of(FLAGS)


@named([page for page in PAGES if python_blocks(page)])
@pytest.mark.usefixtures("registries")
@pytest.mark.filterwarnings("ignore:.* traced again.* now trained")  # as its page says
def test_the_python_runs_as_shown(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}  # of a page, which reads on
    for block in python_blocks(page):
        exec(compile(block, page.name, "exec"), names)


@named(PAGES)
def test_every_link_between_pages_leads_somewhere(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", without_blocks(text_of(page)))
    for target in targets:
        if target.startswith(("https:", "http:")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.is_file(), f"{target} leads nowhere"
        if anchor:
            assert anchor in anchors(linked), f"{target}: there is no such heading"


def test_every_page_is_reached_from_the_readme():
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        for target in re.findall(r"\]\(([^)#\s]+)", without_blocks(text_of(page))):
            if not target.startswith("http"):
                waiting.append((page.parent / target).resolve())
    assert set(PAGES) <= reached


@named(PAGES)
def test_every_test_that_a_page_names_exists(page):
    files = {path.name: text_of(path) for path in ROOT.glob("tests/*.py")}
    functions = set(re.findall(r"def (test_\w+)", "\n".join(files.values())))
    arguments = {"test_size"}  # of from_arrays
    for name in set(re.findall(r"\btest_\w+(?:\.py)?", text_of(page))) - arguments:
        assert name in functions or name in files, f"there is no {name}"


def test_the_readme_is_finished_in_two_minutes():
    assert len(text_of(ROOT / "README.md").splitlines()) <= 200


def test_what_editors_see_is_what_there_is():
    """The names for type checkers are those that are loaded when they are first used."""
    source = text_of(ROOT / "tfloop" / "__init__.py")
    for_editors = source.partition("if TYPE_CHECKING:")[2].partition("_HOME")[0]
    imported = re.findall(r"from tfloop\.(\S+) import (\w+) as \2\n", for_editors)
    homes = {name: home for home, name in imported if name != "checks"}
    assert homes == tfloop._HOME
    for name in tfloop.__all__:
        assert getattr(tfloop, name) is not None


if __name__ == "__main__":
    table = re.compile(r"\| flag and default \| meaning \|\n.*?(?=\n\n|\Z)", re.DOTALL)
    FLAGS.write_text(table.sub(lambda _: flag_table(), text_of(FLAGS)).rstrip() + "\n", "utf-8")
