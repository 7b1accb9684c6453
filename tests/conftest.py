"""Small configurations, models, checkpoints and bundles that test files share, and the order in which files run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from microvlm.config import MemoryConfig, MicroVLMConfig, QuantizationConfig, TextConfig, VisionConfig
from microvlm.exporters.model_card import MODEL_CARD
from microvlm.inputs.processor import Processor
from microvlm.memory.file_lock import locked
from microvlm.model.microvlm import MicroVLM

# One thread per process: models of this size gain nothing from more, and tests run in parallel processes.
torch.set_num_threads(1)
# Programs that tests start in the repository's root import the installed package, not the folder `microvlm`.
os.environ["PYTHONSAFEPATH"] = "1"
# Help texts wrap as on a terminal of usual width.
os.environ["COLUMNS"] = "100"

LONGEST = (
    "test_pages.py",
    "test_training_captions.py",
    "test_training_run.py",
    "test_photo_stages.py",
    "test_packaging.py",
    "test_native_arm.py",
    "test_arm64_ssh.py",
    "test_bench_pi_counting.py",
    "test_training_recall.py",
    "test_kills.py",
    "test_api_page.py",
    "test_vocabulary_shrink.py",
    "test_convolutional_encoder.py",
    "test_arm64_emulated.py",
    "test_assemble_command.py",
)
"""Files with tests that take half a minute or more. They start first, so that no process is left with one at the end of
a run: some hold few tests, and files with few tests come last. `nox -s tests` prints the slowest tests."""

SYSTEMS = {
    "posix": (os.name == "posix", "needs POSIX: signals, pipes, permissions, a shell or file locks"),
    "linux": (sys.platform.startswith("linux"), "needs Linux: /proc or /dev/full"),
}
"""Marker -> whether this system has what the marked test needs, and why it is skipped elsewhere."""
EXPORT_S = 600.0
"""Seconds that a process waits for the export of another."""
# These import modules for a device, which is a POSIX system: fcntl, pwd and signals that Windows lacks.
collect_ignore = (
    [] if os.name == "posix" else ["test_arm64_installer.py", "test_arm64_ssh.py", "test_arm64_worker.py"]
)

FLOAT = QuantizationConfig()
CARD = """\
# tiny

It knows [nothing](knows.md#much), as [the paper](https://example.org/paper) says: [scores](#scores).

![What it says](pictures/said.png)

## Scores

<!-- report results/tiny.json section=naming -->
|  | tiny |
| --- | ---: |
| right | 0.000 [0.000, 0.037] |
<!-- end -->
"""
"""A model card as a checkpoint has it, with links to files that lie elsewhere."""
TERNARY = QuantizationConfig(decoder_bits=1.58, vision_bits=8, embedding_bits=8)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests that use the native library, and sorts files: `LONGEST` first, then by number of tests.

    A file's tests stay together and in their order. Runs before pytest selects by marker. Raises ValueError when
    `LONGEST` names a missing file.
    """
    here = Path(__file__).parent
    missing = [name for name in LONGEST if not (here / name).is_file()]
    if missing:
        raise ValueError(f"conftest.LONGEST names files that do not exist: {', '.join(missing)}")
    for item in items:
        if "native_library" in getattr(item, "fixturenames", ()):
            item.add_marker("native")
        for name, (here_too, reason) in SYSTEMS.items():
            if not here_too and item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))
    place = {name: number for number, name in enumerate(LONGEST)}
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (place.get(item.path.name, len(LONGEST)), -tests[item.path]))


def tiny_config(quantization: QuantizationConfig = TERNARY, **changes: object) -> MicroVLMConfig:
    """Two layers of everything, 32 px images, 300 words: a model that builds in milliseconds."""
    parts: dict = {
        "name": "tiny",
        "vision": VisionConfig(
            image_size=32,
            patch_size=8,
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=96,
            distillation_token=True,
        ),
        "text": TextConfig(
            vocab_size=300,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            intermediate_size=96,
            rope_theta=10_000.0,
            sub_norm=True,
            max_position_embeddings=256,
        ),
        "memory": MemoryConfig(slots=16, code_size=48, readout_size=24),
        "quantization": quantization,
        "prefix_tokens": 4,
    }
    return MicroVLMConfig(**{**parts, **changes})


def seeded_model(config: MicroVLMConfig, seed: int = 0) -> MicroVLM:
    """A model with random weights in which norms, biases, W_M and the prior are not at their neutral initial values."""
    torch.manual_seed(seed)
    model = MicroVLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            elif parameter.ndim == 1 or "token" in name or "prior" in name:
                parameter.normal_(std=0.2)
        model.memory_projection.linear.weight.normal_(std=0.5)
        if model.memory_projection.readout is not None:
            model.memory_projection.readout.fc2.weight.normal_(std=0.2)
    return model.eval()


def common_folder(tmp_path_factory: pytest.TempPathFactory, name: str) -> Path:
    """A folder that all processes of a test run share, because an export takes seconds; on Windows each has its own.

    Windows has no locks that would keep two processes from making the same export.
    """
    if os.name != "posix" or "PYTEST_XDIST_WORKER" not in os.environ:
        return tmp_path_factory.mktemp(name)
    folder = tmp_path_factory.getbasetemp().parent / f"common-{name}"
    folder.mkdir(exist_ok=True)
    return folder


