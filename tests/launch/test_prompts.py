"""Prompt files in, result files out."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from moe_runtime.cli.prompts import check_output, read_prompts, write_lines
from moe_runtime.errors import ConfigError, RequestError


@pytest.mark.parametrize("name", ["my prompts,v2.txt", "a=b.txt", "[x].txt", "out(1).jsonl"])
def test_prompt_files(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text('{"prompt": "a\\nb"}\n\n{"prompt": [1, 2], "id": 7}\n', encoding="utf-8")
    text, ids = read_prompts(file)
    assert (text.value, ids.value, ids.line) == ("a\nb", (1, 2), 3)


def test_text_prompts_keep_blanks_and_lose_line_ends(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_bytes("\ufeff  x = 1\r\n\r\ny \u2028z\n".encode())
    assert [prompt.value for prompt in read_prompts(file)] == ["  x = 1", "y \u2028z"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n \n", "holds no prompt"),
        (b"\xff\xfe", "is not UTF-8 text (byte 0)"),
        (b'{"prompt": "a"}\nnot json', "line 2: is not JSON"),
        (b'{"prompt": "a"}\n{"text": "b"}', "line 2: has ['text'] but no \"prompt\""),
        (b'{"prompt": "a"}\n{"prompt": ""}', "line 2: the prompt is empty"),
        (b'{"prompt": "a"}\n{"prompt": []}', "line 2: the prompt is empty"),
        (
            b'{"prompt": "a"}\n{"prompt": [1, -2]}',
            "line 2: the prompt is [1, -2]; must be a text or a list of token ids",
        ),
        (b'{"prompt": "a"}\n{"prompt": [true]}', "line 2: the prompt is [True]"),
        (b'{"prompt": "a\\ud800"}', "half of a surrogate pair"),
    ],
)
def test_bad_prompt_files(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "bad"
    file.write_bytes(content)
    with pytest.raises((ConfigError, RequestError)) as caught:
        read_prompts(file)
    assert message in str(caught.value)


def test_missing_prompt_file_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "prompts,v2.txt").touch()
    with pytest.raises(ConfigError, match=r"no such file\. Did you mean 'prompts,v2\.txt'"):
        read_prompts(tmp_path / "prompts,v1.txt")
    with pytest.raises(ConfigError, match="is a folder"):
        read_prompts(tmp_path)


def test_output_is_checked_before_the_run(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    check_output(tmp_path / "a.jsonl", prompts=prompts)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="mkdir -p"):
        check_output(tmp_path / "no" / "a.jsonl", prompts=prompts)
    with pytest.raises(ConfigError, match="is a folder"):
        check_output(tmp_path, prompts=prompts)


def test_output_replaces_results_and_nothing_else(tmp_path: Path) -> None:
    prompts, pipe, link, circle = (tmp_path / name for name in ("prompts.txt", "pipe", "link", "circle"))
    prompts.write_text("a", encoding="utf-8")
    os.mkfifo(pipe)
    link.symlink_to(prompts)
    circle.symlink_to(circle)
    for path in (pipe, Path(os.devnull)):
        with pytest.raises(ConfigError, match=r"is no regular file\. Name a \.jsonl file\."):
            check_output(path, prompts=prompts)
    for path in (prompts, link):
        with pytest.raises(ConfigError, match="is the file of prompts, which would be lost"):
            check_output(path, prompts=prompts)
    for path in (circle, tmp_path / ("x" * 5000)):
        with pytest.raises(ConfigError, match="cannot be written"):
            check_output(path, prompts=prompts)


def test_output_through_a_link_goes_to_its_target(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    link, target = tmp_path / "link.jsonl", tmp_path / "far" / "results.jsonl"
    link.symlink_to(target)
    check_output(link, prompts=tmp_path / "prompts.txt")
    write_lines(link, [{"x": 1}])
    assert link.is_symlink()
    assert target.read_text(encoding="utf-8") == '{"x": 1}\n'
    assert [file.name for file in target.parent.iterdir()] == ["results.jsonl"]


def test_prompt_paths_that_cannot_be_looked_at(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read \(File name too long\)"):
        read_prompts(tmp_path / ("x" * 5000))


def test_output_is_whole_or_absent(tmp_path: Path) -> None:
    file = tmp_path / "a=b, [c].jsonl"
    file.write_text("old", encoding="utf-8")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_lines(file, [{"x": 1}, {"x": float("nan")}])
    assert file.read_text(encoding="utf-8") == "old"
    write_lines(file, [{"x": "ü\u2028"}])
    assert [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line] == [{"x": "ü\u2028"}]
    assert list(tmp_path.iterdir()) == [file]
