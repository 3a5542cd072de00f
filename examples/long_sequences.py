"""A recurrent network reads a book from its first character to its last, in chunks that carry its state.

    python examples/long_sequences.py

Backpropagation through the whole book would have to keep every time step for its one backward pass, and its
gradient would be a product of as many factors as the book has characters. `gradkern.truncated_bptt` cuts it
into chunks: the state goes on from one to the next, the gradient does not. Within a chunk it can still
explode, so it is clipped as well. The book is the reference manual that comes with CPython.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradkern
from gradkern.demo import load_text

STREAMS = 32  # places of the book that are read at once
HIDDEN = 128


class Reader(nn.Module):
    """A tanh RNN over characters, `[time, batch]` to scores of the next, `[time, batch, symbols]`."""

    def __init__(self, symbols: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(symbols, 64)
        self.rnn = nn.RNN(64, HIDDEN)
        self.head = nn.Linear(HIDDEN, symbols)
        nn.init.orthogonal_(self.rnn.get_parameter("weight_hh_l0"))

    def forward(self, characters: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scores of the next character at each place, and the state after the last."""
        output, state = self.rnn(self.embed(characters), state)
        return self.head(output), state


def read(model: Reader, optimizer: torch.optim.Optimizer, book: Tensor, steps: int) -> list[float]:
    """Read `book` (`[time, streams]`) once and learn on the way: bits per character of every chunk."""
    bits = []
    chunks = gradkern.truncated_bptt((book[:-1], book[1:]), None, steps)
    for inputs, targets in chunks:
        scores, chunks.state = model(inputs, chunks.state)
        loss = F.cross_entropy(scores.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        gradkern.clip_(model, max_norm=0.25)
        optimizer.step()
        bits.append(loss.item() / math.log(2))
    return bits


def main(arguments: list[str] | None = None) -> list[float]:
    """Read the book several times; returns the bits per character of every chunk."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--readings", type=int, default=3, help="how often to read the book (default: 3)")
    parser.add_argument("--steps", type=int, default=50, help="time steps of a chunk (default: 50)")
    parser.add_argument("--characters", type=int, help="read only the beginning of the book")
    options = parser.parse_args(arguments)
    torch.manual_seed(1)
    text = load_text()
    codes = text.train[: options.characters]
    length = len(codes) // STREAMS
    book = codes[: length * STREAMS].view(STREAMS, length).t().contiguous()
    model = Reader(text.symbols)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    print(f"{STREAMS} streams of {length} characters, in chunks of {options.steps}")
    print(f"guessing: {math.log2(text.symbols):.2f} bits per character")
    bits: list[float] = []
    for reading in range(1, options.readings + 1):
        latest = read(model, optimizer, book, options.steps)
        tail = latest[len(latest) // 2 :]
        print(f"reading {reading}: {sum(tail) / len(tail):.2f} bits per character in its second half")
        bits += latest
    return bits


if __name__ == "__main__":
    torch.set_num_threads(1)  # for so small a network a second one mostly waits
    main()
