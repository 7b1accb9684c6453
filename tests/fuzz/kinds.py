"""Kinds of mutated files, and what a user would do with a file of each kind.

A kind writes mutant number I into its scratch folder and uses it. A use returns when the file is right, raises
`Refused` or UserError with the sentence that the user sees, and anything else is a defect.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import mutations
import numpy as np

Mutate = Callable[[Random, bytes], bytes]


class Refused(Exception):
    """A command ended with status 2; the text is what it printed on stderr."""


class Defect(Exception):
    """What was done with a mutant is neither right nor a refusal."""


class Kind(ABC):
    """One kind of file. `seeds` is a folder with right files, see `seed_files`; `scratch` is the kind's own."""

    name: ClassVar[str]
    mutate: ClassVar[Mutate] = staticmethod(mutations.mutate_bytes)
    originals: Sequence[bytes] = ()
    """Right contents of the file."""

    def __init__(self, seeds: Path, scratch: Path):
        self.seeds, self.scratch = seeds, scratch
        self.prepare()

    @abstractmethod
    def prepare(self) -> None:
        """Read the right files."""

    def write(self, rng: Random) -> None:
        """Write a mutant into the scratch folder."""
        self.put(type(self).mutate(rng, rng.choice(self.originals)))

    @abstractmethod
    def put(self, content: bytes) -> None:
        """Write this content of the file into the scratch folder."""

    @abstractmethod
    def use(self) -> None:
        """Use the mutant as a user would."""

    def check(self) -> None:
        """Use every right file, which must work. What is imported once is imported then."""
        for content in self.originals:
            self.put(content)
            self.use()


class OneFile(Kind):
    """A file that is read by itself; `folder` and `pattern` name the right ones among the seeds."""

    folder: ClassVar[str] = "."
    pattern: ClassVar[str]

    def prepare(self) -> None:
        paths = sorted((self.seeds / self.folder).glob(self.pattern))
        self.originals = [path.read_bytes() for path in paths]
        self.path = self.scratch / f"mutant{paths[0].suffix}"

    def put(self, content: bytes) -> None:
        self.path.write_bytes(content)


def run_command(command: Any, arguments: Sequence[str], stdin: bytes = b"") -> str:
    """Run a click command in this process -> its stdout. Raises Refused for status 2, Defect for another status."""
    from microvlm import console

    out, err = _stream(), _stream()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _stdin(stdin):
        status = console._status(command, arguments)
    if status == 2:
        raise Refused(_text_of(err))
    if status != 0:
        raise Defect(f"status {status}: {_text_of(err)}")
    return _text_of(out)


def _stream() -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace")


def _text_of(stream: io.TextIOWrapper) -> str:
    stream.flush()
    return stream.buffer.getvalue().decode()  # type: ignore[attr-defined]


@contextlib.contextmanager
def _stdin(content: bytes):
    import sys

    saved, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(content), "utf-8", errors="surrogateescape")
    try:
        yield
    finally:
        sys.stdin = saved


class Picture(OneFile):
    """A picture file of one format."""

    folder = "pictures"

    def use(self) -> None:
        from microvlm.inputs.images import load_square

        image = load_square(self.path, 96)
        if image.size != (96, 96) or image.mode != "RGB":
            raise Defect(f"{image.size} {image.mode}")


PICTURES = [
    type(f"{suffix.title()}Picture", (Picture,), {"name": f"picture-{suffix}", "pattern": f"*.{suffix}"})
    for suffix in ("png", "jpg", "gif", "webp", "bmp", "tif", "ppm", "ico")
]


class BundleFile(Kind):
    """One file of a bundle, whose hash in the manifest is right again. One mutant of ten runs on PyTorch."""

    file: ClassVar[str]
    backend = "ort"

    def prepare(self) -> None:
        self.folder = self.scratch / "bundle"
        shutil.copytree(self.seeds / "bundle", self.folder)
        self.originals = [(self.folder / self.file).read_bytes()]
        self.manifest = json.loads((self.folder / "manifest.json").read_text())

    def write(self, rng: Random) -> None:
        super().write(rng)
        self.backend = "torch" if rng.random() < 0.1 else "ort"

    def put(self, content: bytes) -> None:
        (self.folder / self.file).write_bytes(content)
        entry = self.manifest["files"][self.file]
        entry["bytes"], entry["sha256"] = len(content), hashlib.sha256(content).hexdigest()
        (self.folder / "manifest.json").write_text(json.dumps(self.manifest))

    def use(self) -> None:
        import microvlm

        model = microvlm.load(self.folder, backend=self.backend)
        model.generate(np.zeros((8, 8, 3), np.uint8), "what is this?", max_new_tokens=3)
        facts = microvlm.FactMemory(model)
        facts.write("blue", "what colour is it?")
        facts.read("what colour is it?")

    def check(self) -> None:
        for self.backend in ("torch", "ort"):
            super().check()


