"""`microvlm-data cc12m`: the table, the lists and ready shards; and the real img2dataset against a web on 127.0.0.1."""

import importlib.util
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import picture_server
import pytest
from document_mutations import check_mutations
from drawn_emoji import run
from hub_server import Hub, served

pytest.importorskip("pyarrow")
pytest.importorskip("huggingface_hub")

from microvlm.training.data.caption_data import SPLITS, open_data
from microvlm.training.data.download import url_table
from microvlm.training.data.download.download_yield import reason_of
from microvlm.training.data.download.picture_download import DownloadSettings, run_document
from microvlm.training.data.download.ready_shards import REPOSITORY
from microvlm.training.data.download.url_lists import finished_shards, read_record

ROOT = Path(__file__).parent.parent
REQUIREMENTS = ROOT / ".ci" / "img2dataset.txt"
COMMIT = "ab" * 20


def assert_refused(result, *words):
    """Status 2 and one sentence, after lines about the progress."""
    assert result.exit_code == 2, (result.stdout, result.stderr)
    assert "Traceback" not in result.stderr
    message = result.stderr.splitlines()[-1]
    assert message.startswith("Error: ")
    for word in words:
        assert word in message


def write_table(path, rows):
    path.write_text("".join(f"{url}\t{caption}\n" for url, caption in rows))
    return path


def example_rows(count):
    return [(f"https://example.com/{number}.jpg", f"picture {number}") for number in range(count)]


def read_list(path):
    import pyarrow.parquet as pq

    return [tuple(row.values()) for row in pq.read_table(path).to_pylist()]


def test_metadata_counts_rows_leaves_out_other_lines_and_shows_the_first(tmp_path):
    table = write_table(tmp_path / "t.tsv", [("url", "caption"), *example_rows(5)])
    with table.open("ab") as file:
        file.write(b"no tab\n" + b"https://example.com/a b.jpg\tspace\n" + b"https://example.com/x\t\xff\n")
        file.write(b"https://example.com/long.jpg\t" + b"x" * 200_000 + b"\n" + b"ftp://a/b\tc\n")
        file.write(b"https://example.com/last.jpg\tno line's end")
    result = run("cc12m", "--mode", "metadata", "--metadata", table, "-o", tmp_path / "out", "--json")
    document = json.loads(result.stdout)
    assert (document["rows"], document["skipped_lines"]) == (6, 6)
    assert document["first"][0] == {"url": "https://example.com/0.jpg", "caption": "picture 0"}
    result = run("cc12m", "--mode", "metadata", "--metadata", table, "-o", tmp_path / "out")
    assert "6 rows (the release has 12,423,374)" in result.stdout
    assert "picture 2" in result.stdout
    assert "each picture has its own licence" in result.stdout


def test_a_table_without_rows_is_refused(tmp_path):
    for content, word in (("", "is empty"), ("<html>\n</html>\n", "'<html>'")):
        (tmp_path / "t.tsv").write_text(content)
        for mode in ("metadata", "images"):
            command = ("cc12m", "--mode", mode, "--metadata", tmp_path / "t.tsv", "-o", tmp_path / "out")
            assert_refused(run(*command), word, "cc12m.tsv of the CC12M release")
    assert_refused(
        run("cc12m", "--mode", "test", "--metadata", tmp_path / "no.tsv", "-o", tmp_path / "out"),
        "does not exist",
    )


def prepare(table, output, count, *options):
    command = ("cc12m", "--mode", "images", "--metadata", table, "-o", output, "--max-images", count)
    return run(*command, "--shard-size", "10", "--dry-run", *options)


def test_more_pictures_are_another_list_and_a_finished_one_stays(tmp_path):
    table = write_table(tmp_path / "t.tsv", example_rows(30))
    output = tmp_path / "out"
    assert prepare(table, output, 12).exit_code == 0
    first = (output / "urls" / "00000.parquet").read_bytes()
    assert prepare(table, output, 12).exit_code == 0
    assert prepare(table, output, 100).exit_code == 0
    assert (output / "urls" / "00000.parquet").read_bytes() == first
    assert read_list(output / "urls" / "00001.parquet")[0] == (12, "https://example.com/12.jpg", "picture 12")
    record = read_record(output)
    assert [each.rows for each in record.lists] == [12, 18]
    assert record.shards() == [2, 2]
    assert record.lines == 30


