"""Heads with which a pretrained fusion model is fine-tuned: classify, assign, answer.

The tasks of "Align before fuse: vision and language representation learning with momentum
distillation" (Li et al., NeurIPS 2021), section 5. In every module the pretrained model's
parameters are named "towers."...; `begin` gives what is new its start from them, once they are
loaded, and is not to be called on weights that were fine-tuned already.

Enters: uint8 images, token ids. Leaves: logits, losses of answers. Must not know: the tasks' data,
the weights of answers, DeepSpeed.
"""

import copy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn
from transformers import BertModel
from transformers.models.bert.modeling_bert import BertEncoder, BertPredictionHeadTransform

from pipeline.models.fusion import NO_LABEL, Fusion, Texts, initial_std, may_be_confused

ANSWERS_AT_ONCE = 16  # per question and pass; of ranking, the same count on all workers


class TaskOutputs(NamedTuple):
    """What a head says of a batch, in fp32; what it does not say is None.

    `labels` are of tasks that make their own: classes, or NO_LABEL. `word_logits` are those of
    the words of answers that were given, one answer after the other; `is_word` says how many.
    """

    logits: Float[Tensor, "batch labels"] | None = None
    answer_losses: Float[Tensor, " answers"] | None = None
    labels: Int[Tensor, " batch"] | None = None
    word_logits: Float[Tensor, "words vocab"] | None = None
    is_word: Bool[Tensor, "answers places"] | None = None


class TwoPictures(nn.Module):
    """A second stack of the fusion encoder's layers, with which a text reads a second picture.

    Behind each layer, which attends to the first picture, stands its copy, which attends to the
    second; the two share the projections of keys and values. ALBEF, section 5: NLVR2.
    """

    def __init__(self, encoder: BertEncoder):
        """Copy the encoder's layers; what they share is the same module, by two names."""
        super().__init__()
        self.layer = copy.deepcopy(encoder.layer)
        for attention, shared in zip(_crosses(self.layer), _crosses(encoder.layer), strict=True):
            attention.key, attention.value = shared.key, shared.value

    def begin(self, encoder: BertEncoder) -> None:
        """Copy the encoder's weights once more."""
        self.layer.load_state_dict(encoder.layer.state_dict())

    def fuse(
        self,
        encoder: BertEncoder,
        texts: Texts,
        first: Float[Tensor, "batch patches width"],
        second: Float[Tensor, "batch patches width"],
    ) -> Float[Tensor, "batch length width"]:
        """States of texts that have seen two pictures each, of those pictures' states."""
        mask = texts.is_there[:, None, None, :]
        states = texts.states
        for layer, twin in zip(encoder.layer, self.layer, strict=True):
            states = twin(layer(states, mask, first), mask, second)
        return states


class Classifier(nn.Module):
    """Classes of a text and its picture, or its two pictures: an MLP on the first fused state."""

    def __init__(self, model: Fusion, num_labels: int, pictures: int):
        """`pictures`, 1 or 2, are read with each text."""
        assert pictures in (1, 2), "there is no third stack"
        super().__init__()
        width = model.text_model.config.hidden_size
        self.towers = model
        self.second = TwoPictures(model.fusion_encoder) if pictures == 2 else None
        self.head = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, num_labels)
        ).apply(_init_as_bert)

    def begin(self) -> None:
        """Start the second stack, if any, from the pretrained one."""
        if self.second is not None:
            self.second.begin(self.towers.fusion_encoder)

    def forward(
        self,
        images: UInt8[Tensor, "batch *pictures height width 3"],
        tokens: Int[Tensor, "batch length"],
    ) -> TaskOutputs:
        """Logits, [batch, labels]; of two pictures `images` is [batch, 2, height, width, 3]."""
        texts = self.towers.encode_texts(tokens)
        if self.second is None:
            states = self.towers.fuse(texts, self.towers.encode_images(images))
        else:
            found = self.towers.encode_images(images.flatten(0, 1))
            first, second = found.unflatten(0, (len(tokens), 2)).unbind(1)
            states = self.second.fuse(self.towers.fusion_encoder, texts, first, second)
        return TaskOutputs(self.head(states[:, 0]).float())


