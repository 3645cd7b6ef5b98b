"""AWD-LSTM (Merity, Keskar & Socher, 'Regularizing and Optimizing LSTM Language Models', ICLR 2018; arXiv 1708.02182) as a
transformers model: `AwdLstmConfig` and `AwdLstmForCausalLM`, model type `awd_lstm`. Importing this file makes it known to
`AutoConfig` and `AutoModelForCausalLM`; a saved model carries the file along, so that it loads with `trust_remote_code=True`
where this package is not installed. This file therefore needs nothing but torch and transformers.

    w_1 .. w_T -> embedding -> locked dropout -> LSTM 1 -> locked dropout -> ... -> LSTM L -> locked dropout -> decoder -> logits

In training, with probabilities from the configuration and one draw a forward pass (the mask is the same at every time step):

    embedding_dropout   whole words: rows of the embedding matrix
    input_dropout, hidden_dropout, output_dropout   locked ("variational") dropout of each sample's units: after the embedding,
                        between layers, after the last layer
    weight_drop         DropConnect: elements of each layer's hidden-to-hidden matrix
    loss = cross-entropy + ar_alpha * mean(m*h ^ 2) + tar_beta * mean((h_t - h_{t-1})^2)

with h the last layer's output and m*h the same after its dropout. In evaluation there is none of this and the loss is the
cross-entropy alone, in nats per token.

The four gates of a layer (input, forget, cell, output, in torch's order) are stacked in one matrix, `weight_ih` of shape
(4 * hidden, inputs) and `weight_hh` of shape (4 * hidden, hidden). A random v0 (eq. 11) takes its fans from these matrices as
they are stored: fan_in = the columns, fan_out = 4 * hidden.

The state, one (h, c) per layer, goes in and comes out as `state`; nothing is kept in the model. It does not generate text.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, initialization as init
from transformers.utils import ModelOutput

State = tuple[tuple[torch.Tensor, torch.Tensor], ...]  # (h, c) of each layer, each (samples, units of the layer)

EMBEDDING_RANGE = 0.1  # embeddings start uniform in +-0.1, as in the paper


class AwdLstmConfig(PreTrainedConfig):
    """Sizes and regularisers; the defaults are the paper's for the Penn Treebank, with 2 layers instead of 3.

    Args:
        vocab_size: words.
        embedding_size: units of the embedding, and of the last layer where the output matrix is tied to the embedding.
        hidden_size: units of the other layers.
        num_layers: LSTM layers, 1 or more.
        embedding_dropout, input_dropout, hidden_dropout, output_dropout, weight_drop: probabilities, see the top of the file.
        ar_alpha, tar_beta: weights of the activation and temporal activation regularisers, 0 or more.
        tie_word_embeddings: whether the output matrix is the embedding matrix.
    """

    model_type = "awd_lstm"
    keys_to_ignore_at_inference = ["state"]  # noqa: RUF012

    def __init__(
        self,
        vocab_size: int = 10000,
        embedding_size: int = 400,
        hidden_size: int = 1150,
        num_layers: int = 2,
        embedding_dropout: float = 0.1,
        input_dropout: float = 0.4,
        hidden_dropout: float = 0.25,
        output_dropout: float = 0.4,
        weight_drop: float = 0.5,
        ar_alpha: float = 2.0,
        tar_beta: float = 1.0,
        tie_word_embeddings: bool = True,
        **kwargs,
    ) -> None:
        self.vocab_size = vocab_size
        self.embedding_size, self.hidden_size, self.num_layers = embedding_size, hidden_size, num_layers
        self.embedding_dropout, self.input_dropout = embedding_dropout, input_dropout
        self.hidden_dropout, self.output_dropout, self.weight_drop = hidden_dropout, output_dropout, weight_drop
        self.ar_alpha, self.tar_beta = ar_alpha, tar_beta
        super().__init__(**kwargs | {"tie_word_embeddings": tie_word_embeddings})
        self.tie_word_embeddings = tie_word_embeddings

    def list_layer_sizes(self) -> list[int]:
        """Units of each layer; the last one's are the embedding's where input and output matrix are tied."""
        last = self.embedding_size if self.tie_word_embeddings else self.hidden_size
        return [self.hidden_size] * (self.num_layers - 1) + [last]


@dataclass
class AwdLstmOutput(ModelOutput):
    """Args:
    loss: scalar, in nats per token; in training with the regularisers. Only with labels.
    logits: (samples, positions, vocabulary); position i forecasts the token after i.
    state: (h, c) of each layer after the last token, each (samples, units).
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    state: State | None = None