def test_another_table_is_refused_and_an_unrecorded_list_removed(tmp_path):
    table = write_table(tmp_path / "t.tsv", example_rows(12))
    prepare(table, tmp_path / "out", 12)
    leftover = tmp_path / "out" / "urls" / "00001.parquet"
    leftover.write_bytes(b"of a killed command")
    assert prepare(table, tmp_path / "out", 12).exit_code == 0
    assert not leftover.exists()
    other = write_table(tmp_path / "other.tsv", example_rows(12)[1:])
    assert_refused(prepare(other, tmp_path / "out", 12), "begun with another table", "another -o")


def test_a_damaged_record_is_refused(tmp_path):
    prepare(write_table(tmp_path / "t.tsv", example_rows(12)), tmp_path, 12)
    document = json.loads((tmp_path / "download.json").read_text())

    def write_and_read(content):
        (tmp_path / "download.json").write_bytes(content)
        return read_record(tmp_path)

    check_mutations(document, write_and_read)


@contextmanager
def release(content):
    """A server of one file, in parts -> its address, and the first byte of every request."""
    starts = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            starts.append(start)
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            with suppress(OSError):
                self.wfile.write(content[start:])

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/cc12m.tsv", starts
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_release_is_fetched_only_as_far_as_it_is_read_and_goes_on_there(tmp_path, monkeypatch):
    content = "".join(f"{url}\t{caption}\n" for url, caption in example_rows(20_000)).encode()
    monkeypatch.setattr(url_table, "_PIECE_BYTES", 1000)
    with release(content) as (address, starts):
        monkeypatch.setenv("MICROVLM_CC12M_URL", address)
        output = tmp_path / "out"
        assert run("cc12m", "--mode", "test", "-o", output, "--dry-run").exit_code == 0
        assert len(read_list(output / "urls" / "00000.parquet")) == 100
        fetched = (output / "cc12m.tsv").read_bytes()
        assert content.startswith(fetched)
        assert len(fetched) < 100_000
        result = run("cc12m", "--mode", "metadata", "-o", output, "--json")
        assert json.loads(result.stdout)["rows"] == 20_000
        assert (output / "cc12m.tsv").read_bytes() == content
        assert starts[:2] == [0, len(fetched)]


def test_without_a_network_one_sentence_says_what_to_get_by_hand(tmp_path, monkeypatch):
    monkeypatch.setenv("MICROVLM_CC12M_URL", "http://127.0.0.1:9/cc12m.tsv")
    result = run("cc12m", "--mode", "test", "-o", tmp_path)
    assert_refused(result, "cannot be reached", "cc12m.tsv of the CC12M release by hand", "--metadata")
    assert "--shards" in result.stderr.splitlines()[0]
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    result = run("cc12m", "--shards", "--mode", "test", "-o", tmp_path)
    assert_refused(result, "cannot be reached", "leave out --shards")


def test_every_message_of_a_failure_has_one_of_few_reasons():
    for message, reason in (
        ("HTTP Error 404: Not Found", "not found (404, 410)"),
        ("HTTP Error 403: Forbidden", "forbidden (401, 403, 451)"),
        ("HTTP Error 503: Service Unavailable", "error of the server (5xx)"),
        ("HTTP Error 302: The HTTP server returned a redirect error", "another HTTP status"),
        ("<urlopen error timed out>", "timed out"),
        ("The read operation timed out", "timed out"),
        ("<urlopen error [Errno -2] Name or service not known>", "no such host"),
        ("<urlopen error [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed", "no valid certificate"),
        ("<urlopen error [Errno 111] Connection refused>", "no connection"),
        ("Remote end closed connection without response", "no connection"),
        ("IncompleteRead(100 bytes read)", "cut short"),
        ("Use of image disallowed by X-Robots-Tag directive", "the site opted out"),
        ("URL can't contain control characters", "another error"),
    ):
        assert reason_of("failed_to_download", message) == reason
    assert reason_of("failed_to_resize", "Image decoding error") == "not a picture"
    assert reason_of("success", None) == "kept"
    assert reason_of(None, None) == "not recorded"


def test_a_cluster_gets_img2datasets_pyspark_distributor_and_the_same_limits(tmp_path):
    table = write_table(tmp_path / "t.tsv", example_rows(12))
    output = tmp_path / "out"
    options = ("--distributor", "pyspark", "--spark-master", "spark://head:7077", "--max-bytes", "5000")
    result = prepare(table, output, 12, *options, "--json")
    python, program, document = json.loads(result.stdout)["command"]
    assert python == sys.executable
    assert Path(program).name == "img2dataset_run.py"
    content = json.loads(Path(document).read_text())
    assert (content["spark_master"], content["most_bytes"]) == ("spark://head:7077", 5000)
    assert content["options"]["distributor"] == "pyspark"
    assert content["options"]["output_folder"] == str(output / "shards")
    alone = run_document(output, read_record(output), DownloadSettings(most_bytes=5000))
    differing = {name for name, value in alone["options"].items() if content["options"][name] != value}
    assert differing == {"distributor"}
    assert_refused(prepare(table, output, 12, "--distributor", "pyspark"), "--spark-master")
    assert_refused(prepare(table, output, 12, "--shards"), "--shards fetches no URLs")


