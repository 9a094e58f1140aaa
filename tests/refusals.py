"""The table of reasons in docs/refusals.md; `python -m tests.refusals` writes it anew and keeps the advice."""

from __future__ import annotations

from pathlib import Path

from scheduler.decision.reasons import OF_REQUEST, REASONS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "refusals.md"
BEGIN, END = "<!-- reasons:", "<!-- end -->"
COLUMNS = 5
NO_ADVICE = "?"


def advice(page: str) -> dict[str, str]:
    """Return what the page advises, by word."""
    rows = (line.strip("|").split("|") for line in page.splitlines() if line.startswith("| `"))
    return {row[0].strip(" `"): row[-1].strip() for row in rows if len(row) == COLUMNS}


def table(advised: dict[str, str]) -> str:
    """Return the table of all reasons."""
    rows = ["| word | class | sentence | 한국어 | what to do |", "|-|-|-|-|-|"]
    for word, reason in REASONS.items():
        text = reason.text + (f" For the whole request: `{OF_REQUEST[word]}`." if word in OF_REQUEST else "")
        rows.append(f"| `{word}` | {reason.who} | {text} | {reason.text_ko} | {advised.get(word, NO_ADVICE)} |")
    return "\n".join(rows)


def written(page: str) -> str:
    """Return the page with its table written anew."""
    head, _, rest = page.partition(BEGIN)
    comment, _, rest = rest.partition("\n")
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}{comment}\n{table(advice(page))}\n{END}{tail}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
