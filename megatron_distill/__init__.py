"""Distil large reasoning models with Megatron-Core: sharded, certified losses and one small file per method."""
