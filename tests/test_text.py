"""Attribution of what a language model says: strings in, texts and scores out."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests import problems, reference
from tests.problems import draw, randomized
from trak import TRAKer
from trak.errors import BatchError, OptionError, StoreError
from trak.projectors import NoOpProjector
from trak.text import Explanation, TextAttributor
from trak.text._answers import read_answer, select
from trak.text._encoding import batched, collate, encode_texts
from trak.text._tokenizing import Tokenizing

TEXTS = [
    "the capital of japan is tokyo",
    "tokyo rules japan",
    "the capital of peru is lima",
    "lima is old",
    "people eat sushi in tokyo and in all of japan",
    "go on",
]
BOS, EOS = 0, 1
PIECE = r"\s?\S{1,4}|\s"


class Pieces:
    """A fast tokenizer of up to four letters, with the space before them."""

    is_fast = True
    truncation_side = "right"
    eos_token_id = EOS
    all_special_ids = (BOS, EOS)

    def __init__(self, *, bos: bool = False, eos: bool = False) -> None:
        whole = {piece for text in TEXTS for piece in re.findall(PIECE, text)}
        letters = [chr(i) for i in range(ord("a"), ord("z") + 1)]
        self.pieces = ["<bos>", "<eos>", *sorted(whole), *letters, " ", "!"]
        self.head, self.tail = [BOS] * bos, [EOS] * eos

    def cut(self, text: str) -> list[str]:
        found = re.findall(PIECE, text)
        return [
            part
            for piece in found
            for part in ([piece] if piece in self.pieces else piece)
        ]

    def __call__(
        self,
        text: list[str] | None = None,
        text_target: list[str] | None = None,
        add_special_tokens: bool = True,
        return_offsets_mapping: bool = False,
        truncation: bool = False,
        max_length: int = 0,
    ) -> dict[str, Any]:
        rows, spans = [], []
        head, tail = (self.head, self.tail) if add_special_tokens else ([], [])
        for one in text if text is not None else text_target or []:
            pieces = self.cut(one)
            ends = np.cumsum([0, *map(len, pieces)]).tolist()
            inner = list(itertools.pairwise(ends))
            lack = len(head) + len(pieces) + len(tail) - max_length
            if truncation and lack > 0:
                left = self.truncation_side == "left"
                part = slice(lack, None) if left else slice(len(pieces) - lack)
                pieces, inner = pieces[part], inner[part]
            rows.append([*head, *map(self.pieces.index, pieces), *tail])
            spans.append([(0, 0)] * len(head) + inner + [(0, 0)] * len(tail))
        found = {"input_ids": rows}
        return found | ({"offset_mapping": spans} if return_offsets_mapping else {})

    def decode(self, token_ids: list[int], **options: Any) -> str:
        assert options["skip_special_tokens"]
        return "".join(self.pieces[i] for i in token_ids if i not in {BOS, EOS})


class Slow(Pieces):
    """One that tells no characters, as those written in Python."""

    is_fast = False

    def __call__(self, *args: Any, **options: Any) -> dict[str, Any]:
        if options.pop("return_offsets_mapping", False):
            raise NotImplementedError
        return super().__call__(*args, **options)


class Reader(problems.Reader):
    """One that says what it takes, and generates."""

    def __init__(self, tokens: int = 60, positions: int = 16) -> None:
        super().__init__(tokens, positions)
        self.config = SimpleNamespace(
            max_position_embeddings=positions, is_encoder_decoder=False
        )

    def get_input_embeddings(self) -> nn.Embedding:
        return self.tokens

    @torch.no_grad()
    def generate(self, input_ids: Tensor, **options: Any) -> Tensor:
        assert options["do_sample"] is False
        for _ in range(options["max_new_tokens"]):
            logits = self(input_ids).logits[:, -1]
            logits[:, len(Pieces().pieces) :] = -torch.inf
            token = logits.argmax(1, keepdim=True)
            input_ids = torch.cat([input_ids, token], 1)
            if token == EOS:
                break
        return input_ids


class Translator(Reader):
    """Reads a source and, one place further right, the target."""

    def __init__(self) -> None:
        super().__init__()
        self.config.is_encoder_decoder = True
        self.config.decoder_start_token_id = BOS

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
    ) -> SimpleNamespace:
        source = self.read(input_ids, attention_mask)
        seen = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        pooled = (source * seen[..., None]).sum(1, keepdim=True) / seen.sum(1)[
            :, None, None
        ]
        hidden = self.read(decoder_input_ids, None) + pooled
        return SimpleNamespace(logits=self.head(hidden))

    @torch.no_grad()
    def generate(self, input_ids: Tensor, **options: Any) -> Tensor:
        made = torch.tensor([[BOS]])
        for _ in range(options["max_new_tokens"]):
            logits = self(input_ids, None, made).logits[:, -1]
            logits[:, len(Pieces().pieces) :] = -torch.inf
            made = torch.cat([made, logits.argmax(1, keepdim=True)], 1)
        return made


def checkpoints(model: nn.Module, count: int = 2) -> list[dict[str, Tensor]]:
    return [
        {key: value + 0.1 * c for key, value in model.state_dict().items()}
        for c in range(count)
    ]


def attribute(
    path: Path, model: nn.Module | None = None, tokenizer: Any = None, **options: Any
) -> TextAttributor:
    """An attributor without projection or rounding."""
    model = Reader() if model is None else model
    given = {
        "texts": TEXTS,
        "checkpoints": checkpoints(model, 1),
        "save_dir": path,
        "use_half_precision": False,
        "logging_level": 40,
        "batch_size": 2,
        "projector": NoOpProjector(sum(value.numel() for value in model.parameters())),
    }
    tokenizer = Pieces() if tokenizer is None else tokenizer
    return TextAttributor(model, tokenizer, **(given | options))


# -- the numbers ----------------------------------------------------------------------


def outputs(model: nn.Module, ids: list[int], places: list[int]) -> Tensor:
    """The mean of the margins of the tokens at some positions of one text."""
    logits = model(torch.tensor([ids])).logits[0]
    found = [
        reference.margin(logits[place - 1], torch.tensor(ids[place]))
        for place in places
    ]
    return torch.stack(found).mean()


def weight(model: nn.Module, ids: list[int], places: list[int]) -> Tensor:
    logits = model(torch.tensor([ids])).logits[0]
    return torch.stack([
        1 - logits[place - 1].softmax(0)[ids[place]] for place in places
    ]).mean()


def by_hand(
    model: nn.Module,
    weights: list[dict[str, Tensor]],
    train: list[tuple[list[int], list[int]]],
    targets: list[tuple[list[int], list[int]]],
) -> np.ndarray:
    features, phis, qs = [], [], []
    for one in weights:
        model.load_state_dict(one)
        parameters = list(model.parameters())
        scale = sum(value.numel() for value in parameters) ** 0.5
        for rows, kept in ((train, features), (targets, phis)):
            kept.append(
                reference.loop_gradients(
                    lambda i, rows=rows: outputs(model, *rows[i]), len(rows), parameters
                )
                / scale
            )
        qs.append(torch.stack([weight(model, *row).detach() for row in train]))
    return reference.trak(features, phis, qs).numpy()


def test_scores_are_those_of_the_oracle(tmp_path: Path) -> None:
    """Whole texts of several lengths; an answer and a span of it, in one pass."""
    tokenizer = Pieces()
    found = attribute(
        tmp_path, checkpoints=checkpoints(Reader()), exponents=(0.0, 1.0)
    ).explain(
        ["the capital of japan", "lima is"],
        [" is tokyo", " old"],
        ["kyo", None],
        per_token=True,
    )
    rows = tokenizer(TEXTS)["input_ids"]
    train = [(row, list(range(1, len(row)))) for row in rows]
    model = Reader()
    first, second = tokenizer(["the capital of japan is tokyo", "lima is old"])[
        "input_ids"
    ]
    n, m = len(first), len(second)
    assert found[0].tokens == (" toky", "o")
    targets = [
        (first, [n - 2, n - 1]),
        (first, [n - 2]),
        (first, [n - 1]),
        (second, [m - 1]),
    ]
    expected = by_hand(model, checkpoints(model), train, targets)
    np.testing.assert_allclose(found[0].train_scores, expected[:, 0], rtol=1e-4)
    np.testing.assert_allclose(found[0].token_scores, expected[:, 1:3], rtol=1e-4)
    np.testing.assert_allclose(found[1].train_scores, expected[:, 3], rtol=1e-4)


def test_of_a_pair_only_the_completion_is_learned(tmp_path: Path) -> None:
    pairs = [("the capital of japan is", " tokyo"), "lima is old", ("tokyo", " rules")]
    tokenizer = Pieces(bos=True, eos=True)
    answer = attribute(
        tmp_path, tokenizer=tokenizer, texts=pairs, exponents=(0.0, 1.0)
    ).explain("lima is", " old")
    rows = tokenizer(["the capital of japan is tokyo", "lima is old", "tokyo rules"])
    first, second, third = rows["input_ids"]
    train = [
        (first, [len(first) - 3, len(first) - 2, len(first) - 1]),
        (second, list(range(1, len(second)))),
        (third, list(range(3, len(third)))),
    ]
    model = Reader()
    targets = [(second, [len(second) - 2])]  # without the token at the end
    expected = by_hand(model, checkpoints(model, 1), train, targets)
    np.testing.assert_allclose(answer.train_scores, expected[:, 0], rtol=1e-4)


@pytest.mark.parametrize("model", [Reader, Translator])
def test_scores_of_an_answer_are_the_mean_of_its_tokens(
    tmp_path: Path, model: type[Reader]
) -> None:
    texts = list(zip(TEXTS, TEXTS[::-1], strict=True))
    found = attribute(tmp_path, model(), texts=texts, max_length=15).explain(
        "people eat", " sushi in tokyo", per_token=True
    )
    assert "".join(found.tokens) == " sushi in tokyo"
    assert found.token_scores is not None
    assert found.token_scores.shape == (len(TEXTS), len(found.tokens))
    np.testing.assert_allclose(
        found.token_scores.mean(1), found.train_scores, rtol=1e-4, atol=1e-7
    )


def test_batch_size_order_and_repeats_do_not_matter(tmp_path: Path) -> None:
    kept = []
    for size in (1, 4):
        one = attribute(tmp_path / str(size), batch_size=size)
        found = one.explain(["lima", "go", "lima"], [" is old", " on", " is old"])
        kept.append(np.stack([answer.train_scores for answer in found]))
        np.testing.assert_array_equal(kept[-1][0], kept[-1][2])
    for other in kept[1:]:
        np.testing.assert_allclose(other, kept[0], rtol=1e-4, atol=1e-8)
    turned = attribute(tmp_path / "turned", texts=TEXTS[::-1])
    found = turned.explain("lima", " is old")
    np.testing.assert_allclose(
        found.train_scores[::-1], kept[0][0], rtol=1e-4, atol=1e-8
    )


def test_a_store_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = attribute(tmp_path).explain("lima is", " old").train_scores
    again = attribute(tmp_path)
    again.featurize()
    model = again.traker.model
    monkeypatch.setattr(model, "read", None)  # nothing is computed again
    np.testing.assert_array_equal(again.explain("lima is", " old").train_scores, before)
    monkeypatch.undo()
    with pytest.raises(StoreError):
        attribute(tmp_path, texts=[*TEXTS[:-1], "go in"]).explain("lima is", " old")


# -- what is answered -----------------------------------------------------------------


def test_the_model_answers_by_itself(tmp_path: Path) -> None:
    one = attribute(tmp_path, checkpoints=None)
    found = one.explain("lima is", max_new_tokens=3, per_token=True)
    ids = torch.tensor(Pieces()(["lima is"])["input_ids"])
    said = Reader().generate(ids, do_sample=False, max_new_tokens=3)[0, ids.shape[1] :]
    assert found.generation == Pieces().decode(said.tolist(), skip_special_tokens=True)
    assert "".join(found.tokens) == found.generation
    assert len(found.tokens) == 3


def test_the_last_checkpoint_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scores(_: Any, answers: list[Any], **__: Any) -> list[np.ndarray]:
        return [np.zeros((len(TEXTS), 1), np.float32) for _ in answers]

    monkeypatch.setattr(TextAttributor, "_scores", scores)
    model = Reader()
    first, last = (
        checkpoints(model)[0],
        {key: -value for key, value in model.state_dict().items()},
    )
    answers = [
        attribute(tmp_path / str(i), checkpoints=given)
        .explain("lima is", max_new_tokens=4)
        .generation
        for i, given in enumerate(([first, last], [last, first], [last]))
    ]
    assert answers[0] == answers[2] != answers[1]


def test_an_answer_ends_where_the_model_ends_it(tmp_path: Path) -> None:
    class Ending(Reader):
        def generate(self, input_ids: Tensor, **options: Any) -> Tensor:
            said = torch.tensor([[5, 6, EOS, EOS]])
            return torch.cat([input_ids, said], 1)

    found = attribute(tmp_path, Ending()).explain("lima is", per_token=True)
    assert found.tokens == tuple(Pieces().pieces[5:7])
    assert found.generation == "".join(found.tokens)


def test_an_answer_has_room_in_the_model(tmp_path: Path) -> None:
    found = attribute(tmp_path, Reader(positions=15), texts=TEXTS[:3]).explain(
        "lima is old", max_new_tokens=100, per_token=True
    )
    assert len(found.tokens) == 12


def test_an_encoder_decoder_answers(tmp_path: Path) -> None:
    texts = list(zip(TEXTS, TEXTS[::-1], strict=True))
    one = attribute(tmp_path, Translator(), texts=texts)
    found = one.explain("lima is", max_new_tokens=3, per_token=True)
    assert len(found.tokens) == 3
    assert "".join(found.tokens) == found.generation


def test_a_span_of_a_target_sees_the_target_before_it() -> None:
    """The decoder gets all tokens, whichever are labelled."""
    model = Translator()
    tokenizing = Tokenizing(model, Pieces(eos=True))
    answer = read_answer(tokenizing, "prompt", "go on", "lima is old", is_seq2seq=True)
    part = select("span", answer, "old")
    batch = collate(
        [part.whole.labelled(part.places)], model, torch.device("cpu"), has_mask=True
    )
    ids = Pieces(eos=True)(["lima is old"])["input_ids"][0]
    assert batch["decoder_input_ids"].tolist() == [[BOS, *ids[:-1]]]
    assert batch["labels"].tolist() == [[-100, -100, ids[2], -100]]


def test_results_rank_texts(tmp_path: Path) -> None:
    one = attribute(tmp_path)
    found = one.explain("lima is", " old", k=2, per_token=True)
    assert isinstance(found, Explanation)
    order = np.argsort(-found.train_scores, kind="stable")
    assert found.indices.tolist() == order[:2].tolist()
    assert found.texts == [TEXTS[i] for i in order[:2]]
    np.testing.assert_array_equal(found.scores, found.train_scores[order[:2]])
    assert found.opponents.indices.tolist() == order[::-1][:2].tolist()
    text = str(found)
    assert "'lima is' -> ' old'" in text
    assert f"[{order[0]}] {TEXTS[order[0]]}" in text
    assert "most: ' old'" in text
    assert "explained" not in text
    assert "explained: ' old'" in str(one.explain("lima", " is old", "old"))
    assert len(one.explain("lima is", " old", k=99).texts) == len(TEXTS)


def test_one_checkpoint_is_the_models_own(tmp_path: Path) -> None:
    model = Reader()
    found = attribute(tmp_path / "0", model, checkpoints=None).explain("go", " on")
    same = attribute(tmp_path / "1", checkpoints=[Reader().state_dict()])
    np.testing.assert_array_equal(
        found.train_scores, same.explain("go", " on").train_scores
    )


def test_the_models_own_weights_may_be_one_of_several_checkpoints(
    tmp_path: Path,
) -> None:
    """Loading the others into the model does not change them."""
    model = Reader()
    first, last = checkpoints(model)
    known = attribute(tmp_path / "0", checkpoints=[last, first]).explain("go", " on")
    found = attribute(
        tmp_path / "1", model, checkpoints=[last, model.state_dict()]
    ).explain("go", " on")
    np.testing.assert_array_equal(found.train_scores, known.train_scores)


def test_train_inds_are_passed_on(tmp_path: Path) -> None:
    one = attribute(
        tmp_path,
        checkpoints=checkpoints(Reader()),
        train_inds=[[0, 1, 2], [1, 3, 4, 5]],
    )
    one.explain(["go", "lima is"], [" on", " old"])
    assert one.traker.cross_validate() is not None


# -- spans ----------------------------------------------------------------------------


def answer_of(text: str, prompt: str = "lima", tokenizer: Any = None) -> Any:
    tokenizing = Tokenizing(Reader(), tokenizer or Pieces())
    return read_answer(tokenizing, "prompt", prompt, text, is_seq2seq=False)


@pytest.mark.parametrize("tokenizer", [Pieces(), Pieces(bos=True, eos=True), Slow()])
@pytest.mark.parametrize(
    ("span", "expected"),
    [
        (None, " is tokyo"),
        ("tokyo", " tokyo"),
        ((8, 9), "o"),
        ("yo", " tokyo"),
        ("ky", " toky"),
        ((1, 3), " is"),
        ((0, 1), " is"),
        ((2, 5), " is toky"),
        ((0, 9), " is tokyo"),
    ],
)
def test_a_span_is_widened_to_tokens(tokenizer: Any, span: Any, expected: str) -> None:
    part = select("span", answer_of(" is tokyo", tokenizer=tokenizer), span)
    assert "".join(part.tokens()) == expected
    ids = [part.whole.ids[place] for place in part.places]
    assert Pieces().decode(ids, skip_special_tokens=True) == expected


@pytest.mark.parametrize(
    ("span", "match"),
    [
        ("lima", "is no part of the answer ' is in tokyo in'"),
        ("", "is no part of"),
        ("in", "occurs 2 times"),
        ((3, 3), "0 <= start < end <= 15"),
        ((0, 16), "0 <= start < end <= 15"),
        ((-1, 3), "0 <= start < end"),
        ((1, 2, 3), "pass a part"),
        ((0.5, 2), "pass a part"),
        (7, "pass a part"),
    ],
)
def test_a_span_outside_the_answer_is_named(span: Any, match: str) -> None:
    with pytest.raises(OptionError, match=re.escape(match)):
        select("span", answer_of(" is in tokyo in"), span)


def test_spaces_that_a_tokenizer_leaves_out_belong_to_the_token_after_them() -> None:
    class Trimming(Pieces):
        def __call__(self, *args: Any, **options: Any) -> dict[str, Any]:
            found = super().__call__(*args, **options)
            texts = args[0] if args else options["text_target"]
            for spans, text in zip(
                found.get("offset_mapping", []), texts, strict=False
            ):
                for i, (low, high) in enumerate(spans):
                    spans[i] = (low + (text[low:high][:1] == " "), high)
            return found

    answer = answer_of(" is tokyo", tokenizer=Trimming())
    assert answer.tokens() == [" is", " toky", "o"]
    # The space alone belongs to no token that covers anything.
    assert answer_of(" is ", tokenizer=Trimming()).tokens() == [" is"]
    with pytest.raises(OptionError, match="no token that the model predicts stands"):
        select("span", answer_of(" is ", tokenizer=Trimming()), (3, 4))


def test_a_character_of_several_tokens_is_explained_by_all_of_them() -> None:
    class Bytes(Slow):
        """Ids are bytes."""

        pieces = ()

        def __init__(self) -> None:
            pass

        def __call__(self, text: list[str], **_: Any) -> dict[str, Any]:
            return {"input_ids": [list(one.encode()) for one in text]}

        def decode(self, token_ids: list[int], **_: Any) -> str:
            return bytes(token_ids).decode(errors="replace")

    tokenizing = Tokenizing(Reader(tokens=256), Bytes())
    said = list("aüb".encode())
    for answer in ("aüb", said):
        found = read_answer(tokenizing, "prompt", "x", answer, is_seq2seq=False)
        assert found.tokens() == ["a", "ü", "ü", "b"]
        part = select("span", found, "ü")
        assert [part.whole.ids[place] for place in part.places] == said[1:3]
    cut = read_answer(tokenizing, "prompt", "x", said[:2], is_seq2seq=False)
    assert len(cut.places) == 2


def test_a_slow_tokenizer_takes_pairs_apart(tmp_path: Path) -> None:
    pairs = [("lima is", " old"), ("go", " on")]
    found = [
        encode_texts(Tokenizing(Reader(), tokenizer), pairs, is_seq2seq=False)
        for tokenizer in (Pieces(), Slow(), Slow(eos=True))
    ]
    assert found[0] == found[1] == found[2]
    answer = attribute(tmp_path, tokenizer=Slow(eos=True)).explain("lima", " is old")
    known = attribute(tmp_path / "fast").explain("lima", " is old")
    assert answer.tokens == known.tokens


def test_a_slow_tokenizer_may_say_texts_otherwise() -> None:
    class Words(Slow):
        def decode(self, token_ids: list[int], **options: Any) -> str:
            return super().decode(token_ids, **options).strip()

    answer = answer_of(" is tokyo", tokenizer=Words())
    assert answer.text == "is tokyo"
    assert answer.tokens() == ["is", " toky", "o"]
    assert select("span", answer, "tokyo").tokens() == [" toky", "o"]


def test_checkpoints_are_fitted_to_generate_too(tmp_path: Path) -> None:
    weights = checkpoints(Reader())[1]
    known = attribute(tmp_path / "0", checkpoints=[weights]).explain("go")
    wrapped = {f"module.{key}": value for key, value in weights.items()}
    found = attribute(tmp_path / "1", checkpoints=[wrapped]).explain("go")
    assert found.generation == known.generation
    np.testing.assert_array_equal(found.train_scores, known.train_scores)


def test_a_wrapped_model_is_given_no_mask_that_it_does_not_take(
    tmp_path: Path,
) -> None:
    class Maskless(Reader):
        def forward(self, input_ids: Tensor) -> Any:  # type: ignore[override]
            return super().forward(input_ids)

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = Maskless()

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.module(*args, **kwargs)

    known = attribute(tmp_path / "0", Maskless()).explain("go", " on")
    found = attribute(tmp_path / "1", Wrapped()).explain("go", " on")
    np.testing.assert_allclose(found.train_scores, known.train_scores, rtol=1e-5)


# -- texts and batches ----------------------------------------------------------------


def encode(texts: Any, tokenizer: Any = None, **options: Any) -> Any:
    tokenizing = Tokenizing(Reader(), tokenizer or Pieces(), **options)
    return encode_texts(tokenizing, texts, is_seq2seq=False)


def test_labels() -> None:
    whole, pair = encode(["lima is old", ("lima is", " old")], Pieces(eos=True))
    assert whole.labels == whole.ids
    assert whole.ids[-1] == EOS
    assert pair.labels == (-100, -100, *pair.ids[2:])
    # A prompt that ends within a token leaves all of it to the completion.
    assert encode([("lima is o", "ld")])[0].labels[:2] == (-100, -100)
    assert encode([("lima is o", "ld")])[0].labels[2] != -100
    # Without the tokenizer's own special tokens, as after a chat template.
    plain = encode(
        ["lima is old"], Pieces(bos=True, eos=True), add_special_tokens=False
    )
    assert plain[0].ids == whole.ids[:-1]


def test_texts_are_cut_as_the_tokenizer_does() -> None:
    (cut,) = encode(TEXTS[:1], Pieces(bos=True, eos=True), max_length=5)
    assert len(cut.ids) == 5
    assert cut.ids[0] == BOS
    assert cut.ids[-1] == EOS


@pytest.mark.parametrize("kind", [Pieces, Slow])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_pair_that_is_cut_keeps_the_labels_of_its_completion(
    kind: type[Pieces], side: str
) -> None:
    tokenizer = kind(bos=True)
    tokenizer.truncation_side = side
    pair = ("lima is old", " people eat sushi")
    (whole,) = encode([pair], tokenizer)
    (cut,) = encode([pair], tokenizer, max_length=len(whole.ids) - 2)
    assert len(cut.ids) == len(whole.ids) - 2
    learned = [token for token in whole.labels if token != -100]
    kept = learned if side == "left" else learned[:-2]
    assert [token for token in cut.labels if token != -100] == kept


def test_batches_are_of_similar_length_and_padded_on_the_right() -> None:
    encoded = encode(TEXTS)
    groups = list(batched(encoded, 2))
    assert sorted(i for inds, _ in groups for i in inds) == list(range(len(TEXTS)))
    lengths = [len(text.ids) for _, texts in groups for text in texts]
    assert lengths == sorted(lengths, reverse=True)
    batch = collate(groups[-1][1], Reader(), torch.device("cpu"), has_mask=True)
    for i, text in enumerate(groups[-1][1]):
        n = len(text.ids)
        assert batch["input_ids"][i, :n].tolist() == list(text.ids)
        assert batch["attention_mask"][i].tolist() == [1] * n + [0] * (
            batch["input_ids"].shape[1] - n
        )
        assert batch["labels"][i, n:].eq(-100).all()
    bare = collate(encoded, Reader(), torch.device("meta"), has_mask=False)
    assert "attention_mask" not in bare
    assert bare["labels"].device.type == "meta"


def test_a_token_at_the_end_that_also_pads_is_learned() -> None:
    """Labels follow the texts' lengths, so padding with the same id changes nothing."""
    tokenizer = Pieces(eos=True)
    tokenizer.pad_token_id = EOS
    encoded = encode(TEXTS, tokenizer)
    batch = collate(encoded, Reader(), torch.device("cpu"), has_mask=True)
    assert (batch["labels"] == EOS).sum().item() == len(TEXTS)


