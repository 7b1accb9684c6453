"""Where a model comes from: one decision for every command, backend and function, and one sentence for what is none."""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from conftest import another_user, use_hub_cache
from PIL import Image

import microvlm
from microvlm.backends import load as load_runtime
from microvlm.backends import resolve_bundle
from microvlm.bench.bench_command import command as bench_command
from microvlm.bench.equivalence.equivalence_bench import Options as EquivalenceOptions
from microvlm.bench.memory.memory_bench import Options as MemoryOptions
from microvlm.bench.pi.pi_bench import Options as PiOptions
from microvlm.commands.main import cli
from microvlm.config import MicroVLMConfig
from microvlm.console import run_click
from microvlm.errors import UserError
from microvlm.exporters.export_command import command as export_command
from microvlm.inputs.processor import Processor
from microvlm.model.checkpoint import load_checkpoint, resolve_checkpoint
from microvlm.sources import hub, model_source
from microvlm.sources.model_source import BUNDLED, DEFAULT_MODEL, WEIGHTS, find_folder, find_model
from microvlm.training.scoring.score_command import command as score_command


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """The working directory of the test, in which no remark was made yet."""
    monkeypatch.chdir(tmp_path)
    model_source._tell.cache_clear()
    return tmp_path


@pytest.fixture
def hub_cache(tmp_path_factory, monkeypatch) -> Callable[[str, Path], Path]:
    """Puts a folder into the hub's cache as huggingface_hub does: blobs named by hash, a snapshot of links to them.

    Only this cache is looked at, and the network is not.
    """
    cache = tmp_path_factory.mktemp("hub")
    use_hub_cache(cache, monkeypatch)

    def put(hub_id: str, source: Path) -> Path:
        repository = cache / f"models--{hub_id.replace('/', '--')}"
        # The name of a checkpoint's folder is part of the name of its export, which is made once for all tests.
        snapshot = repository / "snapshots" / source.name[:20]
        (repository / "blobs").mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(snapshot.name)
        for path in filter(Path.is_file, source.rglob("*")):
            blob = repository / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
            shutil.copy(path, blob)
            link = snapshot / path.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)
        return snapshot

    return put


@pytest.fixture
def both_kinds(folder, speaking_bundle, speaking_checkpoint) -> Path:
    """A folder with a bundle and the checkpoint it was made from."""
    shutil.copytree(speaking_bundle, folder / "both")
    shutil.copy(speaking_checkpoint / WEIGHTS, folder / "both")
    return folder / "both"


@pytest.fixture
def picture(folder) -> str:
    Image.new("RGB", (32, 32), "red").save(folder / "red.png")
    return "red.png"


def status_of(command, *arguments: object) -> int:
    with pytest.raises(SystemExit) as exit_info:
        run_click(command, [str(argument) for argument in arguments])
    return exit_info.value.code


def refusal(source: object, kind: str | None = None) -> str:
    with pytest.raises(UserError) as error:
        find_model(source, kind)
    return str(error.value)


# What a text or a path means.


def test_a_bundled_name_is_the_bundled_model_and_a_folder_of_that_name_is_named_on_stderr(folder, capsys):
    bundled = find_model("nano")
    assert (bundled.kind, bundled.remark, capsys.readouterr().err) == ("checkpoint", None, "")
    make("nano/config.json=microvlm")
    model = find_model("nano")
    assert model.folder == bundled.folder
    assert (
        model.remark == "'nano' is the model of that name, not the folder here; give ./nano for the folder."
    )
    assert capsys.readouterr().err == model.remark + "\n"
    find_model("nano")
    assert capsys.readouterr().err == "", "it is said once"


@pytest.mark.parametrize("name", BUNDLED)
def test_a_folder_of_pictures_is_not_mistaken_for_a_model_of_its_name(name, capsys):
    make(f"{name}/0001.jpg")
    assert find_folder(name) == model_source._BUNDLED_FOLDER / name
    assert capsys.readouterr().err == ""


def test_every_bundled_name_is_a_checkpoint_of_the_preset_of_that_name():
    assert DEFAULT_MODEL in BUNDLED
    for name in BUNDLED:
        found = find_model(name, "checkpoint")
        assert (found.folder.name, MicroVLMConfig.load(found.folder).name) == (name, name)
    folders = model_source._BUNDLED_FOLDER.iterdir()
    assert sorted(entry.name for entry in folders) == sorted(BUNDLED), "all that a wheel takes has a name"


