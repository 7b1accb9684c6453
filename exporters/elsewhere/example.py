"""Runs this bundle with ONNX Runtime: needs onnxruntime, numpy, pillow and tokenizers, but not microvlm.

    python example.py ask PICTURE [QUESTION]       answers, with the memory of facts.npz if that file exists
    python example.py tell PICTURE QUESTION TEXT   writes a fact into facts.npz
    python example.py forget PICTURE QUESTION      removes the fact from facts.npz

The option `--kernels FILE` registers the native library of the microvlm package, which computes the same bits faster.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import stat
import sys
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageChops
from tokenizers import Tokenizer

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]  # Windows, where writers are not kept apart

FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "ICO")
MOST_PIXELS = 25_000_000
MOST_JSON_BYTES = 64_000_000
TURNS = dict(zip(range(2, 9), (0, 3, 1, 5, 4, 6, 2), strict=True))
"""EXIF orientation -> Pillow's number of the transposition that turns the picture upright."""


class Refusal(Exception):
    """What is wrong, in one sentence."""


@contextlib.contextmanager
def about(path):
    """Within, every error becomes a sentence about `path`: for damaged files libraries raise errors of many types."""
    try:
        yield
    except (Refusal, KeyboardInterrupt):
        raise
    except Image.DecompressionBombError:
        raise Refusal(f"{path} has too many pixels; scale it down first.") from None
    except BaseException as error:  # also a panic of tokenizers, which is no Exception
        if isinstance(error, OSError) and error.strerror:
            raise Refusal(f"{path} cannot be used: {error.strerror}.") from None
        reason = " ".join(str(error).split())[:200] or "no reason is known"
        raise Refusal(
            f"{path} is damaged or not what it should be ({type(error).__name__}: {reason})."
        ) from None


def read_file(path, most_bytes=MOST_JSON_BYTES):
    with about(path):
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_size > most_bytes:
            raise Refusal(f"{path} is no regular file of at most {most_bytes} bytes.")
        return Path(path).read_bytes()


def read_json(path):
    with about(path):
        document = json.loads(read_file(path))
        if not isinstance(document, dict):
            raise Refusal(f"{path} holds no JSON object; export the bundle again.")
        return document