def test_a_second_command_in_the_same_folder_is_refused(tmp_path):
    from filelock import FileLock

    table = write_table(tmp_path / "t.tsv", example_rows(12))
    with FileLock(tmp_path / ".download.lock"):
        assert_refused(prepare(table, tmp_path, 12), "another command fetches into")


@pytest.mark.posix
def test_a_python_without_img2dataset_is_refused_before_anything_is_fetched(tmp_path):
    table = write_table(tmp_path / "t.tsv", example_rows(2))
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "$@"\n')
    bare.chmod(0o755)
    command = ("cc12m", "--mode", "images", "--metadata", table, "-o", tmp_path / "out", "--python")
    assert_refused(run(*command, bare), "has no img2dataset", "microvlm[cc12m]")
    assert_refused(run(*command, tmp_path / "missing"), "does not start")


def tar_shard(count, first=0):
    """A WebDataset shard with pictures and captions."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for number in range(first, first + count):
            for suffix, content in (("jpg", picture_server.picture(number)), ("txt", b"a picture")):
                member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def test_ready_shards_are_fetched_until_there_are_enough_pictures(tmp_path, monkeypatch):
    files = {f"cc12m-train-{number:04d}.tar": tar_shard(3, number * 3) for number in range(4)}
    hub = Hub({f"datasets/{REPOSITORY}": (COMMIT, {**files, "README.md": b"text"})})
    monkeypatch.setattr("time.sleep", lambda _: None)
    with served(hub):
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        command = ("cc12m", "--shards", "-o", tmp_path, "--json", "--mode")
        assert json.loads(run(*command, "metadata").stdout)["shards"] == 4
        assert not hub.sent
        document = json.loads(run(*command, "images", "--max-images", "5").stdout)
        assert (document["pictures"], document["data"]["kept"]) == (6, 5)
        assert sorted(hub.sent) == ["cc12m-train-0000.tar", "cc12m-train-0001.tar"]
        hub.sent.clear()
        hub.altered = {"cc12m-train-0002.tar"}
        assert_refused(run(*command, "images", "--max-images", "9"), "cc12m-train-0002.tar", "another hash")
        hub.altered = set()
        document = json.loads(run(*command, "images", "--max-images", "9").stdout)
        assert (document["pictures"], document["data"]["kept"]) == (9, 9)
        assert document["data"]["output"] == str(tmp_path / "data")
        assert sum(open_data(tmp_path / "data").count(split) for split in SPLITS) == 9
        assert set(hub.sent) == {"cc12m-train-0002.tar"}
        hub.repositories[f"datasets/{REPOSITORY}"] = ("cd" * 20, files)
        assert_refused(run(*command, "metadata"), COMMIT)


def test_every_command_of_the_page_is_accepted(tmp_path):
    from microvlm.training.data.data_command import command

    text = (ROOT / "docs" / "cc12m.md").read_text()
    lines = re.findall(r"^(?:\| `)?microvlm-data (.+?)(?:`.*)?$", text, re.M)
    assert len(lines) >= 8
    for line in lines:
        name, *words = shlex.split(line)
        command.commands[name].make_context(name, words)


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """Variables with which Python finds img2dataset: it is installed, or is put into a folder of its own."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    if importlib.util.find_spec("img2dataset") is None:
        folder = tmp_path_factory.mktemp("img2dataset")
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
        subprocess.run([*pip, "-r", str(REQUIREMENTS)], check=True, timeout=600)
        variables["PYTHONPATH"] = str(folder)
    return variables


@pytest.fixture
def web():
    with picture_server.served() as web:
        yield web


