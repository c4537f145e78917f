"""Starting what a run needs around it. Imports the package; nothing in the package imports this."""
