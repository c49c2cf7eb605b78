"""Finished cells on disk, a JSON file each, so that any number of processes may add to one folder."""

from pathlib import Path

from benchmarks.recovery.records import Cell, Spec
from trigger_opt.records import read_record, write_record

MISSING, DONE, CRASHED, OTHER = "missing", "done", "crashed", "another configuration"


class CellStore:
    """The cells of one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def state(self, spec: Spec) -> str:
        """MISSING, DONE, CRASHED, or OTHER where the cell there was asked for otherwise."""
        cell = self.get(spec)
        if cell is None:
            return MISSING
        if cell.spec != spec:
            return OTHER
        return CRASHED if cell.error else DONE

    def get(self, spec: Spec) -> Cell | None:
        """The cell of this model, method and seed, whatever its configuration.

        Raises:
            UserError: the file there is no cell.
        """
        path = self._path(spec)
        return read_record(path, Cell) if path.is_file() else None

    def put(self, cell: Cell) -> None:
        """Keep a cell at once; a kill at any time leaves the old file or the new one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_record(self._path(cell.spec), cell)

    def all(self) -> list[Cell]:
        """Every cell, by model, method and seed.

        Raises:
            UserError: a file there is no cell.
        """
        cells = [read_record(path, Cell) for path in self.folder.glob("*.json")]
        return sorted(cells, key=lambda c: (c.spec.model, c.spec.method, c.spec.seed))

    def _path(self, spec: Spec) -> Path:
        return self.folder / f"{spec.name}.json"