def draw_locked_mask(like: torch.Tensor, probability: float) -> torch.Tensor:
    """Draw a dropout mask that is the same at all positions: (samples, 1, units) of 0 and 1 / (1 - probability)."""
    return like.new_empty(like.shape[0], 1, like.shape[2]).bernoulli_(1 - probability).div_(1 - probability)


class AwdLstmLayer(nn.Module):
    """One LSTM layer whose hidden-to-hidden matrix is thinned out anew in every training pass (DropConnect)."""

    def __init__(self, input_size: int, hidden_size: int, weight_drop: float) -> None:
        super().__init__()
        self.hidden_size, self.weight_drop = hidden_size, weight_drop
        self.weight_ih = nn.Parameter(torch.empty(4 * hidden_size, input_size))
        self.weight_hh = nn.Parameter(torch.empty(4 * hidden_size, hidden_size))
        self.bias_ih = nn.Parameter(torch.empty(4 * hidden_size))
        self.bias_hh = nn.Parameter(torch.empty(4 * hidden_size))

    def forward(
        self, inputs: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Run over (samples, positions, inputs); return the outputs, (samples, positions, units), and the state after them."""
        weight_hh = functional.dropout(self.weight_hh, self.weight_drop, self.training)
        keeps = torch.is_grad_enabled()  # what a backward pass needs, in evaluation mode too
        weights = (self.weight_ih, weight_hh, self.bias_ih, self.bias_hh)
        before = tuple(part.to(inputs.dtype).unsqueeze(0).contiguous() for part in state)
        outputs, *after = torch.lstm(inputs, before, weights, True, 1, 0.0, keeps, False, True)
        return outputs, tuple(part.squeeze(0) for part in after)


class AwdLstmForCausalLM(PreTrainedModel):
    """The language model; see the top of the file."""

    config_class = AwdLstmConfig
    base_model_prefix = ""
    _input_embed_layer = "embedding"
    accepts_loss_kwargs = True  # the loss is divided by `num_items_in_batch`: accumulated batches weigh by their tokens
    _tied_weights_keys = {"decoder.weight": "embedding.weight"}  # noqa: RUF012
    _no_split_modules = ["AwdLstmLayer"]  # noqa: RUF012

    def __init__(self, config: AwdLstmConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_size)
        sizes = config.list_layer_sizes()
        self.layers = nn.ModuleList(
            AwdLstmLayer(inputs, units, config.weight_drop)
            for inputs, units in zip([config.embedding_size, *sizes], sizes, strict=False)
        )
        self.decoder = nn.Linear(sizes[-1], config.vocab_size)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        """The decoder, as transformers asks for it."""
        return self.decoder

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace the decoder."""
        self.decoder = value

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Embedding and decoder uniform in +-0.1, LSTM weights and biases in +-1/sqrt(units), decoder bias 0."""
        if isinstance(module, nn.Embedding):
            init.uniform_(module.weight, -EMBEDDING_RANGE, EMBEDDING_RANGE)
        elif isinstance(module, nn.Linear):
            init.uniform_(module.weight, -EMBEDDING_RANGE, EMBEDDING_RANGE)
            init.zeros_(module.bias)
        elif isinstance(module, AwdLstmLayer):
            bound = module.hidden_size**-0.5
            for parameter in module.parameters():
                init.uniform_(parameter, -bound, bound)

    def make_zero_state(self, num_samples: int) -> State:
        """Make the state before a text: zeros, on the model's device and in its dtype."""
        options = {"dtype": self.dtype, "device": self.device}
        return tuple(
            (torch.zeros(num_samples, size, **options), torch.zeros(num_samples, size, **options))
            for size in self.config.list_layer_sizes()
        )

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        state: State | None = None,
        labels: torch.Tensor | None = None,
        shift_labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> AwdLstmOutput | tuple:
        """Forecast each next token.

        Args:
            input_ids: (samples, positions).
            attention_mask: 0 where a position at the right is padding, which the regularisers then leave out.
            state: what an earlier call returned, of as many samples; default: zeros. It is not changed.
            labels: (samples, positions), the tokens of the input; shifted by one here. -100: no target.
            shift_labels: the same, shifted already; they win over `labels`.
            num_items_in_batch: what the loss is divided by instead of the targets in this batch, the regularisers being weighed by
                this batch's share of it.
            kwargs: ignored, as transformers' models do.
        """
        hidden, after = self._drop(self._embed(input_ids), self.config.input_dropout), []
        state = self.make_zero_state(len(hidden)) if state is None else state
        for index, layer in enumerate(self.layers):
            if index > 0:
                hidden = self._drop(hidden, self.config.hidden_dropout)
            hidden, layer_state = layer(hidden, state[index])
            after.append(layer_state)
        dropped = self._drop(hidden, self.config.output_dropout)
        logits, loss = self.decoder(dropped), None
        if shift_labels is None and labels is not None:
            shift_labels = functional.pad(labels[:, 1:], (0, 1), value=-100)
        if shift_labels is not None:
            num_here = (shift_labels != -100).sum()
            num_items = num_here if num_items_in_batch is None else num_items_in_batch
            total = functional.cross_entropy(logits.float().flatten(0, 1), shift_labels.flatten(), reduction="sum")
            loss = total / num_items
            if self.training:
                regularisers = self._compute_regularisers(hidden.float(), dropped.float(), attention_mask)
                loss = loss + regularisers * (num_here / num_items)
        result = AwdLstmOutput(loss=loss, logits=logits, state=tuple(after))
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return result if return_dict else result.to_tuple()

    def _embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        embedded = self.embedding(input_ids)
        probability = self.config.embedding_dropout
        if self.training and probability > 0:
            # A word is dropped everywhere in the batch; multiplying what was looked up spares a copy of the whole matrix.
            kept = embedded.new_empty(self.embedding.num_embeddings, 1).bernoulli_(1 - probability)
            embedded = embedded * kept.div_(1 - probability)[input_ids]
        return embedded

    def _drop(self, values: torch.Tensor, probability: float) -> torch.Tensor:
        return values * draw_locked_mask(values, probability) if self.training and probability > 0 else values

    def _compute_regularisers(self, outputs: torch.Tensor, dropped: torch.Tensor, mask) -> torch.Tensor:
        """ar_alpha * mean(dropped^2) + tar_beta * mean(change of outputs^2), means over positions that are no padding."""
        activation = _compute_mean(dropped.square().mean(dim=2), mask)
        change = (outputs[:, 1:] - outputs[:, :-1]).square().mean(dim=2)
        change = _compute_mean(change, None if mask is None else mask[:, 1:])
        return self.config.ar_alpha * activation + self.config.tar_beta * change


def _compute_mean(values: torch.Tensor, counts: torch.Tensor | None) -> torch.Tensor:
    """The mean of the values that count (None: all), 0 if there are none."""
    if counts is None:
        return values.sum() / max(values.numel(), 1)
    return (values * counts).sum() / counts.sum().clamp(min=1)


AwdLstmConfig.register_for_auto_class()
AwdLstmForCausalLM.register_for_auto_class("AutoModelForCausalLM")
AutoConfig.register("awd_lstm", AwdLstmConfig, exist_ok=True)
AutoModelForCausalLM.register(AwdLstmConfig, AwdLstmForCausalLM, exist_ok=True)
