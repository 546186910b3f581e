"""The emoji of the CLIP example: built from packages, dealt into pairs."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"
# Keycap, pair of two code points, skin tone, drawn once only, and without a name.
CODES = ("0023-FE0F-20E3", "1F600", "1F3FB", "1F601", "1F602", "1F603")
NAMED = CODES[:4] + CODES[5:]


@pytest.fixture
def emoji(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("_emoji")


@pytest.fixture
def pairs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("_emoji_pairs")


def load(directory: str) -> ModuleType:
    """Load ``clip.py`` of a directory: there are two, and neither is a module."""
    path = EXAMPLES.parent / directory / "clip.py"
    spec = importlib.util.spec_from_file_location(f"{directory}_clip", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def character(code: str) -> str:
    return "".join(chr(int(part, 16)) for part in code.split("-"))


def drawing(code: str, vendor: str) -> bytes:
    """A square of one colour on a transparent ground."""
    picture = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    colour = (200 if vendor == "google" else 10, 10 * CODES.index(code), 30, 255)
    picture.paste(colour, (16, 16, 48, 48))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def write_archive(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A directory of archives like the registry's, with six emoji."""
    directory = tmp_path / "packages"
    directory.mkdir()
    entries = [
        {
            "unified": code,
            "image": f"{code.lower()}.png",
            "category": "Component" if code == "1F3FB" else "Symbols",
            "subcategory": "some",
            "has_img_google": True,
            "has_img_twitter": code != "1F601",
        }
        for code in CODES
    ]
    for vendor in ("google", "twitter"):
        drawn = {
            f"img/{vendor}/64/{code.lower()}.png": drawing(code, vendor)
            for code in reversed(CODES)
        }
        content = {"emoji.json": json.dumps(entries).encode(), **drawn}
        write_archive(directory / f"emoji-datasource-{vendor}-16.0.0.tgz", content)
    names = {character(code): {"name": f"name of {code}"} for code in NAMED}
    keywords = {character(code): ["one_word", "two", code] for code in NAMED}
    write_archive(
        directory / "unicode-emoji-json-0.9.0.tgz",
        {"data-by-emoji.json": json.dumps(names).encode()},
    )
    write_archive(
        directory / "emojilib-4.0.3.tgz",
        {"dist/emoji-en-US.json": json.dumps(keywords).encode()},
    )
    return directory


@pytest.fixture
def question(emoji: ModuleType, pairs: ModuleType) -> Any:
    count = 40
    generator = np.random.default_rng(0)
    drawings = generator.integers(0, 255, (2, count, 32, 32, 3), dtype=np.uint8)
    meta = [
        {
            "name": f"thing {i}",
            "keywords": [f"thing {i}", f"kind_{i % 4} of", "all"],
        }
        for i in range(count)
    ]
    return pairs.ask(emoji.Emoji(*drawings, meta), n_targets=8)


class TestBuilding:
    def test_what_is_built(
        self, emoji: ModuleType, packages: Path, tmp_path: Path
    ) -> None:
        built = emoji.load(tmp_path / "cache", packages)
        kept = [entry["unified"] for entry in built.meta]
        assert kept == ["0023-FE0F-20E3", "1F600", "1F603"]
        assert built.meta[1] == {
            "unified": "1F600",
            "name": "name of 1F600",
            "keywords": ["one word", "two", "1F600"],
            "category": "Symbols",
            "subcategory": "some",
        }
        for vendor, red in (("google", 200), ("twitter", 10)):
            drawings = getattr(built, vendor)
            assert drawings.shape == (3, 32, 32, 3)
            for picture, code in zip(drawings, kept, strict=True):
                assert tuple(picture[0, 0]) == (255, 255, 255)
                assert tuple(picture[16, 16]) == (red, 10 * CODES.index(code), 30)

    def test_it_is_built_once(
        self, emoji: ModuleType, packages: Path, tmp_path: Path
    ) -> None:
        cache = tmp_path / "cache"
        built = emoji.load(cache, packages)
        again = emoji.load(cache, tmp_path / "nowhere")
        assert again.meta == built.meta
        np.testing.assert_array_equal(again.twitter, built.twitter)
        assert [path.name for path in cache.iterdir()] == ["pairs_32.npz"]

    def test_drawings_that_are_missing(
        self, emoji: ModuleType, packages: Path, tmp_path: Path
    ) -> None:
        path = packages / "emoji-datasource-twitter-16.0.0.tgz"
        write_archive(path, {"img/twitter/64/1f600.png": drawing("1F600", "twitter")})
        with pytest.raises(emoji.NotAvailableError, match="holds 1 of 3 drawings"):
            emoji.load(tmp_path / "cache", packages)
        assert not (tmp_path / "cache" / "pairs_32.npz").exists()


