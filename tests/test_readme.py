"""The README's blocks do what it says. What kinds of block there are: readme_blocks.py."""

import os
import select
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from forks import write_commands
from readme_blocks import README, Block, command, parse


def run_all(blocks: list[Block], folder: Path, commands: Path | None = None) -> None:
    """Run the blocks one after the other in one empty folder, with no settings but a new user's own.

    Of the commands of this environment, those in the folder `commands` are taken first.
    Whatever goes to the network by HTTP goes to a proxy here that never answers, and is found out.
    """
    proxy = socket.create_server(("127.0.0.1", 0))
    address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
    environment = {
        "PATH": os.pathsep.join(
            [str(f) for f in (commands, Path(sys.executable).parent) if f] + [os.environ["PATH"]]
        ),
        "HOME": os.environ["HOME"],
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",  # other tests run beside this one, and threads that wait for a core spin
        **dict.fromkeys(["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"], address),
        "NO_PROXY": "localhost,127.0.0.1",
    }
    with proxy:
        for block in blocks:
            done = subprocess.run(
                command(block),
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            assert done.returncode == 0, f"{block}exit status {done.returncode}\n{done.stdout}"
            assert not select.select([proxy], [], [], 0)[0], f"{block}asks for the network\n{done.stdout}"


def test_the_blocks_work(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """With processes that need not import everything again; the slow test takes the real ones."""
    commands = tmp_path_factory.mktemp("commands")
    write_commands(commands)
    blocks = [block for block in parse(README.read_text(encoding="utf-8")) if block.kind == "default"]
    assert blocks
    run_all(blocks, tmp_path, commands)


@pytest.mark.slow
def test_the_slow_blocks_work(tmp_path: Path) -> None:
    run_all([b for b in parse(README.read_text(encoding="utf-8")) if b.kind in ("default", "slow")], tmp_path)


def test_kinds_of_block() -> None:
    readme = """# Title
<!-- run: setup -->
```bash
make train
```
<!-- a comment about other things -->
```python
print(1)
```

```text
1
```
<!-- run: slow -->
```bash
# not a heading
true
```
"""
    assert parse(readme) == [
        Block(3, "bash", "setup", "make train\n"),
        Block(7, "python", "default", "print(1)\n"),
        Block(11, "text", "sample", "1\n"),
        Block(15, "bash", "slow", "# not a heading\ntrue\n"),
    ]


@pytest.mark.parametrize(
    ("readme", "error"),
    [
        ("```\nls\n```", "a fence takes one of"),
        ("```sh\nls\n```", "a fence takes one of"),
        ("```bash \nls\n```", "a fence takes one of"),
        ("```bash\nls\n", "never closed"),
        ("  ```bash\nls\n```", "a fence starts its line"),
        ("~~~bash\nls\n~~~", "a fence starts its line"),
        ("<!-- run: solw -->\n```bash\nls\n```", "KIND one of"),
        ("<!-- run slow -->\n```bash\nls\n```", "KIND one of"),
        ("<!-- run: slow -->\n\n```bash\nls\n```", "right before a fence"),
        ("<!-- run: slow -->\n```text\nls\n```", "is not run"),
        ("<!-- run: slow -->", "no fence"),
    ],
)
def test_a_block_of_no_known_kind_is_an_error(readme: str, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        parse(readme)


@pytest.mark.parametrize("text", ["false\ntrue\n", "false | true\n", "echo $undefined\n"])
def test_a_block_that_fails_is_found(text: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="exit status 1"):
        run_all([Block(1, "bash", "default", text)], tmp_path)


def test_a_block_that_asks_for_the_network_is_found(tmp_path: Path) -> None:
    text = """
import urllib.request
try:
    urllib.request.urlopen("http://foveal.invalid", timeout=0.1)
except OSError:
    print("no network, going on")
"""
    with pytest.raises(AssertionError, match="asks for the network"):
        run_all([Block(1, "python", "default", text)], tmp_path)
