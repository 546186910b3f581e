"""From prompts and training texts to explanations, by a TRAKer."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from jaxtyping import Float32

from trak._checkpoints import load_weights
from trak._types import Weights
from trak.errors import OptionError
from trak.modelout_functions._inputs import forward_parameters
from trak.text._answers import Answer, read_answer, select
from trak.text._encoding import Encoded, Text, batched, collate, encode_texts
from trak.text._explanation import Explanation, rank
from trak.text._generation import generate
from trak.text._tokenizing import Tokenizer, Tokenizing
from trak.traker import TRAKer


class TextAttributor:
    """Finds the training texts that made a language model say something.

    Texts are tokenized, put in batches of similar length, padded on the right and
    featurized by a :class:`trak.TRAKer` when they are first needed; a store that has them
    is gone on with.

    Args:
        model: A decoder or an encoder-decoder of ``transformers``, or a model that is
            called as these are. Checkpoints are loaded into it, and it is left in
            evaluation mode.
        tokenizer: Its tokenizer. It needs no padding token. One that is fast tells
            exactly where a prompt ends.
        texts: What the model was trained on: whole texts, all of whose tokens were
            learned, or pairs of a prompt and a completion, as they were joined, of which
            only the completion was. Of an encoder-decoder model, pairs of a source and a
            target.
        checkpoints: State dicts, the final one last. Any sequence will do. None for the
            weights that the model has.
        save_dir: Directory of the store.
        task: As of :class:`trak.TRAKer`; None for ``"seq2seq_lm"`` if
            ``model.config.is_encoder_decoder``, else ``"causal_lm"``.
        batch_size: How many texts are computed at a time.
        max_length: Tokens after which training texts are cut, as they were in training;
            None to refuse texts that are longer than the model takes.
        add_special_tokens: Whether the tokenizer adds its special tokens; no, for texts
            that have them, such as those of a chat template.
        train_inds: Of each checkpoint, the texts that it was trained on, as in
            :meth:`trak.TRAKer.load_checkpoint`; None if that is not known.
        **options: Those of :class:`trak.TRAKer`.

    Attributes:
        traker: What computes, for all that is not here.
        texts: The constructor's.

    Raises:
        OptionError: If a text is empty, too long or has no token to predict, the
            tokenizer is another model's, or an argument cannot work.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: Tokenizer,
        texts: Sequence[Text],
        checkpoints: Sequence[Weights] | None = None,
        save_dir: str | Path = "./trak_results",
        *,
        task: Any = None,
        batch_size: int = 8,
        max_length: int | None = None,
        add_special_tokens: bool = True,
        train_inds: Sequence[Any] | None = None,
        **options: Any,
    ) -> None:
        config = getattr(model, "config", None)
        self._is_seq2seq = bool(getattr(config, "is_encoder_decoder", False))
        if checkpoints is None:
            checkpoints = [model.state_dict()]
        if isinstance(checkpoints, dict) or not len(checkpoints):
            raise OptionError(
                "checkpoints is no list of state dicts, or an empty one; pass at least the "
                "final weights, [model.state_dict()], or None for those the model has."
            )
        if train_inds is not None and len(train_inds) != len(checkpoints):
            raise OptionError(
                f"train_inds has {len(train_inds)} entries for {len(checkpoints)} "
                f"checkpoints; pass what each was trained on."
            )
        if batch_size < 1:
            raise OptionError(f"batch_size={batch_size}; pass a number from 1 on.")
        self._model, self._batch_size = model, batch_size
        self._tokenizer, self._checkpoints = tokenizer, _owned(checkpoints, model)
        self._tokenizing = Tokenizing(
            model,
            tokenizer,
            max_length=max_length,
            add_special_tokens=add_special_tokens,
        )
        self.texts = texts
        self._encoded = encode_texts(
            self._tokenizing, texts, is_seq2seq=self._is_seq2seq
        )
        self._train_inds, self._is_ready = train_inds, False
        if task is None:
            task = "seq2seq_lm" if self._is_seq2seq else "causal_lm"
        self.traker = TRAKer(model, task, len(texts), save_dir, **options)

    def featurize(self) -> None:
        """Compute the features of the training texts, if that was not done.

        :meth:`explain` does it when it has to.

        Raises:
            StoreError: If the store has other texts, or another model.
        """
        if self._is_ready:
            return
        for model_id, checkpoint in enumerate(self._checkpoints):
            known = None if self._train_inds is None else self._train_inds[model_id]
            self.traker.load_checkpoint(checkpoint, model_id, train_inds=known)
            for inds, texts in batched(self._encoded, self._batch_size):
                self.traker.featurize(self._collate(texts), inds=inds)
        self.traker.finalize_features(range(len(self._checkpoints)))
        self._is_ready = True

    @overload
    def explain(
        self,
        prompt: str,
        generation: str | None = None,
        span: str | tuple[int, int] | None = None,
        k: int = 10,
        *,
        per_token: bool = False,
        max_new_tokens: int = 64,
        **generate_options: Any,
    ) -> Explanation: ...

    @overload
    def explain(
        self,
        prompt: list[str],
        generation: list[str | None] | None = None,
        span: list[str | tuple[int, int] | None] | None = None,
        k: int = 10,
        *,
        per_token: bool = False,
        max_new_tokens: int = 64,
        **generate_options: Any,
    ) -> list[Explanation]: ...

    def explain(
        self,
        prompt: str | list[str],
        generation: Any = None,
        span: Any = None,
        k: int = 10,
        *,
        per_token: bool = False,
        max_new_tokens: int = 64,
        **generate_options: Any,
    ) -> Explanation | list[Explanation]:
        """Find the training texts that made the model say something.

        Args:
            prompt: The prompt, or the source of an encoder-decoder model. With a list,
                whose other arguments are lists too, all queries share a pass.
            generation: What is to be explained, joined to the prompt as it is, so often
                with a space at its beginning. None for what the model says with the last
                checkpoint, choosing the likeliest token each time.
            span: The part to explain, a string that occurs once in it or a pair (start,
                end) of characters; a token that is partly in it is explained as a whole.
                None for all, but special tokens at the end.
            k: How many training texts to rank, at most as many as there are.
            per_token: Whether to give every token scores of its own.
            max_new_tokens: The most tokens that the model says.
            **generate_options: Further options of ``model.generate``.

        Returns:
            The explanation, or a list of them. A score is that of the mean of the
            tokens' log-odds, or of their sum if the task's ``reduction`` says so.

        Raises:
            OptionError: If an argument cannot work, there is nothing to explain, or the
                prompt and the answer are longer than the model takes.
        """
        if k < 1:
            raise OptionError(
                f"k={k}; pass how many training texts to rank, from 1 on."
            )
        if isinstance(prompt, str):
            queries = [("prompt", prompt, generation, "span", span)]
        else:
            queries = _zipped(prompt, generation, span)
        if max_new_tokens < 1:
            raise OptionError(
                f"max_new_tokens={max_new_tokens}; pass the most that the model says, from "
                f"1 on, or generation, what it said."
            )
        generate_options["max_new_tokens"] = max_new_tokens
        if any(said is None for _, _, said, _, _ in queries):
            load_weights(self._model, self._checkpoints[-1])
        answers = []
        for name, text, said, span_name, part in queries:
            answer = self._answer(name, text, said, generate_options)
            answers.append(select(span_name, answer, part))
        scores = self._scores(answers, per_token=per_token)
        found = [
            self._explanation(answer, one, k)
            for answer, one in zip(answers, scores, strict=True)
        ]
        return found[0] if isinstance(prompt, str) else found

    def _answer(
        self, name: str, prompt: str, said: str | None, options: dict[str, Any]
    ) -> Answer:
        answer: str | list[int]
        if said is not None:
            answer = said
        else:
            ids = self._tokenizing.prompt(prompt)
            self._tokenizing.check(name, ids)
            answer = generate(
                self._model,
                self._tokenizer,
                name,
                ids,
                self._tokenizing.limit,
                options,
            )
        return read_answer(
            self._tokenizing, name, prompt, answer, is_seq2seq=self._is_seq2seq
        )

    def _scores(
        self, answers: list[Answer], *, per_token: bool
    ) -> list[Float32[np.ndarray, "n t"]]:
        """Score all answers, each token of them too if that is wanted."""
        targets: list[Encoded] = []
        starts = []
        for answer in answers:
            starts.append(len(targets))
            targets.append(answer.whole.labelled(answer.places))
            if per_token:
                targets += [answer.whole.labelled([place]) for place in answer.places]
        self.featurize()
        exp_name = _name(targets)
        ids = range(len(self._checkpoints))
        for model_id, checkpoint in zip(ids, self._checkpoints, strict=True):
            self.traker.start_scoring_checkpoint(
                exp_name, checkpoint, model_id, len(targets)
            )
            for inds, chosen in batched(targets, self._batch_size):
                self.traker.score(self._collate(chosen), inds=inds)
        scores = np.asarray(self.traker.finalize_scores(exp_name, ids))
        return np.split(scores, starts[1:], axis=1)

    def _explanation(
        self, answer: Answer, scores: Float32[np.ndarray, "n t"], k: int
    ) -> Explanation:
        whole = scores[:, 0].copy()
        low, high = answer.spans[0][0], answer.spans[-1][1]
        return Explanation(
            answer.prompt,
            answer.text,
            answer.text[low:high],
            tuple(answer.tokens()),
            rank(self.texts, whole, k, largest=True),
            rank(self.texts, whole, k, largest=False),
            whole,
            scores[:, 1:].copy() if scores.shape[1] > 1 else None,
        )

    def _collate(self, texts: list[Encoded]) -> dict[str, torch.Tensor]:
        parameters = forward_parameters(self._model)
        has_mask = "attention_mask" in parameters or any(
            value.kind is value.VAR_KEYWORD for value in parameters.values()
        )
        device = torch.device(self.traker.device)
        return collate(texts, self._model, device, has_mask=has_mask)