class Bundle:
    """One model; `memory` is (mean [1, K, C], covariance [1, K, K])."""

    def __init__(self, folder, kernels=None):
        self.folder = Path(folder)
        manifest = self.folder / "manifest.json"
        with about(manifest):
            document = read_json(manifest)
            if document["format"] != 2:
                raise Refusal(f"{manifest} has the format {document['format']}; this program reads format 2.")
            self.fingerprint, self.graphs = str(document["fingerprint"]), document["graphs"]
            self.check_files(document["files"])
        with about(self.folder / "config.json"):
            config = read_json(self.folder / "config.json")
            self.texts = config["prompt"]
            self.positions = int(config["text"]["max_position_embeddings"])
            self.threshold = float(config["memory"]["scope_threshold"])
            self.set_pixel_numbers(config["vision"], self.optional("preprocessor_config.json"))
        with about(self.folder / "tokenizer.json"):
            self.tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
            self.tokenizer.no_truncation()
            self.tokenizer.no_padding()
        with about(self.folder / "generation_config.json"):
            generation = self.optional("generation_config.json")
            ids = generation.get("eos_token_id", [])
            self.stop_ids = {self.token(self.texts["eos_token"]), *(ids if isinstance(ids, list) else [ids])}
            self.max_new_tokens = int(generation.get("max_new_tokens", 32))
        self.options = onnxruntime.SessionOptions()
        self.options.log_severity_level = 4  # errors are raised and told once
        if kernels:
            with about(kernels):
                self.options.register_custom_ops_library(str(kernels))
        self.sessions = {}

    def check_files(self, files):
        """Sizes, and hashes unless a bundle is large: then those of its small files. Program and pages may differ."""
        hash_all = sum(entry["bytes"] for entry in files.values()) < 64_000_000
        for name, entry in files.items():
            path = self.folder / name
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise Refusal(f"manifest.json lists a file outside of the bundle: {name!r}.")
            if name in ("example.py", "transformers_microvlm.py", "README.md", "MODEL_CARD.md"):
                continue
            if not path.is_file() or path.stat().st_size != entry["bytes"]:
                raise Refusal(f"{path} is missing or has another size; copy or export the bundle again.")
            if hash_all or entry["bytes"] < 4_000_000:
                with open(path, "rb") as stream:
                    digest = hashlib.file_digest(stream, "sha256").hexdigest()
                if digest != entry["sha256"]:
                    raise Refusal(f"{path} was altered; copy or export the bundle again.")
        if not all(graph["file"] in files for graph in self.graphs.values()):
            raise Refusal("manifest.json names a graph that it does not list.")

    def set_pixel_numbers(self, vision, preprocessor):
        for key, value in (("do_resize", True), ("resample", 3), ("do_convert_rgb", True)):
            if preprocessor.get(key, value) != value:
                raise Refusal(
                    f"'{key}' of preprocessor_config.json is not {value}, which is not computed here."
                )
        self.rescale = np.float32(preprocessor.get("rescale_factor", 1 / 255))
        if not preprocessor.get("do_rescale", True):
            self.rescale = np.float32(1)
        self.stretch = vision.get("resize") == "stretch"
        numbers = {**vision, **preprocessor} if preprocessor.get("do_normalize", True) else {}
        self.mean = np.broadcast_to(np.float32(numbers.get("image_mean", 0)), 3)
        self.deviation = np.broadcast_to(np.float32(numbers.get("image_std", 1)), 3)

    def session(self, graph):
        if graph not in self.sessions:
            path = self.folder / self.graphs[graph]["file"]
            with about(path):
                self.sessions[graph] = onnxruntime.InferenceSession(
                    str(path), self.options, providers=["CPUExecutionProvider"]
                )
        return self.sessions[graph]

    def run(self, graph, *inputs):
        """Run a graph; `inputs` are in the order of the table in README.md."""
        session = self.session(graph)
        with about(self.folder / self.graphs[graph]["file"]):
            names = [each.name for each in session.get_inputs()]
            return session.run(None, dict(zip(names, inputs, strict=True)))

    def shape(self, graph, number):
        """The shape of a graph's input. Sizes come from here: what a file says may be anything."""
        return self.session(graph).get_inputs()[number].shape

    def optional(self, name):
        path = self.folder / name
        document = read_json(path) if path.exists() else {}
        return {key: value for key, value in document.items() if value is not None}

    def token(self, text):
        return self.tokenizer.token_to_id(text)

    def normalize(self, text):
        """Text as the model was trained to read it. Special tokens are rejected."""
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise Refusal("the text is not valid Unicode; write it in UTF-8.")
        if self.texts.get("fold_text"):
            text = " ".join(text.lower().split()).rstrip(". ") or text
        for special in self.tokenizer.get_added_tokens_decoder().values():
            if special.content in text:
                raise Refusal(f"leave '{special.content}' out: it is a special token of the model.")
        return text

    def embed(self, text_or_ids):
        ids = text_or_ids
        if isinstance(text_or_ids, str):
            ids = self.tokenizer.encode(text_or_ids, add_special_tokens=False).ids
        self.check_length(len(ids))
        return self.run("embed_tokens", np.array([ids], np.int64))[0]

    def pixels(self, path):
        """float32 [1, 3, side, side]: upright, on white, scaled to a square and normalised."""
        with about(path):
            square = read_square(path, self.shape("vision_encoder", 0)[-1], self.stretch)
        values = np.asarray(square, np.float32) * self.rescale
        return np.ascontiguousarray(((values - self.mean) / self.deviation).transpose(2, 0, 1)[None])

    def prompt(self, question, picture=None):
        """Embeddings [1, S, H] of a question, with the picture's features in place of the image tokens."""
        mark, marks = self.texts["image_token"], ""
        if picture:
            (features,) = self.run("vision_encoder", self.pixels(picture))
            marks = mark * features.shape[1]
        text = self.texts["template"].replace(mark, marks).replace("{prompt}", self.normalize(question))
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        embeds = self.embed(ids)
        if picture:
            embeds[0, np.array(ids) == self.token(mark)] = features[0]
        return embeds

    def encode(self, embeds):
        """(latent [1, C], key [1, K]) of a prompt."""
        return self.run("memory_encode", embeds, np.ones(embeds.shape[:2], np.int64))

    def answer(self, question, picture=None, memory=None):
        """(text, probability that the memory holds the answer); decoding is greedy."""
        embeds, scope = self.prompt(question, picture), 0.0
        self.check_length(embeds.shape[1] + self.max_new_tokens)
        inputs = self.session("decoder_model_merged").get_inputs()
        _, heads, _, width = inputs[-1].shape
        past = [np.zeros((1, heads, 1, width), np.float32)] * (len(inputs) - 4)
        if memory:
            latent, key = self.encode(embeds)
            _, (scope,), _, *past = self.run("memory_read", key, latent, *memory)
        # Column 0 is the memory slot, visible only if the memory is in scope for this question.
        slot_visible = bool(memory) and scope >= self.threshold
        mask = np.array([[slot_visible] + [1] * embeds.shape[1]], np.int64)
        positions, last = np.arange(1, mask.shape[1])[None], np.array(1)
        ids = []
        while len(ids) < self.max_new_tokens:
            logits, *past = self.run("decoder_model_merged", embeds, mask, positions, last, *past)
            token = int(logits[0, -1].argmax())
            if token in self.stop_ids:
                break
            ids.append(token)
            embeds, positions = self.embed([token]), positions[:, -1:] + 1
            mask = np.append(mask, [[1]], 1)
        return self.tokenizer.decode(ids).strip(), float(scope)

    def check_length(self, positions):
        most = self.positions - 1
        if positions > most:
            raise Refusal(f"{positions} positions exceed the model's {most}; shorten the text.")

    def empty_memory(self):
        """(mean, covariance): the prior, read from its safetensors file, and the identity."""
        _, slots, width = self.shape("memory_write", 2)
        path = self.folder / "memory_prior.safetensors"
        with about(path):
            content = read_file(path, 4 * slots * width + 100_000)
            start = 8 + int.from_bytes(content[:8], "little")
            first, end = json.loads(content[8:start])["memory_prior"]["data_offsets"]
            mean = np.frombuffer(content[start + first : start + end], np.float32).reshape(1, slots, width)
        return mean, np.eye(slots, dtype=np.float32)[None]

    def row(self, question, picture, text):
        """(key, latent) of a fact: key of its question; latent of question and answer, without the stop token."""
        prompt = self.prompt(question, picture)
        turn = np.concatenate([prompt, self.embed(self.normalize(text))], 1)
        self.check_length(turn.shape[1])
        latent, _ = self.encode(turn)
        return self.encode(prompt)[1], latent

    def read_facts(self, file):
        """The arrays of facts.npz, {} if there is none. A damaged or another model's file is refused and stays."""
        _, slots, width = self.shape("memory_write", 2)
        if not os.path.lexists(file):
            return {}
        most = 4 * slots * (slots + width) * 2 + 20_000 * (slots + 10)
        with about(file):
            read_file(file, most)
            with zipfile.ZipFile(file) as archive:
                if sum(member.file_size for member in archive.infolist()) > most:
                    raise Refusal(f"{file} is larger than this model's memory; move it away.")
            with np.load(file, allow_pickle=False) as saved:
                facts = dict(saved)
            if int(facts.pop("format", 1)) != 1:
                raise Refusal(f"{file} was written by a newer program.")
            if str(facts.pop("fingerprint", self.fingerprint)) != self.fingerprint:
                raise Refusal(f"{file} has the facts of another model; move it away.")
            shapes = {"mean": (slots, width), "covariance": (slots, slots), "key": (slots,), "code": (width,)}
            for name in ("mean", "covariance", *facts):
                kind, _, fact = name.partition(" ")
                value, shape = facts[name], (1, *shapes[kind])
                if value.dtype != np.float32 or value.shape != shape or not np.isfinite(value).all():
                    raise ValueError(f"{kind} is no float32 array of the shape {shape}")
                if fact and not {f"key {fact}", f"code {fact}"} <= set(facts):
                    raise ValueError("a fact is incomplete")
        return facts