def models_of(command: click.Command) -> Iterator[click.Parameter]:
    """The parameters of a command, and of those below it, that name the one model it works on.

    `microvlm-bench train` takes shapes, whose weights it draws: those of a model that people train.
    """
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            if (command, name) != (bench_command, "train"):
                yield from models_of(inner)
    yield from (
        parameter
        for parameter in command.params
        if parameter.name in ("model", "checkpoint") and not parameter.required
    )


def test_every_command_and_function_has_the_same_default():
    commands = (cli, bench_command, export_command, score_command)
    parameters = [parameter for command in commands for parameter in models_of(command)]
    assert len(parameters) > 10
    assert {parameter.default for parameter in parameters} == {DEFAULT_MODEL}
    assert inspect.signature(microvlm.load).parameters["source"].default == DEFAULT_MODEL
    for options in (EquivalenceOptions, MemoryOptions, PiOptions):
        assert options().model == DEFAULT_MODEL


@pytest.mark.parametrize("source", ["./nano", "nano/", "ABSOLUTE", Path("nano")], ids=str)
def test_a_path_is_a_folder_whatever_its_name(folder, tiny_checkpoint, source, capsys):
    shutil.copytree(tiny_checkpoint, folder / "nano")
    model = find_model(folder / "nano" if source == "ABSOLUTE" else source)
    assert (model.kind, model.folder) == ("checkpoint", folder / "nano")
    assert find_model(str(model.folder)).folder == folder / "nano", (
        "it means the same where it is given on as text"
    )
    assert capsys.readouterr().err == ""


def test_a_folder_is_named_as_it_was_given(folder, tiny_checkpoint):
    shutil.copytree(tiny_checkpoint, folder / "models" / "mine")
    for text in ("models/mine", str(folder / "models" / "mine")):
        assert (find_model(text).given, find_model(text).folder) == (text, Path(text))


def test_a_path_object_never_means_a_bundled_name_or_a_hub_id(hub_cache, tiny_checkpoint):
    hub_cache("me/nano", tiny_checkpoint)
    assert refusal(Path("nano")) == (
        "there is no folder 'nano'; give the bundled model as text, not as a path."
    )
    assert "there is no model 'me/nano'" in refusal(Path("me/nano"))


def test_a_hub_id_is_found_in_the_hubs_cache_as_a_bundle_or_a_checkpoint(
    hub_cache, speaking_bundle, tiny_checkpoint, capsys
):
    bundle, checkpoint = hub_cache("me/bundle", speaking_bundle), hub_cache("me/checkpoint", tiny_checkpoint)
    assert vars(find_model("me/bundle")) == {
        "given": "me/bundle",
        "kind": "bundle",
        "folder": bundle,
        "remark": None,
    }
    assert (find_model("me/checkpoint").kind, find_model("me/checkpoint").folder) == (
        "checkpoint",
        checkpoint,
    )
    assert capsys.readouterr().err == ""


def test_a_folder_of_a_hub_ids_name_is_taken_and_said(
    hub_cache, folder, tiny_checkpoint, speaking_bundle, capsys
):
    shutil.copytree(tiny_checkpoint, folder / "me" / "nano")
    assert find_model("me/nano").remark is None, "nothing else can be meant"
    hub_cache("me/nano", speaking_bundle)
    model = find_model("me/nano")
    assert (model.kind, model.folder) == ("checkpoint", Path("me/nano"))
    assert capsys.readouterr().err == (
        "'me/nano' is the folder here; to run the hub's model of that name, work in another folder.\n"
    )


def test_a_hub_id_that_looks_like_a_path_here_is_said(hub_cache, folder, speaking_bundle, capsys):
    (folder / "runs").mkdir()
    hub_cache("runs/nano", speaking_bundle)
    assert find_model("runs/nano").kind == "bundle"
    assert (
        "'runs/nano' is the hub's model of that name; there is no such folder here."
        in capsys.readouterr().err
    )


