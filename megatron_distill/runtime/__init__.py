"""Process groups, device, precision, and every difference between CPU and GPU."""