def bundle_kind(name: str, file: str, mutate: Mutate) -> type[Kind]:
    """The kind of one file of a bundle."""
    values = {"name": name, "file": file, "mutate": staticmethod(mutate)}
    return type("".join(part.title() for part in name.split("-")), (BundleFile,), values)


JSON = mutations.mutate_json_or_bytes
BUNDLES = [
    bundle_kind("bundle-config", "config.json", JSON),
    bundle_kind("bundle-preprocessor", "preprocessor_config.json", JSON),
    bundle_kind("bundle-generation", "generation_config.json", JSON),
    bundle_kind("bundle-tokenizer-config", "tokenizer_config.json", JSON),
    bundle_kind("bundle-tokenizer-tables", "tokenizer_tables.safetensors", mutations.mutate_safetensors),
    bundle_kind("bundle-prior", "memory_prior.safetensors", mutations.mutate_safetensors),
    bundle_kind("bundle-weights", "onnx/decoder_model_merged.data", mutations.mutate_bytes),
    bundle_kind("bundle-embedding", "onnx/embedding.data", mutations.mutate_bytes),
    bundle_kind("bundle-graph", "onnx/embed_tokens.onnx", mutations.mutate_bytes),
    bundle_kind("bundle-large-graph", "onnx/decoder_model_merged.onnx", mutations.mutate_bytes),
]


class BundleTokenizer(BundleFile):
    """tokenizer.json of a bundle without tables, which the tokenizers library reads."""

    name = "bundle-tokenizer"
    file = "tokenizer.json"
    mutate = staticmethod(JSON)

    def prepare(self) -> None:
        super().prepare()
        (self.folder / "tokenizer_tables.safetensors").unlink()
        del self.manifest["files"]["tokenizer_tables.safetensors"]


class BundleManifest(BundleFile):
    """manifest.json itself."""

    name = "bundle-manifest"
    file = "manifest.json"
    mutate = staticmethod(JSON)

    def put(self, content: bytes) -> None:
        (self.folder / self.file).write_bytes(content)


class BundleByte(BundleFile):
    """Any changed byte of any file that is read, with the hashes of before: refused, always."""

    name = "bundle-altered"
    file = "config.json"

    def prepare(self) -> None:
        super().prepare()
        from microvlm.formats.bundle import DOCUMENTS

        self.files = sorted(set(self.manifest["files"]) - set(DOCUMENTS))
        self.restore = lambda: None

    def write(self, rng: Random) -> None:
        self.restore()
        path = self.folder / rng.choice(self.files)
        original = path.read_bytes()
        self.restore = lambda: path.write_bytes(original)
        content = original
        while content == original:
            content = mutations.mutate_bytes(rng, original)
        path.write_bytes(content)

    def use(self) -> None:
        super().use()
        raise Defect("an altered file was taken for a right one")

    def check(self) -> None:
        BundleFile.use(self)


class CheckpointFile(Kind):
    """One file of a checkpoint, loaded by PyTorch."""

    file: ClassVar[str]

    def prepare(self) -> None:
        self.folder = self.scratch / "checkpoint"
        shutil.copytree(self.seeds / "checkpoint", self.folder)
        self.originals = [(self.folder / self.file).read_bytes()]

    def put(self, content: bytes) -> None:
        (self.folder / self.file).write_bytes(content)

    def use(self) -> None:
        import microvlm

        model = microvlm.load(self.folder, backend="torch")
        model.generate(np.zeros((8, 8, 3), np.uint8), "what is this?", max_new_tokens=3)


class CheckpointConfig(CheckpointFile):
    """config.json of a checkpoint."""

    name = "checkpoint-config"
    file = "config.json"
    mutate = staticmethod(JSON)


class CheckpointWeights(CheckpointFile):
    """model.safetensors of a checkpoint: header, lengths, offsets, metadata and values."""

    name = "checkpoint-weights"
    file = "model.safetensors"
    mutate = staticmethod(mutations.mutate_safetensors)


