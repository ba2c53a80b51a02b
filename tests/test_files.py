"""Files: every damage is found, a killed writer leaves nothing for long, and JSON has limits."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from sedona_fx.errors import CheckpointError
from sedona_fx.files import JSON_DEPTH, json_digest, parse_json, read_torch_file, replacing, torch_save

CONTENT = {"w": torch.arange(40.0).reshape(5, 8), "h": torch.ones(3, dtype=torch.float16), "steps": 7, "names": ["a"]}


def same(found):
    tensors = all(torch.equal(found[k], CONTENT[k]) and found[k].dtype == CONTENT[k].dtype for k in "wh")
    return tensors and (found["steps"], found["names"]) == (7, ["a"])


def test_any_changed_byte_is_found_or_does_not_matter(tmp_path):
    path, draw = tmp_path / "c.pt", random.Random(0)
    torch_save(CONTENT, path)
    raw, found = path.read_bytes(), 0
    for place in draw.sample(range(len(raw)), 600):
        damaged = bytearray(raw)
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            assert same(read_torch_file(path, "weights")), place
        except CheckpointError:
            found += 1
    assert found > 200
    torch.save(CONTENT, path)  # a file from before there was a checksum of the whole
    raw = path.read_bytes()
    for place in range(len(raw) - 1000, len(raw)):  # its directory
        for bit in (0, 4):
            path.write_bytes(raw[:place] + bytes([raw[place] ^ 1 << bit]) + raw[place + 1 :])
            with contextlib.suppress(CheckpointError):
                assert same(read_torch_file(path, "weights")), (place, bit)
    torch_save(CONTENT, path)
    raw = path.read_bytes()
    for place in [raw.find(CONTENT[k].numpy().tobytes()) for k in "wh"]:
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        with pytest.raises(
            CheckpointError, match=r"cannot read the weights '.*c.pt': it is damaged: its part 'data/\d'"
        ):
            read_torch_file(path, "weights")


@pytest.mark.parametrize("cut", [0, 1, 100, -1, -30])
def test_truncated_and_foreign_files(tmp_path, cut):
    path = tmp_path / "c.pt"
    torch_save(CONTENT, path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=r"cannot read the checkpoint .*it is damaged.*Ask\."):
        read_torch_file(path, "checkpoint", advice=" Ask.")


def test_checksums_are_written_also_where_the_user_has_turned_them_off(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch_save(CONTENT, tmp_path / "c.pt")
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)
    assert same(read_torch_file(tmp_path / "c.pt", "weights"))


WRITER = """
import sys, time
from pathlib import Path
from sedona_fx.files import replacing
with replacing(sys.argv[1]) as temporary:
    temporary.write_text("half")
    print(temporary.name, flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs locks that end with a process")
def test_what_a_killed_writer_left_goes_with_the_next_write_and_a_living_one_keeps_its_file(tmp_path):
    path = tmp_path / "c.pt"
    own = [tmp_path / name for name in (".c.pt.original.pt", ".c.pt.pt", "c.pt.12345678.pt", ".d.pt.12345678.pt")]
    for file in own:
        file.write_text("the user's")
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True) as writer:
        left = tmp_path / writer.stdout.readline().strip()
        with replacing(path) as temporary:
            temporary.write_text("whole")
        assert left.exists()
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    with replacing(path) as temporary:
        temporary.write_text("whole")
    assert sorted(tmp_path.iterdir()) == sorted([path, *own])
    assert path.read_text() == "whole"
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_json_has_limits():
    deep = JSON_DEPTH - 1
    assert parse_json("[" * deep + "]" * deep)
    assert parse_json('{"a": [1, 2.5, null, {"b": "c"}]}') == {"a": [1, 2.5, None, {"b": "c"}]}
    start = time.monotonic()
    for text in ("[" * (deep + 2) + "]" * (deep + 2), "[" * 10**6, '{"a":' * 10**5 + "1" + "}" * 10**5):
        with pytest.raises(ValueError, match=r"nested deeper than 100 levels|Expecting value"):
            parse_json(text)
    with pytest.raises(ValueError, match="4300 digits"):
        parse_json("1" * 5000)
    with pytest.raises(ValueError, match="the key 'a' stands twice"):
        parse_json('{"b": {"a": 1, "a": 2}}')
    assert time.monotonic() - start < 5
    assert json_digest({"a": 1, "b": [2.5]}) == json_digest({"b": [2.5], "a": 1}) != json_digest({"a": 1, "b": [2.0]})