@contextmanager
def files_below(limit: int) -> Iterator[None]:
    """Within, the kernel refuses to let a file grow over `limit` bytes, as it does on a full disk. Not on Windows."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@contextmanager
def mounted(target: Path, *options: str) -> Iterator[None]:
    """Within, what `options` of mount(8) name is mounted at `target`. Skips the test where that is not allowed."""
    command = ["mount", *options, str(target)]
    if (
        os.name == "nt"
        or os.geteuid() != 0
        or subprocess.run(command, capture_output=True, check=False).returncode
    ):
        pytest.skip("nothing of this kind can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(target)], check=True)


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder of root's that every user may read."""
    if os.name == "nt" or os.geteuid() != 0:
        pytest.skip("needs root to become another user")
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def use_hub_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets huggingface_hub look at this cache alone, and not at the network. Skips the test where it is missing.

    Modules read the environment when they are imported; older ones keep copies of it.
    """
    pytest.importorskip("huggingface_hub")
    from huggingface_hub import snapshot_download  # noqa: F401

    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    for name, module in list(sys.modules.items()):
        if name.startswith("huggingface_hub"):
            for constant, value in (("HF_HUB_OFFLINE", True), ("HF_HUB_CACHE", str(cache))):
                if constant in vars(module):
                    monkeypatch.setattr(module, constant, value)


@contextmanager
def another_user() -> Iterator[None]:
    """Within, this process, which is root's, has the rights of nobody."""
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture(scope="session")
def ternary_model() -> MicroVLM:
    """A small ternary-trained model with random weights. Tests must not change it."""
    return seeded_model(tiny_config())


@pytest.fixture(scope="session")
def float_model() -> MicroVLM:
    """The same shape in float. Tests must not change it."""
    return seeded_model(tiny_config(FLOAT))


@pytest.fixture(scope="session")
def tiny_checkpoint(ternary_model: MicroVLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`ternary_model` saved, without a tokenizer. Tests must not change it."""
    directory = tmp_path_factory.mktemp("checkpoint") / "tiny"
    ternary_model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_checkpoint` exported at 1.58 bits, four trits a byte. Tests must not change it."""
    from microvlm.exporters.bundle_writer import export
    from microvlm.formats.weight_format import WeightFormat

    directory = common_folder(tmp_path_factory, "bundle") / "tiny"
    with locked(directory, wait_s=EXPORT_S):
        if not directory.exists():
            export(tiny_checkpoint, directory, WeightFormat(), threads=1)
    return directory


@pytest.fixture(scope="session")
def tiny_processor() -> Processor:
    """A byte-level tokenizer with the special tokens of the template, for the tiny configuration."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<|pad|>", "<|end|>", "<|assistant|>", "<image>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["describe the image", "what is this?", "a red heart"], trainer)
    return Processor(tokenizer, tiny_config())


@pytest.fixture(scope="session")
def speaking_checkpoint(
    tiny_checkpoint: Path, tiny_processor: Processor, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """`tiny_checkpoint` with a tokenizer and a model card. Tests must not change it."""
    directory = tmp_path_factory.mktemp("speaking") / "checkpoint"
    shutil.copytree(tiny_checkpoint, directory)
    tiny_processor.save(directory)
    (directory / MODEL_CARD).write_text(CARD)
    return directory


@pytest.fixture(scope="session")
def speaking_bundle(speaking_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`speaking_checkpoint` exported on first use into a cache. Tests must not change it."""
    from microvlm.backends import resolve_bundle

    cache = common_folder(tmp_path_factory, "cache")
    with pytest.MonkeyPatch.context() as environment, locked(cache / "speaking", wait_s=EXPORT_S):
        environment.setenv("MICROVLM_CACHE", str(cache))
        return resolve_bundle(speaking_checkpoint)


@pytest.fixture(scope="session")
def hf_folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.nn.Module]]:
    """The folders of `hf_models` below one root, and the models in them. Tests must not change either."""
    from hf_models import make_folders

    root = tmp_path_factory.mktemp("hf")
    return root, make_folders(root)


@pytest.fixture(scope="session")
def drawn_packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A node_modules folder of emoji packages whose drawings are discs. Tests must not change it."""
    from drawn_emoji import write_packages

    root = tmp_path_factory.mktemp("packages") / "node_modules"
    write_packages(root)
    return root


@pytest.fixture(scope="session")
def drawn_build(drawn_packages: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """The folder that `microvlm-data emoji` builds from `drawn_packages`, and its JSON. Tests must not change it."""
    from drawn_emoji import run

    out = tmp_path_factory.mktemp("build") / "emoji"
    result = run("emoji", "-o", out, "--packages", drawn_packages, "--json")
    assert result.exit_code == 0, result.stderr
    return out, json.loads(result.stdout)


@pytest.fixture(scope="session")
def native_library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The installed native library, or one built now that the loader finds while the fixture lives."""
    from microvlm.backends import native

    with pytest.MonkeyPatch.context() as environment:
        environment.delenv(native.SWITCH, raising=False)
        environment.delenv("MICROVLM_KERNELS", raising=False)
        path = native.library_path()
        if path is None:
            path = build_native(tmp_path_factory.mktemp("native")) / native.LIBRARY
            environment.setenv(native.SWITCH, str(path))
        yield path


def build_native(folder: Path, *options: str) -> Path:
    """Builds backends/native in `folder` with CMake and returns the folder; a failure shows CMake's output."""
    source = Path(__file__).parent.parent / "backends" / "native"
    commands = (["cmake", "-S", source, "-B", folder, *options], ["cmake", "--build", folder, "-j", "2"])
    for command in commands:
        process = subprocess.run(command, capture_output=True, text=True)
        assert process.returncode == 0, process.stdout + process.stderr
    return folder