def test_a_hub_id_that_the_hub_lacks_says_what_is_near(hub_cache, folder):
    (folder / "runs" / "nano").mkdir(parents=True)
    assert refusal("runs/nan0") == (
        "there is no folder 'runs/nan0', and the hub gave no model of that name (LocalEntryNotFoundError): "
        "check the name and the network; near it: 'runs/nano'."
    )


def test_without_the_hubs_client_a_cached_model_is_found_and_another_names_the_package(
    hub_cache, speaking_bundle, monkeypatch
):
    snapshot = hub_cache("me/nano", speaking_bundle)
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    assert find_model("me/nano").folder == snapshot
    assert refusal("me/absent") == "loading 'me/absent' from the hub needs: pip install 'microvlm[export]'."


def test_a_bundle_from_the_hub_is_fetched_whole_and_pickles_are_not(monkeypatch, tmp_path):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    calls = []

    def download(_hub_id, allow_patterns):
        calls.append(allow_patterns)
        (tmp_path / "manifest.json").touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    hub.snapshot("me/nano")
    assert calls == [["*.json"], ["*.json", "*.safetensors", "*.onnx", "*.data", "README.md", "*.py"]]


@pytest.mark.parametrize("text", ["a", "a/b/c", "../b", "./b", "/b", "a/..", "a b/c", "a/b\n", "a/", "-a/b"])
def test_what_is_no_hub_id(text):
    assert not hub.is_hub_id(text)


def test_a_folder_of_both_kinds_is_the_bundle_unless_a_checkpoint_is_needed(both_kinds, capsys):
    assert find_model(both_kinds).kind == "bundle"
    assert capsys.readouterr().err == f"{both_kinds} holds a bundle and a checkpoint; the bundle is taken.\n"
    assert find_model(both_kinds, "checkpoint").kind == "checkpoint"
    assert resolve_bundle(both_kinds) == both_kinds
    assert load_checkpoint(both_kinds).directory == both_kinds
    assert capsys.readouterr().err == ""


def test_a_replacement_of_a_bundle_that_was_cut_off_is_finished_first(folder, speaking_bundle):
    aside = folder / ".bundle.new-01234567"
    shutil.copytree(speaking_bundle, aside / "bundle")
    (aside / "bundle.replaced").mkdir()
    assert find_model("bundle").kind == "bundle"


# What is no model.


def make(name: str) -> None:
    """A file, or with a final slash a folder, below the working directory; PATH=TYPE is a configuration."""
    if name.endswith("/"):
        Path(name).mkdir(parents=True, exist_ok=True)
    else:
        path, _, model_type = name.partition("=")
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps({"model_type": model_type}) if model_type else "")


CHOICES = (
    "give the folder of a checkpoint or a bundle, a hub id (owner/name) or the name of a bundled model "
    f"({', '.join(BUNDLED)})."
)
REFUSED = [
    ([], "nanoo", f"there is no model 'nanoo' (near it: 'nano'): {CHOICES}"),
    (
        ["models/tiny/"],
        "./models/tinny",
        f"there is no model './models/tinny' (near it: './models/tiny'): {CHOICES}",
    ),
    ([], "./absent", f"there is no model './absent': {CHOICES}"),
    (["file"], "file/below", "there is no folder 'file/below', and the hub gave no model of that name"),
    ([], "", f"'' is not the name of a model: {CHOICES}"),
    ([], "x\x1b[31m", f"there is no model 'x\\x1b[31m': {CHOICES}"),
    ([], "x" * 5000, f"there is no model '{'x' * 200}…': {CHOICES}"),
    (
        ["empty/"],
        "empty",
        f"empty is neither a bundle (manifest.json) nor a checkpoint (model.safetensors): {CHOICES}",
    ),
    (
        ["run/last/config.json", "run/last/model.safetensors", "run/log/"],
        "run",
        "run is neither a bundle (manifest.json) nor a checkpoint (model.safetensors): give run/last.",
    ),
    (
        ["d/config.json=qwen2", "d/model.safetensors"],
        "d",
        "d is a decoder (qwen2) alone: assemble it first: microvlm assemble --vision ENCODER --decoder d -o start.",
    ),
    (
        ["v/config.json=deit", "v/pytorch_model.bin"],
        "v",
        "v is a vision encoder (deit) alone: assemble it first: microvlm assemble --vision v --decoder DECODER -o",
    ),
    (
        ["c/config.json=clip", "c/model.safetensors"],
        "./c",
        "c is a 'clip' model, no MicroVLM: assemble one from",
    ),
    (["m/config.json"], "m", "m is an incomplete checkpoint (model.safetensors is missing): copy it again."),
    (
        ["m/config.json", "m/onnx/"],
        "m",
        "m is an incomplete bundle (manifest.json is missing): copy or export it again.",
    ),
    (["m/model.safetensors", "m/.incomplete"], "m", "m was only partly replaced: save it again."),
    (["nano.gguf"], "nano.gguf", "nano.gguf is a decoder alone (GGUF): assemble it first: microvlm assemble"),
    (["nano.tar.gz"], "nano.tar.gz", "nano.tar.gz is an archive: unpack it and give the folder."),
    (["weights.bin"], "weights.bin", f"weights.bin is no folder: {CHOICES}"),
    (
        ["b/config.json", "b/manifest.json", "b/onnx/decoder.onnx"],
        "./b/onnx/decoder.onnx",
        "b/onnx/decoder.onnx is one file of a model: give its folder, b.",
    ),
    (
        ["c/config.json", "c/model.safetensors"],
        "./c/model.safetensors",
        "c/model.safetensors is one file of a model: give its folder, c.",
    ),
]
IDS = [case[1][:20].encode("unicode_escape").decode() or "empty text" for case in REFUSED]