def test_a_model_without_a_mask_is_given_none(tmp_path: Path) -> None:
    class Bare(Reader):
        def forward(self, input_ids: Tensor) -> Any:  # type: ignore[override]
            return super().forward(input_ids)

    found = attribute(tmp_path / "bare", Bare()).explain("go", " on")
    known = attribute(tmp_path / "masked").explain("go", " on")
    np.testing.assert_allclose(found.train_scores, known.train_scores, rtol=1e-4)


# -- what can be wrong ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "match"),
    [
        ([], "texts is empty"),
        ("lima is old", "texts is a str; pass a list"),
        (["lima is old", ""], r"texts\[1\] is empty"),
        (["lima is old", ("lima", "")], r"texts\[1\] has no completion"),
        (["lima is old", "go"], r"texts\[1\] has 1 token, so nothing is predicted"),
        (["go on", 3], r"texts\[1\] is a int; pass a str, or a pair"),
        ([("go", "on", "on")], r"texts\[0\] is a tuple"),
        ([("go", None)], r"texts\[0\] is a tuple"),
        (["go" + 16 * " on"], r"texts\[0\] has 17 tokens, and the model takes 16"),
    ],
)
def test_texts_of_another_kind_are_named(
    texts: Any, match: str, tmp_path: Path, untyped: None
) -> None:
    with pytest.raises(OptionError, match=match):
        attribute(tmp_path, texts=texts)


