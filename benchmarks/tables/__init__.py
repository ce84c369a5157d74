"""Tables of papers, run again: each paper is a file beside this one, with its recipes in the folder of its name."""
