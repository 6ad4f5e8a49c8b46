"""The chat in the terminal: loop, drawing, conversation and interrupts. It knows no model."""