class Description(Kind):
    """`microvlm info` of a checkpoint or a bundle with one wrong file."""

    name = "info"

    def prepare(self) -> None:
        self.folders = [self.scratch / "checkpoint", self.scratch / "bundle"]
        for folder in self.folders:
            shutil.copytree(self.seeds / folder.name, folder)
        self.restore = lambda: None

    def write(self, rng: Random) -> None:
        self.restore()
        self.folder = rng.choice(self.folders)
        files = [path for path in sorted(self.folder.rglob("*")) if path.suffix in (".json", ".safetensors")]
        self.path = rng.choice(files)
        original = self.path.read_bytes()
        self.restore = lambda: self.path.write_bytes(original)
        mutate = JSON if self.path.suffix == ".json" else mutations.mutate_safetensors
        self.put(mutate(rng, original))

    def put(self, content: bytes) -> None:
        self.path.write_bytes(content)

    def use(self) -> None:
        from microvlm.commands.info import info

        run_command(info, [str(self.folder)])


class HuggingFaceConfig(Kind):
    """config.json of an encoder or a decoder of another program."""

    name = "huggingface-config"

    def prepare(self) -> None:
        folder = self.seeds / "huggingface"
        self.configs = {path.name: (path / "config.json").read_bytes() for path in sorted(folder.iterdir())}
        self.preprocessor = (folder / "vision" / "preprocessor_config.json").read_bytes()

    def write(self, rng: Random) -> None:
        self.part = rng.choice(sorted(self.configs))
        content, preprocessor = self.configs[self.part], self.preprocessor
        if self.part == "vision" and rng.random() < 0.5:
            preprocessor = JSON(rng, preprocessor)
        else:
            content = JSON(rng, content)
        self.put(content)
        (self.scratch / "preprocessor_config.json").write_bytes(preprocessor)

    def put(self, content: bytes) -> None:
        (self.scratch / "config.json").write_bytes(content)

    def use(self) -> None:
        from microvlm.model.pretrained import hf_config

        read = hf_config.vision_config if self.part == "vision" else hf_config.text_config
        read(self.scratch)


class GgufDecoder(OneFile):
    """A GGUF decoder: its header, tokenizer and every tensor."""

    name = "gguf-decoder"
    folder = "parts"
    pattern = "*.gguf"

    def use(self) -> None:
        import dataclasses

        from seed_files import fuzzed_configs

        from microvlm.model.pretrained.decoder_tokenizer import read_decoder_tokenizer
        from microvlm.model.pretrained.gguf_weights import gguf_weights
        from microvlm.model.pretrained.part_tensors import decoder_tensors
        from microvlm.model.pretrained.parts import find_part

        part = find_part(self.path, "decoder")
        assert part.gguf is not None
        config = dataclasses.replace(fuzzed_configs()[0], text=part.text_config())
        read_decoder_tokenizer(part.gguf, template="{prompt}")
        tensors, _ = decoder_tensors(gguf_weights(part.gguf, config.text), config)
        for tensor in tensors.values():
            value = tensor.read()
            if (tuple(value.shape), value.dtype) != (tensor.shape, tensor.dtype):
                raise Defect(f"{value.dtype} {tuple(value.shape)} instead of {tensor}")


class PickledEncoder(Kind):
    """pytorch_model.bin of an encoder, whose tensors are all read."""

    name = "pickled-encoder"

    def prepare(self) -> None:
        shutil.copytree(self.seeds / "parts" / "encoder", self.scratch / "encoder")
        self.path = self.scratch / "encoder" / "pytorch_model.bin"
        self.originals = [self.path.read_bytes()]

    def put(self, content: bytes) -> None:
        self.path.write_bytes(content)

    def use(self) -> None:
        from seed_files import fuzzed_configs

        from microvlm.model.pretrained.part_tensors import vision_tensors

        for tensor in vision_tensors(self.path.parent, fuzzed_configs()[1]).values():
            if tuple(tensor.read().shape) != tensor.shape:
                raise Defect("a tensor of another shape")