@pytest.mark.parametrize(("files", "source", "sentence"), REFUSED, ids=IDS)
def test_what_is_no_model_is_one_sentence_that_says_what_to_do(files, source, sentence, hub_cache):
    for name in files:
        make(name)
    assert refusal(source).startswith(sentence)
    assert "\n" not in refusal(source)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("a\0b", "'a\\x00b' is not the name of a model"),
        (b"nano", "source= is b'nano'; give a folder or a name"),
        (None, "source= is None; give a folder or a name"),
        (Path(), "is neither a bundle"),
    ],
    ids=repr,
)
def test_the_api_refuses_other_values_in_a_sentence(source, sentence):
    for function in (find_model, find_folder, microvlm.load, microvlm.MicroVLM.from_pretrained):
        if function is not find_folder or sentence != "is neither a bundle":
            with pytest.raises(UserError, match=sentence.replace("\\", "\\\\")):
                function(source)


def test_a_folder_that_may_not_be_looked_into_is_one_sentence(public_folder, monkeypatch):
    (public_folder / "closed").mkdir(0o700)
    with another_user():
        assert refusal(public_folder / "closed").endswith("Permission denied.")
        assert refusal(public_folder / "closed" / "model").endswith("Permission denied.")


def test_what_needs_the_other_kind_says_which_it_was_given(speaking_bundle, tiny_checkpoint):
    assert refusal(speaking_bundle, "checkpoint") == (
        f"{speaking_bundle} is an exported bundle, and this needs the checkpoint it was made from: give that."
    )
    assert refusal(tiny_checkpoint, "bundle") == (
        f"{tiny_checkpoint} is a checkpoint, and this needs a bundle: make one with microvlm-export."
    )


# Every command and backend.