class Assigner(nn.Module):
    """Says whether a text is of the first of two pictures, of the second, or of neither.

    Trained on pairs of image and text, before a `Classifier` of two pictures, which takes over all
    but the head: ALBEF's text assignment, section 5: NLVR2.
    """

    def __init__(self, model: Fusion):
        super().__init__()
        self.towers = model
        self.second = TwoPictures(model.fusion_encoder)
        self.assign_head = nn.Linear(model.text_model.config.hidden_size, 3).apply(_init_as_bert)

    def begin(self) -> None:
        """Start the second stack from the pretrained one."""
        self.second.begin(self.towers.fusion_encoder)

    def forward(
        self, images: UInt8[Tensor, "batch height width 3"], tokens: Int[Tensor, "batch length"]
    ) -> TaskOutputs:
        """Logits, [batch, 3], and labels of texts with pictures drawn from the batch."""
        pictures, labels = draw_pictures(tokens)
        found = self.towers.encode_images(images)
        first, second = found[pictures[:, 0]], found[pictures[:, 1]]
        texts = self.towers.encode_texts(tokens)
        states = self.second.fuse(self.towers.fusion_encoder, texts, first, second)
        return TaskOutputs(self.assign_head(states[:, 0]).float(), labels=labels)


def draw_pictures(
    tokens: Int[Tensor, "batch length"],
) -> tuple[Int[Tensor, "batch 2"], Int[Tensor, " batch"]]:
    """Draw two rows for each text, and say which is its own: 0 or 1, 2 for neither, all as often.

    NO_LABEL where another row drawn says the same as the text. Of two rows there is no neither, of
    one no label. The others are the next two on a random tour of the batch, so never the text's own
    nor, of three or more, the same.
    """
    count, device = len(tokens), tokens.device
    tour = torch.randperm(count, device=device)
    own = torch.arange(count, device=device)
    other = torch.empty_like(own).scatter(0, tour, tour.roll(-1))
    another = other[other]
    kinds = torch.randint(3 if count > 2 else 2, (count,), device=device)
    first = torch.where(kinds == 0, own, other)
    second = torch.stack([other, own, another])[kinds, own]
    differs = may_be_confused(tokens)
    is_clear = differs[own, other] & ((kinds != 2) | differs[own, another])
    return torch.stack([first, second], dim=1), torch.where(is_clear, kinds, NO_LABEL)