class MemoryFile(OneFile):
    """A memory file with any changed bytes: refused, or without its torn last record."""

    name = "memory"
    folder = "memory"
    pattern = "*.mem"

    def prepare(self) -> None:
        super().prepare()
        self.model = _ort_model(self.seeds / "bundle")
        self.right = [self._texts(path) for path in sorted((self.seeds / self.folder).glob(self.pattern))]

    def use(self) -> None:
        self._edit()
        if not any(self.loaded == texts[: len(self.loaded)] for texts in self.right):
            raise Defect(f"a changed file was taken for a right one: {self.loaded}")

    def _edit(self) -> None:
        """List, load, read, write, forget and save as the commands do, and compare what was saved."""
        import microvlm
        from microvlm.commands.memory import memory

        run_command(memory, ["list", str(self.path)])
        self.loaded = self._texts(self.path)
        facts = microvlm.FactMemory(self.model)
        facts.load(self.path)
        facts.read("who is it?")
        facts.write("a new fact", "what is new?")
        facts.save(self.path)
        facts.forget(0)
        facts.save(self.path)
        if self._texts(self.path) != [entry.text for entry in facts.entries]:
            raise Defect("the saved facts are other ones")

    def _texts(self, path: Path) -> list[str]:
        import microvlm

        facts = microvlm.FactMemory(self.model)
        facts.load(path)
        return [entry.text for entry in facts.entries]


class HashedMemory(MemoryFile):
    """A memory file with wrong rows, states or metadata, and right hashes."""

    name = "memory-hashed"

    def write(self, rng: Random) -> None:
        from microvlm.memory.memory_reader import digest_of
        from microvlm.memory.record_chain import record
        from microvlm.memory.tensor_blob import encode

        blobs = _blobs(rng.choice(self.originals))
        tensors, metadata = rng.choice(blobs)
        for _ in range(rng.choice((1, 1, 2))):
            if rng.random() < 0.6:
                key = rng.choice([*metadata, "log"])
                value = metadata.get(key, "0")
                metadata[key] = _text(JSON(rng, value.encode())) if value[:1] in "[{" else _text_value(rng)
            else:
                name = rng.choice(sorted(tensors))
                tensors[name] = _mutate_array(rng, tensors[name])
        (tensors, metadata), *later = blobs
        digest = digest_of(tensors, metadata)
        content = encode(tensors, {**metadata, "sha256": digest.hex()})
        for tensors, metadata in later:
            appended, digest = record(encode(tensors, metadata), digest)
            content += appended
        self.put(content)

    def use(self) -> None:
        self._edit()


def _blobs(content: bytes) -> list[tuple[dict[str, np.ndarray], dict[str, str]]]:
    """Tensors and metadata of a memory file's first part and of its records."""
    from microvlm.memory.record_chain import RecordReader
    from microvlm.memory.tensor_blob import metadata_of, read_header, read_tensors

    file = io.BytesIO(content)
    header = read_header(file, len(content))
    base = read_tensors(file, header, len(content) - file.tell())
    digest = metadata_of(header)["sha256"]
    blobs = [(dict(base.tensors), {k: v for k, v in base.metadata.items() if k != "sha256"})]
    for each in RecordReader(file, base.size, len(content), bytes.fromhex(digest)):
        part = io.BytesIO(each)
        header = read_header(part, len(each))
        blob = read_tensors(part, header, len(each) - part.tell())
        blobs.append((dict(blob.tensors), dict(blob.metadata)))
    return blobs


def _text(content: bytes) -> str:
    return content.decode("utf-8", "replace")


def _text_value(rng: Random) -> str:
    return str(mutations.any_value(rng)).encode("utf-8", "replace").decode()