def test_a_completion_that_is_cut_off_is_named() -> None:
    with pytest.raises(OptionError, match=r"texts\[0\] has no token of its completion"):
        encode([("lima is old", " on")], max_length=3)


@pytest.mark.parametrize("max_length", [0, 1, 17])
def test_a_max_length_that_the_model_does_not_take_is_named(max_length: int) -> None:
    with pytest.raises(OptionError, match="a number of tokens from 2 to 16"):
        encode(TEXTS, max_length=max_length)


def test_a_tokenizer_of_another_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"texts\[0\] has the token .* own tokenizer"):
        attribute(tmp_path, Reader(tokens=10))
    tokenizer = Pieces()
    model = Reader(tokens=len(tokenizer.pieces) - 1)
    with pytest.raises(OptionError, match="prompt with its answer has the token"):
        attribute(tmp_path, model, tokenizer).explain("lima is", "!")


def test_a_source_is_needed(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"texts\[0\] has no source"):
        attribute(tmp_path, Translator())
    with pytest.raises(OptionError, match=r"the target of texts\[0\] has 17 tokens"):
        attribute(tmp_path, Translator(), texts=[("go", "go" + 16 * " on")])

    class Endless(Translator):
        def __init__(self) -> None:
            super().__init__()
            del self.config.decoder_start_token_id

    with pytest.raises(OptionError, match="does not say what its decoder starts with"):
        attribute(tmp_path, Endless(), texts=[("go", "on")]).featurize()


