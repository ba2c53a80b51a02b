"""The colours of all pictures. Blues and orange can be told apart with every kind of colour vision."""

DARKEST = "#0b2540"
DARK = "#1f4e79"
MIDDLE = "#5b89b4"
PALE = "#9db9d3"
PALER = "#b8cce0"
PALEST = "#dbe7f1"
ORANGE = "#c07a2c"

TEXT = "#444444"
INK = "#222222"
NEUTRAL = "#f7f7f7"
GRID = "#e4e4e4"
