"""Who supervises the student; a part is a file, `teachers.<name>.kind` is its name."""