class Fetch:
    """`microvlm-data cc12m` of one folder, in a process of its own."""

    def __init__(self, web, folder, rows, environment):
        self.folder, self.environment = folder / "out", environment
        table = write_table(folder / "t.tsv", [(f"{web.url}/{kind}/{n}", f"{kind} {n}") for kind, n in rows])
        program = "from microvlm.cli import data; data()"
        self.command = [sys.executable, "-P", "-c", program, "cc12m", "--mode", "images"]
        self.command += ["--metadata", str(table), "-o", str(self.folder), "--shard-size", "10", "--json"]
        self.command += ["--num-workers", "1", "--timeout", "2", "--max-bytes", "300000"]

    def start(self, *options):
        return subprocess.Popen(
            [*self.command, *options],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *options):
        """Run to the end -> the printed document."""
        process = self.start(*options)
        out, err = process.communicate(timeout=300)
        log = self.folder / "img2dataset.log"
        assert process.returncode == 0, (err, log.read_text()[-3000:] if log.exists() else "")
        return json.loads(out)

    def failures(self):
        return [json.loads(line) for line in (self.folder / "failed.jsonl").read_text().splitlines()]

    def captions(self):
        """Captions in all archives of finished shards."""
        captions = []
        for number in finished_shards(self.folder):
            with tarfile.open(self.folder / "shards" / f"{number:05d}.tar") as archive:
                for member in archive:
                    if member.name.endswith(".txt"):
                        captions.append(archive.extractfile(member).read().decode())
        return sorted(captions)


@pytest.mark.fetched
@pytest.mark.posix
def test_every_bad_answer_has_its_reason_none_is_kept_and_only_failures_are_tried_again(
    web, tmp_path, environment
):
    bad = [kind for kind in picture_server.KINDS if kind != "good"]
    rows = [("good", 0), *((kind, 0) for kind in bad), ("good", 1), ("good", 2)]
    fetch = Fetch(web, tmp_path, rows, environment)
    result = fetch()
    assert (result["tried"], result["kept"]) == (len(rows), 3)
    assert result["reasons"] == {
        "timed out": 2,  # slow, dripping
        "cut short": 2,  # truncated, broken
        "too many bytes": 2,  # endless, huge
        "not found (404, 410)": 1,
        "a web page, no picture": 1,
        "the site opted out": 1,
    }
    assert result["published"]["yield"] == [0.62, 0.64]
    assert fetch.captions() == ["good 0", "good 1", "good 2"]
    failures = {line["url"].split("/")[-2]: line["reason"] for line in fetch.failures()}
    assert set(failures) == set(bad)
    assert (failures["endless"], failures["slow"]) == ("too many bytes", "timed out")
    # One answer without a stated length is read up to the limit; the stated gigabyte is not read at all.
    assert 300_000 < result["read_bytes"] < 600_000
    assert json.loads((fetch.folder / "yield.json").read_text()) == {
        k: v for k, v in result.items() if k != "data"
    }
    assert result["data"]["kept"] == 3
    data = open_data(fetch.folder / "data")
    assert sorted(text for split in SPLITS for text in data.texts(split)) == fetch.captions()

    web.mended = True
    web.asked.clear()
    result = fetch("--retry")
    assert set(web.asked) == {f"/{kind}/0" for kind in bad if kind != "opted-out"}
    assert (result["tried"], result["kept"], result["reasons"]) == (len(rows), 11, {"the site opted out": 1})
    assert [line["reason"] for line in fetch.failures()] == ["the site opted out"]
    assert len(fetch.captions()) == 11
    assert result["data"]["kept"] == 11
    data = open_data(fetch.folder / "data")
    assert sorted(text for split in SPLITS for text in data.texts(split)) == fetch.captions()
    assert [path.name for path in fetch.folder.glob("data*")] == ["data"]


@pytest.mark.fetched
@pytest.mark.linux
def test_a_kill_ends_all_processes_and_the_next_run_fetches_unfinished_shards_alone(
    web, tmp_path, environment
):
    rows = [("good", number) for number in range(50)]
    fetch = Fetch(web, tmp_path, rows, environment)
    web.delay_s = 0.5
    process = fetch.start("--threads", "5")
    deadline = time.monotonic() + 240
    while len(finished_shards(fetch.folder)) < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    time.sleep(2)
    finished, asked = finished_shards(fetch.folder), web.asked.total()
    time.sleep(1)
    assert web.asked.total() == asked, "something went on fetching after the kill"
    assert len(finished) < 5
    web.asked.clear()
    web.delay_s = 0.0
    result = fetch()
    assert (result["tried"], result["kept"], result["reasons"]) == (50, 50, {})
    unfinished = set(range(5)) - finished
    assert set(web.asked) == {
        f"/good/{row}" for shard in unfinished for row in range(shard * 10, shard * 10 + 10)
    }
    assert fetch.captions() == sorted(f"good {number}" for number in range(50))
