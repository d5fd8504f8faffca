"""The model and the words that more than one benchmark uses."""

# https://huggingface.co/Qwen/Qwen2.5-7B-Instruct/blob/main/config.json
QWEN_7B = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768, "rope_theta": 1e6,
    "tie_word_embeddings": False,
}  # fmt: skip

WORDS = (
    "agent", "searched", "result", "page", "table", "answer", "evidence", "step", "tool", "call", "returned", "season",
)  # fmt: skip
"""What made-up prompts consist of."""
