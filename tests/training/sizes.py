"""The model that the shipped configs are written for."""

from prmkit.training.model import Model

# Qwen2.5-7B-Instruct, from its config.json.
LINEAR = [(3584, 3584), (512, 3584), (512, 3584), (3584, 3584), (18944, 3584), (18944, 3584), (3584, 18944)]
NAMES = [
    f"model.layers.{n}.{part}_proj.weight" for n in range(28) for part in ("q", "k", "v", "o", "gate", "up", "down")
]
QWEN_7B = Model(28, 3584, 18944, 3584, 512, 28, 152064, tuple(LINEAR * 28), tuple(NAMES), 2 * 152064 * 3584, 7615616512)
