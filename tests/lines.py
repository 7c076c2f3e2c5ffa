"""How large the project is: ``python tests/lines.py`` prints lines, and how many of them are code, per package.

Code is what is neither blank, nor comment, nor docstring. The budgets are held by `tests/unit/test_tree.py`.
"""

import ast
import io
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[1]
_NOT_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
#: at most so many lines in all; 1,300 are for Hugging Face: its doors, any decoder, the sweeps on it; 900 for CompleteP
#: with experts and what else large models have; 1,500 for all modes in Megatron's loop and for Megatron-Bridge
BUDGETS = {
    ("ds_plugin", "megatron_patches"): 14_000 + 1_300 + 900 + 1_500,
    ("ds_plugin/deepspeed_engine/json_check.py",): 120,
    ("ds_plugin/sequence_length_warmup/translate.py",): 120,
    ("ds_plugin/tune",): 250,
    ("benchmarks",): 3_400,
}


def lines(path: Path) -> tuple[int, int]:
    """(all lines, lines of code) of a Python file."""
    text = path.read_text(encoding="utf-8")
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _NOT_CODE:
            code |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if ast.get_docstring(node, clean=False) is not None else None
            if first is not None:
                code -= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return len(text.splitlines()), len(code)


def count(folder: Path) -> tuple[int, int]:
    """The sums over a folder's Python files."""
    found = [lines(path) for path in sorted(folder.rglob("*.py"))]
    return sum(all_ for all_, _ in found), sum(code for _, code in found)


def spent() -> dict[str, tuple[int, int]]:
    """The lines of what has a budget, and how many there may be."""
    found = {}
    for names, most in BUDGETS.items():
        paths = [
            path
            for name in names
            for path in ((ROOT / name).rglob("*.py") if (ROOT / name).is_dir() else [ROOT / name])
        ]
        found[" + ".join(names)] = (sum(len(path.read_text("utf-8").splitlines()) for path in paths), most)
    return found


def main() -> int:
    """Print a table; 1 when a budget is broken."""
    for folder in ("ds_plugin", "megatron_patches", "launch_scripts", "benchmarks", "tests"):
        parts = sorted(p for p in (ROOT / folder).iterdir() if p.is_dir() and p.name != "__pycache__")
        for part in [ROOT / folder, *(parts if folder in ("ds_plugin", "megatron_patches") else [])]:
            every, code = count(part)
            print(f"{str(part.relative_to(ROOT)):<46} {every:>7} lines {code:>7} of code")
    for name, (found, most) in spent().items():
        print(f"{name:<46} {found:>7} lines, at most {most}")
    return int(any(found > most for found, most in spent().values()))


if __name__ == "__main__":
    sys.exit(main())
