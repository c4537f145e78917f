"""The methods, one file each: token arithmetic that knows nothing of Megatron, engines, packing or clusters."""
