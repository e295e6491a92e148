"""What the README shows is true: its Python runs, its table of flags is the program's. Run this
file to renew the table."""

import re
from pathlib import Path

from tfloop.cli import flag, help_text
from tfloop.config import FIELDS, GROUPS

README = Path(__file__).parent.parent / "README.md"


def flag_table() -> str:
    lines = ["| flag and default | meaning |", "| --- | --- |"]
    for group, names in GROUPS.items():
        lines.append(f"| **{group}** | |")
        for name in names:
            default = FIELDS[name].default
            state = (" (on)" if default else " (off)") if isinstance(default, bool) else ""
            lines.append(
                f"| `{flag(name, default)}`{state} | "
                f"{help_text(name).replace('|', chr(92) + '|')} |"
            )
    return "\n".join(lines)


def test_the_table_of_flags_is_the_programs():
    assert flag_table() in README.read_text(encoding="utf-8")


def test_the_python_runs_as_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    table = re.compile(r"\| flag and default \| meaning \|\n.*?(?=\n\n)", re.DOTALL)
    README.write_text(table.sub(lambda _: flag_table(), text), encoding="utf-8")
