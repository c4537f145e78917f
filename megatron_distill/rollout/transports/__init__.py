"""How new weights get from the trainer to servers; sync.py decides when."""