@pytest.mark.parametrize(
    ("query", "match"),
    [
        (
            {"prompt": "lima", "generation": ""},
            "the answer to prompt, '', has no token",
        ),
        ({"prompt": "", "generation": "lima"}, "has no token that the model predicts"),
        ({"prompt": ""}, "prompt has no tokens"),
        ({"prompt": "lima", "num_beams": 2}, "num_beams cannot be chosen"),
        ({"prompt": "go" + 15 * " on"}, "there is no room for an answer"),
        ({"prompt": "go" + 16 * " on"}, "prompt has 17 tokens"),
        (
            {"prompt": "go", "generation": " on" * 16},
            "prompt with its answer has 17 tokens",
        ),
        ({"prompt": "go", "generation": " on", "k": 0}, "k=0"),
        ({"prompt": "go", "max_new_tokens": 0}, "max_new_tokens=0"),
        ({"prompt": []}, "at least one"),
        ({"prompt": ["go"], "generation": " on"}, "generation is a list of as many"),
        (
            {"prompt": ["go"], "generation": [" on", " on"]},
            "generation is a list of as many",
        ),
        (
            {"prompt": ["go"], "generation": [" on"], "span": "on"},
            "span is a list of as many",
        ),
        (
            {"prompt": ["go", "go"], "generation": [" on", " on"], "span": [None, "x"]},
            r"span\[1\]='x' is no part",
        ),
    ],
)
def test_queries_of_another_kind_are_named(
    tmp_path: Path, query: dict[str, Any], match: str
) -> None:
    with pytest.raises(OptionError, match=match):
        attribute(tmp_path).explain(**query)
    assert not list(tmp_path.glob("0/*.mmap*"))  # before anything is computed


