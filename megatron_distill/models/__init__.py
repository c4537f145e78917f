"""The student: a Megatron GPT, its schedule and optimizer, its checkpoints and its Hugging Face name."""
