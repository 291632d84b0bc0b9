"""Palette: the colours of the page and of its pictures, and what they stand for."""

# Names of colours: light, dark.  Hues are Okabe and Ito's, which colour-blind readers tell apart.
PALETTE = {
    "page": ("#fefefe", "#14171b"),
    "ink": ("#1c2127", "#e4e7ea"),
    "soft": ("#5a636e", "#9ba5b0"),
    "line": ("#d8dde3", "#363d45"),
    "blue": ("#0072b2", "#3089c8"),
    "sky": ("#7fbfe6", "#8ac4e8"),
    "pale": ("#b7c9d8", "#5c7489"),
    "orange": ("#e69f00", "#e8ab2c"),
    "green": ("#009e73", "#27b08a"),
    "pink": ("#cc79a7", "#d48db3"),
    "red": ("#d55e00", "#ee7d33"),
    "grey": ("#a3abb4", "#737c86"),
}

# Kinds of buffers from the bottom of the stack to its top: words, colour.
KINDS = {
    "weight": ("trained weights", "blue"),
    "optimizer": ("optimiser state", "sky"),
    "accumulator": ("accumulated gradients", "pale"),
    "saved": ("saved for backward", "orange"),
    "activation": ("activations", "green"),
    "gradient": ("gradients", "pink"),
    "workspace": ("workspace", "grey"),
}
STATUS = {"trained": "blue", "passes gradient": "orange", "frozen": "grey"}
SERIES = ("blue", "red", "green", "pink", "orange", "sky", "grey", "ink")