COMMANDS = {
    "caption": (cli, ["caption", "red.png", "--model", "MODEL"]),
    "caption-ort": (cli, ["caption", "red.png", "--backend", "ort", "--model", "MODEL"]),
    "caption-torch": (cli, ["caption", "red.png", "--backend", "torch", "--model", "MODEL"]),
    "caption-attention": (cli, ["caption", "red.png", "--attention", "heat.png", "--model", "MODEL"]),
    "chat": (cli, ["chat", "--model", "MODEL"]),
    "memory": (cli, ["memory", "write", "--text", "a", "--model", "MODEL", "a.mem"]),
    "info": (cli, ["info", "MODEL"]),
    "info-ort": (cli, ["info", "--backend", "ort", "MODEL"]),
    "export": (export_command, ["MODEL", "-o", "out"]),
    "bench-run": (bench_command, ["run", "MODEL"]),
    "bench-equivalence": (bench_command, ["equivalence", "MODEL"]),
    "bench-memory": (bench_command, ["memory", "MODEL"]),
    "bench-attention": (bench_command, ["attention", "MODEL"]),
    "bench-full": (bench_command, ["full", "MODEL"]),
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    "case",
    [
        case
        for case in REFUSED
        if case[1] in ("nanoo", "", "x\x1b[31m", "empty", "m", "nano.gguf", "d", "v", "file/below")
    ],
    ids=lambda case: case[1].encode("unicode_escape").decode() or "empty text",
)
def test_every_command_refuses_it_with_the_same_sentence(name, case, picture, hub_cache, capsys):
    files, source, _ = case
    if name.startswith("info") and source in ("nano.gguf", "d", "v"):
        pytest.skip("info describes a part to assemble")
    for file in files:
        make(file)
    before = sorted(Path().rglob("*"))
    command, arguments = COMMANDS[name]
    sentence = refusal(source)
    assert status_of(command, *(source if word == "MODEL" else word for word in arguments)) == 2
    assert capsys.readouterr() == ("", f"Error: {sentence}\n")
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(
    "source", ["bundle folder", "checkpoint folder", "bundle of the hub", "checkpoint of the hub"]
)
def test_every_command_and_backend_runs_the_same_model(
    source, speaking_bundle, speaking_checkpoint, hub_cache, picture, monkeypatch, capsys
):
    monkeypatch.setenv("MICROVLM_CACHE", str(speaking_bundle.parent.parent))
    original = speaking_bundle if "bundle" in source else speaking_checkpoint
    model = str(original)
    if "hub" in source:
        hub_cache("me/tiny", original)
        model = "me/tiny"
    answers, fingerprints = set(), set()
    for backend in ("torch", "ort"):
        loaded = microvlm.load(model, backend)
        answers.add(loaded.generate(picture, max_new_tokens=3))
        fingerprints |= {loaded.runtime.fingerprint, load_runtime(backend, model).fingerprint}
    assert (len(answers), len(fingerprints)) == (1, 1)
    assert microvlm.Processor.from_pretrained(model).stop_tokens == loaded.processor.stop_tokens
    for backend in ("torch", "ort"):
        command = ("caption", picture, "--max-new-tokens", 3, "--model", model, "--backend", backend)
        assert status_of(cli, *command) == 0
        assert capsys.readouterr() == (answers.copy().pop() + "\n", "")
    assert status_of(cli, "info", model, "--json") == 0
    described = json.loads(capsys.readouterr().out)
    assert (described["model"], described["kind"]) == (model, source.split()[0])
    if "bundle" in source:
        for function in (load_checkpoint, microvlm.MicroVLM.from_pretrained, resolve_checkpoint):
            with pytest.raises(UserError, match="is an exported bundle, and this needs the checkpoint"):
                function(model)
        assert status_of(export_command, model) == 2
        assert "is an exported bundle, and this needs the checkpoint" in capsys.readouterr().err
    else:
        assert resolve_bundle(model) == speaking_bundle
        assert load_checkpoint(model).config == loaded.config


@pytest.mark.parametrize("backend", ["torch", "ort"])
def test_weights_outside_of_the_bundle_are_refused_behind_a_link(backend, folder, speaking_bundle):
    shutil.copytree(speaking_bundle, folder / "bundle")
    weights = next(Path("bundle", "onnx").glob("*.data"))
    weights.rename(folder / "outside.data")
    weights.symlink_to(folder / "outside.data")
    with pytest.raises(
        UserError,
        match=rf"{weights.name} is a link to a file outside of the bundle: copy the file itself there",
    ):
        load_runtime(backend, "bundle")


def test_a_bundled_name_captions_beside_a_folder_that_hides_nothing(picture, capsys):
    make("nano/manifest.json")
    assert status_of(cli, "caption", picture, "--model", "nano") == 0
    out, err = capsys.readouterr()
    assert out.strip()
    assert err == "'nano' is the model of that name, not the folder here; give ./nano for the folder.\n"


def test_a_processor_needs_no_weights(folder, speaking_checkpoint):
    shutil.copytree(speaking_checkpoint, folder / "texts")
    (folder / "texts" / WEIGHTS).unlink()
    assert (
        Processor.from_pretrained("texts").image_id == Processor.from_pretrained(speaking_checkpoint).image_id
    )