def _owned(checkpoints: Sequence[Weights], model: torch.nn.Module) -> Sequence[Weights]:
    """Copy checkpoints that are the model's own tensors: loading others changes those."""
    if not isinstance(checkpoints, list | tuple):
        return checkpoints
    own = {value.data_ptr() for value in model.parameters()}
    return [
        copy.deepcopy(one)
        if any(torch.is_tensor(v) and v.data_ptr() in own for v in one.values())
        else one
        for one in checkpoints
    ]


def _zipped(
    prompts: object, generations: object, spans: object
) -> list[tuple[str, str, Any, str, Any]]:
    """Bring the arguments of several queries together."""
    if not isinstance(prompts, list | tuple) or not prompts:
        raise OptionError(
            f"prompt={prompts!r}; pass a prompt, or a list of at least one."
        )
    several: list[Iterable[Any]] = []
    for name, given in (("generation", generations), ("span", spans)):
        if given is None:
            given = [None] * len(prompts)
        if not isinstance(given, list) or len(given) != len(prompts):
            raise OptionError(
                f"prompt is a list of {len(prompts)}, so {name} is a list of as many, or "
                f"None; got {given!r}."
            )
        several.append(given)
    return [
        (f"prompt[{i}]", prompt, said, f"span[{i}]", span)
        for i, (prompt, said, span) in enumerate(zip(prompts, *several, strict=True))
    ]


def _name(targets: Sequence[Encoded]) -> str:
    """Name an experiment after its targets, so that asking again costs nothing."""
    content = repr([(text.ids, text.labels, text.target) for text in targets])
    return f"text-{hashlib.blake2b(content.encode(), digest_size=12).hexdigest()}"
