"""The code blocks of README.md and how each is run.

A fence is ```bash, ```python (both are run) or ```text, ```json (output samples and the like: not run).
A comment on the line before a bash or python fence says who runs it:

    (none)               the default tests, in README order, all in one folder
    <!-- run: slow -->   the slow suite, which runs the default blocks too
    <!-- run: setup -->  CI, each block in a clean clone of its own
    <!-- run: test -->   CI, last, in the first setup block's clone: the README's test command

CI calls this file with a bare Python, so it needs nothing but the standard library:

    python tests/readme_blocks.py setup CLONE FOLDER   each in a clone, FOLDER/setup-1 (which stays), ...
    python tests/readme_blocks.py test FOLDER          run the test block in FOLDER
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

README = Path(__file__).resolve().parents[1] / "README.md"
RUN = ("bash", "python")
NOT_RUN = ("text", "json")
KINDS = ("slow", "setup", "test")


class Block(NamedTuple):
    line: int  # of the opening fence, from 1
    language: str
    kind: str  # default, slow, setup, test, or sample (not run)
    text: str

    def __str__(self) -> str:
        return f"README.md:{self.line} ({self.kind})\n{self.text}"


def parse(markdown: str) -> list[Block]:
    """All fenced blocks, in order.

    Raises:
        ValueError: a fence or comment that is none of the known ones, so that no block is left out by a typo.
    """
    blocks = []
    lines = markdown.splitlines()
    comment = ""  # the kind that the line before names
    i = 0
    while i < len(lines):
        line, where = lines[i], f"README.md:{i + 1}: {lines[i]!r}"
        i += 1
        if line.startswith("```"):
            language, start = line[3:], i
            while i < len(lines) and lines[i] != "```":
                i += 1
            if i == len(lines):
                raise ValueError(f"{where} is never closed by a line that is just ```")
            if language not in RUN + NOT_RUN:
                raise ValueError(f"{where}: a fence takes one of {', '.join(RUN + NOT_RUN)}")
            if comment and language in NOT_RUN:
                raise ValueError(f"{where} is not run, but the comment before it says {comment!r}")
            kind = "sample" if language in NOT_RUN else comment or "default"
            blocks.append(Block(start, language, kind, "\n".join(lines[start:i]) + "\n"))
            comment = ""
            i += 1
        elif comment:
            raise ValueError(f"{where}: a run comment stands on the line right before a fence")
        elif line.lstrip(" >").startswith(("```", "~~~")):
            raise ValueError(f"{where}: a fence starts its line, with ```")
        elif "<!--" in line and "run" in line:
            match = re.fullmatch(r"<!-- run: (\w+) -->", line)
            if match is None or match[1] not in KINDS:
                raise ValueError(f"{where}: it takes <!-- run: KIND -->, KIND one of {', '.join(KINDS)}")
            comment = match[1]
    if comment:
        raise ValueError("README.md ends with a run comment and no fence")
    return blocks


def command(block: Block) -> list[str]:
    """What runs the block as a person would who pastes it, stopping at the first line that fails."""
    if block.language == "bash":
        return ["bash", "-euo", "pipefail", "-c", block.text]
    return ["python", "-c", block.text]


def run(block: Block, folder: Path) -> None:
    print(f"\n-- {block}-- in {folder}", flush=True)
    status = subprocess.run(command(block), cwd=folder).returncode
    if status:
        sys.exit(f"README.md:{block.line} ended with exit status {status}")


def main(arguments: list[str]) -> None:
    of_kind: dict[str, list[Block]] = {kind: [] for kind in KINDS}
    for block in parse(README.read_text(encoding="utf-8")):
        of_kind.setdefault(block.kind, []).append(block)
    if not of_kind["setup"] or len(of_kind["test"]) != 1:
        sys.exit("README.md needs setup blocks and exactly one test block")
    match arguments:
        case ["setup", clone, folder]:
            for number, block in enumerate(of_kind["setup"], start=1):
                target = Path(folder, f"setup-{number}")
                subprocess.run(["git", "clone", "--quiet", clone, str(target)], check=True)
                run(block, target)
                if number > 1:  # an environment takes 2 GB
                    shutil.rmtree(target)
        case ["test", folder]:
            run(of_kind["test"][0], Path(folder))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
