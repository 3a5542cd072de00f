"""Names and shapes of the parameters that the rows are measured on."""

from __future__ import annotations

Shapes = dict[str, tuple[int, ...]]


def gpt2_small() -> Shapes:
    """GPT-2 small: 148 tensors, 124 M elements."""
    return gpt(width=768, blocks=12, vocabulary=50257, context=1024)


def gpt(width: int, blocks: int, vocabulary: int, context: int) -> Shapes:
    """A transformer built like GPT-2; the output layer is the embedding."""
    shapes: Shapes = {"wte.weight": (vocabulary, width), "wpe.weight": (context, width)}
    for block in range(blocks):
        for name, shape in {
            "ln_1": (width,),
            "attn.c_attn": (width, 3 * width),
            "attn.c_proj": (width, width),
            "ln_2": (width,),
            "mlp.c_fc": (width, 4 * width),
            "mlp.c_proj": (4 * width, width),
        }.items():
            shapes[f"h.{block}.{name}.weight"] = shape
            shapes[f"h.{block}.{name}.bias"] = shape[-1:]
    return shapes | {"ln_f.weight": (width,), "ln_f.bias": (width,)}


def resnet() -> Shapes:
    """The convolutions of a ResNet-56 for small images, 1.5 times as wide: 162 tensors, 2 M elements."""
    shapes: Shapes = {}
    for stage, channels in enumerate((24, 48, 96)):
        for layer in range(18):
            name = f"stage{stage}.{layer}"
            shapes[f"{name}.conv.weight"] = (channels, channels, 3, 3)
            shapes[f"{name}.norm.weight"] = shapes[f"{name}.norm.bias"] = (channels,)
    return shapes


def perceptron() -> Shapes:
    """Ten layers of 256 units: 20 tensors, 0.66 M elements."""
    shapes: Shapes = {}
    for layer in range(10):
        shapes |= {f"{layer}.weight": (256, 256), f"{layer}.bias": (256,)}
    return shapes


def many_small(tensors: int = 2000) -> Shapes:
    """Tensors of 64 elements, 0.13 M in all of 2000: the calls cost more than the elements."""
    return {f"layer{index}.scale": (64,) for index in range(tensors)}


def one(numel: int) -> Shapes:
    """A single tensor."""
    return {"weight": (numel,)}


def shrunk(shapes: Shapes) -> Shapes:
    """The first 30 tensors with every dimension cut to 5 at most, for tests."""
    return {name: tuple(min(size, 5) for size in shape) for name, shape in list(shapes.items())[:30]}