def read_square(path, side, stretch):
    """RGB [side, side]: turned upright, on white, scaled to a square, as README.md says."""
    # Not by its name: Pillow would map the file, and map some turned TIFFs with the wrong width.
    with open(path, "rb") as stream, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.open(stream, formats=FORMATS)
        target = [max(1, int(length * 2 * side / max(image.size))) for length in image.size]
        drafted = image.draft("RGB", target)  # a JPEG is decoded at a fraction of its size
        if image.width * image.height > MOST_PIXELS:
            raise Refusal(f"{path} has too many pixels; scale it down first.")
        return fit_square(image, side, stretch, drafted[1][2:] if drafted else image.size, path)


def fit_square(image, side, stretch, whole, name="the picture"):
    """The square of an image that is open; `whole`: its exact size, of which the last pixels may be fractions."""
    transparent = image.info.get("transparency")
    raw = str(image.tile[0][3]) if getattr(image, "tile", None) and image.format == "PNG" else ""
    if isinstance(transparent, tuple) and raw == "RGB;16B":  # Pillow keeps the upper bytes only
        raise Refusal(f"{name} has a transparent colour of 16 bits; save it with an alpha channel.")
    if isinstance(transparent, int) and image.mode == "L":
        transparent *= {"L;2": 85, "L;4": 17}.get(raw, 1)  # as Pillow multiplies the samples
    image.load()
    orientation = 1
    with contextlib.suppress(Exception):  # damaged metadata of a good picture
        orientation = image.getexif().get(0x112, 1)
    image = to_rgb(image, transparent)
    factor = max(1, max(image.size) // (2 * side))  # whole pixels are averaged first
    size = [side if stretch else max(1, min(side, round(length * (side / max(whole))))) for length in whole]
    small = image.reduce(factor) if factor > 1 else image
    if small.size != tuple(size):
        small = small.resize(size, Image.Resampling.BICUBIC, (0, 0, whole[0] / factor, whole[1] / factor))
    if orientation in TURNS:
        small = small.transpose(TURNS[orientation])
    square = Image.new("RGB", (side, side), "white")
    square.paste(small, ((side - small.width) // 2, (side - small.height) // 2))
    return square


def to_rgb(image, transparent):
    """A decoded picture of any mode as 8-bit RGB on white."""
    if image.mode == "LAB":
        raise Refusal("the picture has CIELAB colours, which are not read here; save it in RGB.")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return deep_to_rgb(image, transparent)
    if image.mode == "CMYK" and image.format in ("JPEG", "MPO") and "adobe" not in image.info:
        image = ImageChops.invert(image)  # Pillow takes every such file for Adobe's
    if image.mode == "La":
        image = image.convert("LA")
    place = getattr(image, "dispose_extent", None)  # a GIF's first frame may cover a part of it
    if transparent is not None:
        image.info["transparency"] = transparent
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if place:
        part, image = image.crop(place), Image.new("RGB", image.size, "white")
        image.paste(part, place[:2])
    return image


def deep_to_rgb(image, transparent):
    """Grey of 12 or 16 bits: 0 is black, and the largest value white."""
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
        raise Refusal("the picture has 32 bits a pixel, whose white is not known; save it with 8 or 16.")
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    black, white = 0.0, 2.0 ** tags.get(258, (16,))[0] - 1
    if tags.get(262) == 0:  # a TIFF whose 0 is white
        black, white = white, black
    grey = np.rint((values.astype(np.float32) - black) * (255.0 / (white - black)))
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


@contextlib.contextmanager
def locked(file, wait_s=120):
    """Hold the lock of `file`, a file beside it, which ends with the process."""
    path = file.with_name(f".{file.name}.lock")
    if fcntl is None:
        yield
        return
    deadline = time.monotonic() + wait_s
    with about(path):
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
                raise Refusal(f"{path} is a link or no plain file; remove it.")
            with contextlib.suppress(BlockingIOError, FileNotFoundError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(status, os.lstat(path)):  # else its last holder removed it
                    break
            os.close(descriptor)
            if time.monotonic() > deadline:
                raise Refusal(f"{file} is being changed by another process; try again.")
            time.sleep(0.02)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def save(file, facts):
    """Replace `file` whole. Called with its lock, so a temporary file that is there is of a process that was killed."""
    temporary = file.with_name(f".{file.name}")
    with about(file):
        temporary.unlink(missing_ok=True)
        try:
            with open(temporary, "xb") as stream:
                np.savez(stream, **facts)
                stream.flush()
                os.fsync(stream.fileno())
            if file.exists():
                shutil.copymode(file, temporary)
            os.replace(temporary, file)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if os.name == "posix":  # the name too
            folder = os.open(file.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernels", help="path of microvlm's native library")
    parser.add_argument("action", choices=["ask", "tell", "forget"])
    parser.add_argument("picture")
    parser.add_argument("question", nargs="?")
    parser.add_argument("text", nargs="?")
    args = parser.parse_args()
    if (args.action != "ask" and not args.question) or (args.action == "tell" and not args.text):
        parser.error("tell needs a question and a text, forget a question")
    bundle = Bundle(Path(__file__).parent, args.kernels)
    question = args.question or bundle.texts["caption_prompt"]
    file = Path(os.path.realpath("facts.npz"))
    if args.action == "ask":
        facts = bundle.read_facts(file)
        memory = (facts["mean"], facts["covariance"]) if facts else None
        answer, scope = bundle.answer(question, args.picture, memory)
        print(f"{answer}\n(scope {scope:.4f})" if facts else answer, flush=True)
        return
    # A state holds as many rows as it has slots. Forgetting a row needs its own key and latent.
    name = f"{bundle.normalize(question)}|{Path(os.path.realpath(args.picture)).as_posix()}"
    name = name.encode("utf-8", "backslashreplace").decode()
    row = bundle.row(question, args.picture, args.text) if args.action == "tell" else None
    with locked(file):
        facts = bundle.read_facts(file)
        memory = (facts["mean"], facts["covariance"]) if facts else bundle.empty_memory()
        if row:
            if f"key {name}" in facts:
                raise Refusal("a fact is stored under that question and picture; forget it first.")
            if sum(each.startswith("key ") for each in facts) == len(memory[1][0]):
                raise Refusal("the memory is full; forget a fact first.")
            facts[f"key {name}"], facts[f"code {name}"] = row
        elif f"key {name}" not in facts:
            raise Refusal("no fact is stored under that question and picture.")
        else:
            row = facts.pop(f"key {name}"), facts.pop(f"code {name}")
        graph = {"tell": "memory_write", "forget": "memory_forget"}[args.action]
        facts["mean"], facts["covariance"] = bundle.run(graph, *row, *memory)
        save(file, {**facts, "format": np.array(1), "fingerprint": np.array(bundle.fingerprint)})


if __name__ == "__main__":
    Image.MAX_IMAGE_PIXELS = MOST_PIXELS // 2  # Pillow refuses twice as many
    for output in filter(None, (sys.stdout, sys.stderr)):
        output.reconfigure(errors="backslashreplace")
    try:
        main()
    except Refusal as refusal:
        print(f"example.py: {refusal}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # the output is closed or full; nothing is left to be written
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(0 if isinstance(error, BrokenPipeError) else 2)