def test_a_model_that_says_nothing_is_named(tmp_path: Path) -> None:
    class Silent(Reader):
        def generate(self, input_ids: Tensor, **options: Any) -> Tensor:
            return nn.functional.pad(input_ids, (0, 1), value=EOS)

    with pytest.raises(OptionError, match="the model says nothing to prompt"):
        attribute(tmp_path, Silent()).explain("lima")

    class Mute(Reader):
        generate = None

    with pytest.raises(OptionError, match=r"Mute has no generate\(\)"):
        attribute(tmp_path, Mute()).explain("lima")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"checkpoints": []}, "at least the final weights"),
        ({"checkpoints": Reader().state_dict()}, "no list of state dicts"),
        ({"train_inds": [[0], [1]]}, "2 entries for 1 checkpoints"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_options_that_cannot_work_are_named(
    tmp_path: Path, options: dict[str, Any], match: str, untyped: None
) -> None:
    with pytest.raises(OptionError, match=match):
        attribute(tmp_path, **options)


def test_a_batch_on_another_device_is_named(tmp_path: Path) -> None:
    model = Reader()
    traker = TRAKer(model, "causal_lm", 6, tmp_path, proj_dim=8, logging_level=40)
    traker.load_checkpoint(model.state_dict())
    batch = collate(encode(TEXTS), model, torch.device("meta"), has_mask=True)
    with pytest.raises(BatchError, match="a tensor on meta, the model is on cpu"):
        traker.featurize(batch)


# -- with transformers ----------------------------------------------------------------


@pytest.fixture(scope="module")
def fast() -> Any:
    """A byte-level BPE tokenizer without a padding token, as GPT-2's."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(TEXTS, vocab_size=300, special_tokens=["<eos>"])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made._tokenizer, eos_token="<eos>"
    )


@pytest.mark.slow
def test_with_gpt2(fast: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=len(fast),
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for i, value in enumerate(model.parameters()):
            value.copy_(0.1 * draw(*value.shape, seed=i))
    assert fast.pad_token is None
    one = TextAttributor(
        model, fast, TEXTS, None, tmp_path, proj_dim=64, logging_level=40
    )
    found = one.explain("the capital", max_new_tokens=5, per_token=True)
    assert "".join(found.tokens) == found.generation.rstrip("\ufffd") != ""
    given = one.explain("the capital of japan", " is tokyo ☃", "☃", per_token=True)
    assert "".join(given.tokens).replace(" ", "") in {"☃☃", "☃☃☃", "☃☃☃☃"}
    with pytest.raises(OptionError, match="and the model takes 64"):
        one.explain("the capital " * 50, " is")


@pytest.mark.slow
def test_with_t5(fast: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=len(fast),
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=0,
    )
    model = transformers.T5ForConditionalGeneration(config)
    model.load_state_dict(randomized(model, seed=1))
    names = ["shared.weight", "*.layer.*SelfAttention.q.weight"]
    one = TextAttributor(
        model,
        fast,
        list(zip(TEXTS, TEXTS[::-1], strict=True)),
        None,
        tmp_path,
        proj_dim=64,
        logging_level=40,
        grad_wrt=names,
    )
    found = one.explain(["lima", "go on"], [" is old", None], ["old", None])
    assert found[0].span == " old"
    assert len(found) == 2
