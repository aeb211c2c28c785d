"""What the library does through other people's: each module is imported by whoever asks for it."""