class TestFetching:
    def test_without_npm(
        self, emoji: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(emoji.shutil, "which", lambda _: None)
        with pytest.raises(
            emoji.NotAvailableError,
            match=r"emoji-datasource-google@16.0.0, .*emojilib@4.0.3 \(up to 137 MB.* no npm",
        ):
            emoji.load(tmp_path)

    def test_without_a_network(
        self, emoji: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(command: list[str], **options: Any) -> Any:
            message = "npm error code ENOTFOUND\nnpm error network is down\n"
            return subprocess.CompletedProcess(command, 1, "", message)

        monkeypatch.setattr(emoji.shutil, "which", lambda _: "npm")
        monkeypatch.setattr(emoji.subprocess, "run", fail)
        with pytest.raises(
            emoji.NotAvailableError,
            match=r"that failed \(npm error network is down\).*--packages",
        ):
            emoji.load(tmp_path / "cache")

    def test_only_what_is_missing_is_fetched(
        self, emoji: ModuleType, packages: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gone = packages / "emojilib-4.0.3.tgz"
        content, fetched = gone.read_bytes(), []
        gone.unlink()

        def pack(command: list[str], cwd: Path, **options: Any) -> Any:
            fetched.append(command[2])
            (cwd / gone.name).write_bytes(content)
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(emoji.shutil, "which", lambda _: "npm")
        monkeypatch.setattr(emoji.subprocess, "run", pack)
        emoji.fetch(packages)
        assert fetched == ["emojilib@4.0.3"]

    def test_the_command_says_what_it_would_fetch(self, tmp_path: Path) -> None:
        done = subprocess.run(
            [sys.executable, EXAMPLES / "_emoji.py", "--cache", tmp_path],
            capture_output=True,
            text=True,
            env={"PATH": str(tmp_path)},
            check=False,
        )
        assert done.returncode == 1
        assert "emoji-datasource-twitter@16.0.0" in done.stderr
        assert "Traceback" not in done.stderr


class TestPairs:
    def test_twins_are_googles_of_the_same_emoji(self, question: Any) -> None:
        train, targets = question.train, question.targets
        assert len(targets) == 8
        assert len(train) == 40 + 32
        for target, twin in enumerate(question.twins):
            assert train.vendors[twin] == "google"
            assert train.emoji[twin] == targets.emoji[target]
        held = set(targets.emoji)
        shown = zip(train.vendors, train.emoji, strict=True)
        assert not any(vendor == "twitter" and e in held for vendor, e in shown)

    def test_no_phrase_is_said_of_both_drawings(self, question: Any) -> None:
        train = question.train
        for target, twin in enumerate(question.twins):
            phrases = {f"thing {twin}", f"kind {twin % 4} of", "all"}
            ours, theirs = (
                {phrase for phrase in phrases if phrase in caption}
                for caption in (question.targets.captions[target], train.captions[twin])
            )
            assert not ours & theirs
            assert ours | theirs == phrases

    def test_inputs_end_and_are_padded(self, question: Any, pairs: ModuleType) -> None:
        for side in (question.train, question.targets):
            ids, mask = side.inputs["input_ids"], side.inputs["attention_mask"]
            assert ids.shape == (len(side), pairs.LENGTH)
            assert ((ids == pairs.END).sum(1) == 1).all()
            assert ((ids > 0) == mask.bool()).all()
            assert ids.max() < question.vocabulary
            images = side.inputs["pixel_values"]
            assert images.min() >= -1
            assert images.max() <= 1

    def test_words(self, pairs: ModuleType) -> None:
        found = pairs.words("Flag: Åland_Islands “a-b”")
        assert found == ["flag", ":", "åland", "islands", "“", "a", "b", "”"]


class Looked:
    """A model that embeds images as two numbers, and texts as two others."""

    def __init__(self, images: Any, texts: Any) -> None:
        self.images, self.texts = images, texts

    def __call__(self, **batch: Any) -> Any:
        return SimpleNamespace(image_embeds=self.images, text_embeds=self.texts)


class TestModel:
    @pytest.fixture
    def clip_model(self, pairs: ModuleType) -> ModuleType:
        pytest.importorskip("transformers")
        return importlib.import_module("_clip_model")

    def test_similarity_is_against_the_others(
        self, clip_model: ModuleType, question: Any
    ) -> None:
        images = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
        texts = torch.tensor([[0.8, 0.6], [0.0, 1.0], [1.0, 0.0]])
        three = SimpleNamespace(batches=lambda size: [{}])
        model = Looked(images, texts)
        cosines = images.double() @ texts.double().T
        expected = [
            cosines[i, i]
            - sum(cosines[i, j] + cosines[j, i] for j in range(3) if j != i) / 4
            for i in range(3)
        ]
        found = clip_model.similarity(model, three)
        np.testing.assert_allclose(found, expected)
        # Image 2 has cosines .96, .8 and .6 with the texts, and the last is its own.
        assert clip_model.ranks(model, three).tolist() == [2, 1, 3]

    @pytest.mark.slow
    def test_the_example_trains_and_attributes(
        self, clip_model: ModuleType, question: Any, tmp_path: Path, capsys: Any
    ) -> None:
        pytest.importorskip("matplotlib")
        example = load("examples")
        example.N_CHECKPOINTS = 1
        clip_model.BATCH_SIZE = 24
        scores, ranks = example.attribute(question, tmp_path)
        assert scores.shape == (72, 8)
        assert np.isfinite(scores).all()
        chosen = example.report(question, scores, ranks, ["odd", "even"] * 20)
        assert len(chosen) == 2
        assert "was taught by" in capsys.readouterr().out
        path = example.picture.draw(tmp_path / "it.png", question, scores, chosen)
        assert path.stat().st_size > 10_000


def test_shared_words(pairs: ModuleType, question: Any) -> None:
    pytest.importorskip("transformers")
    scores = load("benchmarks").shared_words(question)
    assert scores.shape == (72, 8)
    for i, j in ((0, 0), (50, 3), (71, 7)):
        ours, theirs = (
            set(side.inputs["input_ids"][row].tolist()) - {0, pairs.END}
            for side, row in ((question.train, i), (question.targets, j))
        )
        assert (scores[i, j] > 0) == bool(ours & theirs)
    assert scores.max() <= 1 + 1e-12
