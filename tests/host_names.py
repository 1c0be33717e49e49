"""What the nodes use of the host, read from their own sources: for the day on which the host is newer than this one.

    python tests/host_names.py COMFYUI                # each of the host's modules, and the names that are used of it
    python tests/host_names.py COMFYUI --newer FOLDER # those that files of a newer host, laid out alike, no longer have

Names of modules are found by their imports. What is used of the host's objects (patchers, guiders, layers, options)
has no import: any attribute, keyword or string of ours that is a name in a module's file here should be one there.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import keyword
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from loading import ROOT

HOSTS = ("comfy", "comfy_api", "comfy_extras", "comfy_execution", "folder_paths", "latent_preview", "nodes", "server")
WORD = re.compile(r"[A-Za-z_]\w*")


def sources() -> Iterator[tuple[Path, ast.Module]]:
    """The packed Python files."""
    for path in (ROOT / "__init__.py", *sorted((ROOT / "nodes").rglob("*.py"))):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def file_of(dotted: str, host: Path) -> Path | None:
    """The file of one of the host's modules."""
    base = host.joinpath(*dotted.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


def imported(host: Path) -> dict[str, set[str]]:
    """By module: the names that are taken from it, as `module.name` or `from module import name`."""
    found: dict[str, set[str]] = defaultdict(set)
    for _, tree in sources():
        aliases: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for one in node.names:
                    if one.name.split(".")[0] in HOSTS:
                        found[one.name] |= set()
                        aliases[one.asname or one.name.split(".")[0]] = (
                            one.name if one.asname else one.name.split(".")[0]
                        )
            elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] in HOSTS:
                for one in node.names:
                    whole = f"{node.module}.{one.name}"
                    aliases[one.asname or one.name] = whole
                    if file_of(whole, host) is None:
                        found[str(node.module)].add(one.name)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                first, *rest = ast.unparse(node).split(".")
                if first not in aliases:
                    continue
                dotted = ".".join([aliases[first], *rest])
                module, _, name = dotted.rpartition(".")
                if file_of(module, host) is not None and file_of(dotted, host) is None:
                    found[module].add(name)
    return found


def words() -> set[str]:
    """Every attribute, keyword and string of the engine's that may be a name of the host's."""
    found: set[str] = set()
    for path, tree in sources():
        if "methods" in path.parts or "measuring" in path.parts:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                found.add(node.attr)
            elif isinstance(node, ast.keyword) and node.arg:
                found.add(node.arg)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and WORD.fullmatch(node.value):
                found.add(node.value)
    return {word for word in found if not keyword.iskeyword(word) and not hasattr(builtins, word) and len(word) > 2}


def defined(path: Path) -> set[str]:
    """The names in a file that are its own: functions, classes, arguments, what is assigned, and keys."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {(one.asname or one.name).split(".")[0] for one in node.names}
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and WORD.fullmatch(node.value):
            found.add(node.value)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("host", type=Path)
    parser.add_argument("--newer", type=Path)
    arguments = parser.parse_args()
    of_objects = words()
    for module, names in sorted(imported(arguments.host).items()):
        path = file_of(module, arguments.host)
        if path is None:
            print(f"{module}: not a module of this host: {', '.join(sorted(names))}")
            continue
        others = defined(path) & of_objects - names
        newer = arguments.newer and arguments.newer / path.relative_to(arguments.host)
        if newer is None:
            print(f"{module}: {', '.join(sorted(names))}\n    and of its objects: {', '.join(sorted(others))}")
        elif newer.is_file():
            there = set(WORD.findall(newer.read_text(encoding="utf-8")))
            gone, gone_too = sorted(names - there), sorted(others - there)
            print(f"{module}: {len(names | others)} names, gone: {', '.join(gone + gone_too) or 'none'}")


if __name__ == "__main__":
    main()
