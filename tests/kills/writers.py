"""The writers that are killed: each prepares an old state, changes it, looks at it as a reader does, and goes on."""

from __future__ import annotations

import os
import shutil
import sys
from abc import ABC, abstractmethod
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from conftest import FLOAT, seeded_model, tiny_config

from microvlm import load
from microvlm.backends import resolve_bundle
from microvlm.exporters import bundle_writer
from microvlm.formats.bundle import is_bundle, is_intact, open_bundle
from microvlm.formats.weight_format import WeightFormat
from microvlm.memory.facts import FactMemory
from microvlm.memory.file_lock import locked
from microvlm.model.checkpoint import load_checkpoint

OLD, NEW = "old", "new"


class Writer(ABC):
    """One kind of writing into a folder of its own."""

    name: str

    def __init__(self, folder: Path):
        self.folder = folder
        self.expected: list[str] = []
        """All that is in the folder after a command."""

    @abstractmethod
    def prepare(self) -> None:
        """Make the old state, whatever is there."""

    @abstractmethod
    def change(self) -> None:
        """Make the new state: what is killed, and the next command, which also cleans up."""

    @abstractmethod
    def look(self) -> str:
        """OLD or NEW, read as a command reads it. Raises any error for what is neither, or is not whole."""

    def listing(self) -> list[str]:
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*"))


class MemoryWriter(Writer):
    """`microvlm memory write` and `overwrite`: a fact is appended, or the file written anew."""

    def __init__(self, folder: Path, bundle: Path, overwrite: bool):
        super().__init__(folder)
        self.name = "memory overwrite" if overwrite else "memory write"
        self._overwrite, self._path = overwrite, folder / "facts.mem"
        self._model = load(bundle, backend="ort", threads=1)
        facts = FactMemory(self._model)
        for question, text in (("who?", "nina"), ("where?", "here")):
            facts.write(text, question)
        facts.save(self._path)
        self._content = self._path.read_bytes()

    def prepare(self) -> None:
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._path.write_bytes(self._content)

    def change(self) -> None:
        with locked(self._path):
            facts = FactMemory(self._model)
            facts.load(self._path)
            (facts.overwrite if self._overwrite else facts.write)("new", "where?")
            facts.save(self._path)

    def look(self) -> str:
        facts = FactMemory(self._model)
        facts.load(self._path)
        texts = [entry.text.split()[-1] for entry in facts.entries]
        kept = ["nina"] if self._overwrite else ["nina", "here"]
        if texts == ["nina", "here"]:
            return OLD
        assert texts[: len(kept)] == kept
        assert set(texts[len(kept) :]) == {"new"}
        return NEW


class CheckpointWriter(Writer):
    """`save_pretrained` over an older checkpoint; `shared`: in a folder with another's file."""

    def __init__(self, folder: Path, shared: bool):
        super().__init__(folder)
        self.name = "checkpoint among other files" if shared else "checkpoint"
        self._shared, self._path = shared, folder / "model"
        # Configuration and weights differ, and each fits its own only.
        self._models = {
            OLD: seeded_model(tiny_config(prefix_tokens=4), 1),
            NEW: seeded_model(tiny_config(FLOAT, prefix_tokens=5), 2),
        }

    def prepare(self) -> None:
        if not self._path.exists():
            self._models[OLD].save_pretrained(self._path)
            if self._shared:
                (self._path / "notes.txt").write_text("mine")
        elif self.look() != OLD:
            self._models[OLD].save_pretrained(self._path)

    def change(self) -> None:
        self._models[NEW].save_pretrained(self._path)

    def look(self) -> str:
        loaded = load_checkpoint(self._path).state_dict()
        assert not self._shared or (self._path / "notes.txt").read_text() == "mine"
        for state, model in self._models.items():
            tensors = model.state_dict()
            if tensors.keys() == loaded.keys() and all(
                torch.equal(tensors[key], loaded[key]) for key in tensors
            ):
                return state
        raise AssertionError("neither checkpoint")


class ExportWriter(Writer):
    """`microvlm-export --force` over an older bundle. `real`: graphs are traced, else copied from a finished bundle."""

    def __init__(self, folder: Path, scratch: Path, real: bool = False):
        super().__init__(folder)
        self.name = "export --force, tracing" if real else "export --force"
        self._path, self._scratch, self._real = folder / "bundle", scratch, real
        self._formats = {OLD: WeightFormat(packing="base3"), NEW: WeightFormat(packing="2bit")}
        self._checkpoint = finished_bundles(scratch, self._formats)

    def prepare(self) -> None:
        shutil.rmtree(self._path, ignore_errors=True)
        shutil.copytree(self._scratch / OLD, self._path)

    def change(self) -> None:
        with copied_graphs(self._scratch / NEW, self._real):
            bundle_writer.export(self._checkpoint, self._path, self._formats[NEW], force=True, threads=1)

    def look(self) -> str:
        assert is_bundle(self._path)
        packing = open_bundle(self._path, verify=True).packing
        return OLD if packing == "base3" else NEW


class CacheWriter(Writer):
    """The bundle that `--backend ort` exports once into the user's cache, over a damaged one."""

    name = "bundle cache"

    def __init__(self, folder: Path, scratch: Path):
        super().__init__(folder)
        formats = {OLD: WeightFormat(packing="base3"), NEW: WeightFormat(packing="2bit")}
        self._checkpoint, self._graphs = finished_bundles(scratch, formats), scratch / NEW
        os.environ["MICROVLM_CACHE"] = str(folder)
        self.change()
        (self._bundle,) = (folder / "bundles").iterdir()
        self._damaged = (self._bundle / "config.json").read_bytes() + b" "

    def prepare(self) -> None:
        (self._bundle / "config.json").write_bytes(self._damaged)

    def change(self) -> None:
        with copied_graphs(self._graphs, False):
            resolve_bundle(self._checkpoint)

    def look(self) -> str:
        if is_intact(self._bundle):
            return NEW
        assert (self._bundle / "config.json").read_bytes() == self._damaged
        return OLD


def finished_bundles(scratch: Path, formats: dict[str, WeightFormat]) -> Path:
    """Export a small checkpoint in each format to SCRATCH/STATE, once -> the checkpoint."""
    checkpoint = scratch / "checkpoint"
    if not checkpoint.exists():
        seeded_model(tiny_config()).save_pretrained(checkpoint)
        for state, weights in formats.items():
            bundle_writer.export(checkpoint, scratch / state, weights, threads=1)
    return checkpoint


class copied_graphs:
    """Within, an export copies the graphs of a finished bundle, which saves the seconds of tracing them."""

    def __init__(self, bundle: Path, real: bool):
        self._bundle, self._real, self._write_graphs = bundle, real, bundle_writer._write_graphs

    def __enter__(self) -> None:
        if not self._real:
            bundle_writer._write_graphs = lambda lowered, folder, *rest: shutil.copytree(
                self._bundle / "onnx", folder / "onnx"
            )

    def __exit__(self, *error: object) -> None:
        bundle_writer._write_graphs = self._write_graphs
