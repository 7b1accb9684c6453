"""Runs this bundle with ONNX Runtime: needs onnxruntime, numpy, pillow and tokenizers, but not microvlm.

    python example.py ask PICTURE [QUESTION]       answers, with the memory of facts.npz if that file exists
    python example.py tell PICTURE QUESTION TEXT   writes a fact into facts.npz
    python example.py forget PICTURE QUESTION      removes the fact from facts.npz

The option `--kernels FILE` registers the native library of the microvlm package, which computes the same bits faster.
"""

import argparse
import json
import os
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps
from tokenizers import Tokenizer


class Bundle:
    """One model; `memory` is (mean [1, K, C], covariance [1, K, K])."""

    def __init__(self, folder, kernels=None):
        self.folder = Path(folder)
        self.config = json.loads((self.folder / "config.json").read_text())
        self.graphs = json.loads((self.folder / "manifest.json").read_text())["graphs"]
        self.texts = self.config["prompt"]
        self.tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.pixel_config = {**self.config["vision"], **self.optional("preprocessor_config.json")}
        generation = self.optional("generation_config.json")
        ids = generation.get("eos_token_id", [])
        self.stop_ids = {self.token(self.texts["eos_token"]), *(ids if isinstance(ids, list) else [ids])}
        self.max_new_tokens = generation.get("max_new_tokens", 32)
        self.options = onnxruntime.SessionOptions()
        if kernels:
            self.options.register_custom_ops_library(kernels)
        self.sessions = {}

    def run(self, graph, *inputs):
        """Run a graph; `inputs` are in the order of the table in README.md."""
        entry = self.graphs[graph]
        if graph not in self.sessions:
            self.sessions[graph] = onnxruntime.InferenceSession(
                str(self.folder / entry["file"]), self.options, providers=["CPUExecutionProvider"]
            )
        names = [each["name"] for each in entry["inputs"]]
        return self.sessions[graph].run(None, dict(zip(names, inputs, strict=True)))

    def optional(self, name):
        path = self.folder / name
        return json.loads(path.read_text()) if path.is_file() else {}

    def token(self, text):
        return self.tokenizer.token_to_id(text)

    def normalize(self, text):
        """Text as the model was trained to read it. Special tokens are rejected."""
        if self.texts.get("fold_text"):
            text = " ".join(text.lower().split()).rstrip(". ") or text
        for special in self.tokenizer.get_added_tokens_decoder().values():
            if special.content in text:
                raise SystemExit(f"leave '{special.content}' out: it is a special token of the model")
        return text

    def embed(self, text_or_ids):
        if isinstance(text_or_ids, str):
            text_or_ids = self.tokenizer.encode(text_or_ids, add_special_tokens=False).ids
        return self.run("embed_tokens", np.array([text_or_ids], np.int64))[0]

    def pixels(self, path):
        """float32 [1, 3, side, side]: upright, on white, scaled to fit, centred and normalised."""
        side = self.config["vision"]["image_size"]
        image = ImageOps.exif_transpose(Image.open(path))
        if image.mode[0] in "IF":
            raise SystemExit(f"{path} has more than 8 bits a channel; save it with 8 bits")
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        factor = max(1, max(image.size) // (2 * side))  # whole pixels are averaged first
        size = [max(1, min(side, round(length * side / max(image.size)))) for length in image.size]
        box = (0, 0, image.width / factor, image.height / factor)
        small = image.reduce(factor) if factor > 1 else image
        if small.size != tuple(size):
            small = small.resize(size, Image.Resampling.BICUBIC, box)
        square = Image.new("RGB", (side, side), "white")
        square.paste(small, ((side - small.width) // 2, (side - small.height) // 2))
        values = np.asarray(square, np.float32) * np.float32(self.pixel_config.get("rescale_factor", 1 / 255))
        mean, deviation = (np.float32(self.pixel_config[name]) for name in ("image_mean", "image_std"))
        return np.ascontiguousarray(((values - mean) / deviation).transpose(2, 0, 1)[None])

    def prompt(self, question, picture=None):
        """Embeddings [1, S, H] of a question, with the picture's features in place of the image tokens."""
        mark = self.texts["image_token"]
        marks = mark * self.config["prefix_tokens"] if picture else ""
        text = self.texts["template"].replace(mark, marks).replace("{prompt}", self.normalize(question))
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        embeds = self.embed(ids)
        if picture:
            (features,) = self.run("vision_encoder", self.pixels(picture))
            embeds[0, np.array(ids) == self.token(mark)] = features[0]
        return embeds

    def encode(self, embeds):
        """(latent [1, C], key [1, K]) of a prompt."""
        return self.run("memory_encode", embeds, np.ones(embeds.shape[:2], np.int64))

    def answer(self, question, picture=None, memory=None):
        """(text, probability that the memory holds the answer); decoding is greedy."""
        text = self.config["text"]
        embeds, scope = self.prompt(question, picture), 0.0
        self.check_length(embeds.shape[1] + self.max_new_tokens)
        slot_shape = (1, text["num_key_value_heads"], 1, text["head_dim"])
        past = [np.zeros(slot_shape, np.float32)] * (2 * text["num_hidden_layers"])
        if memory:
            latent, key = self.encode(embeds)
            _, (scope,), _, *past = self.run("memory_read", key, latent, *memory)
        # Column 0 is the memory slot, visible only if the memory is in scope for this question.
        slot_visible = bool(memory) and scope >= self.config["memory"]["scope_threshold"]
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
        most = self.config["text"]["max_position_embeddings"] - 1
        if positions > most:
            raise SystemExit(f"{positions} positions exceed the model's {most}; shorten the text")

    def empty_memory(self):
        """(mean, covariance): the prior, read from its safetensors file, and the identity."""
        content = (self.folder / "memory_prior.safetensors").read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        entry = json.loads(content[8:start])["memory_prior"]
        first, end = entry["data_offsets"]
        mean = np.frombuffer(content[start + first : start + end], np.float32).reshape(entry["shape"])
        return mean[None], np.eye(len(mean), dtype=np.float32)[None]

    def row(self, question, picture, text):
        """(key, latent) of a fact: key of its question; latent of question and answer, without the stop token."""
        prompt = self.prompt(question, picture)
        turn = np.concatenate([prompt, self.embed(self.normalize(text))], 1)
        self.check_length(turn.shape[1])
        latent, _ = self.encode(turn)
        return self.encode(prompt)[1], latent


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
    file = Path("facts.npz")
    facts = {}
    if file.exists():
        with np.load(file) as saved:
            facts = dict(saved)
    memory = (facts["mean"], facts["covariance"]) if facts else bundle.empty_memory()
    if args.action == "ask":
        answer, scope = bundle.answer(question, args.picture, memory if facts else None)
        print(f"{answer}\n(scope {scope:.4f})" if facts else answer)
        return
    # A state holds as many rows as it has slots. Forgetting a row needs its own key and latent.
    name = f"{bundle.normalize(question)}|{Path(args.picture).resolve().as_posix()}"
    if args.action == "tell":
        if f"key {name}" in facts:
            parser.error("a fact is stored under that question and picture; forget it first")
        if sum(each.startswith("key ") for each in facts) == len(memory[1][0]):
            parser.error("the memory is full; forget a fact first")
        key, latent = bundle.row(question, args.picture, args.text)
        facts |= {f"key {name}": key, f"code {name}": latent}
    elif f"key {name}" not in facts:
        parser.error("no fact is stored under that question and picture")
    else:
        key, latent = facts.pop(f"key {name}"), facts.pop(f"code {name}")
    graph = {"tell": "memory_write", "forget": "memory_forget"}[args.action]
    facts["mean"], facts["covariance"] = bundle.run(graph, key, latent, *memory)
    temporary = file.with_name("." + file.name)
    np.savez(temporary, **facts)
    os.replace(temporary, file)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:  # an unreadable picture, or a folder that cannot be written
        raise SystemExit(str(error)) from None