def _mutate_array(rng: Random, array: np.ndarray) -> np.ndarray:
    edit = rng.randrange(6)
    if edit == 0:
        return array[: len(array) // 2]
    if edit == 1:
        return np.concatenate([array, array, array])
    if edit == 2:
        return array[..., : array.shape[-1] // 2]
    if edit == 3:
        return array[None] if rng.random() < 0.5 else array.reshape(-1)
    if edit == 4:
        return array * np.float32(rng.choice((0.0, -1.0, 1e20, 1e38)))
    changed = array.copy()
    if changed.size:
        number = rng.choice((np.nan, np.inf, -np.inf, 1e38, -1.0, 0.0))
        changed.reshape(-1)[rng.randrange(changed.size)] = number
    return changed


class Recipe(OneFile):
    """A training recipe."""

    name = "recipe"
    pattern = "recipe.json"
    mutate = staticmethod(JSON)

    def use(self) -> None:
        from microvlm.training.recipe import load_recipe

        recipe = load_recipe(str(self.path))
        for stage in recipe.stages:
            if Path(stage.name).name != stage.name:
                raise Defect(f"a stage would write into {stage.name!r}")


class BoardProfile(OneFile):
    """A profile of a board."""

    name = "profile"
    folder = "profiles"
    pattern = "*.json"
    mutate = staticmethod(JSON)

    def use(self) -> None:
        from microvlm.bench.pi.profiles import load_profile

        load_profile(str(self.path))


class BenchReport(OneFile):
    """A saved report of a benchmark."""

    name = "report"
    folder = "reports"
    pattern = "*.json"
    mutate = staticmethod(JSON)

    def use(self) -> None:
        from microvlm.bench.report import report_of_file

        report_of_file(self.path).markdown()


class Frame(Kind):
    """A frame between a host and a device."""

    name = "frame"

    def prepare(self) -> None:
        from microvlm.backends.arm64.frames import Tensor, write_frame

        stream = io.BytesIO()
        array = np.arange(6, dtype=np.float32)
        write_frame(stream, {"id": 3, "ok": True}, (Tensor("float32", (2, 3), array.tobytes()),))
        self.original = stream.getvalue()
        self.originals = [self.original]

    def write(self, rng: Random) -> None:
        start = self.original.index(b"{")
        end = self.original.index(b"}") + 1
        header = self.original[start:end]
        if rng.random() < 0.5:
            changed = JSON(rng, header)
            prefix = self.original[:start].replace(
                len(header).to_bytes(4, "little"), len(changed).to_bytes(4, "little"), 1
            )
            self.put(prefix + changed + self.original[end:])
        else:
            super().write(rng)

    def put(self, content: bytes) -> None:
        self.content = content

    def use(self) -> None:
        from microvlm.backends.arm64.frame_arrays import to_array
        from microvlm.backends.arm64.frames import ConnectionLost, FrameError, read_frame

        try:
            _, tensors = read_frame(io.BytesIO(self.content))
        except (FrameError, ConnectionLost) as error:
            raise Refused(str(error) or "the connection was lost.") from None
        for tensor in tensors:
            to_array(tensor)


class ChatLines(Kind):
    """What somebody types or pipes into `microvlm chat`."""

    name = "chat-input"
    LINES = (
        "what is this?",
        "/image picture.png what is this?",
        "/image 'pic ture.png' what's this?",
        "/memory",
        "/reset",
        "/help",
        "/save chat.mem",
        "picture.png",
    )

    def prepare(self) -> None:
        shutil.copy(next((self.seeds / "pictures").glob("*.png")), self.scratch / "picture.png")

    def write(self, rng: Random) -> None:
        lines = [rng.choice(self.LINES).encode() for _ in range(3)]
        lines = [mutations.mutate_bytes(rng, line) if rng.random() < 0.7 else line for line in lines]
        self.put(b"\n".join(lines) + b"\n")

    def put(self, content: bytes) -> None:
        self.lines = content

    def use(self) -> None:
        import os

        from microvlm.commands.chat import chat

        here = Path.cwd()
        os.chdir(self.scratch)
        try:
            run_command(chat, ["--model", str(self.seeds / "bundle"), "--backend", "ort"], self.lines)
        finally:
            os.chdir(here)


class Operator(Kind):
    """A graph of one operator of `ai.microvlm` with any shapes, dtypes and attributes."""

    name = "operator"

    def prepare(self) -> None:
        self.feeds: dict[str, np.ndarray] = {}

    def write(self, rng: Random) -> None:
        from onnx import TensorProto, helper, numpy_helper

        from microvlm.formats.op_table import DOMAIN, OPS

        op = OPS[rng.choice(sorted(OPS))]
        shapes = {"N": 8, "K": 32, "V": 8, "H": 32}
        self.feeds = {}
        inputs, constants = [], []
        for operand in op.inputs:
            dtype = np.dtype(operand.dtype)
            shape = _operand_shape(rng, op, operand.name, shapes)
            if rng.random() < 0.05:
                dtype = np.dtype(rng.choice(("float32", "uint8", "int64", "float64", "int8")))
            array = np.asarray(rng.choices(range(16), k=int(np.prod(shape))), dtype).reshape(shape)
            if operand is not op.inputs[0] and rng.random() < 0.6:
                constants.append(numpy_helper.from_array(array, operand.name))
            else:
                self.feeds[operand.name] = array
                kind = helper.np_dtype_to_tensor_dtype(dtype)
                inputs.append(helper.make_tensor_value_info(operand.name, kind, None))
        attributes = {
            name: rng.choice((8, 8, 8, 32, 32, 7, 0, -1, 2**31, 2**62, 5)) for name in op.attributes
        }
        if rng.random() < 0.05:
            attributes.clear()
        names = [operand.name for operand in op.inputs]
        if rng.random() < 0.03:
            names.pop()
        node = helper.make_node(op.name, names, ["y"], domain=DOMAIN, **attributes)
        output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
        graph = helper.make_graph([node], "g", inputs, [output], constants)
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)]
        self.put(helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString())

    def put(self, content: bytes) -> None:
        self.model = content

    def use(self) -> None:
        import onnxruntime

        from microvlm.backends import native

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        options.register_custom_ops_library(str(native.library_path()))
        try:
            session = onnxruntime.InferenceSession(self.model, options, providers=["CPUExecutionProvider"])
            feeds = {each.name: self.feeds[each.name] for each in session.get_inputs()}
            session.run(None, feeds)
        except Exception as error:  # the runtime's own kinds; a defect here is a signal
            raise Refused(str(error).split("\n")[0]) from None