class Answerer(nn.Module):
    """Answers of a closed list, by how likely a decoder writes them that reads fused questions.

    The decoder is a BERT with causal self-attention, cross-attention over the question's states,
    and a head like that of masked words, with its own embeddings. ALBEF, section 5: VQA.
    """

    answers: Tensor

    def __init__(
        self,
        model: Fusion,
        answers: Int[Tensor, "all_answers places"],
        *,
        layers: int,
        pad: int,
        ranked: int,
    ):
        """`answers` are [start, ..., end, pad...]; of each question `ranked` are weighed."""
        assert bool((answers[:, 0] == answers[0, 0]).all()), "all answers have the same start"
        assert bool((answers[:, 1] != pad).all()), "no answer is empty"
        super().__init__()
        config = copy.deepcopy(model.text_model.config)
        config.num_hidden_layers = layers
        config.is_decoder = config.add_cross_attention = True
        self.towers = model
        self.decoder = BertModel(config, add_pooling_layer=False)
        self.answer_transform = BertPredictionHeadTransform(config).apply(_init_as_bert)
        self.answer_bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.register_buffer("answers", answers.long(), persistent=False)
        if model.text_model.gradient_checkpointing:
            self.decoder.gradient_checkpointing_enable({"use_reentrant": False})
        self._pad = pad
        self._ranked = ranked

    def begin(self) -> None:
        """Start from the pretrained: layers from the fusion encoder's, as many as there are.

        Embeddings from the text model's, the head from that of masked words.
        """
        model, decoder = self.towers, self.decoder
        # Layers beyond the pretrained ones stay random.
        for own, other in zip(decoder.encoder.layer, model.fusion_encoder.layer, strict=False):
            own.load_state_dict(other.state_dict())
        decoder.embeddings.load_state_dict(model.text_model.embeddings.state_dict())
        self.answer_transform.load_state_dict(model.masked_transform.state_dict())
        with torch.no_grad():
            self.answer_bias.copy_(model.masked_bias)

    def forward(
        self,
        images: UInt8[Tensor, "batch height width 3"],
        tokens: Int[Tensor, "batch length"],
        rows: Int[Tensor, " answers"] | None = None,
        targets: Int[Tensor, " answers"] | None = None,
    ) -> TaskOutputs:
        """Losses of the answers `targets`, one or more, to the questions `rows`: -log p.

        Without them logits, [batch, all answers]: log p, without gradients, of the `ranked` whose
        first words are the likeliest (of equals the earlier ones), -inf of the others. log p is
        summed over the words and the end.
        """
        texts = self.towers.encode_texts(tokens)
        states = self.towers.fuse(texts, self.towers.encode_images(images))
        questions = Texts(states, texts.is_there)
        if rows is None or targets is None:
            return TaskOutputs(self._rank(questions))
        return self._losses(questions.take(rows), targets)

    def _losses(self, questions: Texts, targets: Int[Tensor, " answers"]) -> TaskOutputs:
        """-log p of each answer to its question, and the logits of its words."""
        words = self.answers[targets]
        following = words[:, 1:]
        is_word = following != self._pad
        logits = self._next_words(questions, words[:, :-1], is_word)
        losses = F.cross_entropy(logits, following[is_word], reduction="none")
        return TaskOutputs(
            answer_losses=sum_words(losses, is_word), word_logits=logits, is_word=is_word
        )

    def _next_words(
        self,
        questions: Texts,
        words: Int[Tensor, "answers places"],
        wanted: Bool[Tensor, "answers places"],
    ) -> Float[Tensor, "wanted vocab"]:
        """Logits of what follows each wanted place; padding comes last, so needs no mask."""
        states = self.decoder(
            input_ids=words,
            encoder_hidden_states=questions.states,
            encoder_attention_mask=questions.is_there.long(),
            use_cache=False,
        ).last_hidden_state
        states = self.answer_transform(states[wanted])
        embeddings = self.decoder.embeddings.word_embeddings.weight
        # In fp32, under autocast too: bf16 has so few values that answers would tie.
        with torch.autocast(states.device.type, enabled=False):
            return states.float() @ embeddings.float().T + self.answer_bias.float()

    @torch.no_grad()
    def _rank(self, questions: Texts) -> Float[Tensor, "batch all_answers"]:
        """log p of each answer, or -inf; some answers at a time, which bounds memory."""
        chosen = self._likely(questions)
        everyone = torch.arange(len(chosen), device=chosen.device)
        found: list[Tensor] = []
        for some in chosen.split(ANSWERS_AT_ONCE, dim=1):
            rows = everyone.repeat_interleave(some.shape[1])
            losses = self._losses(questions.take(rows), some.flatten()).answer_losses
            assert losses is not None, "it was given answers"
            found.append(-losses.view(some.shape))
        shape = len(chosen), len(self.answers)
        nothing = torch.full(shape, -torch.inf, device=chosen.device)
        return nothing.scatter(1, chosen, torch.cat(found, dim=1))

    def _likely(self, questions: Texts) -> Int[Tensor, "batch ranked"]:
        """The answers whose first words are the likeliest."""
        batch, count = len(questions.states), len(self.answers)
        if self._ranked >= count:
            return torch.arange(count, device=self.answers.device).expand(batch, -1)
        start = self.answers[:1, :1].expand(batch, 1)
        logits = self._next_words(questions, start, torch.ones_like(start, dtype=torch.bool))
        scores = logits[:, self.answers[:, 1]]
        # Stable, where topk may break ties as it likes: many answers share a first word.
        return scores.sort(dim=1, descending=True, stable=True).indices[:, : self._ranked]


def sum_words(
    values: Float[Tensor, " words"], is_word: Bool[Tensor, "answers places"]
) -> Float[Tensor, " answers"]:
    """The sum over each answer's words of what lies one answer after the other."""
    spread = torch.zeros(is_word.shape, device=values.device).masked_scatter(is_word, values)
    return spread.sum(1)


def _crosses(layers: nn.ModuleList) -> list[Any]:
    """Of each layer the part of the cross-attention that projects."""
    found: list[Any] = list(layers)
    return [layer.crossattention.self for layer in found]


def _init_as_bert(part: nn.Module) -> None:
    if isinstance(part, nn.Linear):
        nn.init.normal_(part.weight, std=initial_std(part.in_features))
        nn.init.zeros_(part.bias)
