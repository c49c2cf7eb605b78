"""Results on disk: one JSON file for each kind of measurement, rewritten whole after every cell."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class Store:
    """Records of one kind by key, in `folder/KIND.json`."""

    def __init__(self, folder: Path, kind: str) -> None:
        self._file = folder / f"{kind}.json"
        self.records: dict[str, Record] = (
            json.loads(self._file.read_text(encoding="utf-8")) if self._file.is_file() else {}
        )

    def has(self, key: str, *, commit: str, settings: Mapping[str, Any]) -> bool:
        """Whether this cell is finished: measured on the same code with the same settings."""
        record = self.records.get(key)
        return record is not None and record["about"]["commit"] == commit and record["settings"] == dict(settings)

    def put(self, key: str, record: Record) -> None:
        """Keep a finished cell at once; a kill at any time leaves the old file or the new one."""
        self.records[key] = record
        self._file.parent.mkdir(parents=True, exist_ok=True)
        written = self._file.with_suffix(".json.part")
        written.write_text(json.dumps(self.records, indent=1) + "\n", encoding="utf-8")
        os.replace(written, self._file)