def _operand_shape(rng: Random, op: Any, name: str, sizes: dict[str, int]) -> tuple[int, ...]:
    rows, columns = sizes["N"], sizes["K"]
    shape: tuple[int, ...]
    if name in ("x", "input_ids"):
        shape = rng.choice(((2, columns), (columns,), (1, 2, columns), (0, columns)))
        shape = shape if name == "x" else shape[:-1] or (3,)
    elif name == "packed":
        shape = (-(-rows // op.rows_per_byte), columns // (op.columns_per_byte or 1))
    elif name == "multiplier":
        shape = (rows, columns // 32)
    else:
        shape = (rng.choice((rows, rows, 1)),)
    if rng.random() < 0.4:
        changed = list(shape)
        edit = rng.randrange(4)
        if edit == 0 or not changed:
            changed.append(rng.choice((0, 1, 2)))
        elif edit == 1:
            changed.pop()
        else:
            changed[rng.randrange(len(changed))] = rng.choice((0, 1, 7, 31, 33, 64, 1000))
        shape = tuple(changed)
    return shape


class ExampleFacts(OneFile):
    """facts.npz of a bundle's own example.py."""

    name = "example-facts"
    pattern = "facts.npz"

    def prepare(self) -> None:
        super().prepare()
        self.path = self.scratch / "facts.npz"

    def use(self) -> None:
        import os
        import runpy
        import sys

        out, err = _stream(), _stream()
        arguments, here = sys.argv, Path.cwd()
        picture = next((self.seeds / "pictures").glob("*.png"))
        sys.argv = ["example.py", "ask", str(picture), "what is this?"]
        os.chdir(self.scratch)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                runpy.run_path(str(self.seeds / "bundle" / "example.py"), run_name="__main__")
        except SystemExit as end:
            if end.code not in (None, 0):
                raise Refused(end.code if isinstance(end.code, str) else _text_of(err)) from None
        finally:
            sys.argv = arguments
            os.chdir(here)


class NativeLibrary(Kind):
    """A damaged native library."""

    name = "native-library"

    def prepare(self) -> None:
        from microvlm.backends import native

        path = native.library_path()
        assert path is not None
        self.originals = [path.read_bytes()]
        self.path, self.number = self.scratch, 0

    def put(self, content: bytes) -> None:
        # A name of its own: the loader knows a library by its path.
        self.number += 1
        self.path = self.scratch / f"{self.number}.so"
        self.path.write_bytes(content)

    def use(self) -> None:
        import os

        from microvlm.backends import native

        os.environ[native.SWITCH] = str(self.path)
        try:
            native.library()
        finally:
            del os.environ[native.SWITCH]
            self.path.unlink()


def _ort_model(bundle: Path) -> Any:
    import microvlm

    return microvlm.load(bundle, backend="ort")


KINDS: dict[str, type[Kind]] = {
    kind.name: kind
    for kind in (
        *PICTURES,
        *BUNDLES,
        BundleTokenizer,
        BundleManifest,
        BundleByte,
        CheckpointConfig,
        CheckpointWeights,
        Description,
        HuggingFaceConfig,
        GgufDecoder,
        PickledEncoder,
        MemoryFile,
        HashedMemory,
        Recipe,
        BoardProfile,
        BenchReport,
        Frame,
        ChatLines,
        Operator,
        ExampleFacts,
        NativeLibrary,
    )
}
