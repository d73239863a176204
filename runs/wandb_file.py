"""Read the transaction log of a W&B run (`run-<id>.wandb`) without a server and without a network.

The layout is LevelDB's log format with W&B's header: 7 bytes (`:W&B` and 3 more), then blocks of 32 KiB, each
filled with chunks of (crc32 u32, length u16, type u8, data), little endian. A record is one FULL chunk, or
FIRST, any MIDDLE and LAST; its bytes are a protobuf `wandb_internal_pb2.Record`. Chunks never cross a block:
where fewer than 7 bytes are left in one, they are padding.
"""

import json
import struct
import zlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAGIC = b":W&B"
FILE_HEADER = 7
BLOCK = 32 * 1024
CHUNK = struct.Struct("<IHB")  # crc32 over the type byte and the data, length of the data, type
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4
TYPE_CRC = {kind: zlib.crc32(bytes([kind])) for kind in (FULL, FIRST, MIDDLE, LAST)}


def read_payloads(path: str | Path) -> Iterator[bytes]:
    """The records of `path` as bytes, in the order written. Ends quietly at the first chunk that is cut short
    or damaged: a run that was killed leaves a torn tail, and everything before it is whole.

    Raises `ValueError` if the file is not a W&B transaction log. An empty file is a run that had flushed
    nothing.
    """
    data = Path(path).read_bytes()
    if data and not MAGIC.startswith(data[: len(MAGIC)]):
        raise ValueError(f"not a W&B run file: {path}")
    at = FILE_HEADER
    parts: list[bytes] = []
    while True:
        left = BLOCK - at % BLOCK
        if left < CHUNK.size:
            at += left
        if at + CHUNK.size > len(data):
            return
        crc, length, kind = CHUNK.unpack_from(data, at)
        start = at + CHUNK.size
        at = start + length
        chunk = data[start:at]
        if len(chunk) < length or kind not in TYPE_CRC or zlib.crc32(chunk, TYPE_CRC[kind]) != crc:
            return
        if kind in (FULL, FIRST):
            parts = [chunk]
        else:
            parts.append(chunk)
        if kind in (FULL, LAST):
            yield b"".join(parts)


def read_records(path: str | Path) -> Iterator[Any]:
    """The records of `path` as `wandb.proto.wandb_internal_pb2.Record`; ends as `read_payloads` does."""
    from wandb.proto import wandb_internal_pb2  # pulls in wandb, half a second: only where a file is read

    for payload in read_payloads(path):
        record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
        record.ParseFromString(payload)
        yield record


def has_exit(path: str | Path) -> bool:
    """Whether the run of `path` was finished and the file is whole: among its last records is the exit."""
    from wandb.proto import wandb_internal_pb2

    record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
    for payload in deque(read_payloads(path), maxlen=10):
        record.ParseFromString(payload)
        if record.WhichOneof("record_type") == "exit":
            return True
    return False


def items(container: Any) -> dict[str, Any]:
    """The pairs of a history, summary or config message (its `item` or `update`); media are a dict."""
    return _nested({_path(item): item.value_json for item in container})


def _path(item: Any) -> tuple[str, ...]:
    key = item.key
    return (key,) if key else tuple(item.nested_key)


def _nested(texts: dict[tuple[str, ...], str]) -> dict[str, Any]:
    """{("a", "b"): "1"} -> {"a": {"b": 1}}."""
    found: dict[str, Any] = {}
    # All values in one call: a call for each takes twice as long.
    for path, value in zip(texts, json.loads(f"[{','.join(texts.values())}]")):
        if len(path) == 1:
            found[path[0]] = value
            continue
        *outer, key = path
        inside = found
        for name in outer:
            inside = inside.setdefault(name, {})
        inside[key] = value
    return found


def read_rows(path: str | Path) -> Iterator[dict[str, Any]]:
    """The rows that were logged, without W&B's own keys (`_step`, `_runtime`, `_timestamp`).

    Media come as the dict that W&B keeps for them, with a `_type`.
    """
    for _, row in read_history(path):
        yield row


def read_history(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The same, with W&B's `_step` of each row: its place in the run, of an offline file its place in the
    file."""
    for record in read_records(path):
        if record.WhichOneof("record_type") == "history":
            row = items(record.history.item)
            yield (
                row.get("_step", record.history.step.num),
                {key: value for key, value in row.items() if not key.startswith("_")},
            )


def is_media(row: dict[str, Any]) -> bool:
    """Whether a row of W&B's is an image or a video at its axis, instead of a row of metrics.jsonl."""
    return any(isinstance(value, dict) and "_type" in value for value in row.values())


@dataclass
class WandbRun:
    """What the file of any program's run says about it."""

    id: str = ""
    name: str = ""
    project: str = ""
    group: str = ""
    started: str = ""
    """ISO, UTC."""
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    """With W&B's own keys (`_step`, `_runtime`, `_timestamp`)."""
    memory_mb: float = 0.0
    """Most resident memory of the process, of W&B's own samples; 0 where there are none."""
    exited: bool = False


def read_run(path: str | Path) -> WandbRun:
    """Everything of the run at `path` up to the first damage (`read_payloads`).

    Raises `ValueError` if it is not a W&B transaction log, or is damaged before it says which run it is of.
    """
    run = WandbRun()
    summary: dict[tuple[str, ...], str] = {}  # as text: W&B writes all of it again with every row
    for record in read_records(path):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            run.rows.append(items(record.history.item))
        elif kind == "run":
            about = record.run
            run.id, run.project, run.group = about.run_id, about.project, about.run_group
            run.name = about.display_name or about.run_id
            run.started = about.start_time.ToJsonString()
            run.config |= items(about.config.update)
        elif kind == "config":
            run.config |= items(record.config.update)
        elif kind == "summary":
            summary |= {_path(item): item.value_json for item in record.summary.update}
        elif kind == "stats":
            sample = {item.key: item.value_json for item in record.stats.item}
            run.memory_mb = max(run.memory_mb, float(sample.get("proc.memory.rssMB", 0)))
        elif kind == "exit":
            run.exited = True
    if not run.id:
        raise ValueError(f"{path} is damaged: it does not say which run it is of")
    run.summary = _nested(summary)
    run.config.pop("_wandb", None)
    return run
