"""Lets transformers read this bundle's configuration and prepare its pictures; needs example.py beside it.

    AutoConfig.from_pretrained(FOLDER, trust_remote_code=True)
    AutoImageProcessor.from_pretrained(FOLDER, trust_remote_code=True)

Where the microvlm package is installed, `import microvlm.exporters.elsewhere.auto_classes` replaces trust_remote_code.
"""

import numpy as np
from transformers import BatchFeature, LlamaConfig, PretrainedConfig, Qwen2Config
from transformers.image_processing_utils import BaseImageProcessor


class MicroVLMConfig(PretrainedConfig):
    """config.json as it is. The decoder's own configuration is `get_text_config()`, and its sizes are attributes."""

    model_type = "microvlm"

    def get_text_config(self, *_, **__):
        """A Qwen2Config, or a LlamaConfig for a decoder without biases. One with SubLN has norms that neither has."""
        sizes = {
            key: value
            for key, value in self.text.items()
            if key not in ("attention_bias", "sub_norm", "rotation")
        }
        return (Qwen2Config if self.text["attention_bias"] else LlamaConfig)(
            **sizes, tie_word_embeddings=True
        )


def _size(name):
    return property(lambda self: self.text[name])


for _name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
    setattr(MicroVLMConfig, _name, _size(_name))


class MicroVLMImageProcessor(BaseImageProcessor):
    """Pictures (paths, Pillow images, uint8 arrays [H, W, 3]) -> the `pixel_values` [B, 3, side, side] of example.py.

    A picture is turned upright, laid on white and fitted into the square (`framing` "pad") or stretched ("stretch").
    Pillow images that are not loaded yet are decoded at full size; give the path for a JPEG's faster decoding.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012

    def __init__(self, size, framing, image_mean, image_std, rescale_factor=1 / 255, **others):
        super().__init__(**others)
        self.size, self.framing, self.rescale_factor = size, framing, rescale_factor
        self.image_mean, self.image_std = image_mean, image_std

    def preprocess(self, images, return_tensors=None):
        """Returns a BatchFeature. Raises TypeError for anything but pictures, and example.Refusal for a bad one."""
        pictures = images if isinstance(images, list | tuple) else [images]
        values = np.stack([self._pixels(picture) for picture in pictures])
        return BatchFeature({"pixel_values": values}, tensor_type=return_tensors)

    __call__ = preprocess  # type: ignore[assignment]

    def _pixels(self, picture):
        from PIL import Image

        from .example import fit_square, read_square  # noqa: TID251 - it lies beside this file in a bundle

        side, stretch = self.size["height"], self.framing == "stretch"
        if isinstance(picture, str) or hasattr(picture, "__fspath__"):
            square = read_square(picture, side, stretch)
        else:
            if isinstance(picture, np.ndarray) and picture.dtype == np.uint8:
                picture = Image.fromarray(picture)
            if not isinstance(picture, Image.Image):
                raise TypeError(
                    f"a picture is a path, a Pillow image or a uint8 array, not {type(picture).__name__}."
                )
            square = fit_square(picture, side, stretch, picture.size)
        values = np.asarray(square, np.float32) * np.float32(self.rescale_factor)
        values = (values - np.float32(self.image_mean)) / np.float32(self.image_std)
        return np.ascontiguousarray(values.transpose(2, 0, 1))
